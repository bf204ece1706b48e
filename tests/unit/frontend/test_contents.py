"""Typed contents: one field per datatype, narrowed to its size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from service.errors import InvalidRequest
from service.frontend.codec.contents import from_contents, has_contents, text_array
from service.pb.grpc_service_pb2 import InferTensorContents, ModelInferRequest
from service.tensor import DataType

EVERY_TYPED = [
    (DataType.BOOL, "bool_contents", [True, False, True]),
    (DataType.INT8, "int_contents", [-128, 0, 127]),
    (DataType.INT16, "int_contents", [-32768, 0, 32767]),
    (DataType.INT32, "int_contents", [-(2**31), 0, 2**31 - 1]),
    (DataType.INT64, "int64_contents", [-(2**63), 0, 2**63 - 1]),
    (DataType.UINT8, "uint_contents", [0, 1, 255]),
    (DataType.UINT16, "uint_contents", [0, 1, 65535]),
    (DataType.UINT32, "uint_contents", [0, 1, 2**32 - 1]),
    (DataType.UINT64, "uint64_contents", [0, 1, 2**64 - 1]),
    (DataType.FP32, "fp32_contents", [-1.5, 0.0, float("inf")]),
    (DataType.FP64, "fp64_contents", [-1.5, 1e300, 5e-324]),
]


@pytest.mark.parametrize(("datatype", "field", "values"), EVERY_TYPED)
def test_each_datatype_has_its_field(datatype: DataType, field: str, values: list[Any]) -> None:
    """The extremes of each datatype come out as the little-endian bytes of its own size."""
    contents = InferTensorContents(**{field: values})
    data = from_contents(contents, datatype, len(values), "x")
    assert isinstance(data, bytes)
    assert data == np.array(values, datatype.dtype).tobytes()


def test_strings_become_text() -> None:
    """BYTES elements come out as `str`, empty ones included."""
    contents = InferTensorContents(bytes_contents=[b"a", b"", "zo\u00eb".encode()])
    data = from_contents(contents, DataType.BYTES, 3, "x")
    assert isinstance(data, np.ndarray)
    assert data.tolist() == ["a", "", "zo\u00eb"]


def test_small_integers_keep_their_low_order_bytes() -> None:
    """A value too large for the datatype is cut, as Triton does, not refused."""
    assert from_contents(InferTensorContents(int_contents=[0x1_7F, -1]), DataType.INT8, 2, "x") == b"\x7f\xff"
    assert from_contents(InferTensorContents(uint_contents=[0xABCD_1234]), DataType.UINT16, 1, "x") == b"\x34\x12"


@pytest.mark.parametrize("datatype", [DataType.FP16, DataType.BF16])
def test_half_floats_have_no_typed_form(datatype: DataType) -> None:
    """The message says what to send instead."""
    with pytest.raises(InvalidRequest, match=f"input 'x': {datatype.name} .* send raw_input_contents"):
        from_contents(InferTensorContents(fp32_contents=[1.0]), datatype, 1, "x")


def test_the_wrong_field_is_named_with_the_right_one() -> None:
    """One wrong field, or two fields at once."""
    with pytest.raises(InvalidRequest, match=r"input 'x': FP32 .* contents\.fp32_contents, but fp64_contents is"):
        from_contents(InferTensorContents(fp64_contents=[1.0]), DataType.FP32, 1, "x")
    both = InferTensorContents(fp32_contents=[1.0], int_contents=[1])
    with pytest.raises(InvalidRequest, match="int_contents and fp32_contents is filled"):
        from_contents(both, DataType.FP32, 1, "x")


@pytest.mark.parametrize("given", [1, 3])
def test_too_few_or_too_many_elements(given: int) -> None:
    """The number given and the number that the shape asks for are both told."""
    with pytest.raises(InvalidRequest, match=f"input 'x': its shape asks for 2 elements, but contents has {given}"):
        from_contents(InferTensorContents(fp32_contents=[1.0] * given), DataType.FP32, 2, "x")


def test_text_must_be_utf8() -> None:
    """The element and the byte where it goes wrong are named."""
    with pytest.raises(InvalidRequest, match=r"input 'x': BYTES element 1 is not valid UTF-8 \(at byte 2\)"):
        text_array([b"fine", b"ab\xff"], "x")


def test_an_empty_contents_message_is_none() -> None:
    """Some clients set the message and put nothing into it."""
    tensor: Any = ModelInferRequest.InferInputTensor(name="x")
    assert not has_contents(tensor)
    tensor.contents.SetInParent()
    assert not has_contents(tensor)
    tensor.contents.int_contents.append(0)
    assert has_contents(tensor)
