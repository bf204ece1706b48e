"""A bare ONNX Runtime session, timed alone: the most any server on it can reach.

Run as a process of its own (`python -m benchmarks.bare_session MODEL --rows 1,2,4`), pinned to the core the server
will have, with one thread and default graph optimisation, it prints one JSON object:

    {"rows": [1, 2, ...], "median_ms": [...], "mean_ms": [...], "cpu_ms": [...]}

`median_ms` is the latency of one run (the hardware table); rows per second over a window is `rows / mean_ms`.

With `--again` it keeps the session and prints another line for every line it reads: how fast the machine is right now
(`Pace`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.harness import ROOT, BenchmarkError
from benchmarks.servers import pinned

# Sizes between which latency is interpolated: all small ones, where it is steepest, then about a quarter apart.
SWEEP = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)


@dataclass(frozen=True, slots=True)
class SessionTimes:
    """Times of one run per batch size, in milliseconds, as plain lists that go into a report."""

    rows: list[int]
    median_ms: list[float]
    mean_ms: list[float]
    cpu_ms: list[float]

    def best(self) -> tuple[int, float]:
        """The batch size with the most rows per second, and that rate."""
        rates = [1e3 * rows / mean for rows, mean in zip(self.rows, self.mean_ms, strict=True)]
        index = int(np.argmax(rates))
        return self.rows[index], rates[index]

    def table_s(self) -> npt.NDArray[np.float64]:
        """Latency in seconds of 1, 2, ... max rows: medians, interpolated between sizes, made non-decreasing.

        A larger batch that measured faster than a smaller one is noise, or a better kernel: either way the smaller
        batch could have been padded up to it, so the running minimum from the right is what the hardware can do.
        """
        every = np.arange(1, self.rows[-1] + 1)
        table = np.interp(every, self.rows, self.median_ms) / 1e3
        return np.minimum.accumulate(table[::-1])[::-1]


def measure(model: Path, core: int, rows: Sequence[int], seconds: float, device: str = "cpu") -> SessionTimes:
    """Time a bare session in a process pinned to `core`, about `seconds` per batch size."""
    command = [sys.executable, "-m", "benchmarks.bare_session", str(model), "--seconds", str(seconds)]
    command += ["--device", device, "--rows", ",".join(map(str, rows))]
    done = subprocess.run(pinned(core, command), capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise BenchmarkError(f"bare session of {model.name} failed: {done.stderr[-1500:]}")
    return SessionTimes(**json.loads(done.stdout))


class Pace:
    """A bare session kept at hand on `core`, to ask again and again how fast the machine is."""

    def __init__(self, model: Path, core: int, rows: Sequence[int], seconds: float, device: str = "cpu") -> None:
        command = [sys.executable, "-m", "benchmarks.bare_session", str(model), "--seconds", str(seconds), "--again"]
        command += ["--device", device, "--rows", ",".join(map(str, rows))]
        self._process = subprocess.Popen(
            pinned(core, command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    def __enter__(self) -> Pace:
        self.times()  # the first is cold
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    def times(self) -> SessionTimes:
        """Time it now. Raises `BenchmarkError` when it has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise BenchmarkError("the bare session that tells the machine's pace has ended")
        return SessionTimes(**json.loads(line))


def slowness(times: SessionTimes, table_s: npt.NDArray[np.float64]) -> float:
    """How many times longer runs take than `table_s` says: the geometric mean over the sizes timed."""
    ratios = [ms / 1e3 / float(table_s[rows - 1]) for rows, ms in zip(times.rows, times.median_ms, strict=True)]
    return float(np.exp(np.mean(np.log(ratios))))


def _open(model: str, device: str) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    if device == "cuda":
        ort.preload_dlls()
    provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
    # As the server's default: by trial, which is ONNX Runtime's, sixteen sizes of a convolutional net take minutes.
    choices = {"cudnn_conv_algo_search": "HEURISTIC"} if device == "cuda" else {}
    session = ort.InferenceSession(model, options, providers=[(provider, choices)], enable_fallback=False)
    if session.get_providers()[0] != provider:
        raise SystemExit(f"{provider} was asked for, but the session uses {session.get_providers()}")
    return session


def _time(session: Any, sizes: Sequence[int], seconds: float) -> SessionTimes:
    (spec,) = session.get_inputs()
    random = np.random.default_rng(0)
    times = SessionTimes([], [], [], [])
    for rows in sizes:
        feed = {spec.name: random.random((rows, *spec.shape[1:]), dtype=np.float32)}
        for _ in range(3):  # allocations and the choice of kernels happen on first use
            session.run(None, feed)
        laps: list[float] = []
        cpu0, start = time.process_time(), time.perf_counter()
        while time.perf_counter() - start < seconds or len(laps) < 5:
            lap = time.perf_counter()
            session.run(None, feed)
            laps.append(time.perf_counter() - lap)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu0
        times.rows.append(rows)
        times.median_ms.append(float(np.median(laps)) * 1e3)
        times.mean_ms.append(wall / len(laps) * 1e3)
        times.cpu_ms.append(cpu / len(laps) * 1e3)
    return times


def main() -> None:
    """Print the times of one model as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--rows", default=",".join(map(str, SWEEP)))
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--again", action="store_true", help="once for every line of standard input")
    arguments = parser.parse_args()
    session, sizes = _open(arguments.model, arguments.device), [int(size) for size in arguments.rows.split(",")]
    for _ in sys.stdin if arguments.again else [""]:
        times = _time(session, sizes, arguments.seconds)
        print(json.dumps({name: getattr(times, name) for name in times.__slots__}), flush=True)


if __name__ == "__main__":
    main()
