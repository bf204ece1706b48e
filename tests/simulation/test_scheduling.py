"""The scheduler's promises under load: goodput against the optimum, disturbances, models and classes side by side.

Every test prints nothing and is repeatable: seeds are stated. Bars leave room for the standard deviation of a run
(0.003 for Poisson arrivals, up to 0.009 for Gamma).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from service.scheduler import RefusalReason, bucket_ladder
from service.simulation import (
    Disturbance,
    Load,
    SimulatedModel,
    arrivals,
    clairvoyant,
    linear_table,
    padded_table,
    simulate,
    summarise,
)
from service.simulation.simulator import IN_SLO, LATE, REFUSED


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def classical(setup: float, per_row: float, slo: float) -> float:
    rows = max(1, math.floor((slo / 2 - setup) / per_row + 1e-9))
    return rows / (setup + per_row * rows)


@pytest.mark.parametrize(
    ("setup", "per_row", "factor", "process", "load", "ratio"),
    [
        (5, 0.5, 4, "poisson", 0.9, 0.97),
        (5, 0.5, 4, "poisson", 4.0, 0.95),
        (5, 0.5, 10, "gamma", 2.0, 0.95),
        (1, 0.05, 4, "gamma", 1.2, 0.93),
        (1, 0.05, 2, "gamma", 4.0, 0.79),
        (2, 2, 2, "poisson", 2.0, 0.92),
        (2, 2, 10, "gamma", 4.0, 0.95),
    ],
)
def test_goodput_against_the_optimum(
    setup: float, per_row: float, factor: float, process: str, load: float, ratio: float
) -> None:
    """Goodput stays within a few percent of what a clairvoyant would reach, on other seeds than the table's."""
    slo = factor * (setup + per_row)
    times = arrivals(process, load * classical(setup, per_row, slo) * 1e3, 4000, rng(11))
    model = SimulatedModel.linear("m", setup / 1e3, per_row / 1e3, 200, slo / 1e3, Load(times), exact=True)
    summary = summarise(simulate([model], seed=12)[0])
    best = clairvoyant(times[400:], linear_table(setup / 1e3, per_row / 1e3, 200), slo / 1e3) / 3600

    assert ratio <= summary.attainment / best <= 1.02  # noise may make a batch faster than the table
    assert summary.late_share < 0.015


def test_goodput_does_not_fall_with_load() -> None:
    """Goodput at 4 times the capacity is at least what it is at 1, 1.2 and 2 times."""
    goodput = []
    for load in (1.0, 1.2, 2.0, 4.0):
        times = arrivals("poisson", load * 1091, 5000, rng(3))
        model = SimulatedModel.linear("m", 0.005, 0.0005, 64, 0.022, Load(times))
        goodput.append(summarise(simulate([model], seed=4)[0]).goodput)

    assert all(later >= 0.98 * max(goodput[:index] or [0.0]) for index, later in enumerate(goodput))


@pytest.mark.parametrize("process", ["poisson", "gamma", "mmpp", "even", "diurnal"])
def test_every_arrival_has_one_outcome(process: str) -> None:
    """In time, late and refused add up to what arrived, and refusals to what the queue counted."""
    times = arrivals(process, 2000, 4000, rng(5))
    model = SimulatedModel.linear("m", 0.005, 0.0005, 64, 0.022, Load(times))
    (outcomes,) = simulate([model], seed=6)

    counts = {kind: int((outcomes.outcome == kind).sum()) for kind in (IN_SLO, LATE, REFUSED)}
    assert sum(counts.values()) == 4000
    assert counts[REFUSED] == sum(outcomes.refusals.values())
    assert outcomes.batch_rows.sum() == counts[IN_SLO] + counts[LATE]
    assert bool((outcomes.elapsed_s[outcomes.outcome == IN_SLO] <= 0.022).all())


def test_the_same_seed_gives_the_same_run() -> None:
    """Two runs with the same arguments are equal in every outcome, another seed is not."""

    def run(seed: int) -> tuple[list[int], list[float]]:
        times = arrivals("gamma", 1500, 2000, rng(7))
        model = SimulatedModel.linear("m", 0.005, 0.0005, 64, 0.022, Load(times))
        (outcomes,) = simulate([model], seed=seed)
        return outcomes.outcome.tolist(), outcomes.elapsed_s.tolist()

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_one_replica_more_carries_more() -> None:
    """Two run slots serve nearly twice what one does."""
    times = arrivals("poisson", 2182, 6000, rng(8))

    def goodput(slots: int) -> float:
        model = SimulatedModel.linear("m", 0.005, 0.0005, 64, 0.022, Load(times))
        return summarise(simulate([model], slots=slots, seed=1)[0]).goodput

    assert 1.6 < goodput(2) / goodput(1) < 2.0


