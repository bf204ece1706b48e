"""What every benchmark shares: its settings, server processes pinned to a core, and the load on them.

A benchmark process measures nothing itself. The server under test and its baseline run on one core, the load
generator (`benchmarks/loadgen`, C++) on another, and this process sleeps while a window lasts. Baseline and subject
alternate (A B A B ...), so that a slow drift of the machine hits both; the figure reported is the median of the
ratios of neighbouring windows.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"

# Seed of every recorded arrival process unless told otherwise.
SEED = 20261123


class BenchmarkError(Exception):
    """A benchmark could not run; the message says what is missing or what failed and what to do."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How to measure. `window_s` is the measured part of a run, after `warmup_s`; `repeats` the runs of each kind;
    `only` a part of the labels of the cases to measure, empty for all; `device` where models run: `cpu` or `cuda`."""

    quick: bool = False
    repeats: int = 3
    window_s: float = 5.0
    warmup_s: float = 1.0
    server_core: int = 0
    client_core: int = 1
    out: Path = BUILD / "bench"
    seed: int = SEED
    only: str = ""
    device: str = "cpu"

    @property
    def models(self) -> Path:
        """Where the models of the benchmarks are kept from one run to the next."""
        return BUILD / "bench" / "models"


def parse_settings(description: str, window_s: float = 5.0, quick_window_s: float = 1.5) -> Settings:
    """Settings from the command line; `window_s` and `quick_window_s` are the benchmark's own defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="short windows: to see that it runs, not to quote")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind; the median counts (default 3)")
    parser.add_argument("--window", type=float, metavar="S", help=f"seconds measured per run (default {window_s:g})")
    parser.add_argument("--server-core", type=int, default=0)
    parser.add_argument("--client-core", type=int, default=1)
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the arrivals")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose label contains TEXT")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where models run (default cpu)")
    parser.add_argument("--out", type=Path, default=BUILD / "bench", help="folder of the results")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1")
    return Settings(
        quick=arguments.quick,
        repeats=arguments.repeats,
        window_s=arguments.window or (quick_window_s if arguments.quick else window_s),
        warmup_s=0.5 if arguments.quick else 1.0,
        server_core=arguments.server_core,
        client_core=arguments.client_core,
        out=arguments.out,
        seed=arguments.seed,
        only=arguments.only,
        device=arguments.device,
    )


def say(text: str) -> None:
    """One line of progress, on stderr so that a report on stdout stays clean."""
    print(text, file=sys.stderr, flush=True)


def environment() -> dict[str, Any]:
    """What the figures depend on beside the code: processor, versions, commit and how busy the machine is now."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    from importlib.metadata import version

    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
        "versions": {name: version(name) for name in ("grpcio", "protobuf", "numpy")} | _onnxruntime_version(),
        "idle_share_before": round(idle_share(1.0), 3),
    }


def _onnxruntime_version() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    for name in ("onnxruntime-gpu", "onnxruntime"):
        with contextlib.suppress(PackageNotFoundError):
            return {name: version(name)}
    return {}


def idle_share(seconds: float) -> float:
    """Share of all cores' time that was idle over the next `seconds`: 1.0 is a quiet machine."""

    def read() -> tuple[int, int]:
        values = [int(v) for v in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return values[3] + values[4], sum(values)

    idle0, total0 = read()
    time.sleep(seconds)
    idle1, total1 = read()
    return (idle1 - idle0) / max(1, total1 - total0)
