"""CUDA graphs: a batch size is recorded once, with all its kernels, and replayed with one launch.

Worth it where launching costs more than computing: small models and small batches (measured on an H200: 75 to 37 us for
a tiny model, 494 to 274 us for one image of a residual network; docs/performance.md). The price is a place of its own
on the device for the tensors and the activations of each recorded size.

How (docs/adr/0009-cuda-graphs.md): an instance runs on a thread of its own, since ONNX Runtime keeps graphs with the
thread; a size is captured when warm-up runs it for the first time, alone on the device; then it is replayed on other
inputs and compared with an ordinary run. Whatever is wrong with that, the instance runs as if it had no graphs, and
`why_not` says the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from service.clock import now_ns
from service.engine.buffers import ORDINARY, Memory, batch_output, bindable
from service.engine.gate import Gate
from service.engine.home import Home
from service.engine.pool import Executed, Instance
from service.engine.session import Binding, OnnxSession
from service.errors import DeviceFailed, ExecutionFailed, ModelLoadError, OutOfMemory
from service.request import ShapeClass
from service.scheduler import Segment
from service.tensor import Array, DataType, TensorSpec

# Each holds the activations of its size on the device. The ladder of batch sizes up to 512 has as many rungs.
MAX_GRAPHS = 24
# ONNX Runtime runs a graph twice as usual (allocations settle) and captures on the third run.
CAPTURE_RUNS = 3
# A replay and a run choose the same kernels, so they differ by rounding at most; a graph that does not see its inputs
# differs by as much as the answers themselves. Relative to the largest element.
TOLERANCE = 1e-3
HALF_TOLERANCE = 1e-2
RUN_OPTION = "gpu_graph_id"
# The run option's value for "neither capture nor replay".
NO_GRAPH = "-1"


@dataclass(slots=True)
class FixedPlace:
    """A session bound to tensors at fixed addresses of a device. `run` copies in; `outputs` copies out."""

    session: OnnxSession
    binding: Binding
    run_options: Any
    inputs: list[Any]
    results: list[Any]

    def run(self, arrays: Sequence[Array]) -> None:
        """Copy `arrays` in and run. Raises as `OnnxSession.run_bound`."""
        self.session.run_fixed(self.binding, self.run_options, list(zip(self.inputs, arrays, strict=True)))

    def outputs(self) -> list[Array]:
        """Copies of the outputs in host memory."""
        return [value.numpy() for value in self.results]


def fixed_place(
    session: OnnxSession,
    inputs: Sequence[tuple[TensorSpec, Array]],
    outputs: Sequence[tuple[TensorSpec, tuple[int, ...]]],
    device: tuple[str, int],
    graph_id: str,
) -> FixedPlace:
    """Give tensors of the sizes of `inputs` and `outputs` a place on `device` ("cuda" or "cpu", its number).

    Raises `OutOfMemory`, `ExecutionFailed` or `DeviceFailed`.
    """
    options = ort.RunOptions()
    options.add_run_config_entry(RUN_OPTION, graph_id)
    with session.translating():
        places, results = (
            [
                ort.OrtValue.ortvalue_from_shape_and_type(list(shape), spec.datatype.dtype, *device)
                for spec, shape in ends
            ]
            for ends in ([(spec, array.shape) for spec, array in inputs], outputs)
        )
        binding = session.bind_values(
            [(spec.name, value) for (spec, _), value in zip(inputs, places, strict=True)],
            [(spec.name, value) for (spec, _), value in zip(outputs, results, strict=True)],
        )
    return FixedPlace(session, binding, options, places, results)


def obstacle(session: OnnxSession, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> str:
    """Why a session's graph cannot be captured, as far as that is known before trying; empty if nothing is."""
    for spec in (*inputs, *outputs):
        if spec.datatype in (DataType.BYTES, DataType.BF16):
            return f"'{spec.name}' is {spec.datatype.wire_name}, which has no fixed place on the device"
    if any(-1 in spec.shape for spec in outputs):
        return "the size of an output depends on the input"
    on_host = session.tensors_on_host()
    return f"'{on_host[0]}' is used in host memory" if on_host else ""


