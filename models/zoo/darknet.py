"""Read a network as Darknet describes it: a `.cfg` with a section for each layer, a `.weights` with their numbers.

The weights begin with a version (three int32) and the number of pictures seen in training (int64 since version 0.2,
int32 before). Then come, layer by layer in the order of the description, float32: for a convolution its biases, with
normalisation also scales, means and variances, then its filters.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from models.zoo.errors import ConversionError

Array = npt.NDArray[Any]

_VERSION = struct.Struct("<iii")


@dataclass(frozen=True, slots=True)
class Section:
    """A layer, or the network as a whole (`net`): its kind and its settings."""

    kind: str
    settings: dict[str, str] = field(default_factory=dict)

    def text(self, name: str) -> str:
        """A setting that has to be there. Raises `ConversionError`."""
        if name not in self.settings:
            raise ConversionError(f"section [{self.kind}] has no '{name}'")
        return self.settings[name]

    def integer(self, name: str, default: int | None = None) -> int:
        """A setting that is a whole number. Raises `ConversionError`, also where it is missing without a default."""
        if default is not None and name not in self.settings:
            return default
        return self.integers(name)[0]

    def number(self, name: str, default: float) -> float:
        """A setting that is a number. Raises `ConversionError`."""
        return self.numbers(name)[0] if name in self.settings else default

    def integers(self, name: str) -> list[int]:
        """A list of whole numbers, separated by commas. Raises `ConversionError`."""
        return self._numbers(name, int)

    def numbers(self, name: str) -> list[float]:
        """A list of numbers, separated by commas. Raises `ConversionError`."""
        return self._numbers(name, float)

    def _numbers(self, name: str, kind: Any) -> list[Any]:
        text = self.text(name)
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            raise ConversionError(f"section [{self.kind}]: '{name}={text}' is not a number") from None


def read_sections(description: str) -> list[Section]:
    """The sections of a `.cfg`, the network's own first. Raises `ConversionError`."""
    sections: list[Section] = []
    for raw in description.splitlines():
        line = raw.split("#")[0].strip()
        if line.startswith("[") and line.endswith("]"):
            sections.append(Section(line[1:-1]))
        elif line:
            name, separator, value = line.partition("=")
            if not separator or not sections:
                raise ConversionError(f"not a Darknet description: '{line[:40]}'")
            sections[-1].settings[name.strip()] = value.strip()
    if not sections or sections[0].kind != "net":
        raise ConversionError("not a Darknet description: it does not begin with [net]")
    return sections


class Weights:
    """The numbers of a `.weights` file, in order."""

    def __init__(self, content: bytes) -> None:
        if len(content) < _VERSION.size:
            raise ConversionError("not Darknet's weights: the file is shorter than their beginning")
        major, minor, _ = _VERSION.unpack_from(content)
        begin = _VERSION.size + (8 if (major, minor) >= (0, 2) else 4)
        if (len(content) - begin) % 4:
            raise ConversionError(f"the weights are torn: {len(content)} bytes")
        self._values = np.frombuffer(content, "<f4", offset=begin)
        self._taken = 0

    def take(self, *shape: int) -> Array:
        """The next numbers, in this shape. Raises `ConversionError` when there are fewer."""
        count = int(np.prod(shape))
        left = len(self._values) - self._taken
        if count > left:
            raise ConversionError(f"the weights are torn: {count} numbers needed, {left} left")
        self._taken += count
        return self._values[self._taken - count : self._taken].reshape(shape)

    def refuse_rest(self) -> None:
        """Numbers nobody asked for mean that they belong to another description."""
        if self._taken != len(self._values):
            raise ConversionError(f"{len(self._values) - self._taken} numbers follow the last layer's")
