"""Sessions, requests and answers for tests of the engine and the model: real ONNX Runtime, tiny models.

`SessionDouble` is the one stand-in: it fails or answers as told, for faults that no model can be made to have.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from google.protobuf import text_format

from service.clock import NEVER_NS, now_ns
from service.config.complete import complete
from service.config.graph import read_graph
from service.config.model import ModelConfig
from service.engine.devices import Device
from service.engine.options import plan_session
from service.engine.pool import Instance
from service.engine.session import Binding, OnnxSession
from service.errors import ServiceError
from service.pb import model_config_pb2 as pb
from service.request import BatchOutput, InferenceRequest, InputData, ShapeClass
from service.scheduler import Segment
from service.tensor import Array, DataType, TensorSpec
from tests.support.onnx_models import write_model

CPU = Device("cpu", "cpu", 0, 1, 1)
GPU = Device("cuda:1", "gpu", 1, 1, 1)

# Answers in tests come within milliseconds; the bound is for a machine that is busy with other tests.
ANSWER_S = 20.0


def config_of(directory: Path, model: onnx.ModelProto, config_text: str = "") -> tuple[ModelConfig, Path]:
    """The configuration in force of `model`, written below `directory`, and the model's file."""
    path = write_model(directory, "model", model) / "1" / "model.onnx"
    graph = read_graph(path)
    given = text_format.Parse(config_text, pb.ModelConfig())
    completed = complete(
        given, "model", graph.inputs, graph.outputs, graph.dynamic_quantisation, convolutions=graph.convolutions
    )
    return completed.config, path


def session_of(directory: Path, model: onnx.ModelProto, config_text: str = "") -> tuple[OnnxSession, ModelConfig]:
    """A session of `model` on the CPU."""
    config, path = config_of(directory, model, config_text)
    return OnnxSession(path, plan_session(config, CPU)), config


def instance_of(directory: Path, model: onnx.ModelProto, config_text: str = "") -> tuple[Instance, ModelConfig]:
    """An instance of `model`, as the loader makes it."""
    session, config = session_of(directory, model, config_text)
    return Instance(session, config.inputs, config.outputs, max(1, config.max_batch_size)), config


def raw(array: Array, spec: TensorSpec) -> InputData:
    """A tensor as the codec hands it over: bytes, or a flat object array for BYTES."""
    if spec.datatype is DataType.BYTES:
        return array.reshape(-1)
    return np.ascontiguousarray(array).tobytes()


@dataclass
class Requests:
    """Makes requests for one model: equal shapes get the same `ShapeClass`, as a loaded model gives them."""

    inputs: Sequence[TensorSpec]
    batched: bool = True
    shapes: dict[tuple[object, ...], ShapeClass] = field(default_factory=dict)

    def make(
        self,
        *arrays: Array | None,
        responder: Answers | None = None,
        deadline_ns: int = NEVER_NS,
        priority: int = 1,
    ) -> InferenceRequest:
        """A request with these tensors, in the order of the inputs; None leaves an optional one out."""
        rows = next((len(a) for a, s in zip(arrays, self.inputs, strict=True) if a is not None and s.batched), 1)
        return InferenceRequest(
            rows,
            now_ns(),
            deadline_ns,
            priority,
            self.shape(*arrays),
            [None if a is None else raw(a, s) for a, s in zip(arrays, self.inputs, strict=True)],
            responder if responder is not None else Answers(),
            None,
            b"",
        )

    def shape(self, *arrays: Array | None) -> ShapeClass:
        """The shape class of these tensors."""
        pairs = list(zip(arrays, self.inputs, strict=True))
        shapes = tuple(None if a is None else a.shape[1:] if s.batched else a.shape for a, s in pairs)
        sides = tuple(a.tobytes() for a, s in pairs if a is not None and self.batched and not s.batched)
        if (shapes, sides) not in self.shapes:
            cost = sum(int(np.prod(shape)) for shape in shapes if shape is not None)
            self.shapes[shapes, sides] = ShapeClass(shapes, sides, max(1, cost))
        return self.shapes[shapes, sides]


def whole(*requests: InferenceRequest) -> list[Segment]:
    """All rows of the requests, in order."""
    return [Segment(request, 0, request.rows) for request in requests]


