"""The plan of a run: every request with its time, drawn before the first is sent.

Promise: the same scenario, seed and capacity give the same plan to the nanosecond, however many workers share it. Each
of the things drawn has a generator of its own, seeded by the scenario's seed and a constant, so that adding priorities
to an entry does not move its arrivals."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loadtests import pacer as pacers
from loadtests import trace
from loadtests.errors import LoadTestError, ScenarioError
from loadtests.pacer import Pacer
from loadtests.scenario import (
    Closed,
    Constant,
    Gamma,
    Mmpp,
    OpenArrivals,
    Poisson,
    Ramp,
    Replay,
    Scenario,
    Serverless,
    Steps,
)

NS = 1_000_000_000
# What each generator is for: part of its seed.
_ARRIVALS, _WARM_UP, _ENTRY, _ROWS, _PRIORITY, _VARIANT, _CANCEL, _TRACE = range(1, 9)
# A closed loop has no plan: its requests are taken from a list of this length, over and over.
CLOSED_CYCLE = 65_536


@dataclass(frozen=True, slots=True)
class Plan:
    """All requests by intended time (ns from the start of the run). `template` counts within the entry's templates;
    `deadline_ns` and `cancel_ns` are after the request is sent, 0 for none. Requests before `warm_up_ns` do not
    count."""

    intended_ns: npt.NDArray[np.int64]
    entry: npt.NDArray[np.uint16]
    template: npt.NDArray[np.uint32]
    deadline_ns: npt.NDArray[np.int64]
    cancel_ns: npt.NDArray[np.int64]
    warm_up_ns: int
    end_ns: int
    concurrency: int = 0  # of a closed loop

    def __len__(self) -> int:
        return len(self.intended_ns)

    def share(self, worker: int, workers: int) -> Plan:
        """Every `workers`-th request, beginning with `worker`."""
        part = slice(worker, None, workers)
        concurrency = len(range(worker, self.concurrency, workers))
        return Plan(
            self.intended_ns[part],
            self.entry[part],
            self.template[part],
            self.deadline_ns[part],
            self.cancel_ns[part],
            self.warm_up_ns,
            self.end_ns,
            concurrency,
        )

    def digest(self) -> str:
        """A short hash of all of it: two runs with the same one asked for the same thing."""
        hasher = hashlib.sha256()
        for array in (self.intended_ns, self.entry, self.template, self.deadline_ns, self.cancel_ns):
            hasher.update(np.ascontiguousarray(array).tobytes())
        return hasher.hexdigest()[:16]


def pacer_of(arrivals: OpenArrivals, capacity: float | None, seed: Sequence[int]) -> Pacer:
    """The pacer a scenario asks for. `capacity` turns rates such as 0.8x into requests per second.

    Raises `LoadTestError` (a trace that cannot be read) and `ScenarioError` (a capacity is needed).
    """
    if isinstance(arrivals, Replay):
        rng = np.random.default_rng([*seed, _TRACE])
        minutes = None
        if arrivals.function is not None or arrivals.top is not None or arrivals.minutes is not None:
            first, last = arrivals.minutes or (1, trace.MINUTES_PER_DAY)
            minutes = trace.PerMinute(arrivals.function, arrivals.top, first, last)
        replay = pacers.Replay(trace.read(arrivals.file, arrivals.format, rng, minutes), arrivals.speed, arrivals.loop)
        if arrivals.rate is None:
            return replay
        return pacers.scaled(replay, arrivals.rate.per_second(capacity) / replay.mean_rate)
    if isinstance(arrivals, Ramp):
        start, to = arrivals.start.per_second(capacity), arrivals.to.per_second(capacity)
        return pacers.Ramp(start, to, arrivals.process, arrivals.cv)
    if isinstance(arrivals, Steps):
        steps = tuple(pacers.Step(step.rate.per_second(capacity), step.seconds) for step in arrivals.steps)
        return pacers.Steps(steps, arrivals.process, arrivals.cv)
    rate = arrivals.rate.per_second(capacity)
    if isinstance(arrivals, Constant):
        return pacers.Constant(rate)
    if isinstance(arrivals, Poisson):
        return pacers.Poisson(rate)
    if isinstance(arrivals, Gamma):
        return pacers.Gamma(rate, arrivals.cv)
    if isinstance(arrivals, Mmpp):
        return pacers.Mmpp(rate)
    assert isinstance(arrivals, Serverless)
    return pacers.Serverless(rate)


def build_plan(scenario: Scenario, counts: Sequence[int], capacity: float | None, factor: float = 1.0) -> Plan:
    """Draw the plan, with all rates times `factor`. `counts[i]` is the number of templates of entry i (rows x
    priorities x variants).

    Raises `LoadTestError` when there is nothing to send or too much.
    """
    seed = scenario.seed
    warm_up_ns, end_ns = round(scenario.warm_up * NS), round(scenario.total_s * NS)
    if isinstance(scenario.arrivals, Closed):
        entry = _shared_entries(scenario, CLOSED_CYCLE)
        times = np.zeros(CLOSED_CYCLE, np.int64)
        concurrency = scenario.arrivals.concurrency
    else:
        times, entry = _open(scenario, capacity, factor, warm_up_ns)
        concurrency = 0
        if not len(times):
            raise LoadTestError(f"scenario '{scenario.name}' sends nothing in {scenario.total_s:g} s; raise its rates")
    template = np.zeros(len(times), np.uint32)
    deadline = np.zeros(len(times), np.int64)
    cancel = np.zeros(len(times), np.int64)
    for index, spec in enumerate(scenario.load):
        mine = np.flatnonzero(entry == index)
        rows = _weighted(spec.rows, len(mine), [seed, _ROWS, index])
        priorities = spec.priority or {0: 1.0}
        priority = _weighted(priorities, len(mine), [seed, _PRIORITY, index])
        variant = np.random.default_rng([seed, _VARIANT, index]).integers(0, spec.variants, len(mine))
        # The order of `payload.templates`: rows, then variants, then priorities.
        template[mine] = (rows * spec.variants + variant) * len(priorities) + priority
        assert counts[index] == len(spec.rows) * spec.variants * len(priorities)
        deadline[mine] = round((spec.deadline or 0) * NS)
        if spec.cancel is not None:
            chosen = np.random.default_rng([seed, _CANCEL, index]).random(len(mine)) < spec.cancel.share
            cancel[mine] = np.where(chosen, round(spec.cancel.after * NS), 0)
    return Plan(times, entry, template, deadline, cancel, warm_up_ns, end_ns, concurrency)


def _open(
    scenario: Scenario, capacity: float | None, factor: float, warm_up_ns: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint16]]:
    """Times and entries of all requests, merged. The warm-up is Poisson at the rate with which the load begins."""
    times: list[npt.NDArray[np.int64]] = []
    entries: list[npt.NDArray[np.uint16]] = []

    def draw(arrivals: OpenArrivals, stream: int) -> npt.NDArray[np.int64]:
        pacer = pacers.scaled(pacer_of(arrivals, capacity, [scenario.seed, stream]), factor)
        parts = [pacer.times(scenario.duration, np.random.default_rng([scenario.seed, _ARRIVALS, stream])) + warm_up_ns]
        first = pacer.rate(0.0, scenario.duration)
        if warm_up_ns and first > 0:
            before = pacers.Poisson(first)
            rng = np.random.default_rng([scenario.seed, _WARM_UP, stream])
            parts.insert(0, before.times(scenario.warm_up, rng))
        return np.concatenate(parts)

    if scenario.arrivals is not None:
        assert not isinstance(scenario.arrivals, Closed)
        shared = draw(scenario.arrivals, 0)
        times.append(shared)
        entries.append(_shared_entries(scenario, len(shared)))
    for index, spec in enumerate(scenario.load):
        if spec.arrivals is not None:
            own = draw(spec.arrivals, index + 1)
            times.append(own)
            entries.append(np.full(len(own), index, np.uint16))
    merged = np.concatenate(times)
    order = np.argsort(merged, kind="stable")
    return merged[order], np.concatenate(entries)[order]


def _shared_entries(scenario: Scenario, count: int) -> npt.NDArray[np.uint16]:
    """Which entry each of the scenario's own arrivals is for, by weight."""
    shared = {index: spec.weight for index, spec in enumerate(scenario.load) if spec.arrivals is None}
    chosen = _weighted(shared, count, [scenario.seed, _ENTRY])
    return np.array(list(shared), np.uint16)[chosen]


def _weighted(weights: Mapping[int, float], count: int, seed: Sequence[int]) -> npt.NDArray[np.int64]:
    """`count` positions in `weights`, drawn by weight."""
    if len(weights) == 1:
        return np.zeros(count, np.int64)
    shares = np.array(list(weights.values()), np.float64)
    cumulated = np.cumsum(shares / shares.sum())
    drawn = np.random.default_rng(seed).random(count)
    return np.minimum(np.searchsorted(cumulated, drawn, side="right"), len(weights) - 1)


def capacity_of(scenario: Scenario, measured: float | None) -> float | None:
    """The capacity to plan with: the scenario's number, or what was measured. Raises `ScenarioError` if it is
    missing."""
    if scenario.capacity == "measure":
        if measured is None:
            raise ScenarioError("the capacity has not been measured")
        return measured
    return scenario.capacity
