"""Warm-up: run a model before it is ready, so that the first client does not pay for allocations, and learn how long
each batch size takes.

Rungs of the bucket ladder are run, small to large until the largest that can matter (its latency exceeds the objective,
or the time budget is spent): first each twice the one before, so that a slow model's largest batch is reached, then
those in between while there is time. Then they are timed from large to small. The median of the timed runs is the
latency table; a rung never run is interpolated.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from service.clock import NEVER_NS, now_ns
from service.config.model import ModelConfig, Warmup, WarmupData, WarmupInput
from service.engine.buffers import as_array
from service.engine.pool import Instance, undeclared
from service.engine.states import StepTensors
from service.errors import DeviceFailed, InvalidRequest, ModelLoadError, OutOfMemory, ServiceError
from service.request import BatchOutput, InferenceRequest, InputData, ShapeClass
from service.scheduler import Segment, bucket_ladder
from service.tensor import Array, DataType, TensorSpec, decode_bytes, element_count

# Runs per rung: the first ones are cold (allocation, page faults), the median of twenty is stable to a few percent.
DISCARDED_RUNS = 3
TIMED_RUNS = 20
# Changes of the batch size that are timed. One may be hit by something else, two in three are not.
CHANGES = 3
# Batches up to twice as slow as the objective are measured: the machine may be busy now and faster later. What lies
# beyond is extrapolated, and corrected if it is ever run.
BEYOND_SLO = 2.0
# Open dimensions are tried at these sizes, in this order: a short sequence, a small and a usual picture, one element.
OPEN_DIMENSIONS = (32, 224, 8, 1)
# Elements of a generated row: a model with four open dimensions does not mean 224 x 224 x 224 x 224.
MAX_GENERATED = 1 << 24


@dataclass(frozen=True, slots=True)
class LatencySample:
    """Latencies of one batch size, nanoseconds. `runs` timed runs."""

    p50_ns: int
    p99_ns: int
    runs: int


@dataclass(slots=True)
class Measured:
    """What warm-up found: the shape it ran and the latency of each rung; `complete` if every rung up to the largest
    batch was run; `memory_rows`, if there is one, the smallest batch for which the device had too little memory."""

    shape: ShapeClass
    table: dict[int, LatencySample]
    complete: bool
    memory_rows: int | None = None


class _Nobody:
    """The responder of warm-up requests: their answers are not sent."""

    def answer(self, request: InferenceRequest, outputs: Sequence[BatchOutput], first_row: int) -> None: ...

    def fail(self, request: InferenceRequest, error: ServiceError) -> None: ...

    def hold(self) -> None: ...

    def flush(self) -> None: ...


_NOBODY = _Nobody()


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of inputs to warm up with: its shape class and each input's data (of the whole tensor if not batched).

    `rows` and `count`: how many of it are run at once, and how often, because the configuration asks for it.
    """

    shape: ShapeClass
    inputs: tuple[InputData | None, ...]
    rows: int = 1
    count: int = 0


def samples(config: ModelConfig, directory: Path) -> list[Sample]:
    """Inputs to try, most likely to be accepted first: the configuration's `model_warmup`, else generated ones.

    Zeros are the safest contents for integers (indices, ids, lengths); a model that refuses them may take ones. Samples
    of equal shape have one shape class. Raises `ModelLoadError` for warm-up data that cannot be read.
    """
    if config.warmups:
        tried = [_configured(config, warmup, directory) for warmup in config.warmups]
    else:
        has_open = any(-1 in spec.shape for spec in config.inputs)
        sizes: tuple[int, ...] = OPEN_DIMENSIONS[:1]
        if has_open:
            sizes = tuple(size for size in OPEN_DIMENSIONS if _elements(config, size) <= MAX_GENERATED)
        tried = [_generated(config, size, fill) for size in sizes for fill in (0, 1)]
    if config.sequences is not None:
        shapes_added, added = StepTensors(config, directory).first()
        tried = [
            replace(
                sample,
                shape=_shape_class((*sample.shape.shapes, *shapes_added)),
                inputs=(*sample.inputs, *added),
            )
            for sample in tried
        ]
    shapes: dict[object, ShapeClass] = {}
    return [replace(sample, shape=shapes.setdefault(sample.shape.shapes, sample.shape)) for sample in tried]


