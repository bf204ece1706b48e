"""How requests with one header are served: checked once, then reused for every request with the same header.

Clients send the same header (model, tensor names, datatypes, shapes, parameters) with every request and change only the
data. So a header is parsed and checked against the model once, and becomes a `RequestPlan`; the requests that follow
cost a dictionary lookup. A plan is a pure function of the header and the model version it was made for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from service.clock import NS_PER_US
from service.errors import InvalidRequest
from service.frontend.codec.destination import IN_ANSWER, Destination, Place, destination_of, place_of
from service.request import SequenceFlags, ShapeClass
from service.tensor import BY_WIRE_NAME, DataType, TensorSpec, element_count

_SEQUENCE = ("sequence_id", "sequence_start", "sequence_end")
# Triton's bound on ids that are text.
MAX_IDENTITY = 128
# Largest tensor rank accepted. ONNX Runtime and NumPy both end far below what a message can state.
_MAX_RANK = 32
# Largest product of a tensor's dimensions that are not zero: a gRPC message holds no more bytes than that. An empty
# tensor may state any dimensions beside its zero, but beyond 2**63 bytes NumPy cannot make it, and
# a whole batch of it must stay below that.
_MAX_ELEMENTS = 2**31 - 1


class ServedModel(Protocol):
    """What the codec needs to know of a loaded model version."""

    name: str
    version: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int
    default_priority: int
    priority_levels: int
    labels: Mapping[str, Sequence[str]]
    stateful: bool

    def shape_class(self, shapes: tuple[tuple[int, ...] | None, ...], sides: tuple[bytes, ...]) -> ShapeClass:
        """The one `ShapeClass` object of these shapes and side values."""


@dataclass(frozen=True, slots=True)
class PlannedInput:
    """One input as a request states it. `nbytes` is its exact size, -1 for BYTES; `side` if it has no batch dimension
    in a batched model."""

    index: int
    name: str
    datatype: DataType
    count: int
    nbytes: int
    side: bool
    # Where it lies, if not in the message.
    place: Place | None = None


@dataclass(slots=True)
class RequestPlan:
    """`inputs` are in the order of the raw tensors of the message; `shape` is None when it depends on side inputs'
    values.

    """

    model: Any
    inputs: tuple[PlannedInput, ...]
    input_slots: int
    rows: int
    shapes: tuple[tuple[int, ...] | None, ...]
    shape: ShapeClass | None
    outputs: tuple[int, ...]
    timeout_ns: int
    priority: int
    # What is to become of the outputs, in their order; empty: all are in the answer as they are.
    destinations: tuple[Destination, ...] = ()
    # Inputs whose data are in the message.
    raws: int = 0
    # For a stateful model: which step of which sequence.
    sequence: SequenceFlags | None = None
    # The caller's span, stated for this one request: such a plan is of no use to the next.
    traceparent: str = ""
    # Filled by the encoder: the parts of the answer that are the same for every request of the plan.
    prefix: bytes = b""
    output_headers: Any = None

    def uses_shared_memory(self) -> bool:
        """Whether tensors are read from regions of shared memory, or written there."""
        return any(i.place is not None for i in self.inputs) or any(d.place is not None for d in self.destinations)


def make_plan(message: Any, model: ServedModel) -> RequestPlan:
    """Check the header of the `ModelInferRequest` `message` against `model`.

    Raises `InvalidRequest` naming the model, the tensor and what was expected.
    """
    specs = {spec.name: index for index, spec in enumerate(model.inputs)}
    shapes: list[tuple[int, ...] | None] = [None] * len(model.inputs)
    planned: list[PlannedInput] = []
    rows = 0
    first_batched = ""
    for tensor in message.inputs:
        index = specs.get(tensor.name)
        if index is None:
            raise InvalidRequest(
                f"unexpected inference input '{tensor.name}' for model '{model.name}'; it has {_names(model.inputs)}"
            )
        spec = model.inputs[index]
        if shapes[index] is not None:
            raise InvalidRequest(f"input '{spec.name}' is given twice for model '{model.name}'")
        place = place_of(tensor.parameters, f"input '{spec.name}' of model '{model.name}'")
        datatype = _check_datatype(tensor.datatype, spec, model)
        shape = _check_shape(tuple(tensor.shape), spec, model)
        if spec.batched:
            if rows == 0:
                rows, first_batched = shape[0], spec.name
            elif shape[0] != rows:
                raise InvalidRequest(
                    f"input '{spec.name}' of model '{model.name}' has batch size {shape[0]}, "
                    f"but input '{first_batched}' has {rows}"
                )
        count = element_count(shape)
        shapes[index] = shape[1:] if spec.batched else shape
        nbytes = count * datatype.itemsize if datatype.itemsize else -1
        side = model.max_batch_size > 0 and not spec.batched
        _check_place(place, nbytes, spec, model)
        planned.append(PlannedInput(index, spec.name, datatype, count, nbytes, side, place))
    _check_complete(model, shapes)
    if model.max_batch_size > 0 and rows == 0:
        batched = _names([spec for spec in model.inputs if spec.batched])
        raise InvalidRequest(f"the request for model '{model.name}' has no rows: give at least one of {batched}")
    fixed = tuple(shapes)
    if model.stateful and rows > 1:
        raise InvalidRequest(
            f"inference request to model '{model.name}' must specify batch-size 1 due to requirements of sequence "
            f"batcher, got {rows}"
        )
    outputs, destinations = _requested_outputs(message.outputs, model)
    timeout_ns, priority = _request_parameters(message.parameters, model)
    return RequestPlan(
        model=model,
        inputs=tuple(planned),
        input_slots=len(model.inputs),
        rows=rows if model.max_batch_size > 0 else 1,
        shapes=fixed,
        shape=None if any(p.side for p in planned) else model.shape_class(fixed, ()),
        outputs=outputs,
        destinations=destinations if any(d is not IN_ANSWER for d in destinations) else (),
        raws=sum(p.place is None for p in planned),
        timeout_ns=timeout_ns,
        priority=priority,
        sequence=_sequence(message.parameters, model) if model.stateful else None,
        traceparent=message.parameters["traceparent"].string_param if "traceparent" in message.parameters else "",
    )


def _names(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"'{spec.name}'" for spec in specs) or "none"


def _check_datatype(wire_name: str, spec: TensorSpec, model: ServedModel) -> DataType:
    datatype = BY_WIRE_NAME.get(wire_name)
    if datatype is not spec.datatype:
        raise InvalidRequest(
            f"inference input '{spec.name}' data-type is '{wire_name}', "
            f"but model '{model.name}' expects '{spec.datatype.wire_name}'"
        )
    return datatype


def _check_shape(shape: tuple[int, ...], spec: TensorSpec, model: ServedModel) -> tuple[int, ...]:
    if len(shape) > _MAX_RANK or any(d < 0 for d in shape) or not spec.accepts(shape):
        raise InvalidRequest(
            f"unexpected shape for input '{spec.name}' for model '{model.name}'. "
            f"Expected {list(spec.full_shape)}, got {list(shape[:_MAX_RANK])}"
        )
    if math.prod(d for d in shape if d) > _MAX_ELEMENTS:
        raise InvalidRequest(
            f"unexpected shape for input '{spec.name}' for model '{model.name}'. "
            f"Expected no more than {_MAX_ELEMENTS} elements, as many as a message can carry, got {list(shape)}"
        )
    if spec.batched and not 1 <= shape[0] <= model.max_batch_size:
        raise InvalidRequest(
            f"inference request batch-size must be <= {model.max_batch_size} and >= 1 for '{model.name}', "
            f"got {shape[0]} for input '{spec.name}'"
        )
    return shape


def _check_complete(model: ServedModel, shapes: list[tuple[int, ...] | None]) -> None:
    missing = [s for s, shape in zip(model.inputs, shapes, strict=True) if shape is None and not s.optional]
    if missing:
        given = len(shapes) - shapes.count(None)
        raise InvalidRequest(
            f"expected {len(model.inputs)} inputs but got {given} inputs for model '{model.name}': "
            f"missing {_names(missing)}"
        )


def _check_place(place: Place | None, nbytes: int, spec: TensorSpec, model: ServedModel) -> None:
    if place is not None and nbytes not in (-1, place.byte_size):
        raise InvalidRequest(
            f"input byte size mismatch for input '{spec.name}' for model '{model.name}'. Expected {nbytes}, "
            f"got {place.byte_size} in shared memory"
        )


def _requested_outputs(requested: Any, model: ServedModel) -> tuple[tuple[int, ...], tuple[Destination, ...]]:
    if not requested:
        return tuple(range(len(model.outputs))), ()
    index = {spec.name: i for i, spec in enumerate(model.outputs)}
    chosen: list[int] = []
    destinations: list[Destination] = []
    for tensor in requested:
        position = index.get(tensor.name)
        if position is None:
            raise InvalidRequest(
                f"unexpected inference output '{tensor.name}' for model '{model.name}'; it has {_names(model.outputs)}"
            )
        if position in chosen:
            raise InvalidRequest(f"output '{tensor.name}' is requested twice for model '{model.name}'")
        destinations.append(destination_of(tensor.parameters, model.outputs[position], model.name))
        chosen.append(position)
    return tuple(chosen), tuple(destinations)


def _request_parameters(parameters: Any, model: ServedModel) -> tuple[int, int]:
    """The request parameters that decide how it is queued: (timeout in ns, priority). Unknown names are the client's
    own and are let through."""
    timeout_ns = 0
    priority = 0
    for name in parameters:
        value = parameters[name]
        kind = value.WhichOneof("parameter_choice")
        if name == "timeout":
            timeout_ns = _non_negative(name, value, kind, ("int64_param", "uint64_param")) * NS_PER_US
        elif name == "priority":
            priority = _non_negative(name, value, kind, ("int64_param", "uint64_param"))
        elif name in _SEQUENCE and not model.stateful:
            if value.ListFields() and getattr(value, kind):
                raise InvalidRequest(f"parameter '{name}': model '{model.name}' is not a sequence model")
        elif name == "triton_enable_empty_final_response":
            # Sent by the C++ client with every call; it only concerns streams.
            if kind != "bool_param":
                raise InvalidRequest(f"parameter '{name}' must be a bool, got {kind or 'nothing'}")
        elif name.startswith("triton_"):
            raise InvalidRequest(f"parameter keys starting with 'triton_' are reserved, got '{name}'")
    if priority == 0 or priority > model.priority_levels:
        priority = model.default_priority
    return timeout_ns, priority


def _sequence(parameters: Any, model: ServedModel) -> SequenceFlags:
    """Which step of which sequence a request is."""
    identity: int | str = 0
    if _SEQUENCE[0] in parameters:
        value = parameters[_SEQUENCE[0]]
        kind = value.WhichOneof("parameter_choice")
        if kind not in ("int64_param", "uint64_param", "string_param"):
            raise InvalidRequest(
                f"parameter '{_SEQUENCE[0]}' must be an integer or a string, got {kind or 'nothing'}, for model "
                f"'{model.name}'"
            )
        identity = getattr(value, kind)
    if not identity:
        raise InvalidRequest(
            f"inference request to model '{model.name}' must specify a non-zero or non-empty correlation ID"
        )
    if isinstance(identity, str) and len(identity) > MAX_IDENTITY:
        raise InvalidRequest(
            f"string correlation ID cannot be longer than {MAX_IDENTITY} characters, got {len(identity)} for model "
            f"'{model.name}'"
        )
    flags = []
    for name in _SEQUENCE[1:]:
        kind = parameters[name].WhichOneof("parameter_choice") if name in parameters else "bool_param"
        if kind != "bool_param":
            raise InvalidRequest(f"parameter '{name}' must be a bool for '{model.name}', got {kind or 'nothing'}")
        flags.append(name in parameters and parameters[name].bool_param)
    return SequenceFlags(identity, *flags)


def _non_negative(name: str, value: Any, kind: str | None, kinds: tuple[str, ...]) -> int:
    if kind not in kinds:
        raise InvalidRequest(f"parameter '{name}' must be an integer, got {kind or 'nothing'}")
    number = int(getattr(value, kind))
    if number < 0:
        raise InvalidRequest(f"parameter '{name}' must not be negative, got {number}")
    return number
