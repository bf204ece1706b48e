"""The load generator as a function: build it, run it on its core, read what it measured."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.harness import BUILD, ROOT, BenchmarkError, Settings
from benchmarks.servers import Server, pinned

# Layout of one request in the file `loadgen --records` writes (see its README).
RECORD = np.dtype(
    [
        ("index", "<u4"),
        ("status", "<i2"),
        ("rows", "<u2"),
        ("intended_ns", "<i8"),
        ("lag_ns", "<i8"),
        ("latency_ns", "<i8"),
    ]
)
Records = npt.NDArray[np.void]

# Above these the run measured something else: other processes on the cores, or the load generator's own limit. Five
# per cent leaves room for interrupts and kernel threads.
FOREIGN_LIMIT = 0.05
CLIENT_LIMIT = 0.95


@dataclass(slots=True)
class Load:
    """One run of the load generator. Latencies in ms of OK answers, from the intended send time; NaN = none.

    `foreign` is the larger share of the server's and of the client's core that neither of them used: time taken by
    other processes, by the kernel on their behalf or by the hypervisor, warm-up and drain included.
    """

    offered_rps: float
    ok_rps: float
    sent: int
    ok: int
    errors: dict[str, int]
    p50_ms: float
    p99_ms: float
    server_cpu_us: float
    server_cores: float
    client_cores: float
    lag_p99_us: float
    foreign: float = 0.0

    def doubt(self) -> str:
        """Why this run should not be trusted; empty when nothing was wrong."""
        if self.foreign > FOREIGN_LIMIT:
            return f"others took {self.foreign:.0%} of a core"
        if self.client_cores > CLIENT_LIMIT:
            return f"the load generator used {self.client_cores:.0%} of its core"
        return ""

    def expect_all_ok(self, what: str) -> None:
        """Raise `BenchmarkError` unless every request was answered OK: a cheap refusal must not count as speed."""
        if self.errors or not self.ok:
            raise BenchmarkError(
                f"{what}: {self.ok} of {self.sent} answered OK, errors {self.errors}; expected no errors"
            )


def build_loadgen() -> Path:
    """The load generator, built on demand. Raises `BenchmarkError` telling how to install what is missing."""
    binary = BUILD / "loadgen" / "loadgen"
    make = shutil.which("make")
    if make is None or shutil.which("g++") is None:
        raise BenchmarkError("building the load generator needs make and g++ (Debian: apt-get install build-essential)")
    done = subprocess.run(
        [make, "-s", "-C", str(ROOT / "benchmarks" / "loadgen"), f"BUILD={binary.parent}"],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        hint = " (Debian: apt-get install libnghttp2-dev)" if "nghttp2" in done.stderr else ""
        raise BenchmarkError(f"the load generator does not build{hint}:\n{done.stderr[-2000:]}")
    return binary


@dataclass(frozen=True, slots=True)
class Request:
    """What is sent: a model (or several in turn, separated by commas) and one input. `shape` includes the batch
    dimension."""

    model: str
    input: str
    shape: tuple[int, ...]
    datatype: str = "FP32"

    @property
    def argument(self) -> str:
        return f"{self.input}:{self.datatype}:{','.join(map(str, self.shape))}"


def closed_loop(settings: Settings, server: Server, request: Request, concurrency: int, window_s: float = 0.0) -> Load:
    """`concurrency` requests always in flight, spread over up to 4 connections."""
    arguments = ["--concurrency", str(concurrency), "--connections", str(min(4, concurrency)), "--drain", "10"]
    return _run(settings, server, request, arguments, window_s or settings.window_s)


def open_loop(
    settings: Settings, server: Server, request: Request, arrivals_s: npt.NDArray[np.float64], slo_s: float
) -> tuple[Load, Records]:
    """Replay `arrivals_s` (seconds from the start); the window opens after `settings.warmup_s`. The records cover all.

    Answers are awaited for 3 s or 10 SLOs after the window, whichever is longer; what is still out then is
    `unfinished`, which is as lost as a late answer.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    trace, records = settings.out / "arrivals.f64", settings.out / "records.bin"
    np.ascontiguousarray(arrivals_s, dtype=np.float64).tofile(trace)
    arguments = ["--arrivals", str(trace), "--records", str(records), "--slo-ms", str(slo_s * 1e3)]
    arguments += ["--connections", "4", "--drain", str(max(3.0, 10 * slo_s))]
    load = _run(settings, server, request, arguments, settings.window_s)
    return load, np.fromfile(records, dtype=RECORD)


def _run(settings: Settings, server: Server, request: Request, arguments: list[str], window_s: float) -> Load:
    binary = build_loadgen()
    command = [str(binary), "--url", server.url, "--model", request.model, "--input", request.argument]
    command += ["--duration", str(window_s), "--warmup", str(settings.warmup_s), "--pid", str(server.pid), *arguments]
    if "," in request.model:
        command += ["--variants", str(len(request.model.split(",")))]
    before = _Usage.now(settings, server.pid)
    done = subprocess.run(pinned(settings.client_core, command), capture_output=True, text=True)
    server.check_alive()
    if done.returncode != 0:
        raise BenchmarkError(f"load generator failed ({done.returncode}): {done.stderr[-1000:]}")
    load = parse_load(json.loads(done.stdout))
    load.foreign = _Usage.now(settings, server.pid).foreign_since(before)
    return load


@dataclass(frozen=True, slots=True)
class _Usage:
    """CPU seconds up to now: of each of the two cores, of the server, and of the finished load generators."""

    wall_s: float
    server_core_s: float
    client_core_s: float
    server_s: float
    clients_s: float

    @classmethod
    def now(cls, settings: Settings, server_pid: int) -> _Usage:
        tick = os.sysconf("SC_CLK_TCK")
        cores = {line.split()[0]: line.split()[1:9] for line in Path("/proc/stat").read_text().splitlines()}

        def busy(core: int) -> float:
            user, nice, system, _idle, _iowait, irq, softirq, steal = (int(v) for v in cores[f"cpu{core}"])
            return (user + nice + system + irq + softirq + steal) / tick

        stat = Path(f"/proc/{server_pid}/stat").read_text().rpartition(")")[2].split()
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return cls(
            time.monotonic(),
            busy(settings.server_core),
            busy(settings.client_core),
            (int(stat[11]) + int(stat[12])) / tick,
            children.ru_utime + children.ru_stime,
        )

    def foreign_since(self, before: _Usage) -> float:
        wall = self.wall_s - before.wall_s
        on_server = (self.server_core_s - before.server_core_s) - (self.server_s - before.server_s)
        on_client = (self.client_core_s - before.client_core_s) - (self.clients_s - before.clients_s)
        return max(0.0, on_server / wall, on_client / wall)


def parse_load(summary: Mapping[str, Any]) -> Load:
    """A `Load` from the JSON object the load generator prints."""

    def number(value: float | None) -> float:
        return float("nan") if value is None else float(value)

    return Load(
        offered_rps=number(summary["offered_rps"]),
        ok_rps=number(summary["ok_rps"]),
        sent=int(summary["sent"]),
        ok=int(summary["ok"]),
        errors={str(k): int(v) for k, v in summary["errors"].items()},
        p50_ms=number(summary["latency_ms"]["p50"]),
        p99_ms=number(summary["latency_ms"]["p99"]),
        server_cpu_us=number(summary["server_cpu_us_per_req"]),
        server_cores=number(summary["server_cpu_cores"]),
        client_cores=number(summary["client_cpu_cores"]),
        lag_p99_us=number(summary["send_lag_us"]["p99"]),
    )
