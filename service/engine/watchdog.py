"""Sees batches that hang: a kernel that never ends, a driver that does not answer.

Promise: a batch that has run for longer than the limit, and for longer than twenty times what it was expected to take,
is reported once, and with it the device. What a thread does inside the driver cannot be stopped from outside: the
report ends in the process being replaced, so the limit is far beyond anything a working device does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from service.clock import NS_PER_S, now_ns
from service.scheduler import Dispatch

# A neighbour's load makes a batch several times slower, not twenty times.
HUNG_FACTOR = 20
# How often running batches are looked at: a tenth of the limit, at most every second.
LOOKS_PER_LIMIT = 10
MAX_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True)
class Running:
    """A batch that a worker is executing, and since when (monotonic nanoseconds)."""

    dispatch: Dispatch
    since_ns: int


def hung(running: Iterable[Running], at_ns: int, limit_ns: int) -> list[Running]:
    """Those of `running` that no working device would still be running at `at_ns`."""
    return [r for r in running if at_ns - r.since_ns > max(limit_ns, HUNG_FACTOR * r.dispatch.expected_ns)]


class Watchdog:
    """Calls `report` once for every batch that hangs, from a thread of its own."""

    def __init__(
        self, running: Callable[[], Sequence[Running]], report: Callable[[Running], None], limit_ns: int
    ) -> None:
        self._running = running
        self._report = report
        self._limit_ns = limit_ns
        self._reported: set[Dispatch] = set()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def look(self, at_ns: int) -> None:
        """Report what hangs at `at_ns` and was not reported before."""
        running = self._running()
        # A hung batch stays; what has ended after all need not be remembered.
        self._reported &= {r.dispatch for r in running}
        for found in hung(running, at_ns, self._limit_ns):
            if found.dispatch not in self._reported:
                self._reported.add(found.dispatch)
                self._report(found)

    def _watch(self) -> None:
        interval_s = min(MAX_INTERVAL_S, self._limit_ns / NS_PER_S / LOOKS_PER_LIMIT)
        while not self._stopping.wait(interval_s):
            self.look(now_ns())
