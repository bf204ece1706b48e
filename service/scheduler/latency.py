"""How long a batch will take: a profile, corrected by every batch that runs.

    estimate(shape, rows) = curve(shape)[bucket of rows] x scale x quantile

* `curve`: nanoseconds per bucket, from the profile measured at load, non-decreasing, times a slow correction per
  bucket. A shape that was not profiled is guessed from the nearest one in elements per row, never faster than that,
  and a model without any profile starts at zero; both are replaced by what is measured.
* `scale`: what slowed the device down since (clocks, temperature, neighbours). Such causes slow all sizes alike, so one
  number learns from every batch; a window of samples per size would need ten runs of each.
* `quantile`: the upper quantile of recent actual / predicted ratios. Its level is steered so that `LATE_TARGET` of the
  answers are late, an adaptive conformal step: the late share is controlled, not hoped for.

The constants were chosen in simulation over service times, objectives, loads and disturbances (docs/batching.md).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise

SCALE_STEP = 0.15  # weight of one batch in the scale: a step in speed is learned in about 7 batches
RATIO_LOW, RATIO_HIGH = 0.5, 1.5  # one batch counts as at most this far off: stalls are not a change of speed
WINDOW = 256  # ratios remembered for the quantile
REFRESH = 16  # batches between two looks at the window: sorting it costs more than a batch's other bookkeeping
MIN_RATIOS = 32  # before that the quantile stays at its first value
FIRST_QUANTILE = 1.05  # 5 % above the median, until ratios are known
LATE_TARGET = 0.005  # share of answers allowed to be late
LEVEL_STEP = 0.05
LEVEL_LOW, LEVEL_HIGH = 0.5, 0.995
FULL_WEIGHT_ROWS = 8  # a batch smaller than this says less about the late share
BUCKET_STEP = 0.05  # weight of one batch in the correction of its bucket
BUCKET_SAMPLES = 20  # before that a bucket is not corrected
BUCKET_LOW, BUCKET_HIGH = 0.8, 1.2
# A batch this short (nanoseconds) says nothing about those that are longer: what delays it is the wait for a core or
# for the interpreter, which does not grow with the rows. Such buckets learn for themselves and leave scale and
# quantile alone: times a hundred for batches of 30 us is not times a hundred for batches of 3 ms. Where all are
# short, none is.
MICRO_NS = 200_000
MICRO_STEP = 0.15  # weight of one batch in what a short bucket is believed to take
COLD_SAMPLES = 5  # first runs are slow, never fast: until then the least counts
MAX_SHAPES = 256  # shapes remembered that were not profiled: clients choose shapes, so there must be a bound
PEAK_SHARE = 0.95  # of the peak rows per second, for batches without a deadline


class Curve:
    """Latency of one shape per bucket, without scale and quantile. `ns` is non-decreasing; all zero = unknown."""

    __slots__ = ("_base", "_correction", "_guess", "_samples", "cost", "efficient_rows", "ns", "profiled", "rows")

    def __init__(self, rows: Sequence[int], base: list[float], cost: int, profiled: bool) -> None:
        self.rows = rows
        self.ns = base.copy()
        self.cost = cost
        self.profiled = profiled
        self._base = base  # the profile; for other shapes what was measured so far (0 = not yet)
        self._guess: list[float] | None = None
        if not profiled:
            self._guess = base.copy() if any(base) else None
            self._base = [0.0] * len(rows)
        self._correction = [1.0] * len(rows)
        self._samples = [0] * len(rows)
        self.efficient_rows = self._efficient_rows()

    def fits(self, slack: float) -> int:
        """The largest bucket that takes at most `slack` (nanoseconds at scale and quantile 1); 0 when none does."""
        index = bisect_right(self.ns, slack) if slack > 0.0 else 0
        return self.rows[index - 1] if index else 0

    def index(self, rows: int) -> int:
        """Index of the smallest bucket that holds `rows` (the last one when none does)."""
        index = bisect_left(self.rows, rows)
        return index if index < len(self.rows) else index - 1

    def settled(self, index: int) -> bool:
        """Whether a ratio against this bucket says something about the speed of the device."""
        return self.profiled or self._samples[index] >= COLD_SAMPLES

    def micro(self, index: int) -> bool:
        """Whether this bucket was profiled and is too short to tell how long the longest will take."""
        return self.profiled and 0.0 < self._base[index] < MICRO_NS <= self._base[-1]

    def learn(self, index: int, ns: float) -> None:
        """Take in one run of bucket `index` that would have taken `ns` at scale 1."""
        self._samples[index] += 1
        if self.micro(index):
            self._learn_micro(index, ns)
            return
        if not self.profiled:
            self._learn_point(index, ns)
            return
        correction = self._correction[index]
        ratio = ns / self._base[index] if self._base[index] else 1.0
        correction += BUCKET_STEP * (min(max(ratio, RATIO_LOW), RATIO_HIGH) - correction)
        self._correction[index] = min(max(correction, BUCKET_LOW), BUCKET_HIGH)
        if self._samples[index] >= BUCKET_SAMPLES:
            self._apply_corrections(index)

    def _learn_micro(self, index: int, ns: float) -> None:
        old = self._base[index] * self._correction[index]
        new = old + MICRO_STEP * (min(max(ns, RATIO_LOW * old), max(RATIO_HIGH * old, MICRO_NS)) - old)
        # Never below the profile by more than any other bucket.
        self._correction[index] = max(BUCKET_LOW, new / self._base[index])
        self._apply_corrections(index)

    def _apply_corrections(self, first: int) -> None:
        least = self.ns[first - 1] if first else 0.0
        for index in range(first, len(self.ns)):
            corrected = self._samples[index] >= BUCKET_SAMPLES or self.micro(index)
            value = max(least, self._base[index] * (self._correction[index] if corrected else 1.0))
            if index > first and value == self.ns[index]:
                return
            self.ns[index] = least = value

    def _learn_point(self, index: int, ns: float) -> None:
        count, old = self._samples[index], self._base[index]
        if count == 1:
            self._base[index] = ns
        elif count <= COLD_SAMPLES:
            self._base[index] = min(old, ns)
        else:
            self._base[index] += BUCKET_STEP * (min(max(ns, RATIO_LOW * old), RATIO_HIGH * old) - old)
        points = {rows: value for rows, value in zip(self.rows, self._base, strict=True) if value}
        if self._guess is None:
            self.ns = complete(points, self.rows)
        else:
            # The guess knows how latency grows with rows, the measured points how far off it is.
            guess = dict(zip(self.rows, self._guess, strict=True))
            ratios = {rows: value / guess[rows] for rows, value in points.items() if guess[rows]}
            self.ns = isotonic([value * ratios[_nearest(rows, ratios)] for rows, value in guess.items()])
        self.efficient_rows = self._efficient_rows()

    def _efficient_rows(self) -> int:
        """The smallest bucket that reaches 95 % of the peak rows per second; the largest when nothing is known."""
        speeds = [rows / ns if ns else 0.0 for rows, ns in zip(self.rows, self.ns, strict=True)]
        wanted = PEAK_SHARE * max(speeds)
        best = next(index for index, speed in enumerate(speeds) if speed >= wanted)
        if not any(speeds):
            return self.rows[-1]
        if not self.profiled:
            # Sizes beyond the largest one measured are only guessed: always leave room to try the next.
            measured = [index for index, count in enumerate(self._samples) if count]
            largest = measured[-1] if measured else len(self.rows) - 2
            best = max(best, min(largest + 1, len(self.rows) - 1))
        return self.rows[best]


class LatencyModel:
    """Expected latency of a model's batches by shape and rows, learned online. Not thread-safe.

    `table`: shape -> bucket rows -> nanoseconds (p50 of a warm run of the whole dispatch-to-done path); shapes and rows
    may be missing. `buckets`: the ascending batch sizes the engine runs. `costs`: elements per row of the shapes in
    `table`, where known. Readable state: `scale`, `quantile`, `level` (of the quantile), `prediction_cv`.
    """

    def __init__(
        self,
        table: Mapping[Hashable, Mapping[int, float]],
        buckets: Sequence[int],
        costs: Mapping[Hashable, int] | None = None,
    ) -> None:
        self.buckets = tuple(buckets)
        self.scale = 1.0
        self.quantile = FIRST_QUANTILE
        self.level = 0.9
        self.prediction_cv = 0.0
        self.factor = self.scale * self.quantile  # what a curve's nanoseconds are multiplied with
        self.version = 0  # changes whenever an estimate may have
        self._ratios: deque[float] = deque(maxlen=WINDOW)
        self._batches = 0
        self._curves: dict[Hashable, Curve] = {}
        for shape, points in table.items():
            if points:
                cost = costs.get(shape, 0) if costs else 0
                self._curves[shape] = Curve(self.buckets, complete(points, self.buckets), cost, profiled=True)
        self._guessed: deque[Hashable] = deque()

    def curve(self, shape: Hashable, cost: int) -> Curve:
        """The curve of `shape`, guessed when it was never seen; `cost` = elements per row."""
        curve = self._curves.get(shape)
        if curve is None:
            if len(self._guessed) >= MAX_SHAPES:
                del self._curves[self._guessed.popleft()]
            curve = self._curves[shape] = Curve(self.buckets, self._guess(cost), cost, profiled=False)
            self._guessed.append(shape)
        elif not curve.cost:
            curve.cost = cost
        return curve

    def estimate(self, shape: Hashable, rows: int, cost: int = 1) -> int:
        """Nanoseconds that a batch of `rows` will take, at the steered quantile; larger than a batch: the sum of its
        segments. 0 when nothing is known."""
        curve = self.curve(shape, cost)
        most = self.buckets[-1]
        full, rest = divmod(rows, most) if rows > most else (0, rows)
        ns = full * curve.ns[-1] + (curve.ns[curve.index(rest)] if rest else 0.0)
        return int(ns * self.factor)

    def fits(self, shape: Hashable, slack_ns: int, cost: int = 1) -> int:
        """The largest bucket that will be done within `slack_ns`; 0 when none will."""
        return self.curve(shape, cost).fits(slack_ns / self.factor)

    def observe(self, shape: Hashable, rows: int, actual_ns: int, late_rows: int = 0) -> None:
        """Learn from a batch of `rows` that took `actual_ns`, of which `late_rows` were answered too late."""
        curve = self.curve(shape, 0)
        index = curve.index(rows)
        self.version += 1
        weight = min(1.0, rows / FULL_WEIGHT_ROWS)
        level = self.level + LEVEL_STEP * (late_rows / rows - LATE_TARGET) * weight
        self.level = min(max(level, LEVEL_LOW), LEVEL_HIGH)
        expected_ns = curve.ns[index] * self.scale
        at_scale_one = actual_ns / self.scale
        if expected_ns and curve.settled(index):
            ratio = actual_ns / expected_ns
            if not curve.micro(index):
                self._ratios.append(ratio)
                self.scale *= 1.0 + SCALE_STEP * (min(max(ratio, RATIO_LOW), RATIO_HIGH) - 1.0)
        curve.learn(index, at_scale_one)
        self._batches += 1
        if self._batches % REFRESH == 0 and len(self._ratios) >= MIN_RATIOS:
            self._refresh()
        self.factor = self.scale * self.quantile

    def correct(self, shape: Hashable, rows: int, actual_ns: int) -> None:
        """Believe one run outright: a probe, made because the estimate let nothing else run."""
        curve = self.curve(shape, 0)
        index = curve.index(rows)
        self.version += 1
        if curve.ns[index] and actual_ns > 0:
            self.scale = actual_ns / curve.ns[index]
        else:
            curve.learn(index, actual_ns / self.scale)
        self._ratios.clear()
        self.quantile = FIRST_QUANTILE
        self.factor = self.scale * self.quantile

    def table(self) -> dict[Hashable, dict[int, int]]:
        """The present expectation per shape and bucket in nanoseconds, with scale, without quantile."""
        return {
            shape: {rows: int(ns * self.scale) for rows, ns in zip(self.buckets, curve.ns, strict=True)}
            for shape, curve in list(self._curves.items())
        }

    def _refresh(self) -> None:
        ratios = sorted(self._ratios)
        self.quantile = max(1.0, ratios[min(len(ratios) - 1, int(self.level * len(ratios)))])
        mean = sum(ratios) / len(ratios)
        variance = sum((ratio - mean) ** 2 for ratio in ratios) / len(ratios)
        self.prediction_cv = variance**0.5 / mean

    def _guess(self, cost: int) -> list[float]:
        """A curve for a shape of `cost` elements per row: the nearest profiled one, scaled up when that is cheaper."""
        profiled = [curve for curve in self._curves.values() if curve.profiled]
        if not profiled:
            return [0.0] * len(self.buckets)
        dearer = [curve for curve in profiled if curve.cost >= cost]
        if dearer:
            return min(dearer, key=lambda curve: curve.cost).ns.copy()
        largest = max(profiled, key=lambda curve: curve.cost)
        ratio = cost / largest.cost if largest.cost else 1.0
        return [ns * ratio for ns in largest.ns]


def complete(points: Mapping[int, float], buckets: Sequence[int]) -> list[float]:
    """Latency per bucket from the `points` measured: linear between two points, the first one below all of them, in
    proportion to the rows above (as if batching brought nothing there); then made non-decreasing."""
    known = sorted((rows, float(ns)) for rows, ns in points.items())
    values: list[float] = []
    for rows in buckets:
        if rows <= known[0][0]:
            values.append(known[0][1])
        elif rows >= known[-1][0]:
            values.append(known[-1][1] * rows / known[-1][0])
        else:
            (low, low_ns), (high, high_ns) = next((a, b) for a, b in pairwise(known) if a[0] <= rows <= b[0])
            values.append(low_ns + (high_ns - low_ns) * (rows - low) / (high - low))
    return isotonic(values)


def isotonic(values: Sequence[float]) -> list[float]:
    """The running maximum: more rows never take less time."""
    result: list[float] = []
    least = 0.0
    for value in values:
        least = max(least, value)
        result.append(least)
    return result


def _nearest(rows: int, measured: Mapping[int, float]) -> int:
    return min(measured, key=lambda other: abs(other - rows))
