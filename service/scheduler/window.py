"""The largest feasible window of a run of requests in deadline order.

With F the time the batch would start, d(k) the deadline of the
k-th oldest request, rows(k) the rows from there to the youngest and fits(s) the largest batch done within s:

    fits(d(k) - F) - rows(k) never falls as k grows

(deadlines ascend, rows(k) shrinks), so the first k with fits(d(k) - F) >= rows(k) is found by bisection, and rows(k) is
the largest batch that makes its oldest deadline. A prefix sum of rows makes each probe O(1).
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

from service.scheduler.latency import Curve
from service.scheduler.types import QueuedRequest


class Run(NamedTuple):
    """Requests in deadline order from index `first` on; `ends` the rows up to and including each, `end` the last."""

    items: list[QueuedRequest]
    ends: list[int]
    first: int
    end: int


def largest_window(
    run: Run, curve: Curve, factor: float, cap: int, start_ns: int, extra_rows: int, packing: bool
) -> tuple[int, int]:
    """(index of the first request, rows) of the largest window that ends in time when it starts at `start_ns`, is at
    most `cap` rows, and of equal ones refuses fewest; (length of the list, 0) when nothing is feasible.

    `curve` and `factor` say how long a batch takes. `extra_rows` are expected to have joined by then. `packing`: some
    requests have several rows, so that what fits need not be filled. O(log n) calls of `curve.fits`.
    """
    items, ends, first, last = run
    fits = curve.fits
    behind = len(items)
    end = last + extra_rows
    rows = end - ends[first] + items[first].rows
    if fits((items[first].deadline_ns - start_ns) / factor) >= min(cap, rows):
        return first, min(cap, rows - extra_rows)
    low, high = first, behind
    while low < high:
        middle = (low + high) // 2
        wanted = min(cap, end - ends[middle] + items[middle].rows)
        if fits((items[middle].deadline_ns - start_ns) / factor) >= wanted:
            high = middle
        else:
            low = middle + 1
    rows = min(cap, end - ends[low] + items[low].rows) if low < behind else min(cap, extra_rows)
    if not rows:
        return behind, 0
    # As many rows from an older start: the same goodput, and fewer refused.
    packing = packing and not extra_rows
    packed = prefix(items, ends, low, rows)[1] if packing else rows
    while low > first:
        fit = min(cap, fits((items[low - 1].deadline_ns - start_ns) / factor))
        older = (prefix(items, ends, low - 1, fit)[1] if fit else 0) if packing else fit
        if older < packed:
            break
        low, rows = low - 1, fit
        if older > packed:  # one older start may allow a larger batch; an older one yet cannot
            break
    if packing or low == behind:
        return low, rows
    return low, min(rows, last - ends[low] + items[low].rows)


def prefix(items: list[QueuedRequest], ends: list[int], at: int, most_rows: int) -> tuple[int, int]:
    """How many requests from index `at` on fit whole into `most_rows`, and their rows."""
    before = ends[at] - items[at].rows
    stop = bisect_right(ends, before + most_rows, lo=at)
    return stop - at, (ends[stop - 1] - before) if stop > at else 0
