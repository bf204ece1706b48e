"""A lane: the requests of one model that have shape, priority and deadline class in common, earliest deadline first.

The largest feasible window of a lane is found here. With F the time the batch would start, d(k) the deadline of the
k-th oldest request, rows(k) the rows from there to the youngest and fits(s) the largest batch done within s:

    fits(d(k) - F) - rows(k) never falls as k grows

(deadlines ascend, rows(k) shrinks), so the first k with fits(d(k) - F) >= rows(k) is found by bisection, and rows(k) is
the largest batch that makes its oldest deadline. A prefix sum of rows makes each probe O(1).
"""

from __future__ import annotations

import enum
import math
from bisect import bisect_right
from collections.abc import Hashable
from itertools import accumulate
from typing import TYPE_CHECKING

from service.clock import NEVER_NS
from service.scheduler.types import QueuedRequest, RequestState

if TYPE_CHECKING:
    from service.scheduler.queue import ModelQueue

# Heads left in the list before it is cut: deleting from the front moves everything behind it.
MAX_PASSED = 512
GAP_SHARE = 0.1  # a gap below this share of the budget is short: part of a clump
GAP_DECAY = 0.995  # remembers about the last 200 gaps
RATE_MEMORY = 10.0  # budgets over which the arrival rate is averaged


class LaneKind(enum.Enum):
    """What is in a lane, and so how it is served."""

    DEADLINE = "deadline"  # the largest feasible window
    EAGER = "eager"  # no deadline: everything there is
    OVERSIZE = "oversize"  # larger than a batch: one after another, in segments
    BEST_EFFORT = "best_effort"  # doomed but kept: padding and idle slots only


# Rank of best effort: after every priority.
LAST_RANK = 1 << 62


