"""Whatever bytes arrive: the decoder answers or refuses, never anything else, and never serves what is no message."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import ServiceError
from service.frontend.codec.decode import Decoded, Decoder
from service.frontend.codec.wire import delimited, varint
from service.pb.grpc_service_pb2 import ModelInferRequest
from service.tensor import DataType
from tests.property.codec.messages import Sent, sent_requests
from tests.support.client import request, words
from tests.unit.frontend.served import FakeRepository, model, spec

MUTATIONS = 20_000
SEED = 20_240_229

MODELS = (
    model(name="plain"),
    model(
        spec("x"),
        spec("flag", "BOOL", (2,)),
        spec("text", "BYTES", (-1,)),
        spec("rate", "INT64", (), batched=False),
        name="mixed",
        priority_levels=3,
    ),
    model(spec("a", shape=(), batched=False), name="scalar", max_batch_size=0),
    model(spec("x", shape=(-1, -1)), name="free"),
)


def corpus() -> list[bytes]:
    """Valid messages of many kinds, to start from."""
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    mixed = {
        "x": x,
        "flag": np.array([[True, False], [False, True]]),
        "text": words("a", "zo\u00eb", shape=(2, 1)),
        "rate": np.array(16000, np.int64),
    }
    messages = [
        request("plain", {"x": x}),
        request("plain", {"x": x}, request_id="id-1", outputs=["y"], parameters={"timeout": 1000, "priority": 1}),
        request("plain", {"x": x}, typed=True, version="1"),
        request("plain", {"x": x}, parameters={"a": True, "b": "text", "c": 0.5, "sequence_id": 0}),
        request("mixed", mixed, request_id="\u00e9"),
        request("mixed", mixed, typed=True),
        request("scalar", {"a": np.array(1, np.float32)}),
        request("free", {"x": np.empty((1, 0, 3), np.float32)}),
        request("free", {"x": np.ones((1, 20, 30), np.float32)}),
    ]
    return [message.SerializeToString() for message in messages]


def mutate(rng: random.Random, corpus: list[bytes]) -> bytes:
    """A message of the corpus with one to four faults: bits, bytes, cuts, insertions, splices, varints."""
    data = bytearray(rng.choice(corpus))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(9)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1 and data:
            data[at % len(data)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + rng.randint(1, 8)]
        elif kind == 4:
            data[at:at] = rng.randbytes(rng.randint(1, 8))
        elif kind == 5:
            other = rng.choice(corpus)
            data[at:] = other[rng.randrange(len(other)) :]
        elif kind == 6:
            data[at:at] = varint(rng.choice((2**31 - 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1)))
        elif kind == 7:
            start = rng.randrange(len(data) + 1)
            data[at:at] = data[start : start + rng.randint(1, 30)]
        else:
            data[at:at] = delimited(rng.choice((1, 2, 3, 4, 5, 6, 7, 9, 500)), rng.randbytes(rng.randint(0, 6)))
    return bytes(data)


def check(decoder: Decoder, message: bytes) -> Decoded | None:
    """Decode, or None for a refusal. What is served must be a message to protobuf, with these very tensors."""
    try:
        decoded = decoder.decode(message)
    except ServiceError:
        return None
    parsed: Any = ModelInferRequest.FromString(message)
    plan = decoded.plan
    assert parsed.model_name == plan.model.name
    assert parsed.id.encode() == decoded.request_id
    assert len(parsed.inputs) == len(plan.inputs)
    for position, (tensor, planned) in enumerate(zip(parsed.inputs, plan.inputs, strict=True)):
        data = decoded.inputs[planned.index]
        assert tensor.name == planned.name
        assert data is not None
        if planned.datatype is DataType.BYTES:
            assert isinstance(data, np.ndarray)
            assert data.size == planned.count
        else:
            assert len(data) == planned.nbytes
            if parsed.raw_input_contents:
                assert bytes(data) == parsed.raw_input_contents[position]
        # NumPy can make a whole batch of it.
        assert np.empty(0, planned.datatype.dtype).itemsize * 8 * max(1, planned.count) < 2**62
    return decoded


def is_message(data: bytes) -> bool:
    try:
        ModelInferRequest.FromString(data)
    except DecodeError:
        return False
    return True


def test_twenty_thousand_mutated_messages() -> None:
    """Mutations of valid messages: answered or refused; what protobuf does not read is never answered."""
    rng = random.Random(SEED)
    decoder = Decoder(FakeRepository(*MODELS))
    seeds = corpus()
    for message in seeds:
        assert check(decoder, message) is not None
    served = malformed = 0
    for _ in range(MUTATIONS):
        message = mutate(rng, seeds)
        decoded = check(decoder, message)
        if decoded is not None:
            served += 1
        elif not is_message(message):
            malformed += 1
    # The mutations reach both sides of the line, or they would prove nothing.
    assert served > MUTATIONS // 100
    assert malformed > MUTATIONS // 20


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes(data: bytes) -> None:
    """Noise is refused or, by chance, a message."""
    check(Decoder(FakeRepository(*MODELS)), data)


@settings(max_examples=200, deadline=None)
@given(sent_requests(), st.data())
def test_a_message_cut_anywhere(sent: Sent, data: st.DataObject) -> None:
    """A prefix of a valid message is refused or is a message of its own."""
    message = sent.message().SerializeToString()
    cut = data.draw(st.integers(0, len(message)))
    check(Decoder(FakeRepository(sent.model)), message[:cut])


@settings(max_examples=200, deadline=None)
@given(sent_requests(), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6), st.integers(0, 3))
def test_any_shape(sent: Sent, shape: list[int], which: int) -> None:
    """Whatever dimensions a client states, the answer is a refusal or a tensor that exists."""
    message = sent.message()
    if message.inputs:
        tensor = message.inputs[which % len(message.inputs)]
        del tensor.shape[:]
        tensor.shape.extend(shape)
    decoded = check(Decoder(FakeRepository(sent.model)), message.SerializeToString())
    if decoded is not None:
        for stated in decoded.plan.shapes:
            if stated is not None:
                np.empty((8, *(d if d == 0 else 1 for d in stated)))
                np.broadcast_to(np.empty((), np.float64), (8, *stated))
