"""The plan: every request before the first is sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from loadtests.errors import LoadTestError, ScenarioError
from loadtests.plan import CLOSED_CYCLE, Plan, build_plan
from loadtests.scenario import Scenario, parse_scenario

NS = 1_000_000_000


def scenario(text: str, **more: Any) -> Scenario:
    return parse_scenario({"name": "t", **yaml.safe_load(text), **more}, "t", Path())


def plan(text: str, capacity: float | None = None, factor: float = 1.0, **more: Any) -> Plan:
    made = scenario(text, **more)
    counts = [len(e.rows) * e.variants * len(e.priority or {0: 1}) for e in made.load]
    return build_plan(made, counts, capacity, factor)


TWO = """
duration: 10s
warm_up: 2s
arrivals: {kind: poisson, rate: 1000}
load:
  - {name: a, model: m, weight: 3, rows: {1: 0.75, 2: 0.25}, priority: {1: 0.5, 2: 0.5}, variants: 5}
  - {name: b, model: m, deadline: 20ms, cancel: {share: 0.25, after: 5ms}}
"""


def test_counts_and_shares() -> None:
    """Rates, weights, rows and cancellations come out as they were asked for, within what chance allows."""
    made = plan(TWO)
    assert len(made) == pytest.approx(12_000, rel=0.05)
    assert (np.diff(made.intended_ns) >= 0).all()
    assert made.intended_ns[-1] < 12 * NS
    assert np.mean(made.entry == 0) == pytest.approx(0.75, abs=0.02)
    first = made.template[made.entry == 0]
    assert first.max() == 2 * 5 * 2 - 1
    assert np.mean(first < 10) == pytest.approx(0.75, abs=0.02)  # one row
    assert np.mean(first % 2 == 0) == pytest.approx(0.5, abs=0.03)  # priority 1
    second = made.entry == 1
    assert set(made.deadline_ns[second]) == {20_000_000}
    assert set(made.deadline_ns[~second]) == {0}
    assert set(made.cancel_ns[second]) == {0, 5_000_000}
    assert np.mean(made.cancel_ns[second] > 0) == pytest.approx(0.25, abs=0.03)


def test_shares_make_the_whole() -> None:
    """However many workers: together they send the plan, nothing twice."""
    made = plan(TWO)
    parts = [made.share(worker, 3) for worker in range(3)]
    together = np.sort(np.concatenate([part.intended_ns for part in parts]))
    assert np.array_equal(together, made.intended_ns)
    assert made.digest() == plan(TWO).digest()
    assert made.digest() != plan(TWO, seed=2).digest()


def test_one_thing_does_not_move_another() -> None:
    """Giving requests a priority changes neither when they are sent nor which payload they have."""
    less = TWO.replace(", priority: {1: 0.5, 2: 0.5}", "")
    with_it, without = plan(TWO), plan(less)
    assert np.array_equal(with_it.intended_ns, without.intended_ns)
    assert np.array_equal(with_it.entry, without.entry)
    assert np.array_equal(with_it.template[with_it.entry == 0] // 2, without.template[without.entry == 0])


def test_own_arrivals_and_capacity() -> None:
    """Entries with arrivals of their own beside those that share; rates in units of the capacity; a factor on all."""
    text = """
    duration: 20s
    warm_up: 0s
    capacity: 500
    arrivals: {kind: steps, steps: [{rate: 0.5x, for: 10s}, {rate: 2x, for: 10s}]}
    load:
      - {name: a, model: m}
      - {name: b, model: m, arrivals: {kind: constant, rate: 10}}
    """
    made = plan(text, 500.0)
    a = made.intended_ns[made.entry == 0]
    assert np.count_nonzero(a < 10 * NS) == pytest.approx(2500, rel=0.1)
    assert np.count_nonzero(a >= 10 * NS) == pytest.approx(10_000, rel=0.05)
    assert np.count_nonzero(made.entry == 1) == pytest.approx(200, abs=1)
    assert np.count_nonzero(plan(text, 500.0, 0.5).entry == 1) == pytest.approx(100, abs=1)


def test_a_trace(tmp_path: Path) -> None:
    """Replayed, and compressed to a rate."""
    (tmp_path / "t.txt").write_text("\n".join(str(i / 10) for i in range(100)))
    text = f"""
    duration: 4s
    warm_up: 0s
    arrivals: {{kind: replay, file: {tmp_path}/t.txt, rate: 100}}
    load: [{{model: m}}]
    """
    made = plan(text)
    assert len(made) == pytest.approx(400, rel=0.03)


def test_a_closed_loop_has_no_times() -> None:
    """Only what is sent, over and over; the concurrency is shared."""
    text = "duration: 5s\narrivals: {kind: closed, concurrency: 10}\nload: [{model: m}]\n"
    made = plan(text)
    assert len(made) == CLOSED_CYCLE
    assert [made.share(worker, 3).concurrency for worker in range(3)] == [4, 3, 3]


def test_what_cannot_be_planned() -> None:
    """Nothing to send, no capacity to multiply, a trace that is not there."""
    with pytest.raises(LoadTestError, match="sends nothing"):
        plan("duration: 1ms\nwarm_up: 0s\narrivals: {kind: poisson, rate: 1}\nload: [{model: m}]\n")
    with pytest.raises(ScenarioError, match="needs a capacity"):
        plan("duration: 1s\narrivals: {kind: poisson, rate: 1x}\nload: [{model: m}]\n")
    with pytest.raises(LoadTestError, match="nowhere"):
        plan("duration: 1s\narrivals: {kind: replay, file: /nowhere}\nload: [{model: m}]\n")
