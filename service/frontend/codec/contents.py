"""Typed `InferTensorContents` to the raw form: one form of tensor inside, whatever the client sent.

Rules (as Triton's): exactly one typed field may be filled, the one that belongs to the datatype; small integers travel
in wider fields and keep their low-order bytes; FP16 and BF16 have no typed field and must come raw.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from service.errors import InvalidRequest
from service.request import InputData
from service.tensor import DataType

_FIELD: dict[DataType, str] = {
    DataType.BOOL: "bool_contents",
    DataType.INT8: "int_contents",
    DataType.INT16: "int_contents",
    DataType.INT32: "int_contents",
    DataType.INT64: "int64_contents",
    DataType.UINT8: "uint_contents",
    DataType.UINT16: "uint_contents",
    DataType.UINT32: "uint_contents",
    DataType.UINT64: "uint64_contents",
    DataType.FP32: "fp32_contents",
    DataType.FP64: "fp64_contents",
    DataType.BYTES: "bytes_contents",
}
# The NumPy type that holds every value of the wire field, before it is narrowed.
_WIRE_DTYPE = {"int_contents": np.int32, "uint_contents": np.uint32}


def has_contents(tensor: Any) -> bool:
    """Whether the message's input `tensor` carries typed contents (an empty message counts as none)."""
    return tensor.HasField("contents") and bool(tensor.contents.ListFields())


def from_contents(contents: Any, datatype: DataType, count: int, name: str) -> InputData:
    """The `count` elements of the message `contents`: little-endian bytes, or an object array of `str` for BYTES.

    Raises `InvalidRequest`, naming the input, when the wrong field is filled or the number of elements is wrong.
    """
    filled = [field.name for field, _ in contents.ListFields()]
    wanted = _FIELD.get(datatype)
    if wanted is None:
        raise InvalidRequest(f"input '{name}': {datatype.wire_name} has no typed contents; send raw_input_contents")
    if filled != [wanted]:
        raise InvalidRequest(
            f"input '{name}': {datatype.wire_name} data belongs into contents.{wanted}, "
            f"but {' and '.join(filled)} is filled"
        )
    values = getattr(contents, wanted)
    if len(values) != count:
        raise InvalidRequest(f"input '{name}': its shape asks for {count} elements, but contents has {len(values)}")
    if datatype is DataType.BYTES:
        return text_array(list(values), name)
    return np.array(values, dtype=_WIRE_DTYPE.get(wanted, datatype.dtype)).astype(datatype.dtype).tobytes()


def text_array(elements: list[bytes], name: str) -> InputData:
    """An object array of `str`: ONNX Runtime's strings are passed as Python text, so elements must be UTF-8."""
    array = np.empty(len(elements), dtype=object)
    for index, element in enumerate(elements):
        try:
            array[index] = element.decode()
        except UnicodeDecodeError as error:
            raise InvalidRequest(
                f"input '{name}': BYTES element {index} is not valid UTF-8 (at byte {error.start}); "
                "ONNX string tensors hold text"
            ) from None
    return array
