"""The latency model: what it starts from, what it learns, and what must not mislead it."""

from __future__ import annotations

import random

import pytest

from service.scheduler import LatencyModel, bucket_ladder
from service.scheduler.latency import COLD_SAMPLES, FIRST_QUANTILE, MAX_SHAPES, complete, isotonic

MS = 1_000_000
TABLE = {1: 2 * MS, 2: 3 * MS, 4: 5 * MS, 8: 9 * MS}
BUCKETS = (1, 2, 4, 8)


def model() -> LatencyModel:
    return LatencyModel({(): TABLE}, BUCKETS)


def test_estimate_is_padded_and_has_a_margin() -> None:
    """Three rows cost a bucket of four, at the first quantile of 5 % above the profile."""
    assert model().estimate((), 3) == int(5 * MS * FIRST_QUANTILE)


def test_larger_than_a_batch_is_the_sum_of_its_segments() -> None:
    """Nineteen rows are two full batches and one of four."""
    assert model().estimate((), 19) == int((2 * 9 + 5) * MS * FIRST_QUANTILE)


@pytest.mark.parametrize(("slack_ms", "rows"), [(-1, 0), (0, 0), (2.05, 0), (2.2, 1), (5.2, 2), (5.3, 4), (99, 8)])
def test_fits_is_the_inverse_of_estimate(slack_ms: float, rows: int) -> None:
    """The largest bucket that fits is the last whose estimate is within the slack."""
    assert model().fits((), int(slack_ms * MS)) == rows


def test_a_step_in_speed_is_learned_in_a_few_batches() -> None:
    """After a step of x1.4 the estimate is within 10 % after 12 batches, for sizes that did not run as well."""
    latency = model()
    for _ in range(12):
        latency.observe((), 4, int(7 * MS))

    assert latency.scale == pytest.approx(1.4, rel=0.1)
    assert latency.estimate((), 8) / (9 * 1.4 * MS * latency.quantile) == pytest.approx(1.0, rel=0.1)


def test_one_stall_changes_little() -> None:
    """A single batch that took a hundred times as long moves the estimate by less than 8 %."""
    latency = model()
    latency.observe((), 4, 500 * MS)

    assert latency.scale < 1.08


def test_the_quantile_follows_the_noise() -> None:
    """With 10 % noise the quantile ends near the upper decile or above, and the spread is reported."""
    latency, noise = model(), random.Random(1)
    for _ in range(600):
        latency.observe((), 4, int(5 * MS * noise.gauss(1.0, 0.1)))

    assert 1.08 < latency.quantile < 1.4
    assert latency.prediction_cv == pytest.approx(0.1, rel=0.3)


def test_late_answers_raise_the_level_and_none_lower_it() -> None:
    """The level of the quantile is steered by the late share, within its bounds."""
    latency = model()
    for _ in range(100):
        latency.observe((), 8, 9 * MS, late_rows=8)
    assert latency.level == 0.995
    for _ in range(5000):
        latency.observe((), 8, 9 * MS)
    assert latency.level == 0.5


def test_a_bucket_off_its_profile_is_corrected() -> None:
    """One bucket that is 15 % slower than profiled is corrected without slowing the others for good."""
    latency = model()
    for _ in range(300):
        latency.observe((), 4, int(5.75 * MS))
        latency.observe((), 1, 2 * MS)
        latency.observe((), 2, 3 * MS)

    table = latency.table()[()]
    assert table[4] / (5.75 * MS) == pytest.approx(1.0, rel=0.03)
    assert table[1] / (2 * MS) == pytest.approx(1.0, rel=0.05)


def test_more_rows_never_take_less() -> None:
    """Estimates do not fall as batches grow, whatever was measured."""
    latency, noise = model(), random.Random(2)
    for _ in range(500):
        latency.observe((), noise.choice((1, 2, 3, 5, 8)), int(noise.uniform(0.5, 12) * MS))

    estimates = [latency.estimate((), rows) for rows in range(1, 9)]
    assert estimates == sorted(estimates)


def test_nothing_known_means_everything_fits() -> None:
    """A model without a profile estimates zero, so nothing is refused before it was measured."""
    latency = LatencyModel({}, BUCKETS)

    assert latency.estimate((3,), 8, 3) == 0
    assert latency.fits((3,), 1, 3) == 8
    assert latency.curve((3,), 3).efficient_rows == 8


def test_learns_from_first_runs() -> None:
    """The first runs are the profile; sizes between are interpolated, sizes above in proportion; a cold first run is
    forgotten."""
    latency = LatencyModel({}, BUCKETS)
    latency.observe((3,), 1, 90 * MS)
    for _ in range(COLD_SAMPLES):
        latency.observe((3,), 1, 2 * MS)
        latency.observe((3,), 4, 5 * MS)

    table = latency.table()[(3,)]
    assert table == {1: 2 * MS, 2: int(3 * MS), 4: 5 * MS, 8: 10 * MS}
    assert latency.scale == pytest.approx(1.0)


def test_unmeasured_sizes_are_tried() -> None:
    """Without deadlines the next size above the largest measured one is always allowed."""
    latency = LatencyModel({}, BUCKETS)
    for _ in range(10):
        latency.observe((3,), 1, 2 * MS)
    assert latency.curve((3,), 3).efficient_rows >= 2


