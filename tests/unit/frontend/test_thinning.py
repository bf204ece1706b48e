"""Refusing before reading: only in deep overload of everything in demand, never for longer than the overload lasts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.clock import NS_PER_MS, NS_PER_S
from service.frontend.thinning import HEADROOM, MAX_SHARE, MIN_OFFERED, WINDOW_NS, ModelLoad, Thinning, window_ns

loads = st.lists(
    st.integers(0, 5000).flatmap(lambda n: st.builds(ModelLoad, st.just(n), st.integers(0, n))), min_size=0, max_size=4
)


def after(*windows: tuple[int, list[ModelLoad]]) -> Thinning:
    thinning = Thinning()
    for thinned, models in windows:
        thinning.window(thinned, models)
    return thinning


def test_a_model_with_priorities_is_not_thinned() -> None:
    """A call that has not been read may be the urgent one."""
    deep = [ModelLoad(1000, 900), ModelLoad(1000, 900, ranked=True)]
    assert after((0, deep)).share == 0.0
    assert after((0, deep[:1])).share > 0.0
    assert after((0, [deep[0], ModelLoad(0, 0, ranked=True)])).share > 0.0


def test_nothing_is_thinned_while_requests_are_served() -> None:
    """A model that refuses little keeps every call."""
    assert after((0, [ModelLoad(1000, 100)])).share == 0.0


def test_a_few_refusals_are_no_overload() -> None:
    """One request that cannot be met, alone in its window, must not cost the next ones their answer."""
    for arrived in range(1, MIN_OFFERED):
        assert after((0, [ModelLoad(arrived, arrived)])).share == 0.0
    assert after((0, [ModelLoad(MIN_OFFERED, MIN_OFFERED)])).share > 0.0
    deep = (0, [ModelLoad(1000, 1000)])
    assert after(deep, (MIN_OFFERED, [ModelLoad(1, 1)])).share > 0.0
    assert after(deep, (3, [ModelLoad(1, 1)])).share == 0.0


def test_deep_overload_is_thinned_to_what_is_served_and_some_more() -> None:
    """The share settles where HEADROOM times the served requests are let through."""
    thinning = Thinning()
    offered, served = 1000, 200
    for _ in range(30):
        thinned = round(offered * thinning.share)
        arrived = offered - thinned
        thinning.window(thinned, [ModelLoad(arrived, max(0, arrived - served))])
    assert abs((1 - thinning.share) * offered - HEADROOM * served) < 20


def test_one_model_that_serves_ends_the_thinning() -> None:
    """Calls cannot be told apart unseen, so a model that is not overloaded protects all of them."""
    deep = (0, [ModelLoad(1000, 900)])
    assert after(deep, (500, [ModelLoad(500, 400), ModelLoad(10, 0)])).share == 0.0


def test_the_end_of_an_overload_ends_the_thinning_at_once() -> None:
    """The first window in which requests are served again lets every call through."""
    deep = (0, [ModelLoad(1000, 900)])
    assert after(deep, deep, (10, [ModelLoad(10, 0)])).share == 0.0


def test_calls_are_spread_evenly() -> None:
    """A share of a half refuses every second call, not the first half of them."""
    thinning = after(*[(0, [ModelLoad(1000, 1000 - round(500 / HEADROOM))])] * 20)
    decisions = [thinning.refuses() for _ in range(1000)]
    assert abs(sum(decisions) - 500) <= 10
    assert max(sum(decisions[i : i + 10]) for i in range(0, 1000, 10)) <= 6


@given(st.lists(st.tuples(st.integers(0, 5000), loads), max_size=20))
def test_some_calls_are_always_read(windows: list[tuple[int, list[ModelLoad]]]) -> None:
    """Whatever happened, the share stays within its bounds, so that the end of an overload is noticed."""
    assert 0.0 <= after(*windows).share <= MAX_SHARE


def test_a_window_holds_a_few_batches_and_is_bounded() -> None:
    """Twice the tightest objective, between 50 and 500 ms."""
    assert window_ns(0) == WINDOW_NS == 50 * NS_PER_MS
    assert window_ns(100 * NS_PER_MS) == 200 * NS_PER_MS
    assert window_ns(60 * NS_PER_S) == 500 * NS_PER_MS


def test_a_lighter_overload_goes_on_being_thinned() -> None:
    """Once calls are refused unseen, fewer of those that are read are refused; that alone does not end the thinning."""
    thinning = after((0, [ModelLoad(1000, 900)]))
    before = thinning.share
    thinning.window(900, [ModelLoad(100, 10)])
    assert thinning.share > before / 2
    thinning.window(900, [ModelLoad(100, 1)])
    assert thinning.share == 0.0
