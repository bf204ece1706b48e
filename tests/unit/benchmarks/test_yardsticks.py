"""R2, the fluid line and recorded arrivals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.bare_session import SessionTimes
from benchmarks.yardsticks import capacity, draw, fluid

# l(b) = 5 + 0.5 b milliseconds up to 64 rows.
TABLE = (5 + 0.5 * np.arange(1, 65)) / 1e3


def test_capacity_is_the_largest_batch_that_fits_twice() -> None:
    """With T = 22 ms, 2 l(12) = 22 ms just fits: 12 rows in 11 ms."""
    assert capacity(TABLE, 0.022) == pytest.approx(12 / 0.011)


def test_capacity_below_two_single_batches_is_one_row_at_a_time() -> None:
    """T = 6 ms allows no batch to wait for another."""
    assert capacity(TABLE, 0.006) == pytest.approx(1 / 0.0055)


def test_fluid_meets_the_offered_rate_below_saturation() -> None:
    """At 500/s everything is answered."""
    assert fluid(TABLE, 0.022, 500) == 500


def test_fluid_under_overload_approaches_the_largest_batch_within_the_objective() -> None:
    """At an infinite rate the batch is limited by l(b) <= T alone: 34 rows in 22 ms."""
    assert fluid(TABLE, 0.0221, 1e9) == pytest.approx(34 / 0.022)


def test_fluid_is_zero_when_not_even_one_row_fits() -> None:
    """l(1) = 5.5 ms cannot meet 5 ms."""
    assert fluid(TABLE, 0.005, 100) == 0


@given(st.floats(1, 1e5), st.floats(1, 1e5))
def test_fluid_never_falls_with_the_offered_rate(one: float, other: float) -> None:
    """More offered load never means less goodput."""
    low, high = sorted((one, other))
    assert fluid(TABLE, 0.022, low) <= fluid(TABLE, 0.022, high) + 1e-9


@pytest.mark.parametrize(("kind", "variation"), [("poisson", 1.0), ("gamma3", 3.0)])
def test_arrivals_have_the_stated_rate_and_burstiness(kind: str, variation: float) -> None:
    """Gaps have the mean 1/rate and the coefficient of variation of the process; times stay within the duration."""
    times = draw(kind, 1000, 300, seed=1)
    gaps = np.diff(times)
    assert times[0] >= 0
    assert times[-1] < 300
    assert gaps.mean() == pytest.approx(1e-3, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.03)


def test_arrivals_repeat_with_the_seed() -> None:
    """The same seed draws the same arrivals, another seed others."""
    assert np.array_equal(draw("gamma3", 100, 5, seed=7), draw("gamma3", 100, 5, seed=7))
    assert not np.array_equal(draw("gamma3", 100, 5, seed=7)[:10], draw("gamma3", 100, 5, seed=8)[:10])


def test_unknown_arrivals_are_named() -> None:
    """A misspelt process is an error that says what is possible."""
    with pytest.raises(ValueError, match="'pareto': expected 'poisson' or 'gamma3'"):
        draw("pareto", 1, 1, seed=0)


def test_latency_table_interpolates_and_never_falls() -> None:
    """Between measured sizes latency is linear; a size slower than a larger one may be padded up to it."""
    times = SessionTimes([1, 2, 4, 6], [1.0, 3.0, 2.0, 4.0], [1.0, 3.0, 2.0, 4.0], [1.0, 3.0, 2.0, 4.0])
    assert times.table_s() * 1e3 == pytest.approx([1.0, 2.0, 2.0, 2.0, 3.0, 4.0])


def test_best_batch_is_the_one_with_most_rows_per_second() -> None:
    """4 rows in 2 ms beat 6 in 4 ms."""
    assert SessionTimes([1, 4, 6], [1.0, 2.0, 4.0], [1.0, 2.0, 4.0], [1.0] * 3).best() == (4, 2000.0)
