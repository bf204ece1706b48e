"""Who breaks whose promise on a shared device."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.clock import NS_PER_MS
from service.repository.neighbours import Neighbour, conflicts

ONE_SLOT = {"cuda:0": (1, 1)}


def model(name: str, shortest_ms: float, slo_ms: float | None, slots: dict[str, tuple[int, int]]) -> Neighbour:
    slo_ns = None if slo_ms is None else int(slo_ms * NS_PER_MS)
    return Neighbour(name, slots, slo_ns, int(shortest_ms * NS_PER_MS))


def test_a_slow_model_breaks_the_promise_of_a_fast_one() -> None:
    """Whichever of the two comes second; both numbers and the device are named."""
    slow, fast = model("slow", 30, 200, ONE_SLOT), model("fast", 1, 20, ONE_SLOT)
    for newcomer, other in ((slow, fast), (fast, slow)):
        (said,) = conflicts(newcomer, [other])
        assert "'slow' takes 30 ms" in said
        assert "'fast'" in said
        assert "latency_slo_ms 20" in said
        assert "cuda:0" in said


def test_what_fits_together_is_not_mentioned() -> None:
    """The neighbour's shortest batch and its own, exactly within the objective."""
    assert conflicts(model("a", 15, None, ONE_SLOT), [model("b", 5, 20, ONE_SLOT)]) == []
    assert len(conflicts(model("a", 15.001, None, ONE_SLOT), [model("b", 5, 20, ONE_SLOT)])) == 1


def test_without_a_promise_nothing_breaks() -> None:
    """Nor where it could not be kept alone, which is said elsewhere."""
    assert conflicts(model("a", 50, None, ONE_SLOT), [model("b", 5, None, ONE_SLOT)]) == []
    assert conflicts(model("a", 50, None, ONE_SLOT), [model("b", 25, 20, ONE_SLOT)]) == []


def test_where_they_need_not_meet_nothing_breaks() -> None:
    """Another device, a second one, or a run slot that the slow model cannot take."""
    fast = model("fast", 1, 20, ONE_SLOT)
    assert conflicts(model("slow", 30, None, {"cpu": (1, 1)}), [fast]) == []
    assert conflicts(model("slow", 30, None, {"cuda:0": (1, 2)}), [fast]) == []
    both = model("fast", 1, 20, {"cuda:0": (1, 1), "cuda:1": (1, 1)})
    assert conflicts(model("slow", 30, None, ONE_SLOT), [both]) == []


def test_versions_of_one_model_are_no_neighbours() -> None:
    """A new version replaces the old one."""
    assert conflicts(model("m", 30, 20, ONE_SLOT), [model("m", 30, 20, ONE_SLOT)]) == []


@given(st.integers(1, 100), st.integers(1, 100), st.integers(1, 100))
def test_a_longer_objective_never_adds_a_conflict(one_ms: int, other_ms: int, slo_ms: int) -> None:
    """Promising less is always safe."""
    slow = model("slow", one_ms, None, ONE_SLOT)
    if other_ms <= slo_ms:
        tight = conflicts(slow, [model("m", other_ms, slo_ms, ONE_SLOT)])
        loose = conflicts(slow, [model("m", other_ms, slo_ms + 1, ONE_SLOT)])
        assert len(loose) <= len(tight)
