"""How a run is doing, while it does: a line on a terminal, a word now and then in a log."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from loadtests import worker
from loadtests.run import Progress as Counts
from loadtests.run import Watch


class Live:
    """Progress on standard error, so that results on standard output stay clean."""

    def __init__(self, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text)

    @contextlib.contextmanager
    def stage(self, title: str, seconds: float) -> Iterator[Watch | None]:
        """A part of the work that takes about `seconds`: what is yielded is told how it goes."""
        if not self._console.is_terminal or self._console.quiet:
            self._console.print(f"{title} ({seconds:g} s) ...")
            yield None
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[counts]}"),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(title, total=seconds, counts="")

            def watch(now: Counts) -> None:
                progress.update(task, completed=min(now.at_s % (seconds + 1e-9), seconds), counts=describe(now))

            yield watch


def describe(now: Counts) -> str:
    """`12,345 sent, 99.1 % in time, 3 late, 101 refused, 2 other, 7 out`."""
    counters = now.counters
    answered = counters[worker.ANSWERED]
    parts = [f"{counters[worker.SENT]:,} sent"]
    if answered:
        parts.append(f"{counters[worker.IN_SLO] / answered:.1%} in time")
    for position, word in ((worker.LATE, "late"), (worker.REFUSED, "refused"), (worker.OTHER, "other")):
        if counters[position]:
            parts.append(f"{counters[position]:,} {word}")
    out = counters[worker.SENT] - answered
    if out > 0:
        parts.append(f"{out:,} out")
    return ", ".join(parts)
