"""Who may wait: predicting, refusing, keeping as best effort, and the accounting that goes with each.

Everything that takes a request into a queue or out of it without running it is here. What runs is decided in
`scheduler.py`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from service.clock import NEVER_NS, NS_PER_MS, NS_PER_S
from service.scheduler.lane import BEST_EFFORT, DEADLINE, EAGER, Lane
from service.scheduler.queue import ModelQueue
from service.scheduler.types import GONE, QueuedRequest, Refusal, RefusalReason

PROBE_NS = NS_PER_S  # a request believed unreachable is tried this often, so that a wrong belief ends
PROBE_RUNS = 20  # ... but takes at most one part in 20 of a slow model's time
# Full batches that must be ahead, and fit into the budget, before the newest is refused for them
# (docs/adr/0003-scheduler-refuse-the-newest.md).
MIN_FULL_BATCHES = 2
MIN_RETRY_NS = NS_PER_MS
RETRY_SPREAD = 0.5  # retries are spread over half the hint, so that they do not come back as one burst
GOLDEN = 0.6180339887498949  # multiples modulo 1 spread evenly, without a random generator

NOTHING: Sequence[Refusal] = ()


class Admission:
    """Takes requests in and lets them go, on behalf of the scheduler. Holds no state but the spread of retry hints."""

    __slots__ = ("_hints",)

    def __init__(self) -> None:
        self._hints = 0.0

    def free_ns(self, queue: ModelQueue, now_ns: int) -> int:
        """When a slot is predicted to be free for `queue`; `now_ns` when one is."""
        earliest_ns = NEVER_NS
        for device in queue.devices:
            if queue.limited and queue.running[device.name] >= queue.policy.max_concurrent:
                free_ns = device.free_for(queue, now_ns)
            else:
                free_ns = device.free_at(now_ns)
            if free_ns < earliest_ns:
                earliest_ns = free_ns
        return earliest_ns

    def wait_ns(self, queue: ModelQueue, lane: Lane, now_ns: int) -> int:
        """Predicted wait of a request without a deadline behind all that is queued for its model."""
        curve = lane.curve
        rows = min(lane.cap_rows, curve.efficient_rows)
        batches = queue.pending_rows / rows / queue.parallel
        return int(self.free_ns(queue, now_ns) - now_ns + batches * curve.ns[curve.index(rows)] * lane.latency.factor)

    def shed(self, lane: Lane, free_ns: int, now_ns: int) -> Sequence[Refusal]:
        """Let go of the requests at the head of `lane` that are doomed when the next batch starts at `free_ns`."""
        if lane.kind is not DEADLINE:
            return NOTHING
        forecast = 0
        eagerness = lane.queue.policy.shed_eagerness
        if eagerness:
            forecast = int(eagerness * lane.arrivals.expected_within(free_ns - now_ns))
        # Where other models may take the slot first, the window at `free_ns` is not what will run: giving up requests
        # for it would be giving them up for nothing (docs/adr/0004-scheduler-shared-devices.md).
        queue, shared = lane.queue, False
        for device in queue.devices:
            shared = shared or len(device.active) > len(queue.active)
        count = lane.hopeless(free_ns) if shared else lane.doomed(free_ns, forecast)
        # When nobody would make it nobody is in anybody's way: the batch before may yet end sooner than predicted.
        if not count or (count == lane.count and not forecast):
            return NOTHING
        refused: list[Refusal] = []
        for request in lane.pop(count):
            self.let_go(lane.queue, request, free_ns, now_ns, refused)
        if not lane.count:
            self.deactivate(lane)
        return refused

    def behind_full_batches(self, queue: ModelQueue, lane: Lane, request: QueuedRequest, free_ns: int) -> bool:
        """Whether full batches of requests that will make it occupy the device until it is too late for this one.

        Everybody ahead passed the same test, so refusing the newest costs no goodput: every batch until its deadline is
        full already. And it is the cheapest refusal there is, the soonest, and what bounds the queue. Judged without
        the quantile: a promise to others must be certain to be worth a refusal.
        """
        if lane.kind is not DEADLINE or not lane.count:
            return False
        full, rest = divmod(lane.rows, lane.cap_rows)
        if full < MIN_FULL_BATCHES:
            return False
        curve, scale = lane.curve, lane.latency.scale
        full_ns = curve.ns[curve.index(lane.cap_rows)] * scale
        if request.deadline_ns - request.arrival_ns < MIN_FULL_BATCHES * full_ns:
            return False  # those ahead do not fill their batches either: the newest may be worth more than the oldest
        last_ns = curve.ns[curve.index(min(rest + request.rows, lane.cap_rows))] * scale
        return free_ns + full // queue.parallel * full_ns + last_ns > request.deadline_ns

    def let_go_on_arrival(
        self, queue: ModelQueue, request: QueuedRequest, free_ns: int, now_ns: int
    ) -> Sequence[Refusal]:
        """A request that never entered its lane is doomed behind those that did."""
        if self.keep(queue, request):
            queue.accepted += 1
            return NOTHING
        return (self._refusal(queue, request, RefusalReason.OVERLOADED, free_ns, now_ns),)

    def unreachable(self, queue: ModelQueue, request: QueuedRequest, alone_ns: float, now_ns: int) -> Sequence[Refusal]:
        """An idle device could not make the deadline of this request, as far as is known: probe it, keep it as best
        effort, or refuse it."""
        pause_ns = max(PROBE_NS, int(PROBE_RUNS * alone_ns))
        if (
            request.deadline_ns > now_ns
            and now_ns - max(queue.last_probe_ns, queue.last_done_ns) >= pause_ns
            and queue.probe is None
            and request.rows <= queue.cap_rows(request.shape)
        ):
            queue.last_probe_ns = now_ns
            queue.probe = request
            queue.probes += 1
            queue.accepted += 1
            request.demoted = True
            self.place(queue, request, queue.soft_lane_for(request, EAGER))
            return NOTHING
        if request.deadline_ns > now_ns and self.keep(queue, request):
            queue.accepted += 1
            return NOTHING
        return self.refuse_arrival(queue, request, RefusalReason.UNREACHABLE, now_ns)

    def let_go(
        self, queue: ModelQueue, request: QueuedRequest, free_ns: int, now_ns: int, refused: list[Refusal]
    ) -> None:
        """A queued request, already out of its lane, cannot make its deadline: refuse it, or keep it as best effort."""
        self.forget(queue, request)
        if self.keep(queue, request):
            return
        reason = RefusalReason.EXPIRED if request.deadline_ns <= now_ns else RefusalReason.OVERLOADED
        refused.append(self._refusal(queue, request, reason, free_ns, now_ns))

    def keep(self, queue: ModelQueue, request: QueuedRequest) -> bool:
        """Keep a doomed request as best effort, where the policy says so."""
        policy = queue.policy
        kept = policy.late_policy == "best_effort" or policy.level(request.priority).timeout_action == "DELAY"
        if not kept or request.demoted or request.rows > queue.cap_rows(request.shape):
            return False
        request.demoted = True
        self.place(queue, request, queue.soft_lane_for(request, BEST_EFFORT))
        return True

    def refuse_arrival(
        self, queue: ModelQueue, request: QueuedRequest, reason: RefusalReason, now_ns: int
    ) -> Sequence[Refusal]:
        if reason is RefusalReason.UNREACHABLE and request.deadline_ns <= now_ns:
            reason = RefusalReason.EXPIRED
        return (self._refusal(queue, request, reason, self.free_ns(queue, now_ns), now_ns),)

    def _refusal(
        self, queue: ModelQueue, request: QueuedRequest, reason: RefusalReason, free_ns: int, now_ns: int
    ) -> Refusal:
        request.state = GONE
        request.lane = None
        queue.refused[reason] += 1
        wait_ns = max(0, free_ns - now_ns) + queue.latency.estimate(request.shape, request.rows, request.cost)
        retry_ns = 0
        if reason in (RefusalReason.OVERLOADED, RefusalReason.QUEUE_FULL):
            self._hints = (self._hints + GOLDEN) % 1.0
            retry_ns = int(max(MIN_RETRY_NS, wait_ns) * (1.0 + RETRY_SPREAD * self._hints))
        return Refusal(request, reason, wait_ns, retry_ns)

    # -- bookkeeping -------------------------------------------------------------------------------------------------

    def place(self, queue: ModelQueue, request: QueuedRequest, lane: Lane) -> None:
        if not lane.count:
            queue.active[lane] = None
            for device in queue.devices:
                device.active[lane] = None
        lane.push(request)
        queue.pending_requests += 1
        queue.pending_rows += request.rows - request.dispatched_rows
        queue.pending_by_priority[request.priority] += 1

    def forget(self, queue: ModelQueue, request: QueuedRequest) -> None:
        queue.pending_requests -= 1
        queue.pending_rows -= request.rows - request.dispatched_rows
        queue.pending_by_priority[request.priority] -= 1
        if request is queue.probe:
            queue.probe = None

    def deactivate(self, lane: Lane) -> None:
        queue = lane.queue
        queue.active.pop(lane, None)
        for device in queue.devices:
            device.active.pop(lane, None)

    def lower_cap(self, queue: ModelQueue, shape: Hashable, rows: int) -> None:
        """Lower the cap of a shape, and place what waits anew: some of it may be larger than a batch now."""
        for lane in queue.lower_cap(shape, rows):
            waiting = lane.pop(lane.count) if lane.count else []
            self.deactivate(lane)
            for request in waiting:
                probing = queue.probe is request
                self.forget(queue, request)
                if request.demoted and request.rows <= queue.cap_rows(shape):
                    self.place(queue, request, queue.soft_lane_for(request, lane.kind))
                else:
                    self.place(queue, request, queue.lane_for(request))
                if probing:
                    queue.probe = request
