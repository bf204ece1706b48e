"""Which versions to serve, and what to do next."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.config.model import All, Latest, Specific, VersionPolicy
from service.repository.version_policy import (
    TRANSITIONS,
    Event,
    IllegalTransition,
    Load,
    Snapshot,
    Unload,
    VersionState,
    missing_versions,
    next_action,
    transition,
    versions_to_serve,
)

READY, LOADING, UNLOADING = VersionState.READY, VersionState.LOADING, VersionState.UNLOADING


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Latest(1), (10,)),
        (Latest(2), (9, 10)),
        (Latest(9), (1, 9, 10)),
        (All(), (1, 9, 10)),
        (Specific((9, 4)), (9,)),
    ],
)
def test_a_policy_picks_from_what_is_there(policy: VersionPolicy, expected: tuple[int, ...]) -> None:
    """Numbers, not text: 10 is newer than 9."""
    assert versions_to_serve([9, 10, 1], policy) == expected


def test_versions_that_were_asked_for_and_are_not_there() -> None:
    """Only a list of versions can name one that is missing."""
    assert missing_versions([1, 2], Specific((2, 3, 5))) == (3, 5)
    assert missing_versions([], All()) == ()


def test_every_event_in_every_state_is_a_transition_or_an_error() -> None:
    """The table is the whole machine; an illegal event names both."""
    for state, event in product(VersionState, Event):
        if (state, event) in TRANSITIONS:
            assert transition(state, event) is TRANSITIONS[state, event]
        else:
            with pytest.raises(IllegalTransition, match=f"'{event.value}'.*{state.value}"):
                transition(state, event)


@pytest.mark.parametrize(
    ("snapshot", "policy", "action"),
    [
        # nothing is there, nothing is done
        (Snapshot((), {}), Latest(1), None),
        # the newest wanted version is loaded first
        (Snapshot((1, 2, 3), {}), Latest(2), Load(3)),
        (Snapshot((1, 2, 3), {3: LOADING}), Latest(2), Load(2)),
        (Snapshot((1, 2, 3), {3: READY, 2: READY}), Latest(2), None),
        # the old version stays until the new one is ready
        (Snapshot((1, 2), {1: READY, 2: LOADING}), Latest(1), None),
        (Snapshot((1, 2), {1: READY, 2: READY}), Latest(1), Unload(1)),
        # a new version that failed does not take the old one with it
        (Snapshot((1, 2), {1: READY}, failed=(2,)), Latest(1), None),
        # one of two wanted failed: the other is ready, so the surplus goes
        (Snapshot((1, 2, 3), {1: READY, 3: READY}, failed=(2,)), Latest(2), Unload(1)),
        # files that vanished are unloaded
        (Snapshot((), {1: READY}), Latest(1), Unload(1)),
        # a version being unloaded that is wanted again is waited for
        (Snapshot((1,), {1: UNLOADING}), Latest(1), None),
        # a model that is to go goes, oldest first
        (Snapshot((1, 2), {1: READY, 2: READY}, retired=True), All(), Unload(1)),
        (Snapshot((1, 2), {1: UNLOADING, 2: READY}, retired=True), All(), Unload(2)),
        (Snapshot((1, 2), {}, retired=True), All(), None),
    ],
)
def test_the_next_action(snapshot: Snapshot, policy: VersionPolicy, action: object) -> None:
    """One thing at a time, availability first."""
    assert next_action(snapshot, policy) == action


@given(
    before=st.sets(st.integers(1, 6)),
    after=st.sets(st.integers(1, 6)),
    broken=st.sets(st.integers(1, 6)),
    policy=st.one_of(
        st.builds(Latest, st.integers(1, 3)),
        st.just(All()),
        st.builds(Specific, st.sets(st.integers(1, 6), min_size=1).map(lambda v: tuple(sorted(v)))),
    ),
)
def test_a_change_of_versions_ends_and_never_leaves_the_model_without_one(
    before: set[int], after: set[int], broken: set[int], policy: VersionPolicy
) -> None:
    """Doing what is said reaches the wanted versions in a few steps; while any can be served, one is."""
    states = dict.fromkeys(versions_to_serve(before, policy), READY)
    failed: set[int] = set()
    served_before = bool(states)
    for _ in range(20):
        action = next_action(Snapshot(tuple(after), dict(states), frozenset(failed)), policy)
        match action:
            case None:
                break
            case Load(version):
                assert states.get(version) is None
                if version in broken:
                    failed.add(version)
                else:
                    states[version] = READY
            case Unload(version):
                del states[version]
        if served_before and versions_to_serve(after, policy):
            assert states
    else:
        pytest.fail("no end")
    wanted = set(versions_to_serve(after, policy))
    if wanted - broken or not wanted:
        assert set(states) == wanted - (broken - set(versions_to_serve(before, policy)))
