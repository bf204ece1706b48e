"""The numbers of a run, on runs small enough to count by hand."""

from __future__ import annotations

import numpy as np
import pytest

from loadtests.outcome import Outcome
from loadtests.stats import analyse, intervals, percentile, recovery_s
from tests.unit.loadtests.runs import MS, records, run_of, steady


def test_a_run_by_hand() -> None:
    """Ten requests: six in time, one late, one refused, one out of time, one broken."""
    made = records(
        [(i, 0, 10.0 + i) for i in range(6)] + [(6.0, 0, 80.0), (7.0, 14, 2.0), (8.0, 4, 50.0), (9.0, 13, 1.0)]
    )
    total = analyse(run_of(made)).total
    assert total.offered == 10
    assert {name: n for name, n in total.outcomes.items() if n} == {
        "in_slo": 6, "late": 1, "refused_on_arrival": 1, "expired": 1, "error": 1,
    }  # fmt: skip
    assert total.errors == {"INTERNAL": 1}
    assert (total.offered_rps, total.goodput_rps, total.answered_rps) == (1.0, 0.6, 0.7)
    assert total.attainment == 0.6
    assert total.late_share == pytest.approx(1 / 7)
    assert (total.refused_share, total.error_share) == (0.1, 0.1)
    assert total.latency_ms.count == 7
    assert (total.latency_ms.p50, total.latency_ms.p99, total.latency_ms.max) == (13.0, 80.0, 80.0)
    assert total.reject_ms.p50 == 2.0


def test_the_warm_up_does_not_count() -> None:
    """Nor does it move the timeline."""
    made = records([(0.5, 0, 500.0), (2.5, 0, 1.0), (11.9, 0, 2.0)])
    analysis = analyse(run_of(made, warm_up_s=2.0))
    assert analysis.total.offered == 2
    assert analysis.total.latency_ms.max == 2.0
    line = analysis.timeline
    assert sum(line.offered) * line.width_s == pytest.approx(2)
    assert line.offered[2] > 0
    assert line.offered[-1] > 0


def test_cancelled_requests_are_nobodys_failure() -> None:
    """They are counted, and are in no share."""
    total = analyse(run_of(records([(1, 0, 1.0), (2, -4, 5.0), (3, -4, 5.0)]))).total
    assert total.outcomes["cancelled"] == 2
    assert total.attainment == 1.0


def test_nothing_at_all() -> None:
    """A run in which nothing was answered has shares of nothing, not of zero."""
    total = analyse(run_of(records([(1, 14, 1.0)]))).total
    assert total.attainment == 0.0
    assert total.late_share is None
    assert total.latency_ms.p99 is None


def test_percentiles_are_order_statistics() -> None:
    """The least value that so many percent do not exceed, as it was measured."""
    values = np.arange(1.0, 101.0)
    assert [percentile(values, share) for share in (1, 50, 99, 99.9, 100)] == [1, 50, 99, 100, 100]


def test_a_late_client_makes_a_run_void() -> None:
    """p99 of its lag above a hundredth of the shortest objective; one request in a thousand may be late."""
    made = steady(1000)
    made["sent_ns"][:5] += 20 * MS
    assert analyse(run_of(made)).void == []
    made["sent_ns"][:20] += 20 * MS
    analysis = analyse(run_of(made))
    assert len(analysis.void) == 1
    assert "sent late" in analysis.void[0]
    assert analysis.lag.limit_p99 == 0.5
    assert analyse(run_of(made, slos_s=(None,))).lag.limit_p99 == 1.0
    assert analyse(run_of(made, closed=True)).void == []


def test_a_busy_client_is_said() -> None:
    """A worker near the limit of its core is a note, whatever its lag."""
    run = run_of(steady())
    run.info.worker_cpu = [0.95]
    assert any("95%" in note for note in analyse(run).notes)


def test_recovery() -> None:
    """From the moment on from which at least 99 % of the rest is in time."""
    bad = [(10 + i / 100, 14, 1.0) for i in range(130)]  # until 11.3
    good = [(t / 100, 0, 1.0) for t in range(1130, 4000)]
    run = run_of(records(bad + good), duration_s=40.0)
    assert recovery_s(run, 10.0, 0.99) == pytest.approx(1.3 - 0.28, abs=0.02)  # 28 bad ones are 1 % of the rest
    assert recovery_s(run, 10.0, 1.0) == pytest.approx(1.3)
    assert recovery_s(run, 39.995, 0.99) is None  # nothing was sent later
    never = run_of(records([(i / 10, 14 if i % 10 == 0 else 0, 1.0) for i in range(100)]))
    assert recovery_s(never, 0.0, 0.99) is None


def test_intervals_hold_the_truth() -> None:
    """Of twenty runs with the same distribution, the 95 % intervals of the median miss it at most thrice."""
    missed = 0
    for seed in range(20):
        interval = intervals(run_of(steady(2000, seed=seed)))["p50_ms"]
        assert interval.low <= interval.value <= interval.high
        missed += not interval.low <= 10.0 <= interval.high
    assert missed <= 3


def test_the_timeline_adds_up() -> None:
    """Whatever the outcome, each request is in one bin of one curve."""
    rng = np.random.default_rng(0)
    made = records([(float(t), int(rng.choice([0, 14, 4, 13])), 1.0) for t in np.sort(rng.uniform(0, 10, 500))])
    line = analyse(run_of(made)).timeline
    parts = np.array([line.in_slo, line.late, line.refused, line.expired, line.error]).sum(axis=0)
    assert parts == pytest.approx(np.array(line.offered))
    assert len(Outcome) == 7
