"""Running a model where it was made: to check what it answers, and how long that takes."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

Feeds = Mapping[str, npt.NDArray[Any]]

# Enough for a steady median, short enough not to be felt when all recipes are made.
MEASURE_S = 0.5
LEAST_RUNS = 3


class Session(Protocol):
    """What is needed of an `onnxruntime.InferenceSession`."""

    def run(self, output_names: Sequence[str] | None, input_feed: Feeds) -> Sequence[Any]:
        """The named outputs, or all, for these inputs."""


def open_session(model: bytes | Path) -> Any:
    """A session on one core of the CPU. A path is needed where the model has external data."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    source = model if isinstance(model, bytes) else str(model)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def median_ms(session: Session, feeds: Feeds) -> float:
    """How long one run takes: the median of half a second's, of three at least, after one that does not count."""
    session.run(None, feeds)
    taken_ns: list[int] = []
    while len(taken_ns) < LEAST_RUNS or sum(taken_ns) < MEASURE_S * 1e9:
        began = time.perf_counter_ns()
        session.run(None, feeds)
        taken_ns.append(time.perf_counter_ns() - began)
    return statistics.median(taken_ns) / 1e6


def latency_row(session: Session, feeds: Feeds, what: str) -> str:
    """The line of a card that says how long `what` took where the model was made."""
    # Two digits are what a second measurement agrees in, at best.
    taken_ms = float(f"{median_ms(session, feeds):.2g}")
    return f"| Latency | {taken_ms:g} ms for {what} on one core of the machine it was made on ({_cpu()}) |"


def _cpu() -> str:
    """The processor as Linux names it, or at least its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