def _elements(config: ModelConfig, size: int) -> int:
    return sum(element_count([size if d == -1 else d for d in spec.shape]) for spec in config.inputs)


def _generated(config: ModelConfig, size: int, fill: int) -> Sample:
    rng = np.random.default_rng(0)
    shapes: list[tuple[int, ...] | None] = []
    inputs: list[InputData | None] = []
    for spec in config.inputs:
        if spec.optional:
            shapes.append(None)
            inputs.append(None)
            continue
        shape = tuple(size if d == -1 else d for d in spec.shape)
        shapes.append(shape)
        inputs.append(_fill(spec, shape, fill, rng))
    return Sample(_shape_class(shapes), tuple(inputs))


def _fill(spec: TensorSpec, shape: tuple[int, ...], fill: int, rng: np.random.Generator | None) -> InputData:
    count = element_count(shape)
    if spec.datatype is DataType.BYTES:
        array = np.empty(count, dtype=object)
        array[:] = str(fill)
        return array
    if rng is not None and spec.datatype in (DataType.FP16, DataType.FP32, DataType.FP64):
        # Ordinary numbers: zeros can be faster (or, as denormals, slower) than real data.
        return rng.standard_normal(count).astype(spec.datatype.dtype).tobytes()
    if spec.datatype is DataType.BF16:
        return np.full(count, 0x3F80 * fill, np.uint16).tobytes()
    return np.full(count, fill, spec.datatype.dtype).tobytes()


def _configured(config: ModelConfig, warmup: Warmup, directory: Path) -> Sample:
    given = {item.spec.name: item for item in warmup.inputs}
    rng = np.random.default_rng(0)
    shapes: list[tuple[int, ...] | None] = []
    inputs: list[InputData | None] = []
    for spec in config.inputs:
        item = given.get(spec.name)
        shapes.append(None if item is None else item.shape)
        inputs.append(None if item is None else _warmup_data(item, directory, rng))
    return Sample(_shape_class(shapes), tuple(inputs), max(1, warmup.rows), warmup.count)


def _warmup_data(item: WarmupInput, directory: Path, rng: np.random.Generator) -> InputData:
    count = element_count(item.shape)
    if item.data is WarmupData.ZERO:
        return _fill(item.spec, item.shape, 0, None)
    if item.data is WarmupData.RANDOM:
        if item.spec.datatype.dtype.kind in "iu":
            limit = min(100, 2 ** (8 * item.spec.datatype.itemsize - 1) - 1)
            return rng.integers(0, limit, count).astype(item.spec.datatype.dtype).tobytes()
        return _fill(item.spec, item.shape, 1, rng)
    path = directory / "warmup" / item.file
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ModelLoadError(f"{path}: warm-up data cannot be read: {error.strerror}") from error
    if item.spec.datatype is DataType.BYTES:
        array = np.empty(count, dtype=object)
        try:
            array[:] = [bytes(element).decode() for element in decode_bytes(raw, count, item.spec.name).tolist()]
        except (InvalidRequest, UnicodeDecodeError) as error:
            raise ModelLoadError(f"{path}: {error}") from error
        return array
    expected = count * item.spec.datatype.itemsize
    if len(raw) < expected:
        raise ModelLoadError(f"{path}: {len(raw)} bytes, expected {expected} for input '{item.spec.name}'")
    return raw[:expected]


def _shape_class(shapes: Sequence[tuple[int, ...] | None]) -> ShapeClass:
    cost = sum(element_count(shape) for shape in shapes if shape is not None)
    return ShapeClass(tuple(shapes), (), max(1, cost))


