"""Figures and tables of the goodput benchmark, from made-up runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from benchmarks.bare_session import SessionTimes, slowness
from benchmarks.goodput_plot import plot
from benchmarks.goodput_results import Cell, Run, Subject, figures, series, tables
from benchmarks.outcomes import Outcomes

GOOD = Outcomes(10.0, 1000, 900, 0, 100, 0, 0, 0.5, 0.9, 0.1, 0.3, 0.001)
TIMES = SessionTimes([1, 2], [1.0, 1.5], [1.0, 1.5], [1.0, 1.5])


def subject(goods: list[list[int]], drift: float = 1.0, lag: float = 0.001) -> Subject:
    """One run per load and repetition, with this many good answers of an optimum of 1000."""
    made = Subject("heavy", 0.01, TIMES, np.array([0.001, 0.0015]), 1333.0)
    for index, per_load in enumerate(goods):
        outcomes = [dataclasses.replace(GOOD, good=good, lag_p99_t=lag) for good in per_load]
        cell = Cell("heavy", "poisson", 1000.0 * (index + 1), float(index + 1))
        threads = {"run": (900, 1), "ingress": (100, 1)}
        made.runs[cell] = [Run(0, 1000.0, o, 1000, 1.0, threads, drift=drift) for o in outcomes]
    return made


def test_goodput_is_divided_by_the_optimum_of_its_own_run() -> None:
    """The figure is the median over repetitions, held against the bar of its load."""
    found = {figure.name: figure for figure in figures(subject([[960, 970, 990]]))}
    ratio = found["heavy, poisson, 1.00 x R2 = 1000/s: goodput / optimum"]
    assert ratio.measured == pytest.approx(0.97)
    assert ratio.verdict == "met"


def test_a_fall_from_one_load_to_a_higher_one_is_found() -> None:
    """900, 950, 850: the last is 850/950 of the best before; the median repetition counts."""
    found = {figure.name: figure for figure in figures(subject([[900] * 3, [950] * 3, [850] * 3]))}
    fall = found["heavy, poisson: goodput at a load / best at a lower one"]
    assert fall.runs == pytest.approx((850 / 950,) * 3)
    assert fall.verdict == "missed"


@pytest.mark.parametrize(("drift", "lag", "why"), [(1.2, 0.001, "changed by 20%"), (1.0, 0.02, "send lag p99 2.0%")])
def test_a_disturbed_run_is_doubtful(drift: float, lag: float, why: str) -> None:
    """Neither met nor missed, and the reason is given, for cells and series alike."""
    found = figures(subject([[900], [900]], drift, lag))
    assert {figure.verdict for figure in found} <= {"doubtful", "-"}
    assert all(why in figure.doubt for figure in found)


def test_a_slow_machine_is_no_fall() -> None:
    """Runs are compared at one pace: less goodput while a bare session is slower by as much is the same."""
    made = subject([[900], [720]])
    list(made.runs.values())[1][0].slowness = 1.25
    found = {figure.name: figure for figure in figures(made)}
    assert found["heavy, poisson: goodput at a load / best at a lower one"].measured == pytest.approx(1.0)


def test_slowness_is_the_mean_over_the_sizes_timed() -> None:
    """Geometric: twice as slow at one size and twice as fast at another is no change."""
    table = np.array([0.001, 0.0015])
    assert slowness(SessionTimes([1, 2], [2.0, 3.0], [], []), table) == pytest.approx(2.0)
    assert slowness(SessionTimes([1, 2], [2.0, 0.75], [], []), table) == pytest.approx(1.0)


def test_tables_have_a_cell_for_every_column() -> None:
    """A row that is too short or too long would shift the numbers under other names."""
    for table in tables(subject([[900, 910], [950, 940]])):
        assert len(table.rows) == 2
        assert {len(row) for row in table.rows} == {len(table.columns)}


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    """A PNG file of some size, without a display."""
    plot([series(subject([[900, 910], [950, 940]]), "poisson")], tmp_path / "g.png")
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")


def test_goodput_is_compared_with_triton_in_the_units_of_each_machine() -> None:
    """On a machine half as fast, half of its goodput is as good; the absolute bar is missed all the same."""
    slow = np.interp(np.arange(1, 33), [1, 32], [0.010, 2 * 0.01735])
    made = Subject("cheap", 0.05, TIMES, slow, 700.0)
    outcomes = dataclasses.replace(GOOD, good=7080)
    made.runs[Cell("cheap", "poisson", 3000.0, 4.0)] = [Run(0, 3000.0, outcomes, 8000, 1.0, {})]
    found = {figure.name.split(": ", 1)[1]: figure for figure in figures(made)}
    assert found["goodput; bar: Triton hand-tuned"].verdict == "missed"
    relative = found["goodput / bare rows/s; bar: Triton's"]
    assert relative.measured == pytest.approx(708 * 2 * 0.01735 / 32)
    assert relative.bar == pytest.approx(1412 * 0.01735 / 32, abs=1e-3)
    assert relative.verdict == "met"
