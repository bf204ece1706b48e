"""Outputs as classes, and tensors in shared memory, through the codec."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from service.errors import InvalidRequest, NotFound, ServiceError
from service.frontend.codec.decode import Decoder
from service.frontend.codec.destination import classify
from service.frontend.codec.encode import encode
from service.pb import grpc_service_pb2 as pb
from service.tensor import decode_bytes
from tests.unit.frontend.served import FakeModel, FakeRepository, model, output, spec

X = np.arange(8, dtype=np.float32).reshape(2, 4)


def outputs_of(served: FakeModel, arrays: dict[str, np.ndarray]) -> list[Any]:
    return [output(declared, arrays[declared.name], 2) for declared in served.outputs]


class Memory:
    """A region in the test's own memory."""

    def __init__(self, name: str, content: bytes) -> None:
        self.name = name
        self.content = bytearray(content)

    def read(self, offset: int, size: int) -> memoryview:
        if offset + size > len(self.content):
            raise InvalidRequest("out of bounds")
        return memoryview(bytes(self.content[offset : offset + size]))

    def write(self, offset: int, data: bytes | memoryview) -> None:
        self.content[offset : offset + len(data)] = data


def place(tensor: Any, region: str, byte_size: int, offset: int = 0) -> None:
    tensor.parameters["shared_memory_region"].string_param = region
    tensor.parameters["shared_memory_byte_size"].int64_param = byte_size
    if offset:
        tensor.parameters["shared_memory_offset"].int64_param = offset


def decoder(served: FakeModel, *regions: Memory) -> Decoder:
    known = {region.name: region for region in regions}

    def find(name: str) -> Memory:
        if name not in known:
            raise NotFound(f"Unable to find shared memory region: '{name}'")
        return known[name]

    return Decoder(FakeRepository(served), find)


def two_inputs() -> FakeModel:
    return model(spec("a"), spec("b"), outputs=(spec("p"), spec("q")))


def request(served: FakeModel, **raws: np.ndarray | None) -> Any:
    message = pb.ModelInferRequest(model_name=served.name, id="7")
    for name, array in raws.items():
        message.inputs.add(name=name, datatype="FP32", shape=[2, 4])
        if array is not None:
            message.raw_input_contents.append(array.tobytes())
    return message


def test_inputs_from_shared_memory() -> None:
    """Some of them, in any order: raw tensors are those of the others. Also all of them."""
    served = two_inputs()
    memory = Memory("in", b"\0" * 8 + X.tobytes())
    for first, second in (("a", "b"), ("b", "a")):
        message = request(served, **{first: None, second: X * 2})
        place(message.inputs[0], "in", 32, 8)
        decoded = decoder(served, memory).decode(message.SerializeToString())
        by_name = dict(zip(("a", "b"), decoded.inputs, strict=True))
        assert bytes(by_name[first]) == X.tobytes()  # type: ignore[arg-type]
        assert bytes(by_name[second]) == (X * 2).tobytes()  # type: ignore[arg-type]
    message = request(served, a=None, b=None)
    for tensor in message.inputs:
        place(tensor, "in", 32, 8)
    decoded = decoder(served, memory).decode(message.SerializeToString())
    assert [bytes(data) for data in decoded.inputs] == [X.tobytes()] * 2  # type: ignore[arg-type]
    assert decoded.request_id == b"7"


def test_outputs_into_shared_memory() -> None:
    """The tensor lies there, its entry in the answer says where and is empty; others are in the answer."""
    served = two_inputs()
    memory = Memory("out", b"\0" * 50)
    message = request(served, a=X, b=X)
    place(message.outputs.add(name="q"), "out", 40, 10)
    message.outputs.add(name="p")
    decoded = decoder(served, memory).decode(message.SerializeToString())
    outputs = outputs_of(served, {"p": X, "q": X * 3})
    parts = encode(decoded.plan, decoded.request_id, outputs, 0, 2, decoded.regions)
    answer = pb.ModelInferResponse.FromString(b"".join(parts))
    assert bytes(memory.content[10:42]) == (X * 3).tobytes()
    assert [tensor.name for tensor in answer.outputs] == ["q", "p"]
    assert answer.outputs[0].parameters["shared_memory_region"].string_param == "out"
    assert answer.outputs[0].parameters["shared_memory_byte_size"].int64_param == 32
    assert answer.outputs[0].parameters["shared_memory_offset"].int64_param == 10
    assert list(answer.raw_output_contents) == [b"", X.tobytes()]
    assert not answer.outputs[1].parameters


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda m: place(m.inputs[0], "nobody", 32), NotFound, "'nobody'"),
        (
            lambda m: place(m.inputs[0], "in", 31),
            InvalidRequest,
            "byte size mismatch for input 'a'.* Expected 32, got 31",
        ),
        (lambda m: place(m.inputs[0], "in", 32, 100), InvalidRequest, "out of bounds"),
        (lambda m: place(m.inputs[0], "in", -1), InvalidRequest, "must not be negative"),
        (lambda m: place(m.inputs[0], "in", 32, -1), InvalidRequest, "must not be negative"),
        (lambda m: place(m.outputs.add(name="p"), "nobody", 32), NotFound, "'nobody'"),
    ],
)
def test_places_that_are_wrong(change: Any, error: type[ServiceError], words: str) -> None:
    """Each names what is wrong."""
    served = two_inputs()
    message = request(served, a=None, b=X)
    place(message.inputs[0], "in", 32)
    change(message)
    with pytest.raises(error, match=words):
        decoder(served, Memory("in", X.tobytes())).decode(message.SerializeToString())


