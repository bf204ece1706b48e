"""The session pool: the instances of one model version on one device, and how they run a batch.

An instance is what may execute at the same time as another: on the CPU a set of buffers over one shared session
(sessions are safe to share there and weights exist once), on a GPU a session and a stream of its own. The scheduler
never dispatches more batches of a model than it has instances, so taking one never waits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from service.clock import now_ns
from service.engine.buffers import ORDINARY, Memory, ShapeBuffers, as_array, batch_output, bindable
from service.engine.session import OnnxSession, OtherShapeError
from service.errors import ExecutionFailed, OutOfMemory
from service.request import BatchOutput, ShapeClass
from service.scheduler import Segment
from service.tensor import Array, DataType, TensorSpec

# Shape classes whose buffers an instance keeps: as many as the latency model keeps tables for. The least recently used
# goes first; a model with more live shapes than that pays for allocation again.
MAX_SHAPES = 16


@dataclass(slots=True)
class Executed:
    """A batch that was run: its outputs (valid until the instance is released) and when computing began and ended."""

    outputs: list[BatchOutput]
    started_ns: int
    finished_ns: int


class Instance:
    """One set of buffers on one session. `memory` is what they are made in."""

    def __init__(
        self,
        session: OnnxSession,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        max_rows: int,
        memory: Memory = ORDINARY,
    ) -> None:
        self.session = session
        # Why there are no CUDA graphs, or no more of them, though they were asked for.
        self.why_not = ""
        self._memory = memory
        self._inputs = inputs
        self._outputs = outputs
        self._max_rows = max_rows
        self._buffers: OrderedDict[ShapeClass, ShapeBuffers] = OrderedDict()
        # Whether the file's output shapes cannot be relied on, so that buffers cannot be bound to them. Also set when a
        # run shows it.
        self.undeclared_shapes = _fixed_first_dimension(session, outputs)

    def run(self, segments: Sequence[Segment], rows: int, bucket: int) -> Executed:
        """Run the rows of `segments`, all of one shape class, padded up to `bucket` rows.

        Raises `ExecutionFailed` or `OutOfMemory`; the instance stays usable.
        """
        shape: ShapeClass = segments[0].request.shape  # type: ignore[assignment]
        if self.undeclared_shapes or not bindable(shape, self._inputs, self._outputs):
            return self._run_unbound(segments, shape, rows, bucket)
        bound = self._gather(segments, shape, rows, bucket).bound(bucket)
        started_ns = now_ns()
        try:
            self.session.run_bound(bound.binding)
        except OtherShapeError:
            # Output sizes that depend on the data (detections, a selection): buffers cannot be made beforehand.
            executed = self._run_unbound(segments, shape, rows, bucket)
            self.undeclared_shapes = True
            return executed
        return Executed(bound.outputs, started_ns, now_ns())

    @property
    def graphs(self) -> int:
        """CUDA graphs captured (`graphs.GraphInstance`)."""
        return 0

    @property
    def staging_bytes(self) -> int:
        """Host memory of the instance's buffers. From any thread."""
        return sum(buffers.nbytes for buffers in list(self._buffers.values()))

    def seal(self) -> None:
        """Warm-up is over: nothing is captured any more."""

    def _gather(self, segments: Sequence[Segment], shape: ShapeClass, rows: int, bucket: int) -> ShapeBuffers:
        """The buffers of a shape, with a batch in them. Raises `OutOfMemory`."""
        buffers = self._buffers.get(shape)
        if buffers is None:
            if len(self._buffers) >= MAX_SHAPES:
                self._buffers.popitem(last=False)
            buffers = self._buffers[shape] = ShapeBuffers(
                self.session, shape, self._inputs, self._outputs, self._memory
            )
        elif len(self._buffers) > 1:
            self._buffers.move_to_end(shape)
        try:
            buffers.reserve(bucket, self._max_rows)
        except MemoryError as error:
            raise OutOfMemory(f"no memory for the tensors of a batch of {bucket} rows: {error}") from error
        buffers.merge(segments, rows, bucket)
        return buffers

    def _run_unbound(self, segments: Sequence[Segment], shape: ShapeClass, rows: int, bucket: int) -> Executed:
        feeds: dict[str, tuple[TensorSpec, Array]] = {}
        for index, (spec, row_shape) in enumerate(zip(self._inputs, shape.shapes, strict=True)):
            if row_shape is not None:
                feeds[spec.name] = (spec, _padded(_merged(segments, index, spec, row_shape), spec, bucket - rows))
        started_ns = now_ns()
        answers = self.session.run(feeds, self._outputs)
        finished_ns = now_ns()
        if bucket > rows:
            if not all(_has_rows(spec, array, bucket) for spec, array in zip(self._outputs, answers, strict=True)):
                # What was added cannot be taken out of the answer again.
                return self._run_unbound(segments, shape, rows, rows)
            answers = [spec.rows(array, 0, rows) for spec, array in zip(self._outputs, answers, strict=True)]
        outputs = [batch_output(spec, array, rows) for spec, array in zip(self._outputs, answers, strict=True)]
        if len(segments) > 1:
            for spec, output in zip(self._outputs, outputs, strict=True):
                if spec.batched and not output.spec.batched:
                    raise ExecutionFailed(
                        f"output '{spec.name}' has shape {list(output.shape)} for a batch of {rows} rows: "
                        "its rows cannot be told apart"
                    )
        return Executed(outputs, started_ns, finished_ns)


