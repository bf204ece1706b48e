"""Datatypes and tensor specifications: the nouns shared by the wire, the configuration and the engine.

The protocol's names (Open Inference Protocol, https://github.com/kserve/open-inference-protocol) are the ones used
everywhere inside. BF16 has no NumPy type: its elements travel as uint16 bit patterns. BYTES elements are `bytes` in an
object array; on the wire each is `<u32 little-endian length><bytes>`, row-major.
"""

from __future__ import annotations

import enum
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from service.errors import InvalidRequest

Array = npt.NDArray[np.generic]

# Bytes of the element-length prefix of a BYTES element.
LENGTH_PREFIX = 4
_LENGTH = struct.Struct("<I")


class DataType(enum.Enum):
    """A protocol datatype. `dtype` is the NumPy type its elements have in memory, `itemsize` its bytes on the wire
    (0 = variable), `onnx_type` the value of `onnx.TensorProto.DataType`, `onnx_name` ONNX Runtime's type name."""

    BOOL = ("BOOL", "bool", 9, "tensor(bool)")
    UINT8 = ("UINT8", "uint8", 2, "tensor(uint8)")
    UINT16 = ("UINT16", "uint16", 4, "tensor(uint16)")
    UINT32 = ("UINT32", "uint32", 12, "tensor(uint32)")
    UINT64 = ("UINT64", "uint64", 13, "tensor(uint64)")
    INT8 = ("INT8", "int8", 3, "tensor(int8)")
    INT16 = ("INT16", "int16", 5, "tensor(int16)")
    INT32 = ("INT32", "int32", 6, "tensor(int32)")
    INT64 = ("INT64", "int64", 7, "tensor(int64)")
    FP16 = ("FP16", "float16", 10, "tensor(float16)")
    BF16 = ("BF16", "uint16", 16, "tensor(bfloat16)")
    FP32 = ("FP32", "float32", 1, "tensor(float)")
    FP64 = ("FP64", "float64", 11, "tensor(double)")
    BYTES = ("BYTES", "object", 8, "tensor(string)")

    def __init__(self, wire_name: str, numpy_name: str, onnx_type: int, onnx_name: str) -> None:
        self.wire_name = wire_name
        self.dtype: np.dtype[np.generic] = np.dtype(numpy_name)
        self.itemsize = 0 if numpy_name == "object" else self.dtype.itemsize
        self.onnx_type = onnx_type
        self.onnx_name = onnx_name


BY_WIRE_NAME: dict[str, DataType] = {d.wire_name: d for d in DataType}
BY_ONNX_NAME: dict[str, DataType] = {d.onnx_name: d for d in DataType}
BY_ONNX_TYPE: dict[int, DataType] = {d.onnx_type: d for d in DataType}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a model.

    `shape` is the shape of one row: without the batch dimension when `batched`, else the whole shape. -1 = any size.
    `axis` is where the batch dimension stands: 0 for all that clients send and get, elsewhere for some states.
    """

    name: str
    datatype: DataType
    shape: tuple[int, ...]
    batched: bool = False
    optional: bool = False
    axis: int = 0

    @property
    def full_shape(self) -> tuple[int, ...]:
        """The shape as the protocol's metadata states it: with -1 for the batch dimension when batched."""
        return self.whole(-1, self.shape)

    def whole(self, rows: int, row_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a tensor of `rows` rows of `row_shape` each."""
        if not self.batched:
            return tuple(row_shape)
        return (*row_shape[: self.axis], rows, *row_shape[self.axis :])

    def rows(self, array: Array, first: int, last: int) -> Array:
        """The rows `first` to `last` (excluded) of a tensor, as a view; the whole tensor when not batched."""
        if not self.batched:
            return array
        return array[first:last] if self.axis == 0 else array[(slice(None),) * self.axis + (slice(first, last),)]

    def accepts(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of `shape` (batch dimension included when batched) fits this specification."""
        wanted = self.full_shape
        return len(shape) == len(wanted) and all(w in (-1, s) for w, s in zip(wanted, shape, strict=True))


def element_count(shape: Sequence[int]) -> int:
    """Number of elements of a tensor; 1 for a scalar."""
    return math.prod(shape)


def encode_bytes(array: Array) -> bytes:
    """Encode an object array of `bytes` or `str` as the wire form of BYTES."""
    parts: list[bytes] = []
    for element in array.ravel(order="C").tolist():
        raw = element.encode() if isinstance(element, str) else element
        parts.append(_LENGTH.pack(len(raw)))
        parts.append(raw)
    return b"".join(parts)


def decode_bytes(buffer: memoryview | bytes, count: int, name: str) -> Array:
    """Decode `count` BYTES elements from their wire form into a flat object array of `bytes`.

    Raises `InvalidRequest`, naming the input, when the lengths and the buffer do not agree exactly.
    """
    total = len(buffer)
    if total < count * LENGTH_PREFIX:
        raise InvalidRequest(
            f"input '{name}': expected {count} BYTES elements, but {total} bytes hold at most {total // LENGTH_PREFIX}"
        )
    elements = np.empty(count, dtype=object)
    position = 0
    for index in range(count):
        if position + LENGTH_PREFIX > total:
            raise InvalidRequest(f"input '{name}': expected {count} BYTES elements, but the data ends after {index}")
        (length,) = _LENGTH.unpack_from(buffer, position)
        position += LENGTH_PREFIX
        if length > total - position:
            raise InvalidRequest(
                f"input '{name}': BYTES element {index} states {length} bytes, but only {total - position} are left"
            )
        elements[index] = bytes(buffer[position : position + length])
        position += length
    if position != total:
        raise InvalidRequest(
            f"input '{name}': {total - position} bytes left over after the {count} BYTES elements its shape asks for"
        )
    return elements