def rows_of(outputs: Sequence[BatchOutput], first_row: int, rows: int) -> list[Array]:
    """Copies of one request's part of a batch's outputs, read the way the encoder reads them."""
    parts: list[Array] = []
    for output in outputs:
        if output.view is None:
            array = output.array[first_row : first_row + rows] if output.spec.batched else output.array
            parts.append(array.copy())
            continue
        shape = (rows, *output.shape[1:]) if output.spec.batched else output.shape
        start, end = (
            (first_row * output.row_bytes, (first_row + rows) * output.row_bytes)
            if output.spec.batched
            else (0, len(output.view))
        )
        parts.append(np.frombuffer(bytes(output.view[start:end]), output.array.dtype).reshape(shape))
    return parts


def split_rows(requests: Sequence[InferenceRequest], outputs: Sequence[BatchOutput]) -> list[list[Array]]:
    """What each of the requests of one batch is answered with."""
    first_rows = np.cumsum([0, *(request.rows for request in requests)])
    return [rows_of(outputs, int(first), r.rows) for first, r in zip(first_rows, requests, strict=False)]


class Answers:
    """A responder that keeps what it was told, and lets a test wait for it."""

    def __init__(self) -> None:
        self.outputs: list[tuple[InferenceRequest, list[Array]]] = []
        self.errors: list[tuple[InferenceRequest, ServiceError]] = []
        self.held = 0
        self._changed = threading.Condition()

    def hold(self) -> None:
        with self._changed:
            self.held += 1

    def flush(self) -> None:
        with self._changed:
            self.held -= 1
            assert self.held >= 0, "more was flushed than held"
            self._changed.notify_all()

    def answer(self, request: InferenceRequest, outputs: Sequence[BatchOutput], first_row: int) -> None:
        parts = rows_of(outputs, first_row, request.rows)
        with self._changed:
            self.outputs.append((request, parts))
            self._changed.notify_all()

    def fail(self, request: InferenceRequest, error: ServiceError) -> None:
        with self._changed:
            self.errors.append((request, error))
            self._changed.notify_all()

    @property
    def count(self) -> int:
        return len(self.outputs) + len(self.errors)

    def wait(self, count: int) -> None:
        """Until `count` requests have been answered and nothing is held back. Fails the test when it takes too long."""
        with self._changed:
            arrived = self._changed.wait_for(lambda: self.count >= count and not self.held, ANSWER_S)
        assert arrived, f"{self.count} of {count} requests were answered, held {self.held} times: {self.errors}"

    def of(self, request: InferenceRequest) -> list[Array]:
        """The answer to one request. Fails when it has none, or more than one."""
        (outputs,) = [outputs for answered, outputs in self.outputs if answered is request]
        assert not [error for failed, error in self.errors if failed is request]
        return outputs

    def error_of(self, request: InferenceRequest) -> ServiceError:
        """The error one request was answered with. Fails when it has none, or more than one."""
        (error,) = [error for failed, error in self.errors if failed is request]
        assert not [outputs for answered, outputs in self.outputs if answered is request]
        return error


class SessionDouble:
    """A session that computes `compute` (input arrays by name -> output arrays by name), or raises what it raises.

    Bound or not, it sees the same arrays; `runs` are the rows of each execution, failed ones included.
    """

    def __init__(self, compute: Callable[[Mapping[str, Array]], Mapping[str, Array]]) -> None:
        self.compute = compute
        self.runs: list[int] = []
        self.outputs: tuple[tuple[str, str, list[str | int]], ...] = ()

    def bind(self, inputs: Sequence[tuple[TensorSpec, Array]], outputs: Sequence[tuple[TensorSpec, Array]]) -> Binding:
        return Binding((inputs, outputs))

    def run_bound(self, binding: Binding) -> None:
        inputs, outputs = binding.io
        answers = self._compute({spec.name: array for spec, array in inputs})
        for spec, array in outputs:
            array[...] = answers[spec.name]

    def run(self, feeds: Mapping[str, tuple[TensorSpec, Array]], outputs: Sequence[TensorSpec]) -> list[Array]:
        answers = self._compute({name: array for name, (_, array) in feeds.items()})
        return [answers[spec.name] for spec in outputs]

    def _compute(self, arrays: Mapping[str, Array]) -> Mapping[str, Array]:
        first = next(iter(arrays.values()))
        self.runs.append(len(first))
        return self.compute(arrays)


def double_instance(
    session: SessionDouble, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], max_rows: int
) -> Instance:
    """An instance over a double. The outputs count as declared with the batch in front."""
    session.outputs = tuple((s.name, s.datatype.onnx_name, ["N", *s.shape]) for s in outputs)
    return Instance(session, inputs, outputs, max_rows)  # type: ignore[arg-type]