class GraphInstance(Instance):
    """An instance that captures the batch sizes it runs while `capturing`, and replays them from then on.

    `device` is where tensors get their place: ("cuda", number). `remake` makes a session that captures nothing: one
    whose capture has failed may be left in the middle of it.
    """

    def __init__(
        self,
        session: OnnxSession,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        max_rows: int,
        gate: Gate,
        device: tuple[str, int],
        remake: Callable[[], OnnxSession],
        memory: Memory = ORDINARY,
    ) -> None:
        super().__init__(session, inputs, outputs, max_rows, memory)
        self.capturing = True
        self.why_not = obstacle(session, inputs, outputs)
        self._gate = gate
        self._device = device
        self._remake = remake
        self._graphs: dict[tuple[ShapeClass, int], FixedPlace] = {}
        self._home = Home(f"graphs-{device[0]}:{device[1]}", self)

    @property
    def graphs(self) -> int:
        return len(self._graphs)

    def captured(self, shape: ShapeClass) -> frozenset[int]:
        """The batch sizes of a shape class that are replayed."""
        return frozenset(rows for kind, rows in self._graphs if kind == shape)

    def seal(self) -> None:
        self.capturing = False

    def run(self, segments: Sequence[Segment], rows: int, bucket: int) -> Executed:
        executed: Executed = self._home.call(lambda: self._run_at_home(segments, rows, bucket))
        return executed

    def _run_at_home(self, segments: Sequence[Segment], rows: int, bucket: int) -> Executed:
        shape: ShapeClass = segments[0].request.shape  # type: ignore[assignment]
        place = self._graphs.get((shape, bucket))
        if place is None:
            if self._may_capture(shape):
                place = self._capture(segments, rows, bucket, shape)
            if place is None:
                return super().run(segments, rows, bucket)
        buffers = self._gather(segments, shape, rows, bucket)
        started_ns = now_ns()
        place.run([array for _, array in buffers.inputs(bucket)])
        arrays = place.outputs()
        finished_ns = now_ns()
        outputs = [batch_output(spec, array, bucket) for spec, array in zip(self._outputs, arrays, strict=True)]
        return Executed(outputs, started_ns, finished_ns)

    def _may_capture(self, shape: ShapeClass) -> bool:
        return (
            self.capturing
            and not self.why_not
            and not self.undeclared_shapes
            and len(self._graphs) < MAX_GRAPHS
            and bindable(shape, self._inputs, self._outputs)
        )

    def _capture(self, segments: Sequence[Segment], rows: int, bucket: int, shape: ShapeClass) -> FixedPlace | None:
        """Capture a batch size and check it; None, and `why_not`, if that fails.

        Raises as `OnnxSession.run` where the batch cannot be run at all.
        """
        buffers = self._gather(segments, shape, rows, bucket)
        given = buffers.inputs(bucket)
        shapes = [(s, s.whole(bucket, s.shape)) for s in self._outputs]
        actual = [array for _, array in given]
        other = [_other(array) for array in actual]
        # What is planned for this size is planned now: others would wait for it at the gate for half a second.
        self.session.run({spec.name: (spec, array) for spec, array in given}, self._outputs)
        try:
            with self._gate.alone:
                place = fixed_place(self.session, given, shapes, self._device, str(len(self._graphs) + 1))
                for _ in range(CAPTURE_RUNS):
                    place.run(other)
            for arrays in (other, actual):
                place.run(arrays)
                feeds = {spec.name: (spec, array) for (spec, _), array in zip(given, arrays, strict=True)}
                _compare(self._outputs, place.outputs(), self.session.run(feeds, self._outputs))
        except DeviceFailed:
            raise
        except OutOfMemory:
            self._do_without(f"no device memory for a graph of {bucket} rows")
            return None
        except ExecutionFailed as error:
            self._do_without(f"a graph of {bucket} rows fails: {error}")
            return None
        self._graphs[shape, bucket] = place
        return place

    def _do_without(self, reason: str) -> None:
        self.why_not = reason
        self._graphs.clear()
        self._buffers.clear()
        try:
            self.session = self._remake()
        except ModelLoadError as error:
            raise ExecutionFailed(f"{reason}, and without graphs: {error}") from error


def _other(array: Array) -> Array:
    """Other values that a model takes where it takes `array`: a graph that only saw one of them is found out."""
    if array.dtype == np.bool_:
        return np.logical_not(array)
    if array.dtype.kind == "f":
        return (array.astype(np.float64) * 0.5 + 0.25).astype(array.dtype)
    # Indices and lengths: zeros and ones are what warm-up tries as well.
    return np.where(array == 0, 1, 0).astype(array.dtype)


def _compare(specs: Sequence[TensorSpec], got: Sequence[Array], wanted: Sequence[Array]) -> None:
    """Raises `ExecutionFailed` where a replay's answers are not those of an ordinary run."""
    for spec, one, other in zip(specs, got, wanted, strict=True):
        if one.dtype.kind == "f":
            scale = float(np.max(np.abs(other.astype(np.float64)), initial=0.0, where=np.isfinite(other)))
            tolerance = TOLERANCE if one.dtype.itemsize > 2 else HALF_TOLERANCE
            same = np.allclose(one, other, rtol=0, atol=tolerance * scale, equal_nan=True)
        else:
            same = bool(np.array_equal(one, other))
        if not same:
            raise ExecutionFailed(f"output '{spec.name}' of a replay is not that of an ordinary run")