def vary(sample: Sample, config: ModelConfig) -> Sample:
    """Another row of the same shape: other numbers in what clients send and sequences keep where it is floating-point,
    everything else (what tells the model which step it is among it) the same."""
    rng = np.random.default_rng(1)
    told = {control.spec.name for control in config.sequences.controls} if config.sequences is not None else set()
    inputs: list[InputData | None] = []
    for spec, shape, data in zip(config.session_inputs, sample.shape.shapes, sample.inputs, strict=True):
        floating = spec.datatype in (DataType.FP16, DataType.FP32, DataType.FP64)
        # Four times as large: what scales over the batch shows.
        inputs.append(
            (rng.standard_normal(element_count(shape)) * 4).astype(spec.datatype.dtype).tobytes()
            if shape is not None and floating and spec.batched and spec.name not in told
            else data
        )
    return replace(sample, inputs=tuple(inputs))


def batch_arrays(rows: Sequence[Sample], config: ModelConfig) -> dict[str, tuple[TensorSpec, Array]]:
    """The inputs of a batch of `rows`, all of one shape, as arrays."""
    feeds: dict[str, tuple[TensorSpec, Array]] = {}
    for index, (spec, shape) in enumerate(zip(config.session_inputs, rows[0].shape.shapes, strict=True)):
        if shape is not None:
            given = [data for row in rows if (data := row.inputs[index]) is not None]
            parts = [as_array(data, spec, spec.whole(1, shape)) for data in given]
            feeds[spec.name] = (spec, np.concatenate(parts, axis=spec.axis) if spec.batched else parts[0])
    return feeds


def requests(sample: Sample, config: ModelConfig, rows: int) -> list[Segment]:
    """A batch of `rows` rows of a sample as its segments: requests of one row each, or one request of all rows where
    requests are not joined."""
    if not config.batched:
        rows = 1
    inputs, count = sample.inputs, rows
    if not config.joins_requests and rows > 1 and config.sequences is None:
        specs = config.session_inputs
        inputs = tuple(_repeated(d, rows) if s.batched else d for s, d in zip(specs, inputs, strict=True))
        count = 1
    each = rows // count
    return [
        Segment(InferenceRequest(each, 0, NEVER_NS, 1, sample.shape, inputs, _NOBODY, None, b""), 0, each)
        for _ in range(count)
    ]


def _repeated(data: InputData | None, rows: int) -> InputData | None:
    if data is None:
        return None
    return np.tile(data, rows) if isinstance(data, np.ndarray) else bytes(data) * rows


def first_run(instance: Instance, config: ModelConfig, candidates: Sequence[Sample]) -> tuple[Sample | None, str]:
    """The first candidate the model accepts, or None and the reason of the last refusal. Raises `DeviceFailed`.

    It is run without bound buffers first: what the model really answers decides whether its outputs can be bound.
    """
    reason = "no warm-up input"
    for sample in candidates:
        try:
            answers = instance.session.run(batch_arrays([sample], config), config.session_outputs)
            instance.undeclared_shapes |= undeclared(config.session_outputs, answers)
            instance.run(requests(sample, config, 1), 1, 1)
        except DeviceFailed:
            raise
        except ServiceError as error:
            reason = str(error)
        else:
            return sample, ""
    return None, reason


def run_configured(instance: Instance, config: ModelConfig, candidates: Sequence[Sample]) -> None:
    """Run the configuration's warm-up requests as often as it says. Raises `ModelLoadError` when one is refused."""
    for index, sample in enumerate(candidates):
        for _ in range(sample.count):
            try:
                instance.run(requests(sample, config, sample.rows), sample.rows, sample.rows)
            except DeviceFailed:
                raise
            except ServiceError as error:
                raise ModelLoadError(f"model_warmup[{index}]: the model refuses it: {error}") from error


