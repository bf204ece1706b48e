"""Progress of loading models: a bar on a terminal, log lines everywhere else.

The server tells a `LoadProgress` what happens; it neither knows nor cares which kind it is. Methods may be called from
any thread, `started` first and `finished` last.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from service.clock import NS_PER_S, now_ns

log = logging.getLogger(__name__)

# Often enough to see that it goes on, rarely enough that a thousand models are a few lines.
LOG_INTERVAL_NS = 5 * NS_PER_S


class LoadProgress(Protocol):
    """What is told about loading a repository."""

    def started(self, total: int) -> None:
        """`total` model versions are going to be loaded."""

    def loaded(self, name: str, version: str, seconds: float) -> None:
        """One is ready, after `seconds`."""

    def failed(self, name: str, version: str, reason: str) -> None:
        """One cannot be served, for `reason`."""

    def finished(self) -> None:
        """All have been tried."""


def load_progress(stream: TextIO | None = None) -> LoadProgress:
    """The kind that suits `stream` (stderr by default): a bar when it is a terminal, log lines otherwise."""
    out = sys.stderr if stream is None else stream
    return BarProgress(out) if out.isatty() else LogProgress()


class LogProgress:
    """A line at the start, one now and then, and one for each model that failed."""

    def __init__(self, clock: Callable[[], int] = now_ns, interval_ns: int = LOG_INTERVAL_NS) -> None:
        self._clock = clock
        self._interval_ns = interval_ns
        self._lock = threading.Lock()
        self._total = 0
        self._done = 0
        self._next_ns = 0

    def started(self, total: int) -> None:
        with self._lock:
            self._total, self._done = total, 0
            self._next_ns = self._clock() + self._interval_ns
        log.info("loading models", extra={"models": total})

    def loaded(self, name: str, version: str, seconds: float) -> None:
        with self._lock:
            self._done += 1
            done, at_ns = self._done, self._clock()
            if at_ns < self._next_ns:
                return
            self._next_ns = at_ns + self._interval_ns
        latest = {"model": name, "version": version, "seconds": round(seconds, 3)}
        log.info("still loading models", extra={"done": done, "models": self._total, **latest})

    def failed(self, name: str, version: str, reason: str) -> None:
        with self._lock:
            self._done += 1
        log.error("model not loaded", extra={"model": name, "version": version, "reason": reason})

    def finished(self) -> None:
        """Nothing to say: the server logs what it is ready with."""


class BarProgress:
    """A bar with the latest model's name; models that failed are printed above it and stay."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, highlight=False)
        self._progress = Progress(
            TextColumn("loading"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[latest]}"),
            console=self._console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._failures = 0

    def started(self, total: int) -> None:
        self._failures = 0
        self._task = self._progress.add_task("loading", total=total, latest="")
        self._progress.start()

    def loaded(self, name: str, version: str, seconds: float) -> None:
        self._advance(f"{name} version {version} ({seconds:.1f} s)")

    def failed(self, name: str, version: str, reason: str) -> None:
        self._failures += 1
        self._console.print(
            f"not loaded: {name} version {version}: {reason}", style="red", markup=False, soft_wrap=True
        )
        self._advance(f"{name} version {version}")

    def finished(self) -> None:
        self._progress.stop()
        if self._task is not None:
            task = self._progress.tasks[0]
            loaded = int(task.completed) - self._failures
            self._console.print(f"loaded {loaded} of {int(task.total or 0)} models in {task.elapsed or 0:.1f} s")
            self._progress.remove_task(self._task)
            self._task = None

    def _advance(self, latest: str) -> None:
        if self._task is not None:
            self._progress.update(self._task, advance=1, latest=latest)
