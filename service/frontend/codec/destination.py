"""Where the outputs of a request go, and as what: into the answer, into shared memory, or as the top of its classes.

parameters of a requested output         what the client gets
shared_memory_region, _byte_size, _offset   the tensor in its region, and where in the answer
classification: k                        BYTES [rows, k] of "value:index" or "value:index:label", largest first
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from service.errors import InvalidRequest
from service.tensor import Array, DataType, TensorSpec

SHARED_MEMORY = ("shared_memory_region", "shared_memory_byte_size", "shared_memory_offset")
CLASSIFICATION = "classification"


class Memory(Protocol):
    """A region of shared memory, as `service.frontend.shared_memory.Region`."""

    name: str

    def read(self, offset: int, size: int) -> memoryview: ...

    def write(self, offset: int, data: bytes | memoryview) -> None: ...


@dataclass(frozen=True, slots=True)
class Place:
    """A part of a region of shared memory."""

    region: str
    offset: int
    byte_size: int


@dataclass(frozen=True, slots=True)
class Destination:
    """What is to become of an output. `top` > 0: that many classes."""

    place: Place | None = None
    top: int = 0


IN_ANSWER = Destination()


def place_of(parameters: Mapping[str, Any], what: str) -> Place | None:
    """The part of shared memory that parameters name; None if they name none. Raises `InvalidRequest`."""
    given = [name for name in SHARED_MEMORY if name in parameters]
    if not given:
        return None
    for name, kind in zip(SHARED_MEMORY, ("string_param", "int64_param", "int64_param"), strict=True):
        if name in parameters and parameters[name].WhichOneof("parameter_choice") != kind:
            raise InvalidRequest(f"{what}: parameter '{name}' must be {'a string' if kind[0] == 's' else 'an integer'}")
    if SHARED_MEMORY[0] not in given or SHARED_MEMORY[1] not in given:
        raise InvalidRequest(f"{what}: '{SHARED_MEMORY[0]}' and '{SHARED_MEMORY[1]}' must be given together")
    region = parameters[SHARED_MEMORY[0]].string_param
    byte_size = parameters[SHARED_MEMORY[1]].int64_param
    offset = parameters[SHARED_MEMORY[2]].int64_param if SHARED_MEMORY[2] in given else 0
    if byte_size < 0 or offset < 0:
        raise InvalidRequest(f"{what}: sizes and offsets of shared memory must not be negative")
    return Place(region, offset, byte_size)


def destination_of(parameters: Mapping[str, Any], spec: TensorSpec, model: str) -> Destination:
    """What a request wants with an output. Raises `InvalidRequest`."""
    what = f"output '{spec.name}' of model '{model}'"
    place = place_of(parameters, what)
    if CLASSIFICATION not in parameters:
        return Destination(place) if place is not None else IN_ANSWER
    value = parameters[CLASSIFICATION]
    if value.WhichOneof("parameter_choice") != "int64_param":
        raise InvalidRequest(f"{what}: parameter '{CLASSIFICATION}' must be an integer")
    if value.int64_param <= 0:
        raise InvalidRequest(f"{what}: parameter '{CLASSIFICATION}' must be greater than 0, got {value.int64_param}")
    if place is not None:
        raise InvalidRequest(f"{what}: classification can not be placed in shared memory")
    if spec.datatype in (DataType.BYTES, DataType.BF16, DataType.BOOL):
        raise InvalidRequest(f"{what}: class result not available, its datatype is {spec.datatype.wire_name}")
    return Destination(None, value.int64_param)


def classify(rows: Array, top: int, labels: Sequence[str]) -> Array:
    """The `top` largest elements of each of `rows` [N, classes] as an object array [N, min(top, classes)] of str.

    Equal elements come in the order of their index. The form of the numbers is that of C's printf: %f, %d.
    """
    count = min(top, rows.shape[1])
    found = np.empty((rows.shape[0], count), dtype=object)
    # Stable, and NaN last.
    order = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :count]
    integers = rows.dtype.kind in "iu"
    for index, (row, chosen) in enumerate(zip(rows, order, strict=True)):
        for position, number in enumerate(chosen.tolist()):
            value = f"{int(row[number])}" if integers else f"{float(row[number]):f}"
            label = f":{labels[number]}" if number < len(labels) else ""
            found[index, position] = f"{value}:{number}{label}"
    return found
