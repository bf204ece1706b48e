"""The queue of one model: its lanes, its bounds and its counters.

Every counter is a plain attribute, so that reading one for a metric costs nothing.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Hashable

from service.clock import NEVER_NS
from service.scheduler.device import DeviceState
from service.scheduler.lane import DEADLINE, EAGER, OVERSIZE, Lane, LaneKind
from service.scheduler.latency import LatencyModel
from service.scheduler.policy import QueuePolicy
from service.scheduler.types import QueuedRequest, RefusalReason

# Budgets on a x1.5 grid share a class: close enough to wait in one line, far enough apart not to starve each other.
CLASS_RATIO = math.log(1.5)
# Lanes kept although empty, because a new one costs more than a request; shapes are the clients' choice.
MAX_EMPTY_LANES = 16
NO_CLASS = 1 << 30  # requests without a deadline
# Shapes whose cap was lowered that are remembered; shapes are the clients' choice. The oldest is forgotten, and learned
# again if it ever comes back.
MAX_CAPS = 1024

LaneKey = tuple[Hashable, int, int, LaneKind, int]


class ModelQueue:
    """What waits for one model. Made by `Scheduler.add_queue`; changed by the scheduler only.

    `pending_requests`, `pending_rows` and `pending_by_priority` are what waits now (rows of a request that is partly
    dispatched count until they are). The totals since the queue was made: `accepted`, `dispatched_requests`,
    `dispatched_rows`, `padded_rows`, `batches`, `cancelled`, `failed_batches`, `late_rows`, `probes` and `refused`
    by reason. `running` batches per device.
    """

    __slots__ = (
        "_caps",
        "_lanes",
        "accepted",
        "active",
        "batches",
        "cancelled",
        "closed",
        "devices",
        "dispatched_requests",
        "dispatched_rows",
        "failed_batches",
        "last_done_ns",
        "last_lane",
        "last_probe_ns",
        "late_rows",
        "latency",
        "limited",
        "padded_rows",
        "parallel",
        "pending_by_priority",
        "pending_requests",
        "pending_rows",
        "policy",
        "probe",
        "probes",
        "refused",
        "running",
    )

    def __init__(self, policy: QueuePolicy, latency: LatencyModel, devices: tuple[DeviceState, ...]) -> None:
        self.policy = policy
        self.devices = devices
        self.latency = latency
        self.pending_requests = 0
        self.pending_rows = 0
        self.pending_by_priority: Counter[int] = Counter()
        self.accepted = 0
        self.dispatched_requests = 0
        self.dispatched_rows = 0
        self.padded_rows = 0
        self.batches = 0
        self.cancelled = 0
        self.failed_batches = 0
        self.late_rows = 0
        self.probes = 0
        self.refused: Counter[RefusalReason] = Counter()
        self.running: Counter[str] = Counter()
        self.active: dict[Lane, None] = {}  # lanes with requests
        self.last_lane: Lane | None = None
        # Batches that can run at once, over all devices; whether that is fewer than there are slots.
        self.parallel = sum(min(policy.max_concurrent, len(device.slots)) for device in devices)
        self.limited = any(policy.max_concurrent < len(device.slots) for device in devices)
        self.probe: QueuedRequest | None = None
        self.last_probe_ns = -NEVER_NS
        self.last_done_ns = -NEVER_NS
        self.closed = False
        self._lanes: dict[LaneKey, Lane] = {}
        self._caps: dict[Hashable, int] = {}

    def __repr__(self) -> str:
        return (
            f"ModelQueue({self.policy.name}: {self.pending_requests} requests, {self.pending_rows} rows waiting, "
            f"{sum(self.running.values())} batches running)"
        )

    def cap_rows(self, shape: Hashable) -> int:
        """The largest batch of that shape: the model's, unless the device ran out of memory below it."""
        return self._caps.get(shape, self.policy.max_batch_rows)

    @property
    def least_cap_rows(self) -> int:
        """The largest batch of the shape for which it is smallest."""
        # A copy: another thread may be adding to them.
        return min(self._caps.copy().values(), default=self.policy.max_batch_rows)

    def lower_cap(self, shape: Hashable, rows: int) -> list[Lane]:
        """Never batch `shape` above `rows` again. Returns the lanes that were emptied of requests to be placed anew."""
        buckets = self.policy.buckets
        index = bisect_right(buckets, rows)
        lowered = min(self.cap_rows(shape), buckets[index - 1] if index else buckets[0])
        if shape not in self._caps and len(self._caps) >= MAX_CAPS:
            del self._caps[next(iter(self._caps))]
        self._caps[shape] = lowered
        lanes = [lane for lane in self._lanes.values() if lane.shape == shape]
        for lane in lanes:
            del self._lanes[self._key_of(lane)]
        self.last_lane = None
        return lanes

    def lane_for(self, request: QueuedRequest) -> Lane:
        """The lane a request waits in: by shape, priority, deadline class, and whether it fits into one batch."""
        shape, priority = request.shape, request.priority
        budget_ns = request.deadline_ns - request.arrival_ns if request.deadline_ns < NEVER_NS else NEVER_NS
        last = self.last_lane
        if (
            last is not None
            and last.budget_ns == budget_ns
            and last.priority == priority
            and last.shape == shape
            and (request.rows <= last.cap_rows if self.policy.joins else request.rows == last.cap_rows)
            and last.kind is not OVERSIZE
        ):
            return last
        cap = self.cap_rows(shape)
        kind = DEADLINE if request.deadline_ns < NEVER_NS else EAGER
        if request.rows > cap:
            kind = OVERSIZE
        lane = self._lane(shape, priority, self._deadline_class(budget_ns), kind, budget_ns, request)
        if kind is not OVERSIZE:
            self.last_lane = lane
        return lane

    def soft_lane_for(self, request: QueuedRequest, kind: LaneKind) -> Lane:
        """The lane for a request kept beyond its deadline: BEST_EFFORT, or EAGER for a probe."""
        return self._lane(request.shape, request.priority, NO_CLASS, kind, NEVER_NS, request)

    def _lane(
        self,
        shape: Hashable,
        priority: int,
        deadline_class: int,
        kind: LaneKind,
        budget_ns: int,
        request: QueuedRequest,
    ) -> Lane:
        cap = self.cap_rows(shape)
        if not self.policy.joins:
            # Requests of as many rows as a batch holds: no two of them fit into one.
            cap = min(cap, request.rows)
        key = (shape, priority, deadline_class, kind, cap)
        lane = self._lanes.get(key)
        if lane is None:
            if len(self._lanes) >= MAX_EMPTY_LANES + len(self.active):
                self._lanes = {self._key_of(lane): lane for lane in self.active}
                self.last_lane = None
            lane = self._lanes[key] = Lane(self, kind, shape, priority, deadline_class, budget_ns, cap, request.cost)
        return lane

    def _deadline_class(self, budget_ns: int) -> int:
        """Index on the x1.5 grid of budgets; the objective itself is a grid point, so that it is a class of its own."""
        if budget_ns >= NEVER_NS:
            return NO_CLASS
        anchor_ns = self.policy.slo_ns or 1
        return math.floor(math.log(max(budget_ns, 1) / anchor_ns) / CLASS_RATIO + 1e-9)

    @staticmethod
    def _key_of(lane: Lane) -> LaneKey:
        return (lane.shape, lane.priority, lane.deadline_class, lane.kind, lane.cap_rows)
