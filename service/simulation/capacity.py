"""How much load a model carries within its objective, and how many replicas a rate needs.

`classical` and `fluid` are formulas over a latency table; `sustainable_rate` asks the simulated scheduler.
Rates are rows per second, times seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from service.simulation.arrivals import Times, arrivals
from service.simulation.optimum import clairvoyant, padded_table
from service.simulation.simulator import Disturbance, Load, SimulatedModel, simulate
from service.simulation.summary import WARM_UP_SHARE, Summary, summarise

ATTAINMENT = 0.99  # the share of the offered requests the literature's "sustainable load" is defined by
BISECTIONS = 8  # of the interval up to 2.5 x the classical capacity: a resolution of 1 %
MOST_LOAD = 2.5
REQUESTS = 6_000  # per simulated point: standard deviation of attainment about 0.003 for Poisson arrivals
MAX_REPLICAS = 10_000


def classical(table_s: Mapping[int, float], slo_s: float) -> float:
    """R2 = b*/l(b*), the largest b with 2 l(b) <= SLO (wait one batch, run one batch); b* is at least the smallest
    bucket. The capacity Nexus and Symphony plan with; not an upper bound."""
    buckets = sorted(table_s)
    fitting = [rows for rows in buckets if 2 * table_s[rows] <= slo_s] or buckets[:1]
    return max(rows / table_s[rows] for rows in fitting)


def fluid(table_s: Mapping[int, float], slo_s: float, rate: float) -> float:
    """Goodput when requests come evenly: min(rate, b/l(b)), b the largest batch with l(b) + b/rate <= SLO. Rises with
    the rate; not an upper bound for random arrivals when b is small."""
    best = [rows / seconds for rows, seconds in table_s.items() if seconds + rows / rate <= slo_s]
    least = min(table_s)
    return min(rate, max(best, default=least / table_s[least] if table_s[least] <= slo_s else 0.0))


def peak(table_s: Mapping[int, float]) -> float:
    """Rows per second at the most efficient bucket, deadlines apart."""
    return max(rows / seconds for rows, seconds in table_s.items())


@dataclass(slots=True, frozen=True)
class Scenario:
    """What is offered and how it is judged: arrival process, its burstiness, noise of the service time, seed."""

    process: str = "poisson"
    cv: float = 3.0
    noise_cv: float = 0.03
    seed: int = 1
    requests: int = REQUESTS
    attainment: float = ATTAINMENT


@dataclass(slots=True, frozen=True)
class Point:
    """One offered rate: what the scheduler made of it, the optimum anybody could have, and the fluid line (per s)."""

    summary: Summary
    optimum: float
    fluid: float


def run_point(table_s: Mapping[int, float], slo_s: float, rate: float, scenario: Scenario) -> Summary:
    """Simulate one replica at `rate` requests of one row per second."""
    return _run(table_s, slo_s, _draw(rate, scenario), scenario)


def run_trace(table_s: Mapping[int, float], slo_s: float, times: Times, scenario: Scenario) -> Point:
    """Simulate one replica on these arrival times, with the clairvoyant optimum on the same."""
    summary = _run(table_s, slo_s, times, scenario)
    counted = times[int(len(times) * WARM_UP_SHARE) :]
    best = clairvoyant(counted, padded_table(dict(table_s)), slo_s) / max(float(counted[-1] - counted[0]), 1e-9)
    return Point(summary, best, fluid(table_s, slo_s, summary.rate))


def sweep(table_s: Mapping[int, float], slo_s: float, loads: tuple[float, ...], scenario: Scenario) -> list[Point]:
    """A point per load, in units of the classical capacity."""
    unit = classical(table_s, slo_s)
    return [run_trace(table_s, slo_s, _draw(load * unit, scenario), scenario) for load in loads]


def _draw(rate: float, scenario: Scenario) -> Times:
    return arrivals(scenario.process, rate, scenario.requests, np.random.default_rng(scenario.seed), scenario.cv)


def _run(table_s: Mapping[int, float], slo_s: float, times: Times, scenario: Scenario) -> Summary:
    model = SimulatedModel("model", table_s, slo_s, Load(times))
    (outcomes,) = simulate([model], seed=scenario.seed + 1, disturbance=Disturbance(scenario.noise_cv))
    return summarise(outcomes)


def sustainable_rate(table_s: Mapping[int, float], slo_s: float, scenario: Scenario) -> float:
    """The highest rate per second at which at least `scenario.attainment` of what is offered is answered in time, found
    by bisection to about 1 %; 0.0 when no rate is low enough (bursts hit any objective of few executions)."""

    def holds(rate: float) -> bool:
        return run_point(table_s, slo_s, rate, scenario).attainment >= scenario.attainment

    return bisect_rate(holds, MOST_LOAD * classical(table_s, slo_s))


def bisect_rate(holds: Callable[[float], bool], most: float) -> float:
    """The largest rate up to `most` for which `holds`, which must be true below it and false above."""
    low, high = 0.0, most
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def replicas_for(rate: float, per_replica: float) -> int | None:
    """Replicas that carry `rate` when one carries `per_replica` and the load is spread evenly; None when one carries
    nothing, or more than 10,000 would be needed."""
    if per_replica <= 0.0:
        return None
    needed = max(1, math.ceil(rate / per_replica - 1e-9))
    return needed if needed <= MAX_REPLICAS else None
