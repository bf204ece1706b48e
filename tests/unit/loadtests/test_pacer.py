"""Arrival times of loads: exact where nothing is random, within narrow bounds of what is known where it is."""

from __future__ import annotations

import math

import numpy as np
import pytest

from loadtests.errors import LoadTestError
from loadtests.pacer import (
    DAY_MINUTES,
    MAX_ARRIVALS,
    NS,
    Constant,
    FanOut,
    Gamma,
    Mmpp,
    Pacer,
    Poisson,
    Ramp,
    Replay,
    Serverless,
    Step,
    Steps,
    Times,
    scaled,
)

MS = 1_000_000
TRACE = np.array([0, 100, 100, 400]) * MS


def draw(pacer: Pacer, duration_s: float, seed: int = 7) -> Times:
    return pacer.times(duration_s, np.random.default_rng(seed))


def in_ms(times: Times) -> list[float]:
    return [round(float(time) / MS, 6) for time in times]


def mean_count(pacer: Pacer, duration_s: float, loads: int) -> float:
    rng = np.random.default_rng(11)
    return sum(len(pacer.times(duration_s, rng)) for _ in range(loads)) / loads


def gap_cv(times: Times) -> float:
    gaps = np.diff(times)
    return float(gaps.std() / gaps.mean())


def test_constant_is_evenly_spaced_from_the_start() -> None:
    """Five arrivals in half a second at 10/s, none at the end."""
    assert in_ms(draw(Constant(10), 0.5)) == [0, 100, 200, 300, 400]


@pytest.mark.parametrize("rate", [30, 7, 49])
def test_a_rate_that_does_not_divide_a_second_is_rounded_to_the_nearest_nanosecond(rate: int) -> None:
    """Neither one more nor one fewer than the rate, whatever 1/rate is in floating point."""
    assert draw(Constant(rate), 1).tolist() == [round(NS * k / rate) for k in range(rate)]


def test_a_constant_ramp_integrates_to_whole_arrivals() -> None:
    """From 0 to 2/s in 4 s, t^2/4 have arrived: arrival k comes at 2 sqrt(k)."""
    assert in_ms(draw(Ramp(0, 2, "constant"), 4)) == pytest.approx([2000 * math.sqrt(k) for k in range(4)], abs=1e-6)


def test_a_falling_ramp_is_a_growing_one_backwards() -> None:
    """From 2/s to 0 in 4 s, 2t - t^2/4 have arrived."""
    times = draw(Ramp(2, 0, "constant"), 4) / NS
    assert (2 * times - times**2 / 4).tolist() == pytest.approx([0, 1, 2, 3], abs=1e-6)


def test_a_flat_ramp_is_constant() -> None:
    assert draw(Ramp(10, 10, "constant"), 1).tolist() == draw(Constant(10), 1).tolist()


def test_steps_change_the_distance() -> None:
    """Arrivals at 10/s for 0.2 s, then at 20/s."""
    steps = Steps((Step(10, 0.2), Step(20, 0.1)), "constant")
    assert in_ms(draw(steps, 0.3)) == [0, 100, 200, 250]


def test_the_last_step_is_held_until_the_end() -> None:
    steps = Steps((Step(10, 0.2), Step(20, 0.1)), "constant")
    assert in_ms(draw(steps, 0.5)) == [0, 100, 200, 250, 300, 350, 400, 450]


def test_a_load_may_end_within_the_steps() -> None:
    steps = Steps((Step(10, 0.2), Step(20, 0.1)), "constant")
    assert in_ms(draw(steps, 0.15)) == [0, 100]


def test_nothing_arrives_in_a_pause() -> None:
    """Neither in it nor twice at its end; a last pause lasts."""
    steps = Steps((Step(10, 0.2), Step(0, 1), Step(10, 0.2), Step(0, 1)), "constant")
    assert in_ms(draw(steps, 10)) == [0, 100, 1200, 1300]
    poisson = draw(Steps((Step(1000, 1), Step(0, 2), Step(1000, 1))), 4) / NS
    assert not ((poisson > 1) & (poisson < 3)).any()
    assert (poisson < 1).sum() == pytest.approx(1000, abs=100)
    assert (poisson > 3).sum() == pytest.approx(1000, abs=100)