def measure(
    instance: Instance, config: ModelConfig, sample: Sample, max_rows: int, slo_ns: int | None, budget_ns: int
) -> Measured:
    """Latency per rung of the ladder up to `max_rows`, or up to what there is memory for.

    Raises `ServiceError` when the model fails on a larger batch for another reason.
    """
    start_ns = now_ns()
    rungs = bucket_ladder(max_rows)
    cold: dict[int, int] = {}
    beyond = max_rows + 1
    memory_rows: int | None = None
    for rows in [*coarse(rungs), *rungs]:
        if rows in cold or rows > beyond or (memory_rows is not None and rows >= memory_rows):
            continue
        segments = requests(sample, config, rows)
        try:
            cold[rows] = _time(instance, segments, rows)
        except OutOfMemory:
            if rows == 1:
                raise
            memory_rows = rows
            continue
        spent_ns = now_ns() - start_ns
        if slo_ns is not None and cold[rows] > BEYOND_SLO * slo_ns and rows > 1:
            # Cold runs overstate: only a second one shows that the size is really out of reach.
            cold[rows] = min(cold[rows], _time(instance, segments, rows))
            if cold[rows] > BEYOND_SLO * slo_ns:
                beyond = rows
        if spent_ns > budget_ns // 2:
            break
    table: dict[int, LatencySample] = {}
    left = sorted((rows for rows in cold if rows <= beyond), reverse=True)
    for index, rows in enumerate(left):
        share_ns = max(0, budget_ns - (now_ns() - start_ns)) // (len(left) - index)
        runs = min(TIMED_RUNS, max(1, share_ns // max(1, cold[rows]) - DISCARDED_RUNS))
        segments = requests(sample, config, rows)
        for _ in range(DISCARDED_RUNS if runs > 1 else 0):
            _time(instance, segments, rows)
        times = sorted(_time(instance, segments, rows) for _ in range(runs))
        if runs == 1:
            times.append(min(times[0], cold[rows]))
            times.sort()
        table[rows] = LatencySample(
            int(statistics.median(times)), times[min(len(times) - 1, len(times) * 99 // 100)], runs
        )
    return Measured(sample.shape, dict(sorted(table.items())), left[0] == max_rows, memory_rows)


def largest_run(config: ModelConfig) -> int:
    """The most rows that are run at once."""
    # Steps of sequences have one row each: what is not joined has one.
    alone = config.sequences is not None and not config.joins_requests
    return config.max_batch_size if config.batched and not alone else 1


def cost_of_change(instance: Instance, config: ModelConfig, sample: Sample, one: int, other: int) -> int:
    """What a batch of `one` rows takes longer because the one before it had `other`, nanoseconds: the median of three
    changes, over a batch of the same size right after. Raises `ServiceError`."""
    costs = []
    for _ in range(CHANGES):
        time_rows(instance, config, sample, other)
        after_change = time_rows(instance, config, sample, one)
        costs.append(after_change - time_rows(instance, config, sample, one))
    return max(0, int(statistics.median(costs)))


def coarse(rungs: Sequence[int]) -> list[int]:
    """Rungs each at least twice the one before, and the last."""
    chosen = [rungs[0]]
    for rows in rungs:
        if rows >= 2 * chosen[-1]:
            chosen.append(rows)
    return chosen if chosen[-1] == rungs[-1] else [*chosen, rungs[-1]]


def warm(instance: Instance, config: ModelConfig, sample: Sample, rows: int) -> None:
    """Run a batch size once. A size that there is no memory for is left to those who need it."""
    with contextlib.suppress(OutOfMemory):
        instance.run(requests(sample, config, rows), rows, rows)


def time_rows(instance: Instance, config: ModelConfig, sample: Sample, rows: int) -> int:
    """Nanoseconds of one run of `rows` rows, merging included."""
    return _time(instance, requests(sample, config, rows), rows)


def _time(instance: Instance, segments: list[Segment], rows: int) -> int:
    start_ns = now_ns()
    instance.run(segments, rows, rows)
    return now_ns() - start_ns