class Lane:
    """Requests in deadline order, with prefix sums of their rows. Owned and changed by the scheduler only.

    After `settle`: `window_rows` is the size of the largest feasible window, which begins at the head, and `latest_ns`
    the latest start at which its oldest member makes its deadline (a wish, not a limit, where there is none).
    """

    __slots__ = (
        "_ends",
        "_items",
        "_last_arrival_ns",
        "_passed",
        "_rate_count",
        "_rate_span",
        "budget_ns",
        "cap_rows",
        "count",
        "curve",
        "deadline_class",
        "dirty",
        "end",
        "gap_ns",
        "gaps",
        "held",
        "kind",
        "latency",
        "latest_ns",
        "patience_ns",
        "priority",
        "queue",
        "rank",
        "settled_ns",
        "shape",
        "short_gaps",
        "stale",
        "wide",
        "window_rows",
    )

    def __init__(
        self,
        queue: ModelQueue,
        kind: LaneKind,
        shape: Hashable,
        priority: int,
        deadline_class: int,
        budget_ns: int,
        cap_rows: int,
        cost: int,
    ) -> None:
        self.queue = queue
        self.kind = kind
        self.shape = shape
        self.priority = priority
        self.deadline_class = deadline_class
        self.budget_ns = budget_ns
        self.cap_rows = cap_rows
        self.latency = queue.latency
        self.curve = queue.latency.curve(shape, cost)
        soft = kind is LaneKind.EAGER or budget_ns >= NEVER_NS
        self.rank = LAST_RANK if kind is LaneKind.BEST_EFFORT else 2 * priority + soft
        self.patience_ns = queue.policy.max_queue_ns
        self._items: list[QueuedRequest] = []
        self._ends: list[int] = []  # rows up to and including the item, counted since the lane was made
        self._passed = 0  # items before this index have left
        self.end = 0
        self.count = 0  # live items
        self.stale = 0  # cancelled items still in the list
        self.wide = 0  # items of more than one row that have entered since the lane was last empty
        self.dirty = True
        self.held = False
        self.window_rows = 0
        self.latest_ns = 0
        self.settled_ns = -1
        self.gap_ns = int(budget_ns * GAP_SHARE)
        self.gaps = 0.0
        self.short_gaps = 0.0
        self._last_arrival_ns = -1
        self._rate_count = 0.0
        self._rate_span = 0.0

    @property
    def soft(self) -> bool:
        """Whether nobody in it has a deadline that must be met."""
        return bool(self.rank & 1) or self.rank == LAST_RANK

    @property
    def head(self) -> QueuedRequest:
        """The request with the earliest deadline. The lane must not be empty."""
        if self.stale:
            self._compact()
        return self._items[self._passed]

    @property
    def rows(self) -> int:
        """Rows in the lane, those of a partly dispatched request included."""
        if self.stale:
            self._compact()
        if not self.count:
            return 0
        return self.end - self._ends[self._passed] + self._items[self._passed].rows

    @property
    def last_arrival_ns(self) -> int:
        return self._last_arrival_ns

    def items(self) -> list[QueuedRequest]:
        """The requests, earliest deadline first (a copy)."""
        if self.stale:
            self._compact()
        return self._items[self._passed :]

    def note_arrival(self, arrival_ns: int) -> None:
        """Count one arrival in the statistics of gaps, and of the rate where refusals are made on a forecast."""
        if self._last_arrival_ns >= 0:
            gap_ns = arrival_ns - self._last_arrival_ns
            self.gaps = self.gaps * GAP_DECAY + 1.0
            self.short_gaps = self.short_gaps * GAP_DECAY + (gap_ns < self.gap_ns)
            if self.queue.policy.shed_eagerness:
                memory_ns = RATE_MEMORY * self.budget_ns
                kept = math.exp(-gap_ns / memory_ns)
                self._rate_count = self._rate_count * kept + 1.0
                self._rate_span = self._rate_span * kept + memory_ns * (1.0 - kept)
        self._last_arrival_ns = arrival_ns

    def arrivals_within(self, span_ns: int) -> float:
        """Requests expected to arrive in the next `span_ns` (0 unless refusals are made on a forecast)."""
        return self._rate_count / self._rate_span * span_ns if self._rate_span > 0.0 else 0.0

    def push(self, request: QueuedRequest) -> None:
        """Add a request behind those with an earlier or the same deadline."""
        items = self._items
        request.lane = self
        request.state = RequestState.QUEUED
        self.end += request.rows
        self.count += 1
        self.dirty = True
        if request.rows > 1:
            self.wide += 1
        if len(items) == self._passed or items[-1].deadline_ns <= request.deadline_ns:
            items.append(request)
            self._ends.append(self.end)
            return
        at = bisect_right(items, request.deadline_ns, lo=self._passed, key=_deadline_of)
        before = self._ends[at] - items[at].rows
        items.insert(at, request)
        self._ends[at:] = accumulate((item.rows for item in items[at + 1 :]), initial=before + request.rows)

    def cancel(self, request: QueuedRequest) -> None:
        """Take out a request anywhere in the lane. Costs O(1) now and one pass over the lane at its next use."""
        request.state = RequestState.GONE
        request.lane = None
        self.stale += 1
        self.count -= 1
        self.dirty = True

    def pop(self, count: int) -> list[QueuedRequest]:
        """Take out the `count` requests with the earliest deadlines."""
        if self.stale:
            self._compact()
        first = self._passed
        taken = self._items[first : first + count]
        self.count -= count
        self.dirty = True
        if not self.count:
            self._items.clear()
            self._ends.clear()
            self._passed = 0
            self.wide = 0
            self.held = False
        else:
            self._passed = first + count
            if self._passed > MAX_PASSED:
                del self._items[: self._passed]
                del self._ends[: self._passed]
                self._passed = 0
        return taken

    def prefix(self, most_rows: int) -> tuple[int, int]:
        """How many requests from the head fit whole into `most_rows`, and their rows."""
        if self.stale:
            self._compact()
        return self._prefix(self._passed, most_rows)

    def deadline_after(self, count: int) -> int:
        """Deadline of the request behind the first `count`."""
        return self._items[self._passed + count].deadline_ns

    def rows_after(self, count: int) -> int:
        """Rows of the request behind the first `count`."""
        return self._items[self._passed + count].rows

    def doomed(self, start_ns: int, extra_rows: int = 0) -> int:
        """How many requests from the head cannot be in the largest feasible window of a batch that starts at
        `start_ns`, when `extra_rows` more are expected to have joined by then."""
        if self.stale:
            self._compact()
        first = self._passed
        head = self._items[first]
        rows = self.end + extra_rows - self._ends[first] + head.rows
        cap = self.cap_rows
        # The usual case, in a line: the oldest makes it with everything behind it.
        if self.curve.fits((head.deadline_ns - start_ns) / self.latency.factor) >= (rows if rows < cap else cap):
            return 0
        return self._window(start_ns, extra_rows)[0] - first

    def settle(self, start_ns: int) -> list[QueuedRequest]:
        """Find the window for a batch that starts at `start_ns`; returns the requests that cannot be in it, which have
        left the lane."""
        self.dirty = False
        self.settled_ns = start_ns
        if self.stale:
            self._compact()
        if self.kind is LaneKind.DEADLINE:
            return self._settle_window(start_ns)
        if self.kind is LaneKind.OVERSIZE:
            return self._settle_oversize(start_ns)
        return self._settle_soft(start_ns)

    def _settle_window(self, start_ns: int) -> list[QueuedRequest]:
        unservable = self._remove_unservable(start_ns) if self.wide else []
        if not self.count:
            return unservable
        start, rows = self._window(start_ns, 0)
        if rows <= 0:
            return unservable + self.pop(self.count)
        older = start - self._passed
        left = self.pop(older) if older else []
        self.dirty = False
        self.window_rows = self._prefix(self._passed, rows)[1] if self.wide else rows
        head = self._items[self._passed]
        expected_ns = self.curve.ns[self.curve.index(self.window_rows)] * self.latency.factor
        self.latest_ns = head.deadline_ns - int(expected_ns)
        return unservable + left

    def _settle_oversize(self, start_ns: int) -> list[QueuedRequest]:
        left: list[QueuedRequest] = []
        while self.count:
            head = self._items[self._passed]
            rest = head.rows - head.dispatched_rows
            expected_ns = self.latency.estimate(self.shape, rest, head.cost)
            if head.deadline_ns < NEVER_NS and start_ns + expected_ns > head.deadline_ns:
                left += self.pop(1)
                continue
            self.window_rows = min(rest, self.cap_rows)
            limit_ns = head.deadline_ns if head.deadline_ns < NEVER_NS else head.arrival_ns + self.patience_ns
            self.latest_ns = limit_ns - expected_ns
            break
        self.dirty = False
        return left

    def _settle_soft(self, start_ns: int) -> list[QueuedRequest]:
        left: list[QueuedRequest] = []
        if self.kind is LaneKind.BEST_EFFORT:
            # Kept in the hope of an idle slot; one that never came is an answer too.
            while self.count and self._items[self._passed].arrival_ns + self.patience_ns < start_ns:
                left += self.pop(1)
            self.dirty = False
            if not self.count:
                return left
        policy = self.queue.policy
        stated = policy.slo_ns is None and (policy.max_queue_delay_ns > 0 or policy.preferred_rows)
        most = self.cap_rows if stated else min(self.cap_rows, self.curve.efficient_rows)
        # A request of more rows than are efficient is still one request.
        most = max(most, self._items[self._passed].rows)
        self.window_rows = self._prefix(self._passed, most)[1]
        expected_ns = self.curve.ns[self.curve.index(self.window_rows)] * self.latency.factor
        self.latest_ns = self._items[self._passed].arrival_ns + self.patience_ns - int(expected_ns)
        return left

    def _window(self, start_ns: int, extra_rows: int) -> tuple[int, int]:
        """(index of the first request, rows) of the largest feasible window; the list's length and 0 when nothing is
        feasible."""
        items, ends, cap = self._items, self._ends, self.cap_rows
        factor, fits = self.latency.factor, self.curve.fits
        first, behind = self._passed, len(items)
        end = self.end + extra_rows
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
        packing = self.wide and not extra_rows
        packed = self._prefix(low, rows)[1] if packing else rows
        while low > first:
            fit = min(cap, fits((items[low - 1].deadline_ns - start_ns) / factor))
            older = (self._prefix(low - 1, fit)[1] if fit else 0) if packing else fit
            if older < packed:
                break
            low, rows = low - 1, fit
            if older > packed:  # one older start may allow a larger batch; an older one yet cannot
                break
        return low, rows if packing or low == behind else min(rows, end - extra_rows - ends[low] + items[low].rows)

    def _prefix(self, at: int, most_rows: int) -> tuple[int, int]:
        before = self._ends[at] - self._items[at].rows
        stop = bisect_right(self._ends, before + most_rows, lo=at)
        return stop - at, (self._ends[stop - 1] - before) if stop > at else 0

    def _remove_unservable(self, start_ns: int) -> list[QueuedRequest]:
        """Take out the requests that would miss their deadline even alone, wherever they stand: one request of many
        rows must not make the run behind it look infeasible."""
        items, fits, factor = self._items, self.curve.fits, self.latency.factor
        least = fits((items[self._passed].deadline_ns - start_ns) / factor)
        left = [
            item
            for item in items[self._passed :]
            if item.rows > least and item.rows > fits((item.deadline_ns - start_ns) / factor)
        ]
        for item in left:
            self.cancel(item)
        if left:
            self._compact()
        return left

    def _compact(self) -> None:
        self._items = [item for item in self._items[self._passed :] if item.state is RequestState.QUEUED]
        self.end = sum(item.rows for item in self._items)
        self._ends = list(accumulate(item.rows for item in self._items))
        self._passed = 0
        self.stale = 0
        self.wide = sum(item.rows > 1 for item in self._items)


def _deadline_of(request: QueuedRequest) -> int:
    return request.deadline_ns
