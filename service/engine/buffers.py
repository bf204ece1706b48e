"""Buffers that a batch is merged into and answered from, bound to the session once.

For one shape class an instance keeps one array per input and output, large enough for the largest batch seen. A batch
of n rows uses the first n rows of each; the session is bound to those once per n and then only run. Merging a request
is one copy of its bytes into its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from service.engine.session import Binding, OnnxSession
from service.request import BatchOutput, InferenceRequest, InputData, ShapeClass
from service.scheduler import Segment
from service.tensor import Array, DataType, TensorSpec, element_count

# Buffers grow by this factor, rounded up, so that a slowly growing batch does not allocate every time.
_GROWTH = 1.25

# Makes an array of zeros of a shape and NumPy type, in memory of some kind. Raises `MemoryError`.
Allocate = Callable[[Sequence[int], Any], Array]


@dataclass(frozen=True, slots=True)
class Memory:
    """Where the buffers of an instance lie: ordinary memory, unless said otherwise."""

    inputs: Allocate = np.zeros
    outputs: Allocate = np.zeros


ORDINARY = Memory()


@dataclass(slots=True)
class _Input:
    """`array` has room for the most rows, one after another; `view` are its bytes. Where the batch dimension is not the
    first, a batch takes the elements from the front on, in the shape of its size."""

    index: int
    spec: TensorSpec
    row_shape: tuple[int, ...]
    row_bytes: int
    array: Array
    view: memoryview


@dataclass(slots=True)
class Bound:
    """The session bound to the first rows of the buffers, and those rows as the answer."""

    binding: Binding
    outputs: list[BatchOutput]


def fixed_size(specs: Sequence[TensorSpec]) -> bool:
    """Whether the tensors have fixed-size elements and known row shapes, so that they can be bound beforehand."""
    return all(s.datatype.itemsize and all(d > 0 for d in s.shape) for s in specs)


def bindable(shape: ShapeClass, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bool:
    """Whether batches of this shape class can use bound buffers: no strings, no empty tensors, no open output
    shapes."""
    if not fixed_size(outputs) or not all(spec.datatype.itemsize for spec in inputs):
        return False
    return all(row is None or element_count(row) > 0 for row in shape.shapes)


class ShapeBuffers:
    """The buffers of one shape class on one instance. Used by one thread at a time."""

    def __init__(
        self,
        session: OnnxSession,
        shape: ShapeClass,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        memory: Memory = ORDINARY,
    ) -> None:
        self._session = session
        self._memory = memory
        self._shape = shape
        self._specs = inputs
        self._output_specs = outputs
        self._capacity = 0
        self._inputs: list[_Input] = []
        self._outputs: list[tuple[TensorSpec, Array]] = []
        self._bound: dict[int, Bound] = {}

    def reserve(self, rows: int, most: int) -> None:
        """Make room for batches of `rows`; `most` is the largest that can come. Existing bindings are dropped.

        Raises `MemoryError`; smaller batches can still be made room for.
        """
        if rows <= self._capacity:
            return
        capacity = min(most, max(rows, int(self._capacity * _GROWTH) + 1))
        # Nothing is kept while there may not be memory for more: a smaller batch then starts anew.
        self._capacity = 0
        self._bound.clear()
        self._inputs = []
        self._outputs = []
        for index, (spec, row_shape) in enumerate(zip(self._specs, self._shape.shapes, strict=True)):
            if row_shape is not None:
                whole = (capacity, *row_shape) if spec.batched else row_shape
                array = self._memory.inputs(whole, spec.datatype.dtype)
                row_bytes = element_count(row_shape) * spec.datatype.itemsize
                self._inputs.append(_Input(index, spec, row_shape, row_bytes, array, bytes_of(array)))
        self._outputs = [
            (spec, self._memory.outputs((capacity, *spec.shape) if spec.batched else spec.shape, spec.datatype.dtype))
            for spec in self._output_specs
        ]
        self._capacity = capacity

    def merge(self, segments: Sequence[Segment], rows: int, bucket: int) -> None:
        """Copy the segments' `rows` rows one after another into the input buffers.

        The rows up to `bucket` repeat the last one: what an earlier batch left there, or zeros, might fail the model.
        """
        for target in self._inputs:
            index, row_bytes, view = target.index, target.row_bytes, target.view
            if not target.spec.batched:
                request = segments[0].request
                assert isinstance(request, InferenceRequest)
                view[:] = request.inputs[index]  # type: ignore[assignment]
                continue
            if target.spec.axis:
                _merge_across(segments, target, rows, bucket)
                continue
            position = 0
            for segment in segments:
                data = segment.request.inputs[index]  # type: ignore[attr-defined]
                end = position + segment.rows * row_bytes
                if segment.rows != segment.request.rows:
                    first = segment.first_row * row_bytes
                    data = memoryview(data)[first : first + segment.rows * row_bytes]
                view[position:end] = data
                position = end
            if bucket > rows:
                target.array[rows:bucket] = target.array[rows - 1]

    @property
    def nbytes(self) -> int:
        """Host memory held, bytes."""
        return sum(i.array.nbytes for i in self._inputs) + sum(array.nbytes for _, array in self._outputs)

    def inputs(self, rows: int) -> list[tuple[TensorSpec, Array]]:
        """The first `rows` rows of the input buffers, as merged."""
        return [(i.spec, _first_rows(i.spec, i.array, rows)) for i in self._inputs]

    def bound(self, rows: int) -> Bound:
        """The session bound to the first `rows` rows. Room for them must have been reserved."""
        bound = self._bound.get(rows)
        if bound is None:
            inputs = self.inputs(rows)
            outputs = [(spec, _first_rows(spec, array, rows)) for spec, array in self._outputs]
            bound = Bound(self._session.bind(inputs, outputs), [batch_output(s, a, rows) for s, a in outputs])
            self._bound[rows] = bound
        return bound


def _first_rows(spec: TensorSpec, array: Array, rows: int) -> Array:
    """A tensor of `rows` rows at the front of a buffer [capacity, *row]."""
    if not spec.batched:
        return array
    first = array[:rows]
    return first.reshape(spec.whole(rows, array.shape[1:])) if spec.axis else first


def _merge_across(segments: Sequence[Segment], target: _Input, rows: int, bucket: int) -> None:
    """Copy rows that do not lie one after another: those of a batch dimension that is not the first."""
    spec = target.spec
    whole = _first_rows(spec, target.array, bucket)
    position = 0
    for segment in segments:
        request = segment.request
        data = request.inputs[target.index]  # type: ignore[attr-defined]
        given = as_array(data, spec, spec.whole(request.rows, target.row_shape))
        end = position + segment.rows
        spec.rows(whole, position, end)[...] = spec.rows(given, segment.first_row, segment.first_row + segment.rows)
        position = end
    if bucket > rows:
        spec.rows(whole, rows, bucket)[...] = spec.rows(whole, rows - 1, rows)


def bytes_of(array: Array) -> memoryview:
    """The bytes of a C-contiguous array of fixed-size elements, writable if it is."""
    return array.reshape(-1).view(np.uint8).data


def batch_output(spec: TensorSpec, array: Array, rows: int) -> BatchOutput:
    """An output array as the answer of a batch of `rows`.

    A batched output without a row per row belongs to a request that ran alone: it is given whole.
    """
    if spec.batched and (array.ndim <= spec.axis or array.shape[spec.axis] != rows):
        spec = TensorSpec(spec.name, spec.datatype, array.shape, batched=False)
    if spec.datatype is DataType.BYTES or (spec.batched and spec.axis):
        return BatchOutput(spec, array.shape, array, None, 0)
    view = bytes_of(np.ascontiguousarray(array))
    return BatchOutput(spec, array.shape, array, view, len(view) // rows if spec.batched else len(view))


def as_array(data: InputData, spec: TensorSpec, shape: tuple[int, ...]) -> Array:
    """A request's tensor as an array of `shape`; a copy only where the bytes are not aligned for their type."""
    if isinstance(data, np.ndarray):
        return data.reshape(shape)
    array = np.frombuffer(data, spec.datatype.dtype)
    if not array.flags.aligned:
        array = array.copy()
    return array.reshape(shape)