def test_trim_recovers_most_of_the_padding() -> None:
    """On the x1.25 ladder attainment is within 0.03 of running every size exactly; powers of two cost more."""
    times = arrivals("poisson", 1.2 * 1091, 6000, rng(5))

    def attainment(buckets: list[int]) -> float:
        model = SimulatedModel("m", {rows: 0.005 + 0.0005 * rows for rows in buckets}, 0.022, Load(times))
        return summarise(simulate([model], seed=3)[0]).attainment

    exact, ladder = attainment(list(range(1, 65))), attainment(list(bucket_ladder(64)))
    assert exact - ladder < 0.03
    assert ladder > attainment([1, 2, 4, 8, 16, 32, 64])


NOISE_LOADS, DRIFT_LOADS = (0.9, 2.0), (0.6, 1.0)


@pytest.mark.parametrize(
    ("disturb", "loads", "attainment", "late"),
    [
        (lambda end: Disturbance(0.03), NOISE_LOADS, 0.76, 0.005),
        (lambda end: Disturbance(0.10), NOISE_LOADS, 0.71, 0.010),
        (lambda end: Disturbance(0.20), NOISE_LOADS, 0.60, 0.030),
        (lambda end: Disturbance(0.03, stall_share=0.005, stall_s=0.010), NOISE_LOADS, 0.75, 0.006),
        (lambda end: Disturbance(0.03, drift=lambda t: 1.5 if t > end / 2 else 1.0), DRIFT_LOADS, 0.74, 0.015),
        (
            lambda end: Disturbance(0.03, drift=lambda t: 1 + 0.3 * math.sin(10 * math.pi * t / end)),
            DRIFT_LOADS,
            0.90,
            0.006,
        ),
        (
            lambda end: Disturbance(0.03, drift=lambda t: 1.4 if int(40 * t / end) % 2 else 1.0),
            DRIFT_LOADS,
            0.74,
            0.008,
        ),
    ],
    ids=["cv 3%", "cv 10%", "cv 20%", "stalls", "step x1.5", "sine", "neighbour"],
)
def test_disturbances_cost_little(
    disturb: Callable[[float], Disturbance], loads: tuple[float, ...], attainment: float, late: float
) -> None:
    """Noise, stalls, a slower device and a neighbour that comes and goes are learned: few answers are late."""
    results = []
    for load in loads:
        times = arrivals("poisson", load * 1091, 6000, rng(5))
        model = SimulatedModel.linear("m", 0.005, 0.0005, 100, 0.022, Load(times), exact=True)
        results.append(summarise(simulate([model], seed=3, disturbance=disturb(float(times[-1])))[0]))

    assert np.mean([result.attainment for result in results]) > attainment
    assert np.mean([result.late_share for result in results]) < late


def test_a_wrong_profile_is_unlearned() -> None:
    """Believing the device twice as fast, or twice as slow, as it is costs a short time only."""
    times = arrivals("poisson", 0.6 * 1091, 6000, rng(5))
    table = {rows: 0.005 + 0.0005 * rows for rows in range(1, 65)}
    for factor in (0.5, 2.0):
        believed = {rows: factor * seconds for rows, seconds in table.items()}
        model = SimulatedModel("m", table, 0.022, Load(times), believed)
        assert summarise(simulate([model], seed=3)[0]).attainment > 0.99


def test_an_unknown_model_is_learned() -> None:
    """Starting from nothing the scheduler ends where a profile would have taken it, within 0.02."""
    times = arrivals("poisson", 1.2 * 1091, 8000, rng(5))

    def attainment(believed: Mapping[int, float] | None) -> float:
        model = SimulatedModel.linear("m", 0.005, 0.0005, 32, 0.022, Load(times))
        model.believed_s = believed
        return summarise(simulate([model], seed=3)[0], 0.3).attainment

    assert attainment({}) > attainment(None) - 0.02


