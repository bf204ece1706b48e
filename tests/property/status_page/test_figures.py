"""Properties of the status page's figures: whatever is counted, in whatever steps."""

from __future__ import annotations

import itertools
from bisect import bisect_left

from hypothesis import given
from hypothesis import strategies as st

from service.clock import NS_PER_MS
from service.metrics.buckets import DURATION_BOUNDS_NS
from service.status_page.causes import broken, likely_cause
from service.status_page.counts import NO_COUNTS, Counts, added, difference
from service.status_page.facts import Facts, State
from service.status_page.history import History, Window, latency_ms
from service.status_page.quantiles import quantile
from service.status_page.verdict import Level, judge

REASONS = ("overloaded", "expired", "unreachable", "execution", "invalid", "cancelled", "draining", "odd")
amounts = st.integers(0, 10_000)
tallies = st.dictionaries(st.sampled_from(REASONS), st.integers(1, 1000), max_size=4)
CELLS = len(DURATION_BOUNDS_NS) + 1


@st.composite
def counts(draw: st.DrawFn) -> Counts:
    """What happened in a stretch of time."""
    cells = tuple(draw(st.lists(st.integers(0, 50), min_size=CELLS, max_size=CELLS)))
    requests = sum(cells)
    return Counts(
        requests,
        draw(st.integers(0, requests)),
        draw(amounts) * NS_PER_MS,
        draw(amounts) * NS_PER_MS,
        draw(amounts),
        draw(amounts),
        cells,
        tuple(draw(st.lists(amounts, min_size=19, max_size=19))),
        draw(tallies),
        draw(tallies),
    )


@given(st.lists(counts(), max_size=6))
def test_stretches_that_follow_each_other_add_up(parts: list[Counts]) -> None:
    """The difference of two readings is what happened between them, however it is cut."""
    readings = [NO_COUNTS]
    for part in parts:
        readings.append(added([readings[-1], part]))
    again = [difference(after, before) for before, after in itertools.pairwise(readings)]
    assert again == parts
    assert difference(readings[-1], readings[0]) == added(again) or not parts


@given(st.lists(st.floats(0, 30_000), min_size=1, max_size=200), st.floats(0.01, 1))
def test_a_quantile_lies_in_the_cell_of_the_true_one(values_ms: list[float], share: float) -> None:
    """Between the bounds around the value of that rank."""
    ns = sorted(value * NS_PER_MS for value in values_ms)
    cells = [0] * CELLS
    for value in ns:
        cells[bisect_left(DURATION_BOUNDS_NS, value)] += 1
    found = quantile(share, cells, DURATION_BOUNDS_NS)
    assert found is not None
    rank = share * len(ns)
    true = ns[max(0, min(len(ns) - 1, -int(-rank // 1) - 1))]
    at = bisect_left(DURATION_BOUNDS_NS, true)
    lower = 0 if at == 0 else DURATION_BOUNDS_NS[min(at, CELLS - 1) - 1]
    upper = DURATION_BOUNDS_NS[min(at, CELLS - 2)]
    assert lower <= found <= upper


@given(st.lists(st.integers(0, 50), min_size=CELLS, max_size=CELLS), st.floats(0, 1), st.floats(0, 1))
def test_quantiles_are_ordered(cells: list[int], one: float, other: float) -> None:
    """A larger share is never answered sooner."""
    low, high = sorted((one, other))
    first, second = quantile(low, cells, DURATION_BOUNDS_NS), quantile(high, cells, DURATION_BOUNDS_NS)
    assert (first is None) == (second is None) == (sum(cells) == 0)
    if first is not None and second is not None:
        assert first <= second


@given(counts(), st.integers(1, 10_000))
def test_the_objective_bounds_a_quantile_only_downwards(counted: Counts, slo_ms: int) -> None:
    """Knowing how many were late never makes a latency longer, and never shorter than the objective."""
    for share in (0.5, 0.95, 0.99):
        plain, bounded = latency_ms(share, counted), latency_ms(share, counted, slo_ms * NS_PER_MS)
        if plain is not None and bounded is not None:
            assert min(plain, slo_ms) <= bounded <= plain


steps = st.lists(st.tuples(st.integers(1, 4), counts(), st.integers(0, 100)), max_size=20)


@given(steps, st.integers(1, 12))
def test_a_window_holds_what_ended_in_it(happened: list[tuple[int, Counts, int]], width: int) -> None:
    """Whatever steps were idle."""
    history, total, step = History(), NO_COUNTS, 0
    told: list[tuple[int, Counts, int]] = []
    for gap, part, offered in happened:
        step += gap
        total = added([total, part])
        history.observe(step, 1, total, offered, offered // 2)
        told.append((step, part, offered))
    window = history.window(step, width)
    within = [(part, offered) for at, part, offered in told if step - width < at <= step]
    assert window.offered == sum(offered for _, offered in within)
    assert window.in_time == sum(offered // 2 for _, offered in within)
    assert window.counts.requests == sum(part.requests for part, _ in within)
    assert sum(window.counts.request_cells) == window.counts.requests
    assert len(history.points(step)) == 60


@given(
    counts(),
    st.integers(0, 1000),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0.5, 0.999),
    st.one_of(st.none(), st.floats(0.1, 10)),
    st.floats(0, 3),
    st.sampled_from(State),
)
def test_every_verdict_says_something_and_only_a_loss_is_a_breach(
    counted: Counts,
    offered: int,
    kept: float,
    kept_now: float,
    target: float,
    scale: float | None,
    saturation: float,
    state: State,
) -> None:
    """A promise kept above the target is never called broken, one below it never kept; a breach has a cause."""
    minute = Window(offered, int(offered * kept), counted)
    recent = Window(offered // 4, int(offered // 4 * kept_now))
    facts = Facts(state, "", 20 * NS_PER_MS, minute, recent, scale, scale, saturation)
    verdict = judge(facts, target)
    assert verdict.text or state is State.FAILED
    share = minute.attainment
    if state not in (State.READY, State.RETIRING):
        return
    if share is None:
        assert verdict.level is Level.IDLE
    elif share >= target:
        assert verdict.level in (Level.KEEPING, Level.AT_RISK)
    else:
        assert verdict.level in (Level.BREACHING, Level.AT_RISK)
        assert verdict.cause
    cause, why = likely_cause(facts)
    assert bool(cause) == bool(why)
    assert all(count > 0 for count in broken(minute).values())
