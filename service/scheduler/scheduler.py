"""The scheduler: told what arrives, what ends and what time it is, it says what to run.

The promise is in docs/batching.md. The rule is the **largest feasible window**: from the oldest deadline on, take the
largest contiguous run of queued rows whose oldest member still makes its deadline when the whole run has been executed;
refuse what is older. Of several lanes the one that must start soonest (least laxity) leads. Earlier published forms of
its parts: the window of Nexus (SOSP '19) and Symphony (2023), the latest start time of Clockwork (OSDI '20).

Not thread-safe: callers hold one lock around every call. No call blocks, reads a clock or allocates without bound.
Times are integer nanoseconds on one monotonic clock.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from service.clock import NEVER_NS
from service.scheduler.admission import NOTHING, Admission
from service.scheduler.assembly import assemble
from service.scheduler.device import MAX_BATCHES_PER_SLOT, DeviceState, SlotState
from service.scheduler.hold import hold_until_ns
from service.scheduler.lane import DEADLINE, LAST_RANK, OVERSIZE, Lane
from service.scheduler.latency import LatencyModel
from service.scheduler.policy import QueuePolicy
from service.scheduler.queue import ModelQueue
from service.scheduler.types import (
    GONE,
    QUEUED,
    RUNNING,
    Dispatch,
    Idle,
    QueuedRequest,
    Refusal,
    RefusalReason,
    Slot,
    WaitUntil,
)

GUARD_RUNS = 10  # a lane without deadlines that waited too long gets at most one part in 10 of the device


class Scheduler:
    """Queues of the models on a set of run slots.

    `slots`: the run slots of all devices. `lead_ns`: how long before its start a batch must be closed (staging on the
    host, overlapped with the batch before it).
    """

    def __init__(self, slots: Sequence[Slot], lead_ns: int = 0) -> None:
        self._lead_ns = lead_ns
        self._devices: dict[str, DeviceState] = {}
        self._slots: dict[Slot, SlotState] = {}
        self._admission = Admission()
        for slot in slots:
            device = self._devices.setdefault(slot.device, DeviceState(slot.device))
            state = self._slots[slot] = SlotState(slot, device)
            device.slots.append(state)
            device.refresh()

    # -- models ------------------------------------------------------------------------------------------------------

    def add_queue(self, policy: QueuePolicy, latency: LatencyModel) -> ModelQueue:
        """Make a queue for a model. Raises `ValueError` when it names a device without slots."""
        missing = [name for name in policy.devices if name not in self._devices]
        if missing:
            raise ValueError(f"model '{policy.name}': device {missing[0]!r} has no slots; known: {list(self._devices)}")
        if latency.buckets != policy.buckets:
            raise ValueError(
                f"model '{policy.name}': the latency model has buckets {latency.buckets}, the policy {policy.buckets}"
            )
        return ModelQueue(policy, latency, tuple(self._devices[name] for name in policy.devices))

    def remove_queue(self, queue: ModelQueue) -> list[QueuedRequest]:
        """Forget a model; returns what was waiting, for the caller to answer. Its running batches end as usual."""
        waiting: list[QueuedRequest] = []
        for lane in list(queue.active):
            waiting += lane.items()
            self._admission.deactivate(lane)
        for request in waiting:
            request.state = GONE
            request.lane = None
        queue.pending_requests = queue.pending_rows = 0
        queue.pending_by_priority.clear()
        queue.closed = True
        queue.devices = ()
        return waiting

    def lower_cap(self, queue: ModelQueue, shape: Hashable, rows: int) -> None:
        """Never batch `shape` above `rows` again (the device ran out of memory at that size)."""
        self._admission.lower_cap(queue, shape, rows)

    # -- requests ----------------------------------------------------------------------------------------------------

    def enqueue(self, queue: ModelQueue, request: QueuedRequest, now_ns: int) -> Sequence[Refusal]:
        """Take in a request. Returns what is refused because of it: perhaps the request itself, perhaps older ones
        that are doomed now; usually nothing. Raises `ValueError` when the queue was removed."""
        if queue.closed:
            raise ValueError(f"model '{queue.policy.name}': its queue was removed; look the model up again")
        policy = queue.policy
        rows = request.rows
        level = policy.priorities.get(request.priority) if policy.priorities else None
        if queue.pending_rows + rows > policy.max_queue_rows or (
            level is not None
            and level.max_queue_size
            and queue.pending_by_priority[request.priority] >= level.max_queue_size
        ):
            return self._admission.refuse_arrival(queue, request, RefusalReason.QUEUE_FULL, now_ns)
        lane = queue.lane_for(request)
        curve, factor = lane.curve, lane.latency.factor
        if lane.soft:
            if queue.pending_rows and self._admission.wait_ns(queue, lane, now_ns) > policy.max_queue_ns:
                return self._admission.refuse_arrival(queue, request, RefusalReason.QUEUE_FULL, now_ns)
            self._admission.place(queue, request, lane)
            queue.accepted += 1
            return NOTHING
        if lane.kind is OVERSIZE:
            alone_ns = float(lane.latency.estimate(request.shape, rows, request.cost))
        else:
            alone_ns = curve.ns[curve.index(rows)] * factor
        if now_ns + alone_ns > request.deadline_ns:
            return self._admission.unreachable(queue, request, alone_ns, now_ns)
        lane.arrivals.note(request.arrival_ns)
        free_ns = self._admission.free_ns(queue, now_ns)
        if queue.pending_rows >= lane.cap_rows and self._admission.behind_full_batches(queue, lane, request, free_ns):
            return self._admission.let_go_on_arrival(queue, request, free_ns, now_ns)
        self._admission.place(queue, request, lane)
        queue.accepted += 1
        if free_ns <= now_ns:
            return NOTHING
        return self._admission.shed(lane, free_ns, now_ns)

    def cancel(self, request: QueuedRequest) -> bool:
        """Take a request out of its queue; False when it is not (any more) waiting."""
        lane = request.lane
        if lane is None or request.state is not QUEUED:
            return False
        lane.cancel(request)
        queue = lane.queue
        self._admission.forget(queue, request)
        queue.cancelled += 1
        if not lane.count:
            self._admission.deactivate(lane)
        return True

    def idle_slot(self, queue: ModelQueue) -> Slot | None:
        """The slot whose worker should be woken for `queue`: one that was told `Idle` or `WaitUntil` and has not asked
        since, on a device where the model may run. None when all are busy: they will ask by themselves."""
        for device in queue.devices:
            if device.parked and queue.running[device.name] < queue.policy.max_concurrent:
                return next(iter(device.parked))
        return None

    def spare_slot(self, device: str) -> Slot | None:
        """A slot of `device` that sleeps while there is work left: to be woken after a `Dispatch`, which may have left
        requests behind."""
        state = self._devices[device]
        if not state.parked or not state.active:
            return None
        if all(lane.queue.running[device] >= lane.queue.policy.max_concurrent for lane in state.active):
            return None
        return next(iter(state.parked))

    # -- slots -------------------------------------------------------------------------------------------------------

    def next_step(self, slot: Slot, now_ns: int) -> Dispatch | WaitUntil | Idle:
        """What `slot` should do: asked by its worker when it is free, or to stage a batch behind the running one.

        Raises `ValueError` when the slot has a batch staged already.
        """
        state = self._slots[slot]
        if len(state.running) >= MAX_BATCHES_PER_SLOT:
            raise ValueError(f"slot {slot} has {len(state.running)} batches already; report one as completed first")
        device = state.device
        device.parked.pop(slot, None)
        start_ns = max(now_ns + self._lead_ns, state.due_at(now_ns))
        refused: list[Refusal] = []
        held: dict[Lane, int] = {}
        looked_again = False
        while True:  # every turn dispatches, holds one more lane, or is the one second look
            lane = self._choose(device, start_ns, now_ns, held, refused)
            if lane is None:
                # Requests just given up may have become best effort: those lanes were not looked at.
                if looked_again or not any(other.dirty for other in device.active):
                    break
                looked_again = True
                continue
            if not lane.settled(start_ns):  # settled before: estimates may have changed since
                self._settle(lane, start_ns, now_ns, refused)
                if not lane.count:
                    continue
            if lane.sacrificed or len(lane.queue.active) > 1:
                self._commit(lane, start_ns, now_ns, refused)
            until_ns = hold_until_ns(lane)
            if until_ns <= start_ns:
                return self._dispatch(state, lane, start_ns, now_ns, refused)
            lane.held = True
            held[lane] = until_ns
        device.parked[slot] = None
        if held:
            return WaitUntil(max(min(held.values()) - self._lead_ns, now_ns + 1), refused)
        return Idle(refused)

    def completed(self, dispatch: Dispatch, now_ns: int, actual_ns: int | None, late_rows: int = 0) -> None:
        """A batch has ended: its slot is free and the latency model learns.

        `actual_ns` is its duration from dispatch (or from the end of the batch before it) to done, None when it failed
        and says nothing; `late_rows` the rows answered too late (`Dispatch.late_rows`).
        """
        queue = dispatch.queue
        self._slots[dispatch.slot].end(dispatch, now_ns)
        queue.running[dispatch.slot.device] -= 1
        queue.last_done_ns = now_ns
        if actual_ns is None:
            queue.failed_batches += 1
            return
        queue.late_rows += late_rows
        shape = dispatch.segments[0].request.shape
        if dispatch.probe:
            queue.latency.correct(shape, dispatch.rows, actual_ns)
        else:
            queue.latency.observe(shape, dispatch.rows, actual_ns, late_rows)

    def free_ns(self, device: str, now_ns: int = 0) -> int:
        """When the earliest slot of `device` is predicted to be free (`now_ns` or less: one is)."""
        return self._devices[device].free_at(now_ns)

    def stalled(self, now_ns: int) -> list[Slot]:
        """Slots whose batch has taken more than three times what was expected."""
        return [slot for slot, state in self._slots.items() if state.stalled(now_ns)]

    # -- choosing ----------------------------------------------------------------------------------------------------

    def _choose(
        self, device: DeviceState, start_ns: int, now_ns: int, held: dict[Lane, int], refused: list[Refusal]
    ) -> Lane | None:
        """The lane whose turn it is, settled; lanes in `held` wait until the time stated there."""
        best: Lane | None = None
        urgent: Lane | None = None
        ready: list[Lane] = []
        name = device.name
        for lane in tuple(device.active):
            queue = lane.queue
            if (queue.running[name] >= queue.policy.max_concurrent) or lane in held:
                continue
            if lane.dirty or (lane.latest_ns < start_ns and not lane.settled(start_ns)):
                self._settle(lane, start_ns, now_ns, refused)
                if not lane.count:
                    continue
            ready.append(lane)
            if best is None or lane.rank < best.rank or (lane.rank == best.rank and lane.latest_ns < best.latest_ns):
                best = lane
            if lane.rank != LAST_RANK and (urgent is None or lane.latest_ns < urgent.latest_ns):
                urgent = lane
        if best is None:
            return None
        if urgent is not None and urgent.rank > best.rank:
            floor_ns = min(lane.latest_ns for lane in ready if lane.rank < urgent.rank)
            best = self._before(device, best, urgent, floor_ns, start_ns, now_ns)
        if held and start_ns + self._expected_ns(best) > min(held.values()):
            return None
        return best

    def _before(self, device: DeviceState, best: Lane, urgent: Lane, floor_ns: int, start_ns: int, now_ns: int) -> Lane:
        """Which of the two goes first: the more urgent lane of lower rank when it ends before `floor_ns`, where
        somebody of higher rank must start, or when it has no deadline and waited beyond its patience."""
        if best.soft and best.rank >> 1 < urgent.rank >> 1:
            return best  # nothing says how long a request without a deadline may wait for a lower priority
        if start_ns + self._expected_ns(urgent) <= floor_ns:
            return urgent
        if urgent.soft and urgent.latest_ns < start_ns and device.guard_ns <= now_ns:
            device.guard_ns = start_ns + GUARD_RUNS * self._expected_ns(urgent)
            return urgent
        return best

    def _dispatch(self, state: SlotState, lane: Lane, start_ns: int, now_ns: int, refused: list[Refusal]) -> Dispatch:
        queue = lane.queue
        batch = assemble(lane, start_ns)
        probing = queue.probe is not None and queue.probe.state is RUNNING
        if probing:
            queue.probe = None
        if len(queue.active) > 1:
            for other in tuple(queue.active):
                if not other.count:
                    self._admission.deactivate(other)
        elif not lane.count:
            self._admission.deactivate(lane)
        slack_ns = batch.deadline_ns - start_ns - batch.expected_ns if batch.deadline_ns < NEVER_NS else NEVER_NS
        dispatch = Dispatch(
            queue,
            state.slot,
            batch.segments,
            batch.rows,
            batch.bucket,
            batch.expected_ns,
            batch.reason,
            slack_ns,
            now_ns,
            refused,
            start_ns,
            probing,
        )
        state.begin(dispatch)
        queue.running[state.slot.device] += 1
        queue.batches += 1
        queue.dispatched_rows += batch.rows
        queue.padded_rows += batch.bucket - batch.rows
        if lane.count and lane.kind is DEADLINE:
            # What is left behind may be doomed by the batch just closed: say so now.
            free_ns = self._admission.free_ns(queue, now_ns)
            if free_ns > now_ns:
                refused.extend(self._admission.shed(lane, free_ns, now_ns))
        return dispatch

    def _expected_ns(self, lane: Lane) -> int:
        return int(lane.curve.ns[lane.curve.index(lane.window_rows)] * lane.latency.factor)

    def _settle(self, lane: Lane, start_ns: int, now_ns: int, refused: list[Refusal]) -> None:
        for request in lane.settle(start_ns):
            self._admission.let_go(lane.queue, request, start_ns, now_ns, refused)
        if not lane.count:
            self._admission.deactivate(lane)

    def _commit(self, lane: Lane, start_ns: int, now_ns: int, refused: list[Refusal]) -> None:
        """It is this lane's turn: what the windows of its batch leave behind is given up."""
        queue = lane.queue
        for other in tuple(queue.active) if len(queue.active) > 1 else (lane,):
            if other.sacrificed and other.shape == lane.shape:
                for request in other.commit():
                    self._admission.let_go(queue, request, start_ns, now_ns, refused)
