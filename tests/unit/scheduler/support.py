"""A small world to schedule in: times in milliseconds, one model unless said otherwise."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from service.clock import NEVER_NS
from service.scheduler import (
    Dispatch,
    LatencyModel,
    ModelQueue,
    QueuedRequest,
    QueuePolicy,
    Refusal,
    RefusalReason,
    Scheduler,
    Slot,
    WaitUntil,
)
from service.scheduler.latency import FIRST_QUANTILE

MS = 1_000_000


def ms(value: float) -> int:
    """Milliseconds as nanoseconds."""
    return round(value * MS)


class World:
    """A scheduler with `slots` run slots per device. Latency of every model: `setup` + `per_row` x rows, in ms, where
    the estimate (with its margin) is exact to make arithmetic in tests easy."""

    def __init__(self, slots: int = 1, devices: tuple[str, ...] = ("d",), lead: float = 0.0) -> None:
        self.slots = [Slot(device, index) for device in devices for index in range(slots)]
        self.slot = self.slots[0]
        self.scheduler = Scheduler(self.slots, ms(lead))

    def model(
        self,
        name: str = "m",
        setup: float = 4.0,
        per_row: float = 1.0,
        rows: int = 16,
        slo: float | None = 20.0,
        shapes: tuple[Hashable, ...] = ((),),
        devices: tuple[str, ...] = ("d",),
        known: bool = True,
        table: Mapping[int, float] | None = None,
        **options: Any,
    ) -> ModelQueue:
        """Add a model; `table` (ms by rows) replaces the straight line; `options` are fields of QueuePolicy."""
        policy = QueuePolicy(name, devices, rows, None if slo is None else ms(slo), **options)
        line = table or {size: setup + per_row * size for size in policy.buckets}
        points = {size: ms(line[size]) / FIRST_QUANTILE for size in policy.buckets}
        profile: Mapping[Hashable, Mapping[int, float]] = dict.fromkeys(shapes, points) if known else {}
        return self.scheduler.add_queue(policy, LatencyModel(profile, policy.buckets))

    def request(
        self, queue: ModelQueue, at: float = 0.0, budget: float | None = None, rows: int = 1, **fields: Any
    ) -> QueuedRequest:
        """A request at `at`, with the model's objective or `budget` as its own (both in ms)."""
        slo_ns = ms(budget) if budget is not None else queue.policy.slo_ns
        deadline_ns = NEVER_NS if slo_ns is None else ms(at) + slo_ns
        return QueuedRequest(rows, ms(at), deadline_ns, **fields)

    def put(self, queue: ModelQueue, at: float = 0.0, **fields: Any) -> tuple[QueuedRequest, list[Refusal]]:
        """Queue one request at `at`; returns it and what was refused because of it."""
        request = self.request(queue, at, **fields)
        return request, list(self.scheduler.enqueue(queue, request, ms(at)))

    def fill(self, queue: ModelQueue, times: list[float], **fields: Any) -> list[QueuedRequest]:
        """Queue requests that must all be accepted without refusing anybody."""
        requests = []
        for at in times:
            request, refused = self.put(queue, at, **fields)
            assert refused == []
            requests.append(request)
        return requests

    def run(self, at: float, slot: Slot | None = None) -> Dispatch:
        """The dispatch that must come at `at`."""
        step = self.scheduler.next_step(slot or self.slot, ms(at))
        assert isinstance(step, Dispatch), step
        return step

    def wait(self, at: float) -> WaitUntil:
        """The wait that must come at `at`."""
        step = self.scheduler.next_step(self.slot, ms(at))
        assert isinstance(step, WaitUntil), step
        return step

    def done(self, dispatch: Dispatch, at: float) -> None:
        """Report `dispatch` as ended at `at`, exactly as long as expected, so that nothing is learned."""
        self.scheduler.completed(dispatch, ms(at), None)


def taken(dispatch: Dispatch) -> list[QueuedRequest]:
    """The requests of a batch."""
    return [segment.request for segment in dispatch.segments]


def reasons(refused: list[Refusal]) -> list[RefusalReason]:
    """Why each was refused."""
    return [refusal.reason for refusal in refused]
