"""Bytes to `InferenceRequest`: the plan from the header, views of the data, and every check that must come before a
batch.

A request that passes here can be merged with any other of the same shape class without harm to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from google.protobuf.message import DecodeError

from service.errors import InvalidRequest, UnsupportedFeature
from service.frontend.codec.contents import from_contents, has_contents, text_array
from service.frontend.codec.destination import Memory
from service.frontend.codec.plan import PlannedInput, RequestPlan, ServedModel, make_plan
from service.frontend.codec.wire import split
from service.pb.grpc_service_pb2 import ModelInferRequest
from service.request import InputData, ShapeClass
from service.tensor import DataType, decode_bytes

# Plans kept. A client has a handful of headers; a flood of different ones empties the cache and costs only their
# parsing.
MAX_PLANS = 4096
# Longer headers are not worth keeping: parsing them is a small part of the work they announce.
MAX_PLAN_HEADER = 16 * 1024


class Repository(Protocol):
    """Where models are looked up. `generation` changes whenever a lookup might answer differently."""

    generation: int

    def lookup(self, name: str, version: str) -> ServedModel:
        """The model version that serves requests for `name` and `version` ("" = latest), or a `ServiceError`."""


class Decoded:
    """A checked request: its plan, its tensors in the order of the model's inputs, its shape class and its id.

    `regions` are those of the plan's destinations, held until the answer is written; empty where there are none.
    """

    __slots__ = ("inputs", "plan", "regions", "request_id", "shape")

    def __init__(
        self,
        plan: RequestPlan,
        inputs: list[InputData | None],
        shape: ShapeClass,
        request_id: bytes,
        regions: Sequence[Memory | None] = (),
    ) -> None:
        self.plan = plan
        self.inputs = inputs
        self.shape = shape
        self.request_id = request_id
        self.regions = regions


class Decoder:
    """Decodes requests for the models of one repository. Used by one thread."""

    def __init__(self, repository: Repository, find: Callable[[str], Memory] | None = None) -> None:
        """`find`: gives the region of shared memory of a name, or raises a `ServiceError`; None: there is none."""
        self._repository = repository
        self._find = find or _no_region
        self._plans: dict[bytes, RequestPlan] = {}
        self._generation = 0

    def decode(self, message: bytes | memoryview) -> Decoded:
        """Decode a serialized `ModelInferRequest`.

        Raises `ServiceError`: the model cannot be found, or the request is malformed, inconsistent or unsupported.
        """
        parts = split(message)
        if parts is None:
            return self._decode_any(message)
        request_id = parts.request_id
        if request_id and not request_id.isascii():
            _check_text(request_id)
        if not parts.raws:
            return self._without_raws(message, parts.header, request_id)
        if self._generation != self._repository.generation:
            # Read before anything is looked up. Plans hold their models, which may be gone.
            self._generation = self._repository.generation
            self._plans.clear()
        plan = self._plans.get(parts.header)
        if plan is None:
            parsed = _parse(parts.header)
            plan = self._plan(parsed)
            _refuse_contents(parsed, plan)
            if len(parts.header) <= MAX_PLAN_HEADER and not plan.traceparent:
                if len(self._plans) >= MAX_PLANS:
                    self._plans.clear()
                self._plans[parts.header] = plan
        raws = parts.raws
        if len(raws) != plan.raws:
            raise _wrong_number_of_raws(len(raws), plan)
        view = memoryview(message)
        if plan.destinations or plan.raws != len(plan.inputs):
            return self._placed(plan, (view[start:end] for start, end in raws), request_id)
        inputs: list[InputData | None] = [None] * plan.input_slots
        for planned, (start, end) in zip(plan.inputs, raws, strict=True):
            if planned.nbytes != end - start or planned.datatype is DataType.BOOL:
                inputs[planned.index] = _checked(planned, view[start:end], plan)
            else:
                inputs[planned.index] = view[start:end]
        return Decoded(plan, inputs, plan.shape or _with_sides(plan, inputs), request_id)

    def _without_raws(self, message: bytes | memoryview, header: bytes, request_id: bytes) -> Decoded:
        """Everything is in shared memory, or in typed contents: only the former has a plan without raw tensors."""
        known = self._plans.get(header) if self._generation == self._repository.generation else None
        if known is None or known.raws or not known.inputs:
            return self._decode_any(message, header)
        return self._placed(known, iter(()), request_id)

    def _placed(self, plan: RequestPlan, raws: Iterator[memoryview], request_id: bytes) -> Decoded:
        """A request with tensors in shared memory: those of inputs are read now, regions of outputs are held."""
        inputs: list[InputData | None] = [None] * plan.input_slots
        for planned in plan.inputs:
            place = planned.place
            if place is None:
                inputs[planned.index] = _checked(planned, next(raws), plan)
            else:
                data = self._find(place.region).read(place.offset, place.byte_size)
                inputs[planned.index] = _checked(planned, data, plan)
        regions = [None if d.place is None else self._find(d.place.region) for d in plan.destinations]
        return Decoded(plan, inputs, plan.shape or _with_sides(plan, inputs), request_id, regions)

    def _plan(self, parsed: Any) -> RequestPlan:
        model = self._repository.lookup(parsed.model_name, parsed.model_version)
        return make_plan(parsed, model)

    def _decode_any(self, message: bytes | memoryview, header: bytes = b"") -> Decoded:
        """The slow path: typed contents, or fields in an unusual order. `header`: what the next request of the kind can
        be told by, if all its inputs are in shared memory."""
        parsed = _parse(bytes(message))
        generation = self._repository.generation
        plan = self._plan(parsed)
        if plan.inputs and plan.raws == 0 and 0 < len(header) <= MAX_PLAN_HEADER and not plan.traceparent:
            if self._generation != generation or len(self._plans) >= MAX_PLANS:
                self._generation = generation
                self._plans.clear()
            self._plans[header] = plan
        raws = parsed.raw_input_contents
        inputs: list[InputData | None] = [None] * plan.input_slots
        if raws or plan.raws == 0 < len(plan.inputs):
            _refuse_contents(parsed, plan)
            if len(raws) != plan.raws:
                raise _wrong_number_of_raws(len(raws), plan)
            if plan.destinations or plan.raws != len(plan.inputs):
                return self._placed(plan, map(memoryview, raws), parsed.id.encode())
            for planned, raw in zip(plan.inputs, raws, strict=True):
                inputs[planned.index] = _checked(planned, memoryview(raw), plan)
        else:
            for planned, tensor in zip(plan.inputs, parsed.inputs, strict=True):
                if planned.place is not None:
                    place = planned.place
                    data = self._find(place.region).read(place.offset, place.byte_size)
                    inputs[planned.index] = _checked(planned, data, plan)
                elif planned.count == 0 and not has_contents(tensor):
                    empty = np.empty(0, dtype=object) if planned.datatype is DataType.BYTES else b""
                    inputs[planned.index] = empty
                elif not has_contents(tensor):
                    raise _wrong_number_of_raws(0, plan)
                else:
                    inputs[planned.index] = from_contents(
                        tensor.contents, planned.datatype, planned.count, planned.name
                    )
        regions = [None if d.place is None else self._find(d.place.region) for d in plan.destinations]
        return Decoded(plan, inputs, plan.shape or _with_sides(plan, inputs), parsed.id.encode(), regions)


def _no_region(_name: str) -> Memory:
    raise UnsupportedFeature("shared memory of clients is not allowed: start the server with --allow-client-shm")


def _parse(message: bytes) -> Any:
    try:
        return ModelInferRequest.FromString(message)
    except DecodeError as error:
        raise InvalidRequest(f"the message is not a valid ModelInferRequest: {error}") from None


def _check_text(request_id: bytes) -> None:
    try:
        request_id.decode()
    except UnicodeDecodeError:
        raise InvalidRequest("the message is not a valid ModelInferRequest: id is not valid UTF-8") from None


def _refuse_contents(parsed: Any, plan: RequestPlan) -> None:
    for tensor in parsed.inputs:
        if has_contents(tensor):
            raise InvalidRequest(
                f"contents field must not be specified when using raw_input_contents for '{tensor.name}' "
                f"for model '{plan.model.name}'"
            )


def _wrong_number_of_raws(given: int, plan: RequestPlan) -> InvalidRequest:
    wanted = [planned for planned in plan.inputs if planned.place is None]
    if given < len(wanted):
        return InvalidRequest(
            f"unable to find data for input tensor '{wanted[given].name}' for model '{plan.model.name}': "
            f"{len(wanted)} inputs, {given} raw_input_contents"
        )
    return InvalidRequest(
        f"{given} raw_input_contents for the {len(wanted)} inputs given for model '{plan.model.name}'"
    )


def _checked(planned: PlannedInput, raw: memoryview, plan: RequestPlan) -> InputData:
    """Raw data whose size or contents need a look: BYTES, BOOL, or a wrong size."""
    if planned.datatype is DataType.BYTES:
        return text_array(list(decode_bytes(raw, planned.count, planned.name)), planned.name)
    if planned.nbytes != len(raw):
        raise InvalidRequest(
            f"input byte size mismatch for input '{planned.name}' for model '{plan.model.name}'. "
            f"Expected {planned.nbytes}, got {len(raw)}"
        )
    if planned.datatype is DataType.BOOL and planned.count and np.frombuffer(raw, np.uint8).max() > 1:
        # Compilers may assume that a bool is 0 or 1; anything else is undefined behaviour inside the kernels.
        raise InvalidRequest(f"input '{planned.name}' for model '{plan.model.name}': BOOL elements must be 0 or 1")
    return raw


def _index(planned: PlannedInput) -> int:
    return planned.index


def _with_sides(plan: RequestPlan, inputs: list[InputData | None]) -> ShapeClass:
    """The shape class of a request whose side inputs must equal those of the others in its batch."""
    sides = []
    # In the model's order: the client's may differ from request to request.
    for planned in sorted(plan.inputs, key=_index):
        if planned.side:
            data = inputs[planned.index]
            sides.append(repr(data.tolist()).encode() if isinstance(data, np.ndarray) else bytes(data or b""))
    shape: ShapeClass = plan.model.shape_class(plan.shapes, tuple(sides))
    return shape
