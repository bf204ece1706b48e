"""A lane: the requests of one model that have shape, priority and deadline class in common, earliest deadline first.

Prefix sums of the rows make every question about a part of it O(1); what is cancelled leaves at the next use.
"""

from __future__ import annotations

import enum
from bisect import bisect_left, bisect_right
from collections.abc import Hashable
from itertools import accumulate
from typing import TYPE_CHECKING

from service.clock import NEVER_NS, NS_PER_S
from service.scheduler.gaps import ArrivalStatistics
from service.scheduler.types import GONE, QUEUED, QueuedRequest
from service.scheduler.window import Run, largest_window, prefix

if TYPE_CHECKING:
    from service.scheduler.queue import ModelQueue

# Heads left in the list before it is cut: deleting from the front moves everything behind it.
MAX_PASSED = 512


# Requests without a deadline give way to those with one, but not for longer than an interactive caller waits without
# losing the thread (Nielsen, Usability Engineering, 1993, chapter 5).
PATIENCE_NS = NS_PER_S


class LaneKind(enum.Enum):
    """What is in a lane, and so how it is served."""

    DEADLINE = "deadline"  # the largest feasible window
    EAGER = "eager"  # no deadline: everything there is
    OVERSIZE = "oversize"  # larger than a batch: one after another, in segments
    BEST_EFFORT = "best_effort"  # doomed but kept: padding and idle slots only


DEADLINE, EAGER, OVERSIZE, BEST_EFFORT = LaneKind

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
        "_passed",
        "arrivals",
        "budget_ns",
        "cap_rows",
        "count",
        "curve",
        "deadline_class",
        "dirty",
        "end",
        "held",
        "kind",
        "latency",
        "latest_ns",
        "patience_ns",
        "priority",
        "queue",
        "rank",
        "sacrificed",
        "settled_ns",
        "settled_version",
        "shape",
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
        soft = kind is EAGER or budget_ns >= NEVER_NS
        self.rank = LAST_RANK if kind is BEST_EFFORT else 2 * priority + soft
        self.patience_ns = min(queue.policy.max_queue_ns, PATIENCE_NS)
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
        self.sacrificed = 0  # requests at the head that the window leaves behind
        self.latest_ns = 0
        self.settled_ns = -1
        self.settled_version = -1
        self.arrivals = ArrivalStatistics(budget_ns, queue.policy.shed_eagerness > 0.0)

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

    def items(self) -> list[QueuedRequest]:
        """The requests, earliest deadline first (a copy)."""
        if self.stale:
            self._compact()
        return self._items[self._passed :]

    def push(self, request: QueuedRequest) -> None:
        """Add a request behind those with an earlier or the same deadline."""
        items = self._items
        request.lane = self
        request.state = QUEUED
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
        request.state = GONE
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

    def hopeless(self, start_ns: int) -> int:
        """How many requests from the head would miss their deadline even in a batch of their own at `start_ns`."""
        if self.stale:
            self._compact()
        least_ns = start_ns + int(self.curve.ns[0] * self.latency.factor)
        return bisect_left(self._items, least_ns, lo=self._passed, key=_deadline_of) - self._passed

    def settled(self, start_ns: int) -> bool:
        """Whether the window was found for this very start, with the present estimates."""
        return self.settled_ns == start_ns and self.settled_version == self.latency.version

    def settle(self, start_ns: int) -> list[QueuedRequest]:
        """Find the window for a batch that starts at `start_ns`. Returns the requests that can be in no batch then:
        they have left the lane. Those that only this window leaves behind stay until `commit`."""
        self.dirty = False
        self.settled_ns = start_ns
        self.settled_version = self.latency.version
        self.sacrificed = 0
        if self.stale:
            self._compact()
        if self.kind is DEADLINE:
            return self._settle_window(start_ns)
        if self.kind is OVERSIZE:
            return self._settle_oversize(start_ns)
        return self._settle_soft(start_ns)

    def commit(self) -> list[QueuedRequest]:
        """Give up the requests that the window of `settle` leaves behind; returns them, taken out of the lane."""
        if not self.sacrificed:
            return []
        left = self.pop(self.sacrificed)
        self.sacrificed = 0
        self.dirty = False
        return left

    def _settle_window(self, start_ns: int) -> list[QueuedRequest]:
        unservable = self._remove_unservable(start_ns) if self.wide else []
        if not self.count:
            return unservable
        start, rows = self._window(start_ns, 0)
        if rows <= 0:
            return unservable + self.pop(self.count)
        older = start - self._passed
        left: list[QueuedRequest] = []
        if older:
            left = self.pop(min(older, self.hopeless(start_ns)))
            self.dirty = False
        self.sacrificed = older - len(left)
        first = self._passed + self.sacrificed
        self.window_rows = self._prefix(first, rows)[1] if self.wide else rows
        head = self._items[first]
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
        if self.kind is BEST_EFFORT:
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
        run = Run(self._items, self._ends, self._passed, self.end)
        return largest_window(run, self.curve, self.latency.factor, self.cap_rows, start_ns, extra_rows, self.wide > 0)

    def _prefix(self, at: int, most_rows: int) -> tuple[int, int]:
        return prefix(self._items, self._ends, at, most_rows)

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
        self._items = [item for item in self._items[self._passed :] if item.state is QUEUED]
        self.end = sum(item.rows for item in self._items)
        self._ends = list(accumulate(item.rows for item in self._items))
        self._passed = 0
        self.stale = 0
        self.wide = sum(item.rows > 1 for item in self._items)


def _deadline_of(request: QueuedRequest) -> int:
    return request.deadline_ns
