"""Quantiles, words, and the last minutes of a model version."""

from __future__ import annotations

import pytest

from service.clock import NS_PER_MS
from service.metrics.buckets import DURATION_BOUNDS_NS, ROWS_BOUNDS
from service.metrics.model import ModelMetrics
from service.metrics.shard import WINDOW_STEPS
from service.status_page.counts import NO_COUNTS, Counts, counts_of
from service.status_page.history import KEPT_STEPS, History, Point, Window, latency_ms
from service.status_page.quantiles import quantile, ratio
from service.status_page.words import duration, many, percent
from tests.unit.metrics.records import Request, batch


def cells(**counts: int) -> tuple[int, ...]:
    """Request cells with so many values up to `ms10` = 10 ms, and so on."""
    made = [0] * (len(DURATION_BOUNDS_NS) + 1)
    for name, count in counts.items():
        made[DURATION_BOUNDS_NS.index(int(name.removeprefix("ms")) * NS_PER_MS)] = count
    return tuple(made)


@pytest.mark.parametrize(
    ("share", "counted", "expected"),
    [
        (0.5, (0, 0, 0), None),
        (0.5, (10, 0, 0), 5.0),  # half of a cell from 0 to 10
        (0.5, (0, 10, 0), 15.0),  # half of one from 10 to 20
        (0.99, (99, 1, 0), 10.0),  # a rank on the border belongs to the cell that ends there
        (0.995, (99, 1, 0), 15.0),
        (0.5, (0, 0, 3), 20.0),  # beyond all bounds: the last one is all that is known
        (0.0, (0, 4, 0), 10.0),  # empty cells before the first value are passed over
        (1.0, (4, 4, 0), 20.0),
    ],
)
def test_a_quantile_is_interpolated_inside_its_cell(
    share: float, counted: tuple[int, ...], expected: float | None
) -> None:
    """As Prometheus' histogram_quantile does."""
    assert quantile(share, counted, (10.0, 20.0)) == pytest.approx(expected)


def test_a_share_of_nothing_is_not_known() -> None:
    """Neither 0 nor 1."""
    assert ratio(0, 0) is None
    assert ratio(1, 4) == 0.25


def test_a_latency_is_within_the_objective_when_late_answers_are_too_few() -> None:
    """The cell from 10 to 25 ms leaves open on which side of 20 ms its values are; the count of late ones does not."""
    counts = Counts(requests=100, late=1, request_cells=cells(ms25=100))
    assert latency_ms(0.99, counts) == pytest.approx(24.85)
    assert latency_ms(0.99, counts, 20 * NS_PER_MS) == 20
    assert latency_ms(0.999, counts, 20 * NS_PER_MS) == pytest.approx(24.985)
    assert latency_ms(0.5, counts, 20 * NS_PER_MS) == pytest.approx(17.5)
    assert latency_ms(0.99, NO_COUNTS, 20 * NS_PER_MS) is None


@pytest.mark.parametrize(
    ("share", "text"),
    [(1, "100 %"), (0, "0 %"), (0.99, "99 %"), (0.99999, "99.99 %"), (0.00001, "0.01 %"), (0.12345, "12.35 %")],
)
def test_percents_never_round_to_all_or_nothing(share: float, text: str) -> None:
    """100 % is said of all requests only."""
    assert percent(share) == text


def test_durations_have_three_digits_and_counts_a_plural() -> None:
    """In the unit that suits."""
    assert [duration(ms) for ms in (0.4213, 20, 999.4, 1500)] == ["0.421 ms", "20 ms", "999 ms", "1.5 s"]
    assert [many(count, "request") for count in (0, 1, 12_345)] == ["0 requests", "1 request", "12,345 requests"]


def test_counts_are_what_was_recorded() -> None:
    """Of all shards of a model version together."""
    metrics = ModelMetrics("m", "1")
    first, second = metrics.shard(), metrics.shard()
    first.record_batch(batch(10, rows=3, requests=2), [Request(4 * NS_PER_MS), Request(8 * NS_PER_MS, deadline_ns=9)])
    second.record_refusal("overloaded", 0, 5)
    second.record_failure("execution", 0, 5)
    counts = counts_of(metrics.sum())
    assert (counts.requests, counts.late, counts.batches, counts.batch_rows) == (2, 1, 1, 3)
    assert counts.queue_ns == (6 + 2) * NS_PER_MS
    assert counts.compute_ns == 2 * 13 * NS_PER_MS
    assert counts.batch_cells[ROWS_BOUNDS.index(3)] == 1
    assert sum(counts.request_cells) == 2
    assert counts.refusals == {"overloaded": 1}
    assert counts.failures == {"execution": 1}


def test_a_window_is_the_steps_it_names() -> None:
    """And no others: a step without anything is a step all the same."""
    history = History()
    history.observe(10, 1, Counts(requests=5, refusals={"overloaded": 1}), 6, 5)
    history.observe(11, 1, Counts(requests=5, refusals={"overloaded": 1}), 0, 0)
    history.observe(13, 1, Counts(requests=9, late=2, refusals={"overloaded": 4}), 7, 2)
    assert history.window(13, 3) == Window(7, 2, Counts(requests=4, late=2, refusals={"overloaded": 3}))
    assert history.window(13, 4).offered == 13
    assert history.window(13, 4).attainment == 7 / 13
    assert history.window(12, 2) == Window()
    assert history.window(12, 2).attainment is None
    assert [point.offered for point in history.points(13)][-5:] == [0, 6, 0, 0, 7]


def test_counters_of_another_load_begin_at_zero() -> None:
    """A version that is replaced keeps its charts; its counts are never taken from one another's."""
    history = History()
    history.observe(1, "first load", Counts(requests=100), 100, 100)
    history.observe(2, "second load", Counts(requests=3), 3, 3)
    assert history.window(2, 1).counts.requests == 3
    assert history.window(2, 2).counts.requests == 103


def test_what_is_kept_is_bounded() -> None:
    """A minute of counts, five of points, however long the server runs."""
    history = History()
    for step in range(10 * KEPT_STEPS):
        history.observe(step, 1, Counts(requests=step + 1, request_cells=cells(ms10=step + 1)), 1, 1)
    last = 10 * KEPT_STEPS - 1
    assert history.window(last, 10 * KEPT_STEPS).offered == WINDOW_STEPS
    assert history.attainment(last, 10 * KEPT_STEPS) == 1.0
    points = history.points(last)
    assert [point.step for point in points] == list(range(last - KEPT_STEPS + 1, last + 1))
    assert {point.p50_ms for point in points} == {7.5}
    assert history.busy(last)
    assert history.busy(last + KEPT_STEPS - 1)
    assert not history.busy(last + KEPT_STEPS)
    assert history.points(last + KEPT_STEPS)[0] == Point(last + 1, 0, 0, None, None, None, None)
