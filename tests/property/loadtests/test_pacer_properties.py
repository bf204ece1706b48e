"""What holds of every pacer, whatever its parameters: order, range, repeatability, mean and scaling."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtests.pacer import (
    NS,
    Constant,
    FanOut,
    Gamma,
    Mmpp,
    Pacer,
    Poisson,
    Process,
    Ramp,
    Replay,
    Serverless,
    Step,
    Steps,
    scaled,
)

rates = st.floats(0.01, 3000)
cvs = st.floats(0.05, 8)
processes: st.SearchStrategy[Process] = st.sampled_from(["poisson", "gamma", "constant"])
durations = st.floats(0.001, 3)
seeds = st.integers(0, 2**32)
traces = st.lists(st.integers(0, 5 * NS), min_size=2, max_size=50).map(lambda times: np.array(sorted([0, *times, NS])))

ramps = st.builds(Ramp, rates, st.just(0.0) | rates, processes, cvs)
pauses = st.builds(Step, st.just(0.0) | rates, st.floats(0.001, 2))
staircases = st.builds(
    lambda first, others, process, cv: Steps((first, *others), process, cv),
    st.builds(Step, rates, st.floats(0.001, 2)),
    st.lists(pauses, max_size=5),
    processes,
    cvs,
)
# Those whose counts have the variance of a renewal process of their integrated rate.
renewals = st.one_of(
    st.builds(Constant, rates), st.builds(Poisson, rates), st.builds(Gamma, rates, cvs), ramps, staircases
)
simple = st.one_of(
    renewals,
    st.builds(Mmpp, rates, hot=st.floats(1, 10), calm=st.floats(0, 1), stay_s=st.floats(0.001, 5)),
    st.builds(Replay, traces, st.floats(0.1, 20), st.booleans()),
    st.builds(Serverless, rates, st.none() | st.floats(0.05, 5), st.integers(1, 20), st.floats(0, 1)),
)
pacers = st.one_of(simple, st.builds(FanOut, simple, st.floats(0, 1), st.floats(0, 5)))


def integral(pacer: Pacer, duration_s: float, pieces: int = 2000) -> float:
    """Of the rate; for ramps exact, for steps but for a piece at each of their borders."""
    at = (np.arange(pieces) + 0.5) * duration_s / pieces
    return sum(pacer.rate(float(moment), duration_s) for moment in at) * duration_s / pieces


@given(pacers, durations, seeds)
@settings(deadline=None)
def test_times_are_sorted_whole_nanoseconds_within_the_load(pacer: Pacer, duration_s: float, seed: int) -> None:
    times = pacer.times(duration_s, np.random.default_rng(seed))
    assert times.dtype == np.int64
    assert (np.diff(times) >= 0).all()
    assert not len(times) or (times[0] >= 0 and times[-1] < round(duration_s * NS))


@given(pacers, durations, seeds)
@settings(deadline=None)
def test_a_seed_decides_everything(pacer: Pacer, duration_s: float, seed: int) -> None:
    first, second = (pacer.times(duration_s, np.random.default_rng(seed)) for _ in range(2))
    assert first.tolist() == second.tolist()


@given(pacers, durations)
@settings(deadline=None)
def test_a_rate_is_never_negative(pacer: Pacer, duration_s: float) -> None:
    for share in (0.0, 0.3, 0.99, 1.0):
        assert pacer.rate(share * duration_s, duration_s) >= 0


@given(renewals, durations, seeds)
@settings(deadline=None, max_examples=50, derandomize=True)
def test_as_many_arrive_as_the_rate_integrates_to(pacer: Pacer, duration_s: float, seed: int) -> None:
    """Summed over 30 loads, within some standard deviations of a renewal process and what `integral` misses.

    Always the same examples: a bound on what is random would be broken some day by others.
    """
    loads = 30
    rng = np.random.default_rng(seed)
    count = sum(len(pacer.times(duration_s, rng)) for _ in range(loads))
    expected = integral(pacer, duration_s)
    cv = getattr(pacer, "cv", 1.0) if getattr(pacer, "process", "gamma") == "gamma" else 1.0
    spread = math.sqrt(loads * (expected + 1)) * (1 + cv) + 4 * (1 + cv**2)
    missed = 6 * 3000 * duration_s / 2000 if isinstance(pacer, Steps) else 1.0
    assert abs(count - loads * expected) <= 6 * spread + loads * missed


@given(renewals, st.floats(0.2, 5), durations)
@settings(deadline=None)
def test_scaling_multiplies_the_rate_at_every_moment(pacer: Pacer, factor: float, duration_s: float) -> None:
    for share in (0.0, 0.4, 0.9):
        at_s = share * duration_s
        expected = pacer.rate(at_s, duration_s) * factor
        assert math.isclose(scaled(pacer, factor).rate(at_s, duration_s), expected, abs_tol=1e-9)


@given(st.builds(Poisson, rates) | st.builds(Gamma, rates, cvs), st.floats(0.2, 5), durations, seeds)
@settings(deadline=None)
def test_a_higher_rate_is_the_same_load_in_less_time(
    pacer: Poisson | Gamma, factor: float, duration_s: float, seed: int
) -> None:
    """With the same seed: the process of rate 1 is drawn first and mapped afterwards."""
    slow = pacer.times(duration_s, np.random.default_rng(seed))
    fast = scaled(pacer, factor).times(duration_s / factor, np.random.default_rng(seed))
    # Rounding may put an arrival at the very end on either side of it.
    assert abs(len(slow) - len(fast)) <= 1
    both = min(len(slow), len(fast))
    assert np.allclose(slow[:both] / factor, fast[:both], rtol=1e-9, atol=1 + 1 / factor)


@given(traces, st.floats(0.1, 20), seeds)
@settings(deadline=None)
def test_a_whole_trace_is_replayed_once(
    trace: np.ndarray[tuple[int], np.dtype[np.int64]], scale: float, seed: int
) -> None:
    """Without a loop, in a load that is long enough: every arrival, at its own time over the scale."""
    times = Replay(trace, scale).times(60, np.random.default_rng(seed))
    assert np.abs(times - trace / scale).max() <= 0.5 + 1e-6
    assert len(times) == len(trace)
