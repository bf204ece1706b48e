"""NVIDIA's perf_analyzer, the real binary: it comes with a Linux wheel of the published client.

It wants two shared libraries: the CUDA runtime's (from its wheel; no GPU is needed) and libb64 (Debian and Ubuntu:
`apt-get install libb64-0d`). Without the latter its tests are skipped, or fail where
`ONCLOCK_TEST_PERF_ANALYZER=require` says that they must be run.
"""

from __future__ import annotations

import csv
import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.venvs import python_with

REQUIRE = "ONCLOCK_TEST_PERF_ANALYZER"
REQUIREMENTS = ("tritonclient[grpc]==2.51.0", "nvidia-cuda-runtime-cu12==12.9.79")
# The last version whose wheel carries the binary. A run of these tests takes two seconds; it must end by itself.
TIMEOUT_S = 90.0


@dataclass(frozen=True, slots=True)
class Measured:
    """One line of its table, by column, and all that it printed."""

    columns: dict[str, str]
    printed: str

    def number(self, column: str) -> float:
        return float(self.columns[column])


def needs_perf_analyzer() -> None:
    """Skip or fail (see above) where it cannot be run."""
    reason = _missing()
    if reason and os.environ.get(REQUIRE) == "require":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


def _missing() -> str:
    if sys.platform != "linux":
        return "perf_analyzer is published for Linux only"
    try:
        ctypes.CDLL("libb64.so.0d")
    except OSError:
        return "perf_analyzer needs libb64: apt-get install libb64-0d"
    return ""


def perf_analyzer(address: str, model: str, directory: Path, arguments: Sequence[str]) -> list[Measured]:
    """Run it against the server at `address` to its end, and read its table. Fails the test if it fails."""
    python = python_with(*REQUIREMENTS)
    (site,) = python.parent.parent.glob("lib/python*/site-packages")
    table = directory / "table.csv"
    command = [python.parent / "perf_analyzer", "-i", "grpc", "-u", address, "-m", model, "-f", table, *arguments]
    # Windows are counted in requests, and one is enough: what is tested is that it works, not how fast.
    brief = ["--measurement-mode", "count_windows", "--measurement-request-count", "50", "-s", "999", "-r", "3"]
    done = subprocess.run(
        [*map(str, command), *brief],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env={**os.environ, "LD_LIBRARY_PATH": str(site / "nvidia" / "cuda_runtime" / "lib")},
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows, printed
    return [Measured(row, printed) for row in rows]
