"""The wire format: varints, fields, and the split of a message into header, id and raw tensors."""

from __future__ import annotations

import pytest
from google.protobuf.internal import decoder

from service.frontend.codec.wire import delimited, delimiter, split, varint
from service.pb.grpc_service_pb2 import ModelInferRequest

NAME = delimited(1, b"m")
RAW = delimited(7, b"abcd")


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 16383, 16384, 2**31 - 1, 2**32, 2**63 - 1])
def test_varint_is_what_protobuf_reads(value: int) -> None:
    """A varint of any size is read back by the protobuf library, with nothing left over."""
    encoded = varint(value)
    assert decoder._DecodeVarint(encoded, 0) == (value, len(encoded))


@pytest.mark.parametrize("size", [0, 1, 127, 128, 20_000])
def test_delimited_is_tag_length_payload(size: int) -> None:
    """A field is read back by the protobuf library as the raw tensor it holds."""
    payload = b"x" * size
    message = ModelInferRequest.FromString(delimited(7, payload))
    assert message.raw_input_contents == [payload]
    assert delimited(7, payload) == delimiter(7, size) + payload


def test_split_of_an_ordinary_message() -> None:
    """The header is all before the raw tensors, less the id; raw tensors are positions, not copies."""
    message = ModelInferRequest(model_name="m", id="42", raw_input_contents=[b"abcd", b"", b"z" * 200])
    message.inputs.add(name="x", datatype="FP32", shape=[1])
    data = message.SerializeToString()
    parts = split(data)
    assert parts is not None
    assert parts.request_id == b"42"
    assert [data[start:end] for start, end in parts.raws] == [b"abcd", b"", b"z" * 200]
    message.ClearField("id")
    message.ClearField("raw_input_contents")
    assert parts.header == message.SerializeToString()


@pytest.mark.parametrize("size", [127, 128, 16_383, 16_384, 2_097_151, 2_097_152])
def test_split_reads_lengths_of_one_to_four_bytes(size: int) -> None:
    """Tensors at the borders where a length takes a byte more."""
    message = NAME + delimited(7, bytes(size)) + RAW
    parts = split(message)
    assert parts is not None
    assert [end - start for start, end in parts.raws] == [size, 4]


def test_requests_that_differ_in_id_and_data_have_one_header() -> None:
    """What changes from request to request is not in the header."""
    one = split(NAME + delimited(3, b"1") + RAW)
    other = split(NAME + delimited(3, b"a much longer id") + delimited(7, b"other data"))
    none = split(NAME + RAW)
    assert one is not None
    assert other is not None
    assert none is not None
    assert one.header == other.header == none.header == NAME


def test_split_without_raw_tensors_or_without_anything() -> None:
    """A message without raw tensors is all header; an empty one is an empty header."""
    bare, empty = split(NAME + delimited(3, b"i")), split(b"")
    assert bare is not None
    assert (bare.header, bare.request_id, bare.raws) == (NAME, b"i", [])
    assert empty is not None
    assert (empty.header, empty.request_id, empty.raws) == (b"", b"", [])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("a field after the raw tensors", RAW + NAME),
        ("the id after the raw tensors", NAME + RAW + delimited(3, b"1")),
        ("two ids", delimited(3, b"1") + delimited(3, b"2") + RAW),
        ("an unknown field", delimited(9, b"new") + RAW),
        ("an unknown field of two tag bytes", delimited(100, b"new") + RAW),
        ("a varint field", b"\x08\x01" + RAW),
        ("a tag and nothing", NAME + b"\x3a"),
        ("a length beyond the end", NAME + b"\x3a\x05abcd"),
        ("a length that breaks off", NAME + b"\x3a\x80"),
        ("a length of six bytes", NAME + b"\x3a\x84\x80\x80\x80\x80\x00abcd"),
        ("the end of a group", b"\x0c" + RAW),
    ],
)
def test_split_leaves_the_unusual_to_protobuf(what: str, message: bytes) -> None:
    """Anything but the usual order and form is None: the protobuf library decides what it is."""
    assert split(message) is None, what


def test_split_reads_a_length_written_longer_than_needed() -> None:
    """A varint may be padded with zero groups; protobuf reads it, and so does the split."""
    message = NAME + b"\x3a\x84\x80\x80\x00abcd"
    parts = split(message)
    assert parts is not None
    assert [message[start:end] for start, end in parts.raws] == [b"abcd"]
    assert ModelInferRequest.FromString(message).raw_input_contents == [b"abcd"]
