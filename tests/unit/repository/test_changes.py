"""When files are complete: never before they have been quiet, always in the end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.repository.changes import FileFacts, Files, Watcher

QUIET = 10


def files(**sizes: int) -> Files:
    return {name: FileFacts(size, 0, 1) for name, size in sizes.items()}


def test_a_new_model_settles() -> None:
    """After a quiet time between two looks; then it is reported until it is brought."""
    watcher = Watcher(QUIET)
    assert watcher.look({"m": files(a=1)}, 0) == []
    assert watcher.unsettled
    assert watcher.look({"m": files(a=1)}, 9) == []
    assert watcher.look({"m": files(a=1)}, 10) == ["m"]
    watcher.brought("m", files(a=1))
    assert watcher.look({"m": files(a=1)}, 11) == []
    assert not watcher.unsettled


def test_a_file_that_grows_is_waited_for() -> None:
    """Every change begins the quiet time anew."""
    watcher = Watcher(QUIET)
    for now in range(0, 50, 5):
        assert watcher.look({"m": files(a=now)}, now) == []
    assert watcher.look({"m": files(a=45)}, 55) == ["m"]


def test_a_change_that_is_taken_back_is_none() -> None:
    """What serves is what lies there."""
    watcher = Watcher(QUIET)
    watcher.brought("m", files(a=1))
    assert watcher.look({"m": files(a=2)}, 0) == []
    assert watcher.look({"m": files(a=1)}, 20) == []
    assert not watcher.unsettled


def test_a_model_that_vanishes_is_reported_when_it_stays_away() -> None:
    """Moving a directory aside for a moment unloads nothing."""
    watcher = Watcher(QUIET)
    watcher.brought("m", files(a=1))
    assert watcher.look({}, 0) == []
    assert watcher.look({"m": files(a=1)}, 5) == []
    assert watcher.look({}, 10) == []
    assert watcher.look({}, 20) == ["m"]
    watcher.brought("m", {})
    assert watcher.look({}, 30) == []
    assert not watcher.unsettled


def test_one_that_came_and_went_is_forgotten() -> None:
    """Before anything was made of it."""
    watcher = Watcher(QUIET)
    watcher.look({"m": files(a=1)}, 0)
    watcher.look({}, 5)
    assert not watcher.unsettled


# A history: what one model's files are at each look, and how much time passes after it.
LOOKS = st.lists(
    st.tuples(st.dictionaries(st.sampled_from("abc"), st.integers(0, 3), max_size=3), st.integers(1, 15)), max_size=30
)


@given(LOOKS)
def test_whatever_comes_in_whatever_pieces(history: list[tuple[dict[str, int], int]]) -> None:
    """Nothing is brought that was not seen unchanged for the quiet time; what stays is brought in the end."""
    watcher = Watcher(QUIET)
    now = 0
    since, last = 0, files()
    brought = files()
    for sizes, passes in history:
        present = files(**sizes)
        if present != last:
            since, last = now, present
        models = {"m": present} if present else {}
        for name in watcher.look(models, now):
            assert name == "m"
            assert now - since >= QUIET
            assert present != brought
            watcher.brought("m", present)
            brought = present
        now += passes
    models = {"m": last} if last else {}
    for _ in range(2):
        for name in watcher.look(models, now):
            watcher.brought(name, last)
            brought = last
        now += QUIET
    assert brought == last
    assert watcher.look(models, now) == []