def test_efficient_rows_reach_the_peak() -> None:
    """Without deadlines the smallest bucket with 95 % of the peak rows per second is the largest batch."""
    table = {1: 10 * MS, 2: 11 * MS, 4: 12 * MS, 8: 23.5 * MS}
    assert LatencyModel({(): table}, BUCKETS).curve((), 1).efficient_rows == 4


def test_an_unknown_shape_is_never_guessed_faster() -> None:
    """A shape that was not profiled costs at least what the nearest profiled one does, and more in proportion."""
    latency = LatencyModel({(8,): TABLE}, BUCKETS, {(8,): 8})

    assert latency.estimate((4,), 1, 4) == latency.estimate((8,), 1, 8)
    assert latency.estimate((32,), 1, 32) == 4 * latency.estimate((8,), 1, 8)


def test_a_guess_is_corrected_by_its_first_run() -> None:
    """The first run of a guessed shape corrects all of its sizes by the same ratio, and nothing else."""
    latency = LatencyModel({(8,): TABLE}, BUCKETS, {(8,): 8})
    latency.curve((16,), 16)
    latency.observe((16,), 1, 8 * MS)

    assert latency.table()[(16,)] == {1: 8 * MS, 2: 12 * MS, 4: 20 * MS, 8: 36 * MS}
    assert latency.table()[(8,)] == {rows: int(ns) for rows, ns in TABLE.items()}


def test_the_cost_of_a_profiled_shape_is_learned() -> None:
    """A profile without stated cost gets the cost of the first request of that shape."""
    latency = LatencyModel({(8,): TABLE}, BUCKETS)
    latency.curve((8,), 8)

    assert latency.estimate((16,), 1, 16) == 2 * latency.estimate((8,), 1, 8)


def test_a_guess_without_costs_is_the_profile() -> None:
    """When nothing is known of costs a new shape is taken to be like the profiled one."""
    latency = LatencyModel({(8,): TABLE}, BUCKETS)
    assert latency.estimate((16,), 1, 16) == latency.estimate((8,), 1, 16)


def test_shapes_remembered_are_bounded() -> None:
    """Clients choose shapes: the oldest unprofiled one is forgotten."""
    latency = LatencyModel({(): TABLE}, BUCKETS)
    for size in range(MAX_SHAPES + 10):
        latency.curve((size,), size)

    assert len(latency.table()) == MAX_SHAPES + 1
    assert (0,) not in latency.table()


def test_correct_believes_one_run() -> None:
    """A probe replaces the belief outright, for a profiled model and for one that knows nothing."""
    latency = model()
    latency.scale, latency.factor = 40.0, 42.0
    latency.correct((), 4, 5 * MS)
    assert latency.scale == pytest.approx(1.0)

    blank = LatencyModel({}, BUCKETS)
    blank.correct((3,), 4, 5 * MS)
    assert blank.table()[(3,)][4] == 5 * MS


def test_rows_beyond_the_last_bucket_count_as_the_last() -> None:
    """A batch larger than every bucket teaches about the largest."""
    latency = model()
    latency.observe((), 100, 18 * MS)
    assert latency.scale > 1.0


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ({2: 4.0}, [4.0, 4.0, 8.0, 16.0]),
        ({1: 1.0, 8: 8.0}, [1.0, 2.0, 4.0, 8.0]),
        ({1: 3.0, 2: 1.0}, [3.0, 3.0, 3.0, 4.0]),
    ],
)
def test_complete(points: dict[int, float], expected: list[float]) -> None:
    """Missing sizes are interpolated, extended in proportion, and made non-decreasing."""
    assert complete(points, BUCKETS) == expected


def test_isotonic() -> None:
    """The running maximum."""
    assert isotonic([1.0, 3.0, 2.0]) == [1.0, 3.0, 3.0]


def test_an_empty_profile_is_no_profile() -> None:
    """A shape with an empty table counts as never profiled."""
    assert LatencyModel({(): {}}, bucket_ladder(8)).estimate((), 8) == 0


def test_short_batches_do_not_tell_the_speed_of_the_device() -> None:
    """What delays a batch of 30 us a hundredfold, the wait for a core, does not delay one of 3 ms a hundredfold."""
    model = LatencyModel({"s": {1: 30_000, 64: 90_000, 4096: 3_000_000}}, (1, 64, 4096))
    for _ in range(500):
        model.observe("s", 1, 3_000_000)
    # It is learned where it was seen, and at least that holds for larger ones ...
    assert model.estimate("s", 1) == pytest.approx(3_000_000, rel=0.15)
    assert 3_000_000 <= model.estimate("s", 4096) <= 4_000_000
    # ... and forgotten when it is over.
    for _ in range(200):
        model.observe("s", 1, 30_000)
    assert model.estimate("s", 1) < 60_000
    # Long batches tell it, and it holds for all sizes.
    for _ in range(100):
        model.observe("s", 4096, 6_000_000)
    assert model.estimate("s", 4096) == pytest.approx(6_000_000, rel=0.15)
    assert model.scale > 1.5
