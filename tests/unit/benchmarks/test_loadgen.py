"""The load generator replays what it is given and records what happened (skipped where it cannot be built)."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness import BenchmarkError
from benchmarks.load import RECORD, build_loadgen, parse_load
from benchmarks.servers import free_port

CONNECT_TIMEOUT_S = 5.0


@pytest.fixture(scope="module")
def loadgen() -> Path:
    try:
        return build_loadgen()
    except BenchmarkError as error:
        pytest.skip(str(error))


@pytest.fixture
def server(loadgen: Path) -> Iterator[str]:
    """The fixed-answer server that comes with the generator."""
    port = free_port()
    process = subprocess.Popen([str(loadgen.parent / "nullserver"), str(port)])
    try:
        end = time.monotonic() + CONNECT_TIMEOUT_S
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert time.monotonic() < end, "the null server does not listen"
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("binary", [True, False])
def test_recorded_arrivals_are_replayed(loadgen: Path, server: str, tmp_path: Path, binary: bool) -> None:
    """Every arrival up to the end of the window becomes one record at its own time; counts agree with the summary."""
    times = np.cumsum(np.random.default_rng(3).exponential(1e-3, 500))
    trace = tmp_path / ("a.f64" if binary else "a.txt")
    if binary:
        times.tofile(trace)
    else:
        np.savetxt(trace, times)
    command = [str(loadgen), "--url", server, "--model", "m", "--input", "x:FP32:1,16", "--arrivals", str(trace)]
    command += ["--records", str(tmp_path / "r"), "--warmup", "0.1", "--duration", "0.2", "--drain", "2"]
    done = subprocess.run([*command, "--rows", "1:3,4:1"], capture_output=True, text=True, check=True)
    load = parse_load(json.loads(done.stdout))
    records = np.fromfile(tmp_path / "r", dtype=RECORD)
    sent = times[times < 0.3 - 1e-9]
    assert len(records) == len(sent)
    assert np.array_equal(records["index"], np.arange(len(sent)))
    assert np.abs(records["intended_ns"] - sent * 1e9).max() <= 2
    assert (records["status"] == 0).all()
    assert (records["latency_ns"] > 0).all()
    assert (records["latency_ns"] >= records["lag_ns"]).all()
    assert set(records["rows"].tolist()) == {1, 4}
    assert load.sent == load.ok == int((sent >= 0.1).sum())


def test_arrivals_that_go_back_in_time_are_refused(loadgen: Path, tmp_path: Path) -> None:
    """A trace that does not ascend is an error that says so, before anything is sent."""
    trace = tmp_path / "a.txt"
    trace.write_text("0.2\n0.1\n")
    command = [str(loadgen), "--url", "127.0.0.1:9", "--model", "m", "--input", "x:FP32:1", "--arrivals", str(trace)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "must ascend" in done.stderr
