"""Arrivals, the clairvoyant optimum, capacity figures and pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.simulation import arrivals, clairvoyant, fan_out, padded_table, read_trace
from service.simulation.arrivals import PROCESSES
from service.simulation.capacity import (
    Scenario,
    bisect_rate,
    classical,
    fluid,
    peak,
    replicas_for,
    run_trace,
    sustainable_rate,
    sweep,
)
from service.simulation.plot import plot_sweep

TABLE = {rows: 0.005 + 0.0005 * rows for rows in range(1, 65)}


def brute_force(times: list[float], table: list[float], slo: float) -> int:
    """The optimum by trying every sequence of contiguous batches."""
    best = 0

    def extend(first: int, free: float, served: int) -> None:
        nonlocal best
        best = max(best, served)
        for start in range(first, len(times)):
            for end in range(start, min(len(times), start + len(table))):
                done = max(free, times[end]) + table[end - start]
                if done <= times[start] + slo + 1e-12:
                    extend(end + 1, done, served + end - start + 1)

    extend(0, 0.0, 0)
    return best


@given(
    st.lists(st.floats(0.0, 20.0), min_size=1, max_size=7),
    st.lists(st.floats(0.1, 4.0), min_size=1, max_size=5),
    st.floats(0.5, 12.0),
)
def test_optimum_equals_brute_force(times: list[float], steps: list[float], slo: float) -> None:
    """The dynamic programme finds what trying everything finds, for any non-decreasing table."""
    table = np.sort(np.array(steps)).tolist()
    ordered = sorted(times)

    assert clairvoyant(np.array(ordered), np.array(table), slo) == brute_force(ordered, table, slo)


def test_optimum_of_nothing() -> None:
    """No arrivals, or an objective below one execution: nothing can be answered."""
    assert clairvoyant(np.array([]), np.array([1.0]), 5.0) == 0
    assert clairvoyant(np.array([1.0]), np.array([6.0]), 5.0) == 0


def test_optimum_refuses_disorder() -> None:
    """Arrivals and latencies must ascend."""
    with pytest.raises(ValueError, match="arrival"):
        clairvoyant(np.array([2.0, 1.0]), np.array([1.0]), 5.0)
    with pytest.raises(ValueError, match="latencies"):
        clairvoyant(np.array([1.0]), np.array([2.0, 1.0]), 5.0)


def test_padding_goes_to_the_next_bucket() -> None:
    """A padded table holds the latency of the next bucket for every size, and never falls."""
    assert padded_table({1: 1.0, 4: 3.0, 6: 2.0}).tolist() == [1.0, 3.0, 3.0, 3.0, 3.0, 3.0]


@pytest.mark.parametrize("process", PROCESSES)
def test_arrivals_have_their_rate(process: str) -> None:
    """Every process delivers the count asked for, ascending, at about the rate, the same for the same seed."""
    times = arrivals(process, 200.0, 20000, np.random.default_rng(1))

    assert len(times) == 20000
    assert (np.diff(times) >= 0).all()
    assert 20000 / times[-1] == pytest.approx(200.0, rel=0.2)
    assert (times == arrivals(process, 200.0, 20000, np.random.default_rng(1))).all()


def test_gamma_has_its_burstiness() -> None:
    """The coefficient of variation of the gaps is the one asked for."""
    gaps = np.diff(arrivals("gamma", 100.0, 40000, np.random.default_rng(1), cv=2.0))
    assert gaps.std() / gaps.mean() == pytest.approx(2.0, rel=0.05)


def test_arrivals_refuse_nonsense() -> None:
    """An unknown process and a rate of nothing are named."""
    with pytest.raises(ValueError, match="poisson, gamma"):
        arrivals("weibull", 1.0, 1, np.random.default_rng(1))
    with pytest.raises(ValueError, match="rate"):
        arrivals("poisson", 0.0, 1, np.random.default_rng(1))


def test_fan_out() -> None:
    """A call that fans out arrives several times at once."""
    assert fan_out(np.array([1.0, 2.0]), 2).tolist() == [1.0, 1.0, 2.0, 2.0]


def test_traces_from_files(tmp_path: Path) -> None:
    """One time per line starts at zero; counts per minute are spread in their minute; errors name the line."""
    lines, minutes = tmp_path / "lines.txt", tmp_path / "minutes.csv"
    lines.write_text("# seconds\n12.5\n\n10.0\n11\n")
    minutes.write_text("HashOwner,HashFunction,Trigger,1,2,3\na,f,http,2,0,1\nb,g,timer,1,,2\n")
    rng = np.random.default_rng(1)

    assert read_trace(lines, rng).tolist() == [0.0, 1.0, 2.5]
    assert np.bincount((read_trace(minutes, rng) // 60).astype(int)).tolist() == [3, 0, 3]

    lines.write_text("1.0\nsoon\n")
    with pytest.raises(ValueError, match=r"lines.txt:2: 'soon'"):
        read_trace(lines, rng)
    lines.write_text("# nothing\n")
    with pytest.raises(ValueError, match="no arrival times"):
        read_trace(lines, rng)
    minutes.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"1 .. 1440"):
        read_trace(minutes, rng)


def test_capacity_formulas() -> None:
    """The classical capacity, the fluid goodput and the peak of a known table."""
    assert classical(TABLE, 0.022) == pytest.approx(12 / 0.011)
    assert classical(TABLE, 0.006) == pytest.approx(1 / 0.0055)
    assert fluid(TABLE, 0.022, 500.0) == 500.0
    assert fluid(TABLE, 0.022, 2182.0) == pytest.approx(17 / 0.0135)
    assert fluid(TABLE, 0.004, 500.0) == 0.0
    assert peak(TABLE) == pytest.approx(64 / 0.037)


def test_replicas() -> None:
    """Replicas are rounded up; none help when one carries nothing."""
    assert replicas_for(1000.0, 400.0) == 3
    assert replicas_for(800.0, 400.0) == 2
    assert replicas_for(0.0, 400.0) == 1
    assert replicas_for(1000.0, 0.0) is None
    assert replicas_for(1e9, 1.0) is None


def test_bisection_finds_the_edge() -> None:
    """The bisection ends within 1 % of where the answer changes."""
    assert bisect_rate(lambda rate: rate < 70.0, 100.0) == pytest.approx(70.0, abs=0.5)


def test_sustainable_rate_is_below_the_optimum() -> None:
    """The sustainable load of the reference setting is about 0.8 of the classical capacity."""
    rate = sustainable_rate(TABLE, 0.022, Scenario(requests=4000))
    assert 0.7 < rate / classical(TABLE, 0.022) < 0.9


def test_sweep_and_picture(tmp_path: Path) -> None:
    """A sweep has a point per load, below the optimum; the picture is written where asked, as what was asked."""
    points = sweep(TABLE, 0.022, (0.5, 2.0), Scenario(requests=1500))
    assert len(points) == 2
    assert all(point.summary.goodput <= 1.03 * point.optimum for point in points)

    for name in ("a.png", "sub/b.svg"):
        plot_sweep(points, 0.022, tmp_path / name, "title")
        assert (tmp_path / name).stat().st_size > 1000
    with pytest.raises(ValueError, match=r"\.png, \.svg"):
        plot_sweep(points, 0.022, tmp_path / "c.gif", "title")


def test_a_trace_can_be_replayed() -> None:
    """Given arrival times a point has their rate and the optimum on them."""
    point = run_trace(TABLE, 0.022, np.arange(1, 2001) / 400.0, Scenario())
    assert point.summary.attainment == 1.0
    assert point.optimum == pytest.approx(400.0, rel=0.01)