def _has_rows(spec: TensorSpec, array: Array, rows: int) -> bool:
    """Whether an output has a row per row."""
    return not spec.batched or (array.ndim > spec.axis and array.shape[spec.axis] == rows)


def _padded(array: Array, spec: TensorSpec, more: int) -> Array:
    """`array` with its last row `more` times behind it; itself where it has no rows."""
    if more <= 0 or not spec.batched:
        return array
    rows = array.shape[spec.axis]
    last = spec.rows(array, rows - 1, rows)
    return np.concatenate([array, *[last] * more], axis=spec.axis)


def _merged(segments: Sequence[Segment], index: int, spec: TensorSpec, row_shape: tuple[int, ...]) -> Array:
    parts: list[Array] = []
    for segment in segments:
        request = segment.request
        data = request.inputs[index]  # type: ignore[attr-defined]
        array = as_array(data, spec, spec.whole(request.rows, row_shape))
        if not spec.batched:
            return array
        if segment.rows != request.rows:
            array = spec.rows(array, segment.first_row, segment.first_row + segment.rows)
        parts.append(array)
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=spec.axis)


class SessionPool:
    """The free instances of one model version on one device."""

    def __init__(self, instances: Sequence[Instance]) -> None:
        self.instances = tuple(instances)
        # Appending to and popping from a list are atomic; the scheduler guarantees that one is free.
        self._free = list(instances)

    @property
    def graphs(self) -> int:
        """CUDA graphs captured, of all instances."""
        return sum(instance.graphs for instance in self.instances)

    @property
    def staging_bytes(self) -> int:
        """Host memory of the buffers that batches are gathered in and answered from."""
        return sum(instance.staging_bytes for instance in self.instances)

    def acquire(self) -> Instance:
        """An instance that nobody else uses."""
        return self._free.pop()

    def release(self, instance: Instance) -> None:
        """Give an instance back; its last outputs are no longer valid."""
        self._free.append(instance)


def _fixed_first_dimension(session: OnnxSession, outputs: Sequence[TensorSpec]) -> bool:
    """Whether the file declares a fixed size where the batch's rows should be, as some converters do: ONNX Runtime then
    refuses a bound buffer of any other size."""
    declared = {name: shape for name, _, shape in session.outputs}
    batched = [(declared[spec.name], spec.axis) for spec in outputs if spec.batched]
    return any(len(shape) <= axis or isinstance(shape[axis], int) for shape, axis in batched)


def undeclared(outputs: Sequence[TensorSpec], arrays: Sequence[Array]) -> bool:
    """Whether answers have other trailing shapes or datatypes than declared (-1 fits anything)."""
    return any(
        not spec.accepts(array.shape) or (spec.datatype is not DataType.BYTES and array.dtype != spec.datatype.dtype)
        for spec, array in zip(outputs, arrays, strict=True)
    )
