"""The last minutes of one model version, in steps of five seconds: a value machine that is told the step.

A step is the attainment window's (`service.metrics.shard`), so shares here agree with `onclock_slo_attainment`. The
counts of the last minute are kept, from which quantiles over it are made; of what is older only the points of a chart
remain. Steps in which nothing happened take no room.

Bounds: `WINDOW_STEPS` counts of about 1.5 KB and `KEPT_STEPS` points of 0.3 KB, at most 36 KB for a version that is
busy all the time: less than a hundredth of what its session takes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from service.clock import NS_PER_MS
from service.metrics.buckets import DURATION_BOUNDS_NS
from service.metrics.shard import WINDOW_STEPS
from service.status_page.counts import NO_COUNTS, Counts, added, difference
from service.status_page.quantiles import quantile, ratio, rounded

# Five minutes: what somebody who was just called wants to see, and a chart's width in points.
KEPT_STEPS = 60


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of time. `offered` requests ended in it, `in_time` of them within their deadline."""

    offered: int = 0
    in_time: int = 0
    counts: Counts = NO_COUNTS

    @property
    def attainment(self) -> float | None:
        """The share answered in time; None when nothing was offered."""
        return ratio(self.in_time, self.offered)


NOTHING_ASKED = Window()


class Point(NamedTuple):
    """One step of a chart; times in ms, of four digits, None when nothing was answered. `queue_ms` and `compute_ms` are
    means."""

    step: int
    offered: int
    in_time: int
    p50_ms: float | None
    p99_ms: float | None
    queue_ms: float | None
    compute_ms: float | None


class History:
    """Of one model version. `source` tells one load of it from another: counters of a new one begin at 0."""

    def __init__(self) -> None:
        self._source: object = None
        self._before = NO_COUNTS
        self._steps: deque[tuple[int, Window]] = deque(maxlen=WINDOW_STEPS)
        self._points: deque[Point] = deque(maxlen=KEPT_STEPS)

    def observe(
        self, step: int, source: object, counts: Counts, offered: int, in_time: int, slo_ns: int | None = None
    ) -> None:
        """At the end of `step`, later than any before, `source`, with this objective, has counted `counts` since its
        load; `offered` and `in_time` are those of the step alone."""
        before = self._before if source is self._source else NO_COUNTS
        self._source, self._before = source, counts
        # The same object: nothing was counted, as with most of many models at most times.
        window = Window(offered, in_time, NO_COUNTS if counts is before else difference(counts, before))
        if offered or window.counts.requests or window.counts.refusals or window.counts.failures:
            self._steps.append((step, window))
            self._points.append(_point(step, window, slo_ns))

    def window(self, last: int, steps: int) -> Window:
        """The `steps` steps (at most `WINDOW_STEPS`) up to and with `last`."""
        within = [window for step, window in self._steps if last - steps < step <= last]
        offered = sum(window.offered for window in within)
        in_time = sum(window.in_time for window in within)
        return Window(offered, in_time, added(window.counts for window in within))

    def attainment(self, last: int, steps: int) -> float | None:
        """The share answered in time in the `steps` steps (at most `KEPT_STEPS`) up to and with `last`."""
        within = [point for point in self._points if last - steps < point.step <= last]
        return ratio(sum(point.in_time for point in within), sum(point.offered for point in within))

    def busy(self, last: int) -> bool:
        """Whether anything happened in the `KEPT_STEPS` steps up to and with `last`."""
        return any(last - KEPT_STEPS < point.step <= last for point in self._points)

    def points(self, last: int) -> list[Point]:
        """`KEPT_STEPS` points up to and with `last`, one a step."""
        known = {point.step: point for point in self._points}
        steps = range(last - KEPT_STEPS + 1, last + 1)
        return [known.get(step) or Point(step, 0, 0, None, None, None, None) for step in steps]


def latency_ms(share: float, counts: Counts, slo_ns: int | None = None) -> float | None:
    """A quantile of the time from arrival to answer, ms; None when nothing was answered.

    How many answers were late is known exactly, and no deadline is later than the objective. So where that many were in
    time the quantile is within the objective, whatever the cells leave open.
    """
    found = quantile(share, counts.request_cells, DURATION_BOUNDS_NS)
    if found is None:
        return None
    if slo_ns is not None and counts.late <= (1 - share) * counts.requests:
        found = min(found, slo_ns)
    return found / NS_PER_MS


def mean_ms(ns: int, count: int) -> float | None:
    """The mean of `count` durations that add up to `ns`, ms; None of none."""
    mean = ratio(ns, count)
    return None if mean is None else mean / NS_PER_MS


def _point(step: int, window: Window, slo_ns: int | None) -> Point:
    counts = window.counts
    return Point(
        step,
        window.offered,
        window.in_time,
        rounded(latency_ms(0.5, counts, slo_ns)),
        rounded(latency_ms(0.99, counts, slo_ns)),
        rounded(mean_ms(counts.queue_ns, counts.requests)),
        rounded(mean_ms(counts.compute_ns, counts.requests)),
    )