def test_a_replay_is_the_trace() -> None:
    assert in_ms(draw(Replay(TRACE), 10)) == [0, 100, 100, 400]


def test_a_replay_is_compressed_by_its_scale() -> None:
    assert in_ms(draw(Replay(TRACE, scale=2), 10)) == [0, 50, 50, 200]


def test_a_replay_ends_with_the_load() -> None:
    """An arrival at the very end is not in the load."""
    assert in_ms(draw(Replay(TRACE), 0.4)) == [0, 100, 100]


def test_a_loop_starts_again_one_mean_gap_after_its_end() -> None:
    """The mean gap is 400/3 ms."""
    again = round(400 * MS * 4 / 3)
    assert draw(Replay(TRACE, loop=True), 1).tolist() == [*TRACE, *(TRACE + again)]
    assert in_ms(draw(Replay(TRACE, 2, loop=True), 0.3)) == pytest.approx([0, 50, 50, 200, 800 / 3], abs=1e-6)


def test_a_replay_knows_its_rate() -> None:
    """Scaling a trace to a rate is by the ratio of both."""
    assert Replay(TRACE).mean_rate == pytest.approx(7.5)
    assert scaled(Replay(TRACE, loop=True), 4).times(100, np.random.default_rng()).size == pytest.approx(3000, abs=4)
    with pytest.raises(LoadTestError, match="single moment"):
        _ = Replay(TRACE[:1]).mean_rate


def test_the_rate_of_a_replay_is_that_of_the_second_around() -> None:
    trace = Replay(np.arange(0, 10 * NS, 10 * MS), scale=2, loop=True)
    assert [trace.rate(at) for at in (0, 3, 4.999, 77)] == pytest.approx([200, 200, 200, 200], abs=1)
    assert Replay(np.arange(0, NS, 10 * MS)).rate(5) == 0


@pytest.mark.parametrize(
    ("pacer", "cv"),
    [(Poisson(1000), 1.0), (Gamma(1000, 0.5), 0.5), (Gamma(1000, 1.0), 1.0), (Gamma(1000, 3.0), 3.0)],
)
def test_gaps_have_their_mean_and_variation(pacer: Pacer, cv: float) -> None:
    """200,000 gaps: four standard errors of the mean are cv % of it, and the cv is within a few %."""
    times = draw(pacer, 200)
    assert len(times) == pytest.approx(200_000, abs=4 * cv * math.sqrt(200_000))
    assert gap_cv(times) == pytest.approx(cv, rel=0.03)


