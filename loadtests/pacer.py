"""When requests are sent: all arrival times of a load, drawn before it begins.

Promise: times are nanoseconds from the start of the load, never decreasing, all in [0, duration); the same pacer,
duration and seed give the same times to the nanosecond. Rates are exact in the mean over seeds: no pacer starts with a
burst or a gap that it would not have later. What cannot be drawn raises `LoadTestError`, when the pacer is made or when
it is asked for its times.

How a rate changes is one thing, how random the arrivals are another. A renewal process of rate 1 is drawn first, then
mapped through the inverse of the integrated rate (time rescaling: Cox, "Some statistical methods connected with series
of events", 1955; compared with thinning by Lewis & Shedler, "Simulation of nonhomogeneous Poisson processes by
thinning", 1979). That keeps its character: gamma arrivals are as bursty on a ramp as on the level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from loadtests.errors import LoadTestError

Times = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Process = Literal["poisson", "gamma", "constant"]
Generator = np.random.Generator

NS = 1_000_000_000
# A plan is held in memory: about 60 bytes a request, several times that while it is drawn.
MAX_ARRIVALS = 20_000_000
# Pieces of constant rate in one load; each costs as much as an arrival or more.
MAX_PIECES = 2_000_000
# Below, gaps are equal for every purpose (`constant` says so); above, nearly all are 0.
MIN_CV, MAX_CV = 0.001, 20.0

# Serverless: minutes of a day, the AR(1) process of the log rate per minute, how far a day swings, Zipf's exponent, the
# share of a minute within which timers fire, and the coefficients of variation found among the callers.
DAY_MINUTES = 40
MEMORY, SPREAD, SWING, ZIPF, TIMER_JITTER = 0.9, 0.45, 0.5, 1.2, 1 / 60
CALLER_CVS = (1.0, 1.5, 3.0, 5.0)


class Pacer(Protocol):
    """Decides when requests are sent."""

    def times(self, duration_s: float, rng: Generator) -> Times:
        """All arrivals of a load of `duration_s` seconds, in ns from its start.

        Raises `LoadTestError` for a duration that is not positive, and for more than `MAX_ARRIVALS`.
        """
        ...

    def rate(self, at_s: float, duration_s: float | None = None) -> float:
        """The intended mean rate per second, `at_s` seconds into a load of `duration_s`.

        Raises `LoadTestError` when the answer depends on the duration and none is given.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Level:
    """A pacer with one mean rate per second throughout."""

    per_second: float

    def __post_init__(self) -> None:
        _check(0 < self.per_second < math.inf, f"a rate of {self.per_second:g}", "more than 0 per second")

    def rate(self, at_s: float, duration_s: float | None = None) -> float:
        del at_s, duration_s  # the same at any moment
        return self.per_second


@dataclass(frozen=True, slots=True)
class Constant(_Level):
    """One after another at equal distance, the first at 0."""

    def times(self, duration_s: float, rng: Generator) -> Times:
        return Steps((Step(self.per_second, 1.0),), "constant").times(duration_s, rng)


@dataclass(frozen=True, slots=True)
class Poisson(_Level):
    """Many independent clients: exponential gaps."""

    def times(self, duration_s: float, rng: Generator) -> Times:
        return Steps((Step(self.per_second, 1.0),), "poisson").times(duration_s, rng)


@dataclass(frozen=True, slots=True)
class Gamma(_Level):
    """Gamma gaps whose standard deviation is `cv` means: 1 is Poisson, more is bursty (AlpaServe, OSDI '23)."""

    cv: float = 3.0

    def __post_init__(self) -> None:
        _Level.__post_init__(self)
        _check_process("gamma", self.cv)

    def times(self, duration_s: float, rng: Generator) -> Times:
        return Steps((Step(self.per_second, 1.0),), "gamma", self.cv).times(duration_s, rng)


