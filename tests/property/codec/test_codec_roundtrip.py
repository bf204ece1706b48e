"""Any tensors through the codec come out as they went in, however the message is written."""

from __future__ import annotations

from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from service.frontend.codec.decode import Decoded, Decoder
from service.frontend.codec.encode import encode
from service.frontend.codec.wire import split
from service.pb.grpc_service_pb2 import ModelInferRequest, ModelInferResponse
from service.tensor import DataType, TensorSpec
from tests.property.codec.messages import TYPED, Sent, array_of, fields, flat_text, sent_requests, wire_of
from tests.support.client import arrays
from tests.unit.frontend.served import FakeRepository, output


def assert_decoded(decoded: Decoded, sent: Sent) -> None:
    """Everything that the request said is in `decoded`, bit for bit."""
    assert decoded.plan.rows == sent.rows
    assert decoded.request_id == sent.request_id.encode()
    expected_outputs = sent.outputs or [spec.name for spec in sent.model.outputs]
    assert [sent.model.outputs[index].name for index in decoded.plan.outputs] == expected_outputs
    assert len(decoded.inputs) == len(sent.model.inputs)
    for spec, data, shape in zip(sent.model.inputs, decoded.inputs, decoded.plan.shapes, strict=True):
        array = sent.arrays.get(spec.name)
        if array is None:
            assert data is None
            assert shape is None
            continue
        assert shape == (array.shape[1:] if spec.batched else array.shape)
        if spec.datatype is DataType.BYTES:
            assert isinstance(data, np.ndarray)
            assert data.tolist() == flat_text(array)
        else:
            assert data is not None
            assert bytes(data) == array.tobytes()


@settings(max_examples=300, deadline=None)
@given(sent_requests())
def test_raw_tensors_of_every_datatype(sent: Sent) -> None:
    """Raw contents, twice with one decoder: the second time from the plan cache."""
    decoder = Decoder(FakeRepository(sent.model))
    message = sent.message().SerializeToString()
    first = decoder.decode(message)
    assert_decoded(first, sent)
    second = decoder.decode(message)
    assert_decoded(second, sent)
    assert first.shape is second.shape


@settings(max_examples=300, deadline=None)
@given(sent_requests(TYPED))
def test_typed_contents_of_every_datatype_that_has_them(sent: Sent) -> None:
    """Typed contents decode to what raw contents decode to."""
    decoder = Decoder(FakeRepository(sent.model))
    if any(array.dtype.kind == "f" and np.isnan(array).any() for array in sent.arrays.values()):
        # A NaN keeps being one, but the protobuf library may change its payload.
        return
    typed = decoder.decode(sent.message(typed=True).SerializeToString())
    assert_decoded(typed, sent)
    raw = decoder.decode(sent.message().SerializeToString())
    assert raw.shape is typed.shape


@settings(max_examples=200, deadline=None)
@given(sent_requests(), st.data())
def test_any_order_of_fields(sent: Sent, data: st.DataObject) -> None:
    """Top-level fields in any order are the same request, as long as repeated fields keep theirs."""
    parts = fields(sent.message())
    shuffled = data.draw(st.permutations(range(len(parts))))
    # Stable within each kind of field: inputs among inputs, raw tensors among raw tensors.
    by_tag: dict[int, list[bytes]] = {}
    for part in parts:
        by_tag.setdefault(part[0], []).append(part)
    queues = {tag: iter(group) for tag, group in by_tag.items()}
    message = b"".join(next(queues[parts[index][0]]) for index in shuffled)
    assert ModelInferRequest.FromString(message) == sent.message()
    assert_decoded(Decoder(FakeRepository(sent.model)).decode(message), sent)


