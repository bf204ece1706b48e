"""Runs the real scheduler against arrivals on simulated time: no threads, no clock, repeatable from its seed.

A batch takes its table's time (padded up to its bucket), times lognormal noise, times a drift, plus rare stalls. What
is simulated is the device; what decides is `service.scheduler.Scheduler`, the same object that runs in the server.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from service.clock import NEVER_NS, NS_PER_S
from service.scheduler import (
    Dispatch,
    LatencyModel,
    QueuedRequest,
    QueuePolicy,
    Refusal,
    RefusalReason,
    Scheduler,
    Slot,
    WaitUntil,
    bucket_ladder,
)

Floats = npt.NDArray[np.float64]


@dataclass(slots=True)
class Load:
    """Requests for one model: when they come and what they ask for. `rows`, `slos_s` and `priorities` hold one value
    per arrival, or one for all (None: one row, the model's objective, the highest level)."""

    arrivals_s: Floats
    rows: Sequence[int] | int = 1
    slos_s: Sequence[float] | float | None = None
    priorities: Sequence[int] | int = 1


@dataclass(slots=True)
class SimulatedModel:
    """A model of the simulation. `table_s[b]`: seconds of a batch of b rows, for every bucket; `believed_s`: what the
    scheduler is told instead (None: the same table; empty: nothing)."""

    name: str
    table_s: Mapping[int, float]
    slo_s: float | None
    load: Load
    believed_s: Mapping[int, float] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # further fields of QueuePolicy

    @classmethod
    def linear(
        cls,
        name: str,
        setup_s: float,
        per_row_s: float,
        max_rows: int,
        slo_s: float | None,
        load: Load,
        *,
        exact: bool = False,
        **options: Any,
    ) -> SimulatedModel:
        """A model with l(b) = setup + per_row x b; every size a bucket when `exact`, else a x1.25 ladder."""
        buckets = range(1, max_rows + 1) if exact else bucket_ladder(max_rows)
        return cls(name, {rows: setup_s + per_row_s * rows for rows in buckets}, slo_s, load, options=options)


@dataclass(slots=True)
class Disturbance:
    """How reality departs from the table: noise with coefficient of variation `cv`, a stall of `stall_s` in a share of
    `stall_share` of the batches, and `drift` (time in seconds -> factor)."""

    cv: float = 0.03
    stall_share: float = 0.0
    stall_s: float = 0.0
    drift: Callable[[float], float] | None = None


IN_SLO, LATE, REFUSED, UNKNOWN = 0, 1, 2, -1


@dataclass(slots=True)
class Outcomes:
    """What became of every request of a model, in order of arrival: `outcome` is IN_SLO, LATE or REFUSED, `elapsed_s`
    the time from arrival to answer or refusal, `on_arrival` whether it was refused at once; `batches` holds rows and
    seconds of each batch."""

    arrivals_s: Floats
    outcome: npt.NDArray[np.int8]
    elapsed_s: Floats
    on_arrival: npt.NDArray[np.bool_]
    batch_starts_s: Floats
    batch_rows: npt.NDArray[np.int64]
    batch_s: Floats
    refusals: Mapping[RefusalReason, int]


def simulate(
    models: Sequence[SimulatedModel],
    *,
    slots: int = 1,
    seed: int = 0,
    disturbance: Disturbance | None = None,
    lead_s: float = 0.0,
) -> list[Outcomes]:
    """Run `models` on one device with `slots` run slots; `lead_s` is host time per batch, overlapped with the batch
    before. Returns one `Outcomes` per model. The same arguments give the same result."""
    return _Simulation(models, slots, seed, disturbance or Disturbance(), lead_s).run()


class _Simulation:
    def __init__(
        self, models: Sequence[SimulatedModel], slots: int, seed: int, disturbance: Disturbance, lead_s: float
    ) -> None:
        self.lead_ns = round(lead_s * NS_PER_S)
        self.slots = [Slot("device", index) for index in range(slots)]
        self.scheduler = Scheduler(self.slots, self.lead_ns)
        self.disturbance = disturbance
        self.models = models
        self.queues = []
        self.tables: dict[object, dict[int, float]] = {}
        self.index: dict[object, int] = {}
        for number, model in enumerate(models):
            buckets = tuple(sorted(model.table_s))
            believed = model.table_s if model.believed_s is None else model.believed_s
            believed_ns = {rows: seconds * NS_PER_S for rows, seconds in believed.items()}
            table: dict[Hashable, dict[int, float]] = {(): believed_ns}
            slo_ns = None if model.slo_s is None else round(model.slo_s * NS_PER_S)
            policy = QueuePolicy(
                model.name, ("device",), buckets[-1], slo_ns, buckets, **{"max_concurrent": slots, **model.options}
            )
            queue = self.scheduler.add_queue(policy, LatencyModel(table, buckets))
            self.queues.append(queue)
            self.tables[queue] = {rows: seconds * NS_PER_S for rows, seconds in model.table_s.items()}
            self.index[queue] = number
        self.plan = self._plan()
        total = len(self.plan)
        self.outcome = [UNKNOWN] * total
        self.elapsed_ns = [0] * total
        self.on_arrival = [False] * total
        self.answered_rows: dict[int, int] = {}  # of requests answered in parts
        rng = np.random.default_rng(seed)
        sigma = math.sqrt(math.log(1 + disturbance.cv**2))
        self.noise = np.exp(-sigma * sigma / 2 + sigma * rng.standard_normal(total + 16)).tolist()
        self.stalls = (rng.random(total + 16) < disturbance.stall_share).tolist()
        self.run_batches = 0
        self.batches: list[list[tuple[int, int, int]]] = [[] for _ in models]
        # Ends of running batches, staging moments and wake-ups: (time, order, what, slot, dispatch)
        self.events: list[tuple[int, int, Dispatch | None, Slot]] = []
        self.order = 0
        self.now = 0
        self.free_ns = dict.fromkeys(self.slots, 0)
        self.wake: dict[Slot, int] = {}

    def _plan(self) -> list[tuple[int, int, int, int, int]]:
        """(arrival, model, rows, deadline, priority) of every request, in order of arrival."""
        merged: list[tuple[int, int, int, int, int]] = []
        for number, model in enumerate(self.models):
            load = model.load
            times = np.round(load.arrivals_s * NS_PER_S).astype(np.int64).tolist()
            count = len(times)
            rows = [load.rows] * count if isinstance(load.rows, int) else load.rows
            levels = [load.priorities] * count if isinstance(load.priorities, int) else load.priorities
            slos = model.slo_s if load.slos_s is None else load.slos_s
            if slos is None:
                deadlines = [NEVER_NS] * count
            elif isinstance(slos, float | int):
                deadlines = [time + round(slos * NS_PER_S) for time in times]
            else:
                deadlines = [time + round(slo * NS_PER_S) for time, slo in zip(times, slos, strict=True)]
            merged.extend(zip(times, [number] * count, rows, deadlines, levels, strict=True))
        merged.sort(key=itemgetter(0))
        return merged

    def run(self) -> list[Outcomes]:
        scheduler, plan, queues = self.scheduler, self.plan, self.queues
        position, count = 0, len(plan)
        enqueue, idle_slot, events = scheduler.enqueue, scheduler.idle_slot, self.events
        for slot in self.slots:  # as a worker does when it starts
            scheduler.next_step(slot, 0)
        while position < count or events:
            next_arrival = plan[position][0] if position < count else NEVER_NS
            if events and events[0][0] < next_arrival:
                self._event()
                continue
            if position >= count:
                self._event()
                continue
            # Arrivals of the same instant are taken in together, then a slot is woken: a fan-out is one batch.
            self.now = now = next_arrival
            touched = None
            while position < count and plan[position][0] == now:
                _, number, rows, deadline, priority = plan[position]
                queue = queues[number]
                refused = enqueue(queue, QueuedRequest(rows, now, deadline, priority, (), 1, position), now)
                position += 1
                if refused:
                    self._refuse(refused)
                touched = queue
            if events and events[0][0] <= now:
                continue  # a slot becomes free at this very moment: it decides
            wake = idle_slot(touched) if touched is not None else None
            if wake is not None:
                self._step(wake)
        return [self._outcomes(number) for number in range(len(self.models))]

    def _push(self, at: int, dispatch: Dispatch | None, slot: Slot) -> None:
        self.order += 1
        heapq.heappush(self.events, (at, self.order, dispatch, slot))

    def _event(self) -> None:
        at, order, dispatch, slot = heapq.heappop(self.events)
        if dispatch is None and self.wake.get(slot) != order:
            return
        self.now = max(self.now, at)
        if dispatch is not None:
            self._complete(dispatch)
            if self.lead_ns:
                return  # the next batch was staged before this one ended
        self._step(slot)

    def _step(self, slot: Slot) -> None:
        step = self.scheduler.next_step(slot, self.now)
        self.wake.pop(slot, None)
        if step.refused:
            self._refuse(step.refused)
        if isinstance(step, Dispatch):
            self._start(step)
            other = self.scheduler.spare_slot(slot.device)
            if other is not None:
                self._step(other)
        elif isinstance(step, WaitUntil):
            self._push(step.at_ns, None, slot)
            self.wake[slot] = self.order

    def _start(self, dispatch: Dispatch) -> None:
        queue, slot = dispatch.queue, dispatch.slot
        start = max(self.now + self.lead_ns, self.free_ns[slot])
        table = self.tables[queue]
        duration = table[dispatch.bucket] * self.noise[self.run_batches]
        if self.disturbance.drift is not None:
            duration *= self.disturbance.drift(start / NS_PER_S)
        if self.stalls[self.run_batches]:
            duration += self.disturbance.stall_s * NS_PER_S
        self.run_batches += 1
        end = start + max(1, int(duration))
        self.free_ns[slot] = end
        self.batches[self.index[queue]].append((start, dispatch.rows, end - start))
        self._push(end, dispatch, slot)
        if self.lead_ns:
            self._push(max(end - self.lead_ns, self.now + 1), None, slot)
            self.wake[slot] = self.order

    def _complete(self, dispatch: Dispatch) -> None:
        now = self.now
        for segment in dispatch.segments:
            request = segment.request
            position = request.payload
            if segment.rows != request.rows:
                rows = self.answered_rows[position] = self.answered_rows.get(position, 0) + segment.rows
                if rows < request.rows or self.outcome[position] != UNKNOWN:
                    continue
            self.outcome[position] = IN_SLO if now <= request.deadline_ns else LATE
            self.elapsed_ns[position] = now - request.arrival_ns
        # Host time of an overlapped batch is not the device's: it is timed from its start.
        begun = dispatch.start_ns if self.lead_ns else dispatch.dispatched_ns
        self.scheduler.completed(dispatch, now, now - begun, dispatch.late_rows(now))

    def _refuse(self, refused: Sequence[Refusal]) -> None:
        for refusal in refused:
            position = refusal.request.payload
            elapsed = self.now - refusal.request.arrival_ns
            self.outcome[position] = REFUSED
            self.elapsed_ns[position] = elapsed
            self.on_arrival[position] = elapsed == 0

    def _outcomes(self, number: int) -> Outcomes:
        mine = np.array([entry[1] for entry in self.plan], dtype=np.int64) == number
        batches = np.array(self.batches[number], dtype=np.int64).reshape(-1, 3)
        return Outcomes(
            np.array([entry[0] for entry in self.plan], dtype=np.float64)[mine] / NS_PER_S,
            np.array(self.outcome, dtype=np.int8)[mine],
            np.array(self.elapsed_ns, dtype=np.float64)[mine] / NS_PER_S,
            np.array(self.on_arrival, dtype=np.bool_)[mine],
            batches[:, 0] / NS_PER_S,
            batches[:, 1],
            batches[:, 2] / NS_PER_S,
            dict(self.queues[number].refused),
        )