@dataclass(frozen=True, slots=True)
class Mmpp(_Level):
    """Hot and calm spells: a Poisson process whose rate switches between two levels (Markov-modulated).

    `hot` and `calm` are in proportion to each other; the levels are such that the mean is `per_second`. A `hot_share`
    of the time is hot. A hot spell lasts `stay_s` seconds on average, with an exponential distribution, and a calm one
    as long as the share asks for.
    """

    hot: float = 3.0
    calm: float = 0.5
    hot_share: float = 0.2
    stay_s: float = 0.1  # several times the objective of most models, and dozens of spells in a short run

    def __post_init__(self) -> None:
        _Level.__post_init__(self)
        proportion = min(self.hot, self.calm) >= 0 and 0 < self.hot + self.calm < math.inf
        _check(proportion, f"hot {self.hot:g} and calm {self.calm:g}", "at least 0 each, and one of them more")
        _check(0 < self.hot_share < 1, f"a hot share of {self.hot_share:g}", "more than 0 and less than 1")
        _check(0 < self.stay_s < math.inf, f"a stay of {self.stay_s:g} s", "more than 0 s")

    def times(self, duration_s: float, rng: Generator) -> Times:
        _check_duration(duration_s)
        # Two spells, one of each kind.
        cycle_s = self.stay_s / self.hot_share
        _check_pieces(2 * duration_s / cycle_s, "spells")
        mean = self.hot_share * self.hot + (1 - self.hot_share) * self.calm
        kinds = [(self.stay_s, self.hot / mean), (cycle_s - self.stay_s, self.calm / mean)]
        if rng.random() >= self.hot_share:
            kinds.reverse()
        (first_s, first), (second_s, second) = kinds
        cycles = int(duration_s / cycle_s) + 8
        lengths = np.empty(0)
        while lengths.sum() < duration_s:
            lengths = np.append(lengths, rng.standard_exponential((cycles, 2)) * (first_s, second_s))
        starts = np.append(0.0, np.cumsum(lengths)[:-1])
        rates = np.tile((first * self.per_second, second * self.per_second), len(starts) // 2)
        inside = starts < duration_s
        return _to_ns(_on_steps(starts[inside], rates[inside], duration_s, "poisson", 1.0, rng), duration_s)


@dataclass(frozen=True, slots=True)
class Ramp:
    """A rate that grows, or falls, evenly from one value to another over the whole load. One of the two may be 0."""

    from_rate: float
    to_rate: float
    process: Process = "poisson"
    cv: float = 3.0  # of the gamma process

    def __post_init__(self) -> None:
        sensible = min(self.from_rate, self.to_rate) >= 0 and 0 < self.from_rate + self.to_rate < math.inf
        _check(sensible, f"a ramp from {self.from_rate:g} to {self.to_rate:g}", "rates of at least 0, not both 0")
        _check_process(self.process, self.cv)

    def times(self, duration_s: float, rng: Generator) -> Times:
        _check_duration(duration_s)
        total = (self.from_rate + self.to_rate) / 2 * duration_s
        units = _renewal(self.process, self.cv, total, rng)
        # The root of from*t + slope*t^2/2 = units, in the form that loses nothing when the slope is small.
        slope = (self.to_rate - self.from_rate) / duration_s
        below = self.from_rate + np.sqrt(np.maximum(0.0, self.from_rate**2 + 2 * slope * units))
        return _to_ns(np.divide(2 * units, below, out=np.zeros_like(units), where=below > 0), duration_s)

    def rate(self, at_s: float, duration_s: float | None = None) -> float:
        if at_s == 0:
            return self.from_rate
        share = at_s / _needed(duration_s, "ramp")
        return self.from_rate * (1 - share) + self.to_rate * share


@dataclass(frozen=True, slots=True)
class Step:
    """`rate` per second (0 is a pause) for `seconds`."""

    rate: float
    seconds: float

    def __post_init__(self) -> None:
        _check(0 <= self.rate < math.inf, f"a step with a rate of {self.rate:g}", "0 per second or more")
        _check(0 < self.seconds < math.inf, f"a step of {self.seconds:g} s", "more than 0 s")


@dataclass(frozen=True, slots=True)
class Steps:
    """One rate after another. The last one is held until the load ends; a shorter load ends in the midst of them."""

    steps: tuple[Step, ...]
    process: Process = "poisson"
    cv: float = 3.0  # of the gamma process

    def __post_init__(self) -> None:
        _check(0 < len(self.steps) <= MAX_PIECES, f"a load of {len(self.steps)} steps", f"1 to {MAX_PIECES:,}")
        _check(any(step.rate > 0 for step in self.steps), "steps with rates of 0 only", "one with more")
        _check_process(self.process, self.cv)

    def times(self, duration_s: float, rng: Generator) -> Times:
        _check_duration(duration_s)
        starts = np.append(0.0, np.cumsum([step.seconds for step in self.steps[:-1]]))
        rates = np.array([step.rate for step in self.steps])
        inside = starts < duration_s
        return _to_ns(_on_steps(starts[inside], rates[inside], duration_s, self.process, self.cv, rng), duration_s)

    def rate(self, at_s: float, duration_s: float | None = None) -> float:
        del duration_s
        end = 0.0
        for step in self.steps:
            end += step.seconds
            if at_s < end:
                return step.rate
        return self.steps[-1].rate


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """The arrivals of a trace (sorted, ns from its first one), `scale` times as fast.

    With `loop` it starts again when it is over, one mean gap after its last arrival; otherwise nothing comes after it.
    """

    times_ns: Times
    scale: float = 1.0
    loop: bool = False

    def __post_init__(self) -> None:
        trace = self.times_ns
        _check(0 < self.scale < math.inf, f"a trace at {self.scale:g} times its speed", "more than 0")
        _check(len(trace) > 0, "a trace without arrivals", "one or more")
        _check(
            bool(trace[0] >= 0 and (np.diff(trace) >= 0).all()), "an unsorted trace", "times of 0 or more, ascending"
        )
        _check(not self.loop or bool(trace[-1] > 0), "a trace with a single moment", "more of them, or no loop")

    @property
    def mean_rate(self) -> float:
        """Arrivals per second at this scale. Raises `LoadTestError` when all of them are at one moment."""
        _check(bool(self.times_ns[-1] > 0), "a trace with a single moment", "more of them, to have a rate")
        return len(self.times_ns) / self._period_ns() * NS * self.scale

    def times(self, duration_s: float, rng: Generator) -> Times:
        del rng  # a trace leaves nothing to chance
        _check_duration(duration_s)
        count = self._count(duration_s * NS * self.scale)
        _check_count(count)
        passes, position = np.divmod(np.arange(count), len(self.times_ns))
        return _to_ns((self.times_ns[position] + passes * self._period_ns()) / (self.scale * NS), duration_s)

    def rate(self, at_s: float, duration_s: float | None = None) -> float:
        """The mean over the second around the moment."""
        del duration_s
        from_s, to_s = max(0.0, at_s - 0.5), at_s + 0.5
        return (self._count(to_s * NS * self.scale) - self._count(from_s * NS * self.scale)) / (to_s - from_s)

    def _period_ns(self) -> int:
        last = int(self.times_ns[-1])
        return last + max(1, round(last / max(1, len(self.times_ns) - 1)))

    def _count(self, until_ns: float) -> int:
        """Arrivals before a moment of the trace's own time."""
        passes, rest = divmod(until_ns, self._period_ns()) if self.loop else (0.0, until_ns)
        return int(passes) * len(self.times_ns) + int(np.searchsorted(self.times_ns, math.ceil(rest)))


@dataclass(frozen=True, slots=True)
class FanOut:
    """A `share` of the calls of another pacer becomes several requests at the same moment: `mean_extra` more on average
    (Poisson). Rates grow accordingly."""

    inner: Pacer
    share: float
    mean_extra: float

    def __post_init__(self) -> None:
        _check(0 <= self.share <= 1, f"a share of {self.share:g} that fans out", "0 to 1")
        _check(0 <= self.mean_extra <= 1e6, f"a fan-out of {self.mean_extra:g} more", "0 to 1,000,000")

    def times(self, duration_s: float, rng: Generator) -> Times:
        return _fan_out(self.inner.times(duration_s, rng), self.share, self.mean_extra, rng)

    def rate(self, at_s: float, duration_s: float | None = None) -> float:
        return self.inner.rate(at_s, duration_s) * (1 + self.share * self.mean_extra)


@dataclass(frozen=True, slots=True)
class Serverless(_Level):
    """What traces of serverless functions look like (Shahrad et al., ATC '20), without a download.

    The load is the sum of `functions` of Zipf popularity. The rate of each swings by half over a day of `DAY_MINUTES`
    and wanders from minute to minute (the exponential of an AR(1) process); its gaps are gamma, with a cv of its own.
    The least popular `timer_share` are timers instead: they fire at whole minutes, up to a sixtieth late, which makes
    spikes. Of all calls a `fan_share` is `fan_size` requests at once on average.

    A minute lasts `minute_s` seconds. None: the load is one day however long it is, and so has the mean `per_second`;
    a single seed is often 10 % off it and at times 25, since the most popular functions wander.
    """

    minute_s: float | None = None
    functions: int = 50
    timer_share: float = 0.3
    fan_share: float = 0.02
    fan_size: float = 8.0

    def __post_init__(self) -> None:
        _Level.__post_init__(self)
        minute_s = self.minute_s
        _check(minute_s is None or 0 < minute_s < math.inf, f"a minute of {minute_s} s", "more than 0 s")
        _check(0 < self.functions <= 10_000, f"a load of {self.functions} functions", "1 to 10,000")
        _check(0 <= self.timer_share <= 1, f"a share of {self.timer_share:g} of timers", "0 to 1")
        _check(0 <= self.fan_share <= 1, f"a share of {self.fan_share:g} that fans out", "0 to 1")
        _check(1 <= self.fan_size <= 1e6, f"a fan-out of {self.fan_size:g} requests", "1 to 1,000,000")

    def times(self, duration_s: float, rng: Generator) -> Times:
        _check_duration(duration_s)
        _check_count(self.per_second * duration_s)
        minute_s = self._minute_s(duration_s)
        _check_pieces(duration_s / minute_s * self.functions, "minutes of all functions")
        minutes = math.ceil(duration_s / minute_s)
        starts = np.arange(minutes, dtype=np.float64) * minute_s
        calls: list[Floats] = []
        callers, timers = self._rates()
        for rate in callers:
            rates = rate * _day(np.arange(minutes)) * _wander(minutes, rng)
            cv = float(rng.choice(CALLER_CVS))
            calls.append(_on_steps(starts, rates, duration_s, "gamma", cv, rng))
        for rate in timers:
            # So many every minute, or one in so many minutes.
            fired = np.diff(np.floor(rng.random() + rate * minute_s * np.arange(minutes + 1))).astype(np.int64)
            calls.append(np.repeat(starts, fired) + rng.random(fired.sum()) * minute_s * TIMER_JITTER)
        merged = _to_ns(np.sort(np.concatenate(calls)), duration_s)
        return _fan_out(merged, self.fan_share, self.fan_size - 1, rng)

    def rate(self, at_s: float, duration_s: float | None = None) -> float:
        minute = 0 if at_s == 0 else at_s // self._minute_s(duration_s)
        callers, timers = self._rates()
        calls = callers.sum() * _day(np.array([minute]))[0] + timers.sum()
        return float(calls) * (1 + self.fan_share * (self.fan_size - 1))

    def _minute_s(self, duration_s: float | None) -> float:
        return self.minute_s or _needed(duration_s, "day") / DAY_MINUTES

    def _rates(self) -> tuple[Floats, Floats]:
        """Mean calls per second of the functions that are called, and of those on a timer."""
        popularity = np.arange(1, self.functions + 1) ** -ZIPF
        rates = self.per_second / (1 + self.fan_share * (self.fan_size - 1)) * popularity / popularity.sum()
        called = self.functions - round(self.functions * self.timer_share)
        return rates[:called], rates[called:]


def scaled(pacer: Pacer, factor: float) -> Pacer:
    """The same load at `factor` times the rate; spells, steps and minutes keep their length. A trace is compressed.

    Raises `LoadTestError` for a factor that is not positive, `TypeError` for a pacer from elsewhere.
    """
    _check(0 < factor < math.inf, f"a rate times {factor:g}", "a factor of more than 0")
    if isinstance(pacer, (Constant, Poisson, Gamma, Mmpp, Serverless)):
        return replace(pacer, per_second=pacer.per_second * factor)
    if isinstance(pacer, Ramp):
        return replace(pacer, from_rate=pacer.from_rate * factor, to_rate=pacer.to_rate * factor)
    if isinstance(pacer, Steps):
        return replace(pacer, steps=tuple(Step(step.rate * factor, step.seconds) for step in pacer.steps))
    if isinstance(pacer, Replay):
        return replace(pacer, scale=pacer.scale * factor)
    if isinstance(pacer, FanOut):
        return replace(pacer, inner=scaled(pacer.inner, factor))
    raise TypeError(f"{type(pacer).__name__} cannot be scaled")


def _renewal(process: Process, cv: float, total: float, rng: Generator) -> Floats:
    """The arrivals of a renewal process of rate 1 in [0, total); `cv` is that of gamma."""
    _check_count(total)
    if process == "constant":
        return np.arange(math.ceil(total), dtype=np.float64)
    cv = cv if process == "gamma" else 1.0
    shape = cv**-2
    # The start falls into a gap, a long one more likely, and what is left of it comes first (Cox, "Renewal Theory",
    # 1962, chapter 5). Starting with a whole gap instead would add (cv^2 - 1)/2 arrivals on average.
    pieces = [np.array([rng.random() * rng.gamma(shape + 1, 1 / shape)])]
    while pieces[-1][-1] < total:
        left = total - pieces[-1][-1]
        gaps = rng.gamma(shape, 1 / shape, int(left + 4 * cv * math.sqrt(left)) + 16)
        pieces.append(pieces[-1][-1] + np.cumsum(gaps))
    units: Floats = np.concatenate(pieces)
    return units[: np.searchsorted(units, total)]


def _on_steps(starts: Floats, rates: Floats, duration_s: float, process: Process, cv: float, rng: Generator) -> Floats:
    """Arrivals in seconds at rates that hold from each start to the next, the last one to the end."""
    integral = np.append(0.0, np.cumsum(rates[:-1] * np.diff(starts)))
    total = float(integral[-1] + rates[-1] * (duration_s - starts[-1]))
    units = _renewal(process, cv, total, rng)
    # `right`: on the boundary of a pause an arrival comes after it.
    piece = np.searchsorted(integral, units, side="right") - 1
    times: Floats = starts[piece] + (units - integral[piece]) / rates[piece]
    return times


def _fan_out(times: Times, share: float, mean_extra: float, rng: Generator) -> Times:
    _check_count(len(times) * (1 + share * mean_extra))
    sizes = np.ones(len(times), np.int64)
    fanning = rng.random(len(times)) < share
    sizes[fanning] += rng.poisson(mean_extra, int(fanning.sum()))
    return np.repeat(times, sizes)


def _day(minute: npt.NDArray[np.int64]) -> Floats:
    """How much more than the mean is called in these minutes of a day; 1 on average over whole days."""
    return 1 + SWING * np.sin(2 * math.pi * (minute + 0.5) / DAY_MINUTES)


def _wander(minutes: int, rng: Generator) -> Floats:
    """A stationary factor of mean 1 for each minute."""
    noise = rng.standard_normal(minutes)
    level, levels = 0.0, np.empty(minutes)
    for minute in range(minutes):
        level = MEMORY * level + (math.sqrt(1 - MEMORY**2) if minute else 1.0) * noise[minute]
        levels[minute] = level
    factors: Floats = np.exp(SPREAD * levels - SPREAD**2 / 2)
    return factors


def _to_ns(times_s: Floats, duration_s: float) -> Times:
    """Ascending seconds in whole ns; what rounding puts at the end or behind is left out."""
    # Inverting a rate may swap neighbours by a rounding error.
    times = np.maximum.accumulate(np.rint(times_s * NS).astype(np.int64))
    return times[: np.searchsorted(times, round(duration_s * NS))]


def _check(holds: bool, what: str, expected: str) -> None:
    if not holds:
        raise LoadTestError(f"{what} cannot be paced; expected {expected}")


def _check_duration(duration_s: float) -> None:
    _check(0 < duration_s < math.inf, f"a load of {duration_s:g} s", "a duration of more than 0 s")


def _check_process(process: Process, cv: float) -> None:
    _check(process in ("poisson", "gamma", "constant"), f"a process '{process}'", "poisson, gamma or constant")
    within = process != "gamma" or MIN_CV <= cv <= MAX_CV
    _check(within, f"a coefficient of variation (cv) of {cv:g}", f"{MIN_CV:g} to {MAX_CV:g} (1 = Poisson)")


def _check_count(count: float) -> None:
    _check(count <= MAX_ARRIVALS, f"a load of {count:,.0f} arrivals", f"at most {MAX_ARRIVALS:,}: lower or shorten it")


def _check_pieces(count: float, what: str) -> None:
    _check(count <= MAX_PIECES, f"a load of {count:,.0f} {what}", f"at most {MAX_PIECES:,}: longer ones")


def _needed(duration_s: float | None, what: str) -> float:
    """The duration. Raises `LoadTestError` when there is none."""
    if duration_s is None:
        raise LoadTestError(f"the rate within a {what} depends on how long the load lasts: give `duration_s` as well")
    return duration_s
