"""Strategies: models of any inputs, requests that fit them, and the same request written in other ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from service.pb.grpc_service_pb2 import ModelInferRequest
from service.tensor import Array, DataType, TensorSpec, encode_bytes
from tests.support.client import request
from tests.unit.frontend.served import FakeModel

MAX_ROWS = 4
# Datatypes with a typed form.
TYPED = frozenset(DataType) - {DataType.FP16, DataType.BF16}

names = st.text(min_size=1, max_size=8)
ids = st.text(max_size=12)
texts = st.text(max_size=6)


@dataclass(slots=True)
class Sent:
    """A request that fits `model`: `arrays` by input in the client's order."""

    model: FakeModel
    rows: int
    arrays: dict[str, Array]
    request_id: str
    outputs: list[str]

    def message(self, typed: bool = False) -> Any:
        """The request as a `ModelInferRequest`."""
        datatypes = {spec.name: spec.datatype.wire_name for spec in self.model.inputs}
        return request(
            self.model.name,
            self.arrays,
            request_id=self.request_id,
            outputs=self.outputs,
            datatypes={name: datatypes[name] for name in self.arrays},
            typed=typed,
        )


def array_of(draw: st.DrawFn, datatype: DataType, shape: tuple[int, ...]) -> Array:
    """An array of any bits that the datatype allows (BOOL: 0 and 1; BYTES: text)."""
    count = int(np.prod(shape, dtype=np.int64))
    if datatype is DataType.BYTES:
        array = np.empty(count, object)
        array[:] = draw(st.lists(texts, min_size=count, max_size=count))
        return array.reshape(shape)
    if datatype is DataType.BOOL:
        return np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)), np.bool_).reshape(shape)
    data = draw(st.binary(min_size=count * datatype.itemsize, max_size=count * datatype.itemsize))
    return np.frombuffer(data, datatype.dtype).reshape(shape)


@st.composite
def sent_requests(draw: st.DrawFn, datatypes: frozenset[DataType] = frozenset(DataType)) -> Sent:
    """A model of up to four inputs (batched, side and optional ones) and a request that fits it."""
    kinds = st.sampled_from(sorted(datatypes, key=lambda d: d.wire_name))
    batched_model = draw(st.booleans())
    rows = draw(st.integers(1, MAX_ROWS)) if batched_model else 1
    specs: list[TensorSpec] = []
    arrays: dict[str, Array] = {}
    input_names = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    for position, name in enumerate(input_names):
        datatype = draw(kinds)
        shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
        declared = tuple(-1 if draw(st.booleans()) else size for size in shape)
        # The first input of a batched model carries the rows.
        batched = batched_model and (position == 0 or draw(st.booleans()))
        optional = position > 0 and draw(st.booleans())
        specs.append(TensorSpec(name, datatype, declared, batched, optional))
        if not optional or draw(st.booleans()):
            arrays[name] = array_of(draw, datatype, (rows, *shape) if batched else shape)
    order = draw(st.permutations(list(arrays)))
    outputs = tuple(TensorSpec(f"out{i}", draw(kinds), (-1,), batched_model) for i in range(draw(st.integers(1, 3))))
    model = FakeModel(draw(names), tuple(specs), outputs, max_batch_size=MAX_ROWS if batched_model else 0)
    wanted = draw(st.lists(st.sampled_from([o.name for o in outputs]), unique=True))
    return Sent(model, rows, {name: arrays[name] for name in order}, draw(ids), wanted)


def fields(message: Any) -> list[bytes]:
    """The message as its top-level fields, each serialized, in the order of their numbers."""
    single: list[Any] = []
    for field, value in message.ListFields():
        repeated = value if field.name in ("inputs", "outputs", "raw_input_contents") else None
        for element in repeated if repeated is not None else [value]:
            part = ModelInferRequest()
            if repeated is not None:
                getattr(part, field.name).append(element)
            elif field.name == "parameters":
                for key in value:
                    part.parameters[key].CopyFrom(value[key])
            else:
                setattr(part, field.name, element)
            single.append(part.SerializeToString())
    return single


def flat_text(array: Array) -> list[str]:
    """The elements of a BYTES array as text."""
    return [element if isinstance(element, str) else element.decode() for element in array.ravel().tolist()]


def wire_of(array: Array) -> bytes:
    """The raw form of an array."""
    return encode_bytes(array) if array.dtype == object else np.ascontiguousarray(array).tobytes()