def test_a_hopeless_belief_recovers() -> None:
    """A profile ten times too slow, by which every deadline is unreachable, is found out by a probe."""
    times = arrivals("poisson", 300, 3000, rng(5))
    table = {rows: 0.005 + 0.0005 * rows for rows in range(1, 33)}
    model = SimulatedModel("m", table, 0.022, Load(times), {rows: 10 * seconds for rows, seconds in table.items()})
    (outcomes,) = simulate([model], seed=3)

    assert outcomes.refusals[RefusalReason.UNREACHABLE] < 30
    assert summarise(outcomes, 0.3).attainment > 0.99


def test_early_refusal_behind_full_batches_is_free() -> None:
    """Where the largest batch binds, most refusals are made on arrival, and goodput is what full batches give."""
    times = arrivals("poisson", 4 * 8889, 12000, rng(5))
    model = SimulatedModel.linear("m", 0.001, 0.00005, 16, 0.0105, Load(times), exact=True)
    summary = summarise(simulate([model], seed=2)[0])

    assert summary.goodput > 0.98 * 16 / 0.0018
    assert summary.refused_on_arrival > 0.8 * summary.refused
    assert summary.refusal_p50_s < 0.001


def test_refusals_come_early() -> None:
    """At twice the capacity the median refusal comes within 0.35 of the objective."""
    times = arrivals("poisson", 2 * 1091, 6000, rng(1))
    model = SimulatedModel.linear("m", 0.005, 0.0005, 64, 0.022, Load(times))

    assert summarise(simulate([model], seed=2)[0]).refusal_p50_s < 0.35 * 0.022


def test_eagerness_moves_refusals_to_the_arrival() -> None:
    """`shed_eagerness` 0.8 makes most refusals on arrival at twice the capacity, and costs a few percent at most."""
    times = arrivals("poisson", 2 * 1091, 6000, rng(1))

    def run(eagerness: float) -> tuple[float, float]:
        model = SimulatedModel.linear("m", 0.005, 0.0005, 64, 0.022, Load(times), shed_eagerness=eagerness)
        summary = summarise(simulate([model], seed=2)[0])
        return summary.attainment, summary.refused_on_arrival / summary.refused

    patient, eager = run(0.0), run(0.8)
    assert eager[1] > 0.5 > patient[1]
    assert eager[0] > 0.95 * patient[0]


@pytest.mark.parametrize(("slos", "load", "worst", "total"), [
    ((55, 55, 55, 55), 0.9, 0.95, 0.96),
    ((55, 55, 55, 55), 2.0, 0.55, 0.59),
    ((30, 60, 120, 200), 0.6, 0.96, 0.97),
    ((30, 60, 120, 200), 1.2, 0.55, 0.88),
])  # fmt: skip
def test_models_side_by_side(slos: tuple[int, ...], load: float, worst: float, total: float) -> None:
    """Equal models, and models with different objectives, share a device by least laxity: none starves."""
    rates = []
    for slo in slos:
        rows = max(1, int((slo / (len(slos) + 1) - 5) / 0.5))
        rates.append(load * rows / (len(slos) * max(slo / (len(slos) + 1), 5 + 0.5 * rows)) * 1e3)
    horizon = 6000 / sum(rates)
    results = []
    for seed in (3, 13, 23):
        generator, models = rng(seed), []
        for number, (slo, rate) in enumerate(zip(slos, rates, strict=True)):
            times = arrivals("poisson", rate, int(horizon * rate * 1.3) + 50, generator)
            load_of = Load(times[times < horizon])
            models.append(SimulatedModel.linear(f"m{number}", 0.005, 0.0005, 390, slo / 1e3, load_of, exact=True))
        summaries = [summarise(outcomes) for outcomes in simulate(models, seed=0)]
        everybody = sum(s.in_slo for s in summaries) / sum(s.offered for s in summaries)
        results.append((min(s.attainment for s in summaries), everybody))

    assert np.mean([result[0] for result in results]) > worst
    assert np.mean([result[1] for result in results]) > total