def test_gamma_is_burstier_than_poisson_over_a_second_too() -> None:
    """The index of dispersion of a renewal process tends to cv^2."""
    counts = np.bincount(draw(Gamma(1000, 3.0), 400) // NS, minlength=400)
    assert counts.var() / counts.mean() == pytest.approx(9, rel=0.25)


def test_bursty_loads_do_not_begin_with_a_burst() -> None:
    """An ordinary renewal process with a cv of 3 has 4 arrivals too many, 14 for 10."""
    assert mean_count(Gamma(100, 3.0), 0.1, 4000) == pytest.approx(10, abs=0.8)


def test_a_mapped_process_stays_bursty() -> None:
    """Undoing the steps' rates gives gaps with the cv of the process."""
    times = draw(Steps((Step(1000, 20), Step(4000, 20)), "gamma", 3.0), 40) / NS
    units = np.where(times < 20, 1000 * times, 20_000 + 4000 * (times - 20))
    gaps = np.diff(units)
    assert gaps.mean() == pytest.approx(1, rel=0.04)
    assert gaps.std() / gaps.mean() == pytest.approx(3, rel=0.05)


def test_a_ramp_follows_its_rate() -> None:
    """Each quarter of a ramp from 0 to 8000/s in 4 s has what the line says."""
    counts = np.bincount(draw(Ramp(0, 8000), 4) // NS, minlength=4)
    assert counts.tolist() == pytest.approx([1000, 3000, 5000, 7000], rel=0.1)


def test_mmpp_has_its_mean_rate() -> None:
    """Also when it has no time to forget how it began, and when the levels do not average 1 by themselves."""
    assert mean_count(Mmpp(1000), 0.3, 1000) == pytest.approx(300, rel=0.08)
    assert mean_count(Mmpp(1000, hot=10, calm=1, hot_share=0.5, stay_s=0.01), 0.3, 300) == pytest.approx(300, rel=0.05)


def test_mmpp_is_hot_for_its_share_of_the_time() -> None:
    """With a silent calm state: arrivals fill a quarter of the 10 ms windows, in spells of 200 ms on average."""
    times = draw(Mmpp(10_000, hot=1, calm=0, hot_share=0.25, stay_s=0.2), 200)
    busy = np.bincount(times // (10 * MS), minlength=20_000) > 0
    assert busy.mean() == pytest.approx(0.25, abs=0.06)
    spells = np.count_nonzero(np.diff(busy.astype(int)) == 1)
    assert 0.01 * busy.sum() / spells == pytest.approx(0.2, rel=0.2)


def test_fan_out_repeats_moments() -> None:
    """A tenth of 100,000 calls is 8 requests on average."""
    inner = draw(Constant(10_000), 10)
    times = draw(FanOut(Constant(10_000), 0.1, 7), 10)
    moments, sizes = np.unique(times, return_counts=True)
    assert moments.tolist() == inner.tolist()
    assert len(times) == pytest.approx(170_000, rel=0.02)
    assert (sizes > 1).mean() == pytest.approx(0.1, rel=0.05)
    assert draw(FanOut(Constant(10), 0, 7), 1).tolist() == draw(Constant(10), 1).tolist()
    assert FanOut(Ramp(0, 10), 0.5, 4).rate(1, 2) == 15


def test_serverless_has_its_mean_rate_whatever_the_duration() -> None:
    assert mean_count(Serverless(2000, functions=20), 0.5, 200) == pytest.approx(1000, rel=0.04)
    assert mean_count(Serverless(200, functions=20), 5, 200) == pytest.approx(1000, rel=0.04)


def test_serverless_swings_over_a_day() -> None:
    """The first half of a day has about twice the calls of the second, in the mean of many seeds."""
    rng = np.random.default_rng(3)
    times = np.concatenate([Serverless(500, timer_share=0, functions=20).times(4, rng) for _ in range(100)])
    swing = 0.5 * 2 / math.pi
    assert (times < 2 * NS).mean() == pytest.approx((1 + swing) / 2, abs=0.02)


def test_serverless_timers_fire_at_whole_minutes() -> None:
    """All of them, and with one function that is due in every fourth minute nothing else."""
    times = draw(Serverless(0.25, minute_s=1, functions=1, timer_share=1, fan_share=0), 40)
    assert len(times) == 10
    assert (times % NS < NS / 60).all()
    assert np.diff(times // NS).tolist() == [4] * 9
    many = draw(Serverless(1000, minute_s=1, timer_share=1), 20)
    assert (many % NS <= NS / 60).all()


def test_serverless_spikes_are_visible_next_to_the_callers() -> None:
    """The sixtieth of a minute in which timers fire is busier than the rest, in the mean of the minutes."""
    times = np.concatenate([draw(Serverless(1000, minute_s=1), 40, seed) for seed in range(10)])
    assert (times % NS < NS // 60).mean() > 2 / 60


def test_serverless_calls_fan_out() -> None:
    """2 % of the calls are 8 requests on average. Timers show it best: bursts of gamma gaps can be of one moment,
    too."""
    _, sizes = np.unique(draw(Serverless(5000, timer_share=1), 20), return_counts=True)
    assert (sizes > 1).mean() == pytest.approx(0.02, rel=0.1)
    assert sizes[sizes > 1].mean() == pytest.approx(8, rel=0.05)
    _, sizes = np.unique(draw(Serverless(5000, timer_share=1, fan_share=0), 20), return_counts=True)
    assert (sizes > 1).mean() < 0.001


@pytest.mark.parametrize(
    ("pacer", "at_s", "rate"),
    [
        (Constant(10), 3, 10),
        (Poisson(10), 0, 10),
        (Gamma(10, 2), 9, 10),
        (Mmpp(10, hot=5), 1, 10),
        (Ramp(10, 30), 0, 10),
        (Ramp(10, 30), 5, 20),
        (Ramp(30, 10), 10, 10),
        (Steps((Step(1, 2), Step(5, 2))), 1.9, 1),
        (Steps((Step(1, 2), Step(5, 2))), 2, 5),
        (Steps((Step(1, 2), Step(5, 2))), 9, 5),
    ],
)
def test_rates_at_a_moment(pacer: Pacer, at_s: float, rate: float) -> None:
    """Of a load of 10 s."""
    assert pacer.rate(at_s, 10) == pytest.approx(rate)


def test_the_rate_of_a_day_is_highest_after_a_quarter_of_it() -> None:
    rates = [Serverless(100).rate(at + 0.5, DAY_MINUTES) for at in range(DAY_MINUTES)]
    assert np.mean(rates) == pytest.approx(100)
    assert rates.index(max(rates)) in (9, 10)
    assert Serverless(100, minute_s=1).rate(9.5) == pytest.approx(rates[9])


@pytest.mark.parametrize("pacer", [Ramp(1, 2), Serverless(10)])
def test_a_rate_that_depends_on_the_duration_is_not_guessed(pacer: Pacer) -> None:
    """At the start it does not."""
    assert pacer.rate(0) == pacer.rate(0, 10)
    with pytest.raises(LoadTestError, match="depends on how long the load lasts: give `duration_s`"):
        pacer.rate(1)


@pytest.mark.parametrize(
    ("pacer", "double"),
    [
        (Constant(5), Constant(10)),
        (Poisson(5), Poisson(10)),
        (Gamma(5, 2), Gamma(10, 2)),
        (Mmpp(5, stay_s=3), Mmpp(10, stay_s=3)),
        (Ramp(0, 5, "gamma", 2), Ramp(0, 10, "gamma", 2)),
        (Steps((Step(5, 2), Step(0, 1)), "constant"), Steps((Step(10, 2), Step(0, 1)), "constant")),
        (FanOut(Poisson(5), 0.1, 7), FanOut(Poisson(10), 0.1, 7)),
        (Serverless(5, functions=3), Serverless(10, functions=3)),
    ],
)
def test_scaling_changes_the_rate_and_nothing_else(pacer: Pacer, double: Pacer) -> None:
    assert scaled(pacer, 2) == double


def test_scaling_a_replay_compresses_it() -> None:
    assert in_ms(draw(scaled(Replay(TRACE, 2), 2), 10)) == [0, 25, 25, 100]


def test_what_cannot_be_scaled_is_refused() -> None:
    class Other:
        def times(self, duration_s: float, rng: np.random.Generator) -> Times:
            return np.empty(0, np.int64)

        def rate(self, at_s: float, duration_s: float | None = None) -> float:
            return 0.0

    with pytest.raises(TypeError, match="Other cannot be scaled"):
        scaled(Other(), 2)
    with pytest.raises(LoadTestError, match="a rate times 0 cannot be paced; expected a factor of more than 0"):
        scaled(Poisson(1), 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(0), "a rate of 0 cannot be paced; expected more than 0 per second"),
        (lambda: Poisson(-3), "a rate of -3 cannot be paced"),
        (lambda: Poisson(math.nan), "a rate of nan cannot be paced"),
        (lambda: Mmpp(math.inf), "a rate of inf cannot be paced"),
        (lambda: Gamma(0, 3), "a rate of 0 cannot be paced"),
        (lambda: Gamma(1, 0), r"\(cv\) of 0 cannot be paced; expected 0.001 to 20 \(1 = Poisson\)"),
        (lambda: Gamma(1, 21), r"\(cv\) of 21 cannot be paced"),
        (lambda: Ramp(1, 2, "gamma", -1), r"\(cv\) of -1 cannot be paced"),
        (lambda: Ramp(1, 2, "gama"), "a process 'gama' cannot be paced; expected poisson, gamma or constant"),  # type: ignore[arg-type]
        (lambda: Ramp(0, 0), "a ramp from 0 to 0 cannot be paced; expected rates of at least 0, not both 0"),
        (lambda: Ramp(-1, 5), "a ramp from -1 to 5 cannot be paced"),
        (lambda: Step(-1, 5), "a step with a rate of -1 cannot be paced"),
        (lambda: Step(1, 0), "a step of 0 s cannot be paced"),
        (lambda: Steps(()), "a load of 0 steps cannot be paced"),
        (lambda: Steps((Step(0, 1),)), "steps with rates of 0 only cannot be paced"),
        (lambda: Mmpp(1, hot=0, calm=0), "hot 0 and calm 0 cannot be paced"),
        (lambda: Mmpp(1, hot_share=1), "a hot share of 1 cannot be paced; expected more than 0 and less than 1"),
        (lambda: Mmpp(1, stay_s=0), "a stay of 0 s cannot be paced"),
        (lambda: Replay(TRACE[:0]), "a trace without arrivals cannot be paced"),
        (lambda: Replay(TRACE[::-1]), "an unsorted trace cannot be paced"),
        (lambda: Replay(TRACE, 0), "a trace at 0 times its speed cannot be paced"),
        (lambda: Replay(TRACE[:1], loop=True), "a trace with a single moment cannot be paced"),
        (lambda: FanOut(Poisson(1), 1.5, 1), "a share of 1.5 that fans out cannot be paced"),
        (lambda: FanOut(Poisson(1), 0.5, -1), "a fan-out of -1 more cannot be paced"),
        (lambda: Serverless(1, minute_s=0), "a minute of 0 s cannot be paced"),
        (lambda: Serverless(1, functions=0), "a load of 0 functions cannot be paced"),
        (lambda: Serverless(1, timer_share=2), "a share of 2 of timers cannot be paced"),
        (lambda: Serverless(1, fan_share=-1), "a share of -1 that fans out cannot be paced"),
        (lambda: Serverless(1, fan_size=0.5), "a fan-out of 0.5 requests cannot be paced"),
    ],
)
def test_nonsense_is_refused_when_the_pacer_is_made(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(LoadTestError, match=message):
        make()


@pytest.mark.parametrize(
    "pacer",
    [
        Constant(3e7),
        Poisson(3e7),
        Gamma(3e7),
        Mmpp(2e8),
        Ramp(0, 6e7),
        Steps((Step(3e7, 1),)),
        Replay(np.arange(0, NS, MS), scale=30_000, loop=True),
        Serverless(3e7),
        FanOut(Constant(1000), 1, 30_000),
    ],
)
def test_a_load_beyond_the_bound_is_refused_before_it_is_drawn(pacer: Pacer) -> None:
    with pytest.raises(LoadTestError, match=f"arrivals cannot be paced; expected at most {MAX_ARRIVALS:,}"):
        draw(pacer, 1)


def test_a_load_of_too_many_pieces_is_refused() -> None:
    with pytest.raises(LoadTestError, match="spells cannot be paced; expected at most 2,000,000"):
        draw(Mmpp(1, stay_s=1e-6), 10)
    with pytest.raises(LoadTestError, match="minutes of all functions cannot be paced"):
        draw(Serverless(1, minute_s=1e-4), 10)


@pytest.mark.parametrize("duration_s", [0, -1, math.nan, math.inf])
@pytest.mark.parametrize("pacer", [Poisson(1), Mmpp(1), Ramp(1, 2), Replay(TRACE), Serverless(1)])
def test_a_load_without_a_duration_is_refused(pacer: Pacer, duration_s: float) -> None:
    with pytest.raises(LoadTestError, match="cannot be paced; expected a duration of more than 0 s"):
        draw(pacer, duration_s)
