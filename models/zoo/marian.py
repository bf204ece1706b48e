"""Read the tensors of a Marian model file (`.bin`), as Marian and Bergamot publish them, with NumPy alone.

The layout, all integers little-endian:

    u64 version (1), u64 number of items
    per item: u64 length of the name, u64 type, u64 rank, u64 length of the data
    the names one after the other, each ending in a zero byte
    the shapes one after the other, i32 per dimension
    u64 length of a gap, then the gap, so that the data starts at a multiple of 256 bytes
    the data of the items one after the other; lengths include padding behind the elements

Three types are known here: text (the network's settings, as YAML), float32, and the eight-bit integers of the intgemm
library: the elements, then a float32 multiplier; an element is the weight times that multiplier, rounded. intgemm keeps
the matrices it multiplies by transposed. The embedding is the exception: it is looked up by row.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from models.zoo.errors import ConversionError

Array = npt.NDArray[Any]

FILE_VERSION = 1
TEXT = 0x101
FLOAT32 = 0x404
INTGEMM8 = 0x4101
# The one text item there is, and the one matrix that is not stored transposed.
SETTINGS = "special:model.yml"
EMBEDDING = "Wemb"
# The scales that Marian quantises activations with. Here activations stay float32, so these are left out.
ACTIVATION_SCALE = "_QuantMultA"

_HEADER = struct.Struct("<QQ")
_ITEM = struct.Struct("<QQQQ")
_LENGTH = struct.Struct("<Q")
_MULTIPLIER = struct.Struct("<f")


@dataclass(frozen=True, slots=True)
class Quantised:
    """A matrix of eight-bit integers as its shape says (inputs, outputs); `values * scale` are the weights."""

    values: npt.NDArray[np.int8]
    scale: float


@dataclass(frozen=True, slots=True)
class MarianFile:
    """What a model file holds: float32 tensors and quantised matrices by name, and the settings (YAML)."""

    floats: dict[str, Array]
    quantised: dict[str, Quantised]
    settings: str


@dataclass(frozen=True, slots=True)
class _Item:
    name: str
    kind: int
    shape: tuple[int, ...]
    data: bytes


def read_marian(content: bytes) -> MarianFile:
    """The tensors of a model file. Raises `ConversionError` when it is torn or holds anything not known here."""
    floats: dict[str, Array] = {}
    quantised: dict[str, Quantised] = {}
    settings = ""
    for item in _items(_Reader(content)):
        if item.name in floats or item.name in quantised:
            raise ConversionError(f"item '{item.name}' is there twice")
        if item.name.endswith(ACTIVATION_SCALE):
            continue
        if item.kind == FLOAT32:
            floats[item.name] = np.frombuffer(_elements(item, 4), "<f4").reshape(item.shape)
        elif item.kind == INTGEMM8:
            quantised[item.name] = _quantised(item)
        elif item.kind == TEXT and item.name == SETTINGS:
            settings = item.data.rstrip(b"\0").decode("utf-8", "replace")
        else:
            raise ConversionError(f"item '{item.name}' is of type {item.kind:#x}, which is not known here")
    return MarianFile(floats, quantised, settings)


class _Reader:
    """The bytes in order. Every length is checked before it is believed."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._position = 0

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes. Raises `ConversionError` when there are fewer."""
        left = len(self._content) - self._position
        if count > left:
            raise ConversionError(f"not a whole Marian model: {what} needs {count} bytes, the file has {left} left")
        self._position += count
        return self._content[self._position - count : self._position]

    def refuse_rest(self) -> None:
        """Bytes behind the last item mean that the lengths are not what they seem."""
        if self._position != len(self._content):
            raise ConversionError(f"{len(self._content) - self._position} bytes follow the last item")


def _items(reader: _Reader) -> list[_Item]:
    version, count = _HEADER.unpack(reader.take(_HEADER.size, "the header"))
    if version != FILE_VERSION:
        raise ConversionError(f"not a Marian model: it begins with version {version}, expected {FILE_VERSION}")
    table = reader.take(count * _ITEM.size, f"the table of {count} items")
    rows = [_ITEM.unpack_from(table, index * _ITEM.size) for index in range(count)]
    names = [_name(reader.take(length, f"the name of item {index}")) for index, (length, *_) in enumerate(rows)]
    shapes = [
        _shape(name, reader.take(4 * row[2], f"the shape of '{name}'")) for name, row in zip(names, rows, strict=True)
    ]
    (gap,) = _LENGTH.unpack(reader.take(_LENGTH.size, "the gap's length"))
    reader.take(gap, "the gap before the data")
    items = [
        _Item(name, kind, shape, reader.take(length, f"the data of '{name}'"))
        for name, shape, (_, kind, _, length) in zip(names, shapes, rows, strict=True)
    ]
    reader.refuse_rest()
    return items


def _name(raw: bytes) -> str:
    try:
        return raw.rstrip(b"\0").decode("ascii")
    except UnicodeDecodeError:
        raise ConversionError(f"{raw[:40]!r} is not the name of an item") from None


def _shape(name: str, raw: bytes) -> tuple[int, ...]:
    shape = struct.unpack(f"<{len(raw) // 4}i", raw)
    if min(shape, default=0) < 0:
        raise ConversionError(f"item '{name}' has shape {shape}")
    return shape


def _elements(item: _Item, size: int) -> bytes:
    """The item's elements without the padding behind them."""
    expected = math.prod(item.shape) * size
    if expected > len(item.data):
        raise ConversionError(f"item '{item.name}' of shape {item.shape} has {len(item.data)} bytes of {expected}")
    return item.data[:expected]


def _quantised(item: _Item) -> Quantised:
    if len(item.shape) != 2:
        raise ConversionError(f"item '{item.name}' has shape {item.shape}, expected a matrix")
    values = np.frombuffer(_elements(item, 1), np.int8)
    if len(item.data) < len(values) + _MULTIPLIER.size:
        raise ConversionError(f"item '{item.name}' has no multiplier behind its elements")
    (multiplier,) = _MULTIPLIER.unpack_from(item.data, len(values))
    if not (math.isfinite(multiplier) and multiplier > 0):
        raise ConversionError(f"item '{item.name}' has multiplier {multiplier}, expected a number above 0")
    rows, columns = item.shape
    matrix = values.reshape(rows, columns) if item.name == EMBEDDING else values.reshape(columns, rows).T
    return Quantised(matrix, 1.0 / multiplier)