@settings(max_examples=200, deadline=None)
@given(sent_requests(), st.data())
def test_duplicate_fields_follow_protobuf(sent: Sent, data: st.DataObject) -> None:
    """Of two names, versions or ids the last one counts, whichever path reads them."""
    parts = fields(sent.message())
    decoys = [
        ModelInferRequest(model_name="decoy").SerializeToString(),
        ModelInferRequest(model_version="9").SerializeToString(),
        ModelInferRequest(id="decoy").SerializeToString(),
    ]
    message = sent.message()
    chosen = data.draw(st.lists(st.sampled_from(decoys), min_size=1, max_size=3))
    joined = b"".join(chosen) + b"".join(parts)
    expected = ModelInferRequest.FromString(joined)
    decoded = Decoder(FakeRepository(sent.model)).decode(joined)
    assert expected.model_name == message.model_name
    assert decoded.request_id == expected.id.encode()
    assert decoded.plan.rows == sent.rows


@settings(max_examples=300, deadline=None)
@given(sent_requests(), st.binary(max_size=40), st.data())
def test_split_agrees_with_protobuf(sent: Sent, noise: bytes, data: st.DataObject) -> None:
    """Whenever a message is split, its parts put together again are the same message to protobuf."""
    message = sent.message().SerializeToString()
    position = data.draw(st.integers(0, len(message)))
    for candidate in (message, noise, message[:position] + noise + message[position:], message[:position]):
        parts = split(candidate)
        if parts is None:
            continue
        raws = [candidate[start:end] for start, end in parts.raws]
        again: Any = ModelInferRequest(raw_input_contents=raws).SerializeToString()
        try:
            expected = ModelInferRequest.FromString(candidate)
            identifier = parts.request_id.decode()
        except (DecodeError, UnicodeDecodeError):
            # What protobuf refuses in the whole it must refuse in the parts, or it is the id that is no text.
            assert not _parses(parts.header) or not parts.request_id.isascii()
            continue
        if identifier:
            again = ModelInferRequest(id=identifier).SerializeToString() + again
        assert ModelInferRequest.FromString(parts.header + again) == expected


def _parses(header: bytes) -> bool:
    try:
        ModelInferRequest.FromString(header)
    except DecodeError:
        return False
    return True


@st.composite
def answered_requests(draw: st.DrawFn) -> tuple[Sent, list[Any], int, int]:
    """A request, the outputs of a batch that it rode in, the batch's rows and where the request's begin."""
    sent = draw(sent_requests())
    before = draw(st.integers(0, 3)) if sent.model.max_batch_size else 0
    total = before + sent.rows + (draw(st.integers(0, 3)) if sent.model.max_batch_size else 0)
    outputs = []
    for index, declared in enumerate(sent.model.outputs):
        shape = tuple(draw(st.lists(st.integers(0, 3), min_size=1, max_size=2)))
        spec = TensorSpec(declared.name, declared.datatype, (-1,) * len(shape), declared.batched and index % 2 == 0)
        array = array_of(draw, spec.datatype, (total, *shape) if spec.batched else shape)
        outputs.append((spec, array))
    return sent, outputs, total, before


@settings(max_examples=300, deadline=None)
@given(answered_requests())
def test_outputs_of_every_datatype(case: tuple[Sent, list[tuple[TensorSpec, Any]], int, int]) -> None:
    """A request's rows of a batch, encoded and read by protobuf, are those rows bit for bit; twice with one plan."""
    sent, outputs, total, before = case
    plan = Decoder(FakeRepository(sent.model)).decode(sent.message().SerializeToString()).plan
    by_name = {spec.name: (spec, array) for spec, array in outputs}
    for _ in range(2):
        batch = [output(spec, array, total) for spec, array in outputs]
        parts = encode(plan, sent.request_id.encode(), batch, before, sent.rows)
        answer: Any = ModelInferResponse.FromString(b"".join(parts))
        assert (answer.model_name, answer.model_version, answer.id) == (sent.model.name, "1", sent.request_id)
        wanted = sent.outputs or [spec.name for spec, _ in outputs]
        assert [tensor.name for tensor in answer.outputs] == wanted
        values = arrays(answer)
        for name in wanted:
            spec, array = by_name[name]
            rows = array[before : before + sent.rows] if spec.batched else array
            assert values[name].shape == rows.shape
            assert wire_of(values[name]) == wire_of(rows)