@pytest.mark.parametrize(
    ("load", "total", "tight"), [(0.6, 0.995, 0.99), (0.9, 0.84, 0.72), (1.2, 0.67, 0.45), (2.0, 0.46, 0.24)]
)
def test_deadline_classes_all_get_served(load: float, total: float, tight: float) -> None:
    """Three deadline classes T, 2T, 5T of one model: the tightest is served too, where one queue would starve it."""
    generator = rng(4)
    rate = load * classical(5, 0.5, 44) * 1e3
    parts = []
    for slo in (0.022, 0.044, 0.110):
        times = arrivals("poisson", rate / 3, 2600, generator)
        parts.append(np.column_stack([times[times < 6000 / rate], np.full(int((times < 6000 / rate).sum()), slo)]))
    merged = np.concatenate(parts)
    merged = merged[np.argsort(merged[:, 0])]
    load_of = Load(merged[:, 0], slos_s=merged[:, 1].tolist())
    (outcomes,) = simulate([SimulatedModel.linear("m", 0.005, 0.0005, 200, 0.022, load_of, exact=True)], seed=0)

    served = (outcomes.outcome == IN_SLO)[600:]
    per_class = [float(served[merged[600:, 1] == slo].mean()) for slo in (0.022, 0.044, 0.110)]
    assert served.mean() > total
    assert per_class[0] > tight
    assert per_class == sorted(per_class)


def test_requests_with_several_rows() -> None:
    """Rows are conserved, requests of up to a batch are atomic, larger ones are answered once, in segments."""
    times = arrivals("poisson", 150, 2000, rng(9))
    rows = rng(10).choice([1, 2, 8, 40], 2000).tolist()
    model = SimulatedModel.linear("m", 0.005, 0.0005, 16, 0.1, Load(times, rows=rows))
    (outcomes,) = simulate([model], seed=1)

    assert summarise(outcomes).attainment > 0.5
    assert outcomes.batch_rows.max() <= 16
    for size in (1, 2, 8):
        mask = np.array(rows) == size
        assert (outcomes.outcome[mask] == IN_SLO).mean() > 0.6


def test_priorities_under_overload() -> None:
    """At twice the capacity the higher level keeps its promise nearly always, the lower one gets what is left."""
    times = arrivals("poisson", 2000, 6000, rng(2))
    levels = rng(3).choice([1, 2], 6000, p=[0.3, 0.7]).tolist()
    model = SimulatedModel.linear("m", 0.005, 0.0005, 64, 0.022, Load(times, priorities=levels), priority_levels=2)
    (outcomes,) = simulate([model], seed=1)

    high = (outcomes.outcome[np.array(levels) == 1] == IN_SLO).mean()
    low = (outcomes.outcome[np.array(levels) == 2] == IN_SLO).mean()
    assert high > 0.95
    assert 0.1 < low < high


def test_overlapped_host_time_costs_little() -> None:
    """One millisecond of host time per batch, overlapped, costs at most 0.03 of attainment at load 0.9."""
    times = arrivals("poisson", 0.9 * 1091, 6000, rng(1))

    def attainment(lead_s: float) -> float:
        model = SimulatedModel.linear("m", 0.005, 0.0005, 100, 0.022, Load(times), exact=True, max_concurrent=2)
        return summarise(simulate([model], seed=2, lead_s=lead_s)[0]).attainment

    assert attainment(0.001) > attainment(0.0) - 0.03


def test_no_objective_serves_everything() -> None:
    """Without an objective and below the capacity nothing is refused; above it the queue is bounded."""
    times = arrivals("poisson", 1000, 4000, rng(2))
    model = SimulatedModel.linear("m", 0.005, 0.0005, 32, None, Load(times))
    assert summarise(simulate([model], seed=1)[0]).attainment == 1.0

    times = arrivals("poisson", 4000, 8000, rng(2))
    model = SimulatedModel.linear("m", 0.005, 0.0005, 32, None, Load(times), max_queue_ns=200_000_000)
    (outcomes,) = simulate([model], seed=1)
    assert outcomes.refusals.keys() == {RefusalReason.QUEUE_FULL}
    assert outcomes.elapsed_s[outcomes.outcome != REFUSED].max() < 0.25


def test_the_optimum_counts_padding() -> None:
    """The optimum of a padded table is not above that of the exact one."""
    times = arrivals("poisson", 1200, 600, rng(1))
    exact = clairvoyant(times, linear_table(0.005, 0.0005, 64), 0.022)
    padded = clairvoyant(times, padded_table({rows: 0.005 + 0.0005 * rows for rows in (1, 8, 64)}), 0.022)

    assert padded < exact