def test_half_a_place() -> None:
    """Region and size belong together, each of its type."""
    served = two_inputs()
    for name, field, value in (
        ("shared_memory_region", "string_param", "in"),
        ("shared_memory_byte_size", "int64_param", 32),
    ):
        message = request(served, a=None, b=X)
        setattr(message.inputs[0].parameters[name], field, value)
        with pytest.raises(InvalidRequest, match="must be given together"):
            decoder(served).decode(message.SerializeToString())
    message = request(served, a=None, b=X)
    message.inputs[0].parameters["shared_memory_region"].int64_param = 3
    with pytest.raises(InvalidRequest, match="must be a string"):
        decoder(served).decode(message.SerializeToString())


def test_an_output_larger_than_its_place() -> None:
    """The request fails, nothing is written."""
    served = two_inputs()
    memory = Memory("out", b"\0" * 50)
    message = request(served, a=X, b=X)
    place(message.outputs.add(name="p"), "out", 31)
    decoded = decoder(served, memory).decode(message.SerializeToString())
    with pytest.raises(InvalidRequest, match="should be at least 32 bytes"):
        encode(decoded.plan, b"", outputs_of(served, {"p": X, "q": X}), 0, 2, decoded.regions)
    assert memory.content == b"\0" * 50


def test_without_shared_memory() -> None:
    """A server that was not started for it says so."""
    served = two_inputs()
    message = request(served, a=None, b=X)
    place(message.inputs[0], "in", 32)
    with pytest.raises(ServiceError, match="--allow-client-shm"):
        Decoder(FakeRepository(served)).decode(message.SerializeToString())


def top(served: FakeModel, k: int, values: np.ndarray) -> tuple[list[int], list[list[str]]]:
    message = request(served, a=X, b=X)
    message.outputs.add(name="p").parameters["classification"].int64_param = k
    decoded = decoder(served).decode(message.SerializeToString())
    outputs = outputs_of(served, {"p": values, "q": X})
    answer = pb.ModelInferResponse.FromString(b"".join(encode(decoded.plan, b"", outputs, 0, 2, decoded.regions)))
    (tensor,) = answer.outputs
    assert tensor.datatype == "BYTES"
    count = int(np.prod(tensor.shape))
    found = decode_bytes(answer.raw_output_contents[0], count, "p")
    return list(tensor.shape), [[e.decode() for e in row] for row in found.reshape(tensor.shape)]


def test_the_top_of_the_classes() -> None:
    """Value, index and label of each row's largest; never more than there are classes."""
    served = two_inputs()
    served.labels = {"p": ("ant", "bee", "cat")}
    values = np.array([[0.1, 0.5, 0.25, -1], [3, 1, 3, 7]], np.float32)
    shape, found = top(served, 2, values)
    assert shape == [2, 2]
    assert found == [["0.500000:1:bee", "0.250000:2:cat"], ["7.000000:3", "3.000000:0:ant"]]
    assert top(served, 9, values)[0] == [2, 4]


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.floats(-9, 9, width=32)))
def test_classes_are_sorted(values: np.ndarray) -> None:
    """By value, then by index; each once."""
    for row, found in zip(values, classify(values, values.shape[1], ()), strict=True):
        indices = [int(text.split(":")[1]) for text in found]
        assert sorted(indices) == list(range(len(row)))
        assert indices == sorted(range(len(row)), key=lambda i: (-float(row[i]), i))


def test_classes_of_integers() -> None:
    """Without a point."""
    assert classify(np.array([[3, 9]], np.int64), 1, ()).tolist() == [["9:1"]]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"int64_param": 0}, "greater than 0"),
        ({"string_param": "2"}, "must be an integer"),
    ],
)
def test_classes_that_cannot_be_had(value: dict[str, Any], words: str) -> None:
    """Wrong numbers, and datatypes that have no order."""
    served = two_inputs()
    message = request(served, a=X, b=X)
    parameter = message.outputs.add(name="p").parameters["classification"]
    ((field, content),) = value.items()
    setattr(parameter, field, content)
    with pytest.raises(InvalidRequest, match=words):
        decoder(served).decode(message.SerializeToString())
    text = model(spec("a"), spec("b"), outputs=(spec("p", "BYTES"),))
    message = request(text, a=X, b=X)
    message.outputs.add(name="p").parameters["classification"].int64_param = 1
    with pytest.raises(InvalidRequest, match="class result not available, its datatype is BYTES"):
        decoder(text).decode(message.SerializeToString())


def test_classes_do_not_go_into_shared_memory() -> None:
    """As elsewhere."""
    served = two_inputs()
    message = request(served, a=X, b=X)
    output = message.outputs.add(name="p")
    output.parameters["classification"].int64_param = 1
    place(output, "out", 32)
    with pytest.raises(InvalidRequest, match="can not be placed in shared memory"):
        decoder(served, Memory("out", b"")).decode(message.SerializeToString())


def test_a_plan_made_with_tensors_does_not_serve_a_message_without() -> None:
    """Nor the other way round: the second of each pair has the same header as the first."""
    served = two_inputs()
    memory = Memory("in", X.tobytes())
    shared = decoder(served, memory)
    whole = request(served, a=X, b=X)
    shared.decode(whole.SerializeToString())
    del whole.raw_input_contents[:]
    with pytest.raises(InvalidRequest, match="unable to find data for input tensor 'a'"):
        shared.decode(whole.SerializeToString())
    placed = request(served, a=None, b=None)
    for tensor in placed.inputs:
        place(tensor, "in", 32)
    for _ in range(2):
        decoded = shared.decode(placed.SerializeToString())
        assert [bytes(data) for data in decoded.inputs] == [X.tobytes()] * 2  # type: ignore[arg-type]
    placed.raw_input_contents.append(X.tobytes())
    with pytest.raises(InvalidRequest, match="1 raw_input_contents for the 0 inputs"):
        shared.decode(placed.SerializeToString())
