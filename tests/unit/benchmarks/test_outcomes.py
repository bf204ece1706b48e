"""Every request of a window is counted in exactly one outcome."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.load import RECORD, Records
from benchmarks.outcomes import classify

MS = 1_000_000
OK, EXPIRED, EXHAUSTED, UNAVAILABLE, INTERNAL, UNFINISHED = 0, 4, 8, 14, 13, -3


def records(rows: list[tuple[float, int, float]]) -> Records:
    """Records of (intended ms, status, latency ms), each sent 10 us late."""
    made = np.zeros(len(rows), dtype=RECORD)
    for index, (intended, status, latency) in enumerate(rows):
        made[index] = (index, status, 0, int(intended * MS), 10_000, int(latency * MS))
    return made


def test_each_status_has_its_outcome() -> None:
    """Answers count by the objective, refusals and expiries by status, everything else is lost."""
    found = classify(
        records(
            [
                (0, OK, 50),
                (1, OK, 50.1),
                (2, UNAVAILABLE, 1),
                (3, EXHAUSTED, 3),
                (4, EXPIRED, 60),
                (5, INTERNAL, 5),
                (6, UNFINISHED, -1e-6),
            ]
        ),
        slo_s=0.05,
        from_s=0,
        to_s=1,
    )
    counts = (found.offered, found.good, found.late, found.refused, found.expired, found.failed)
    assert counts == (7, 1, 1, 2, 1, 2)
    assert found.late_share == 0.5
    assert found.p99_t == pytest.approx(50.1 / 50)
    assert found.reject_p50_t == pytest.approx(3 / 50)
    assert found.lag_p99_t == pytest.approx(0.01 / 50)


def test_only_requests_intended_within_the_window_count() -> None:
    """What was meant for the warm-up does not count, however late its answer; the end is excluded."""
    found = classify(records([(999, OK, 5), (1000, OK, 5), (2999, OK, 5), (3000, OK, 5)]), 0.05, 1.0, 3.0)
    assert (found.offered, found.good, found.goodput) == (2, 2, 1.0)


def test_nothing_answered_leaves_no_percentile() -> None:
    """Percentiles of nothing are NaN, shares of nothing zero."""
    found = classify(records([(0, UNFINISHED, -1e-6)]), 0.05, 0, 1)
    assert math.isnan(found.p50_t)
    assert math.isnan(found.reject_p50_t)
    assert found.late_share == 0


@given(
    st.lists(
        st.tuples(
            st.floats(0, 2000),
            st.sampled_from([OK, EXPIRED, EXHAUSTED, UNAVAILABLE, 13, -1, -2, -3]),
            st.floats(0, 200),
        )
    )
)
def test_outcomes_add_up_to_what_was_offered(rows: list[tuple[float, int, float]]) -> None:
    """Whatever happened, no request is counted twice or forgotten."""
    found = classify(records(rows), 0.05, 0.5, 1.5)
    assert found.good + found.late + found.refused + found.expired + found.failed == found.offered
    assert found.offered == sum(500 * MS <= int(intended * MS) < 1500 * MS for intended, _, _ in rows)
