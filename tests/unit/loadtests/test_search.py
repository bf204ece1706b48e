"""The search for the highest load, against servers made of a number."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from loadtests.search import MAX_DOUBLINGS, Search


def found(limit: float, tolerance: float = 0.05, flaky: float = 0.0, seed: int = 0) -> tuple[float, int]:
    """The load that is found when loads up to `limit` pass, and the number of runs; a run fails by chance `flaky`."""
    rng = random.Random(seed)
    search, runs = Search(tolerance), 0
    while (factor := search.next()) is not None:
        runs += 1
        assert runs < 80
        search.tell(factor <= limit and rng.random() >= flaky)
    return search.low, runs


@settings(max_examples=200)
@given(st.floats(0.01, 1000), st.floats(0.01, 0.3))
def test_it_is_found_to_the_tolerance(limit: float, tolerance: float) -> None:
    """From below: what is reported has passed."""
    best, _ = found(limit, tolerance)
    assert best <= limit
    assert best >= limit / (1 + tolerance) - 1e-9


def test_one_bad_run_is_not_believed() -> None:
    """Each load that fails is tried again: by chance one in ten fails, and the result is near the limit mostly."""
    results = [found(20.0, flaky=0.1, seed=seed)[0] for seed in range(40)]
    assert sum(result >= 15 for result in results) >= 34


def test_it_ends() -> None:
    """When nothing passes, and when everything does."""
    assert found(0.0)[0] == 0.0
    best, runs = found(1e12)
    assert best == pytest.approx(2.0**MAX_DOUBLINGS)
    assert runs <= MAX_DOUBLINGS + 2
