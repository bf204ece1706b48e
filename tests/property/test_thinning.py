"""Properties of refusing before reading: every call that is refused unseen is counted for some model."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.frontend.thinning import ModelLoad, shares_of

COUNTS = st.integers(0, 10_000)


@st.composite
def loads(draw: st.DrawFn) -> list[ModelLoad]:
    """The windows of one to eight models, also such in which nothing was refused or nothing arrived."""
    arrivals = draw(st.lists(COUNTS, min_size=1, max_size=8))
    return [ModelLoad(arrived, draw(st.integers(0, arrived))) for arrived in arrivals]


@given(COUNTS, loads())
def test_no_refusal_is_lost(thinned: int, windows: list[ModelLoad]) -> None:
    """The shares are whole, none is negative, and together they are all the calls."""
    shares = shares_of(thinned, windows)
    assert len(shares) == len(windows)
    assert min(shares) >= 0
    assert sum(shares) == thinned


@given(COUNTS, loads())
def test_shares_follow_what_was_refused(thinned: int, windows: list[ModelLoad]) -> None:
    """Each share is its model's part of the refusals, to within one call."""
    total = sum(load.refused for load in windows)
    if total:
        for share, load in zip(shares_of(thinned, windows), windows, strict=True):
            assert abs(share - thinned * load.refused / total) < 1 + 1e-6
