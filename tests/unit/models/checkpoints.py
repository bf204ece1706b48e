"""Writes PyTorch checkpoints byte by byte, in both layouts, without PyTorch.

The opcodes are those of the standard library's pickle protocol 2 (`pickletools`), the order of the parts that of
`torch/serialization.py`.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from models.zoo.torch_checkpoint import LEGACY_MAGIC, LEGACY_PROTOCOL

Array = npt.NDArray[Any]

STORAGE_OF = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


def global_name(module: str, name: str) -> bytes:
    """Opcodes that push the global `module.name`."""
    return f"c{module}\n{name}\n".encode()


def integer(value: int) -> bytes:
    """Opcodes that push an integer of any size."""
    return f"L{value}L\n".encode()


def text(value: str) -> bytes:
    """Opcodes that push a string."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def group(*items: bytes) -> bytes:
    """Opcodes that push a tuple."""
    return b"(" + b"".join(items) + b"t"


def pickled(content: bytes) -> bytes:
    """A whole pickle of what the opcodes push."""
    return b"\x80\x02" + content + b"."


def ordered(items: Mapping[str, bytes]) -> bytes:
    """Opcodes that push an OrderedDict."""
    pairs = b"".join(text(name) + value for name, value in items.items())
    return global_name("collections", "OrderedDict") + b")R(" + pairs + b"u"


def tensor(key: str, array: Array, legacy: bool, offset: int = 0, stride: tuple[int, ...] | None = None) -> bytes:
    """Opcodes that push a tensor of `array`'s shape on the storage `key`, which holds `offset` more elements."""
    if stride is None:
        stride = tuple(step // array.itemsize for step in array.strides)
    storage = [text("storage"), global_name("torch", STORAGE_OF[array.dtype.name]), text(key), text("cpu")]
    storage.append(integer(array.size + offset))
    if legacy:
        storage.append(b"N")
    arguments = group(
        group(*storage) + b"Q",
        integer(offset),
        group(*map(integer, array.shape)),
        group(*map(integer, stride)),
        b"\x89",
        ordered({}),
    )
    return global_name("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def legacy_checkpoint(tensors: Mapping[str, Array]) -> bytes:
    """A checkpoint as PyTorch before 1.6 wrote it."""
    content = ordered({name: tensor(str(i), array, legacy=True) for i, (name, array) in enumerate(tensors.items())})
    keys = b"](" + b"".join(text(str(i)) for i in range(len(tensors))) + b"e"
    system = b"}" + text("little_endian") + b"\x88s"
    parts = [integer(LEGACY_MAGIC), integer(LEGACY_PROTOCOL), system, content, keys]
    raw = b"".join(struct.pack("<q", array.size) + array.tobytes() for array in tensors.values())
    return b"".join(map(pickled, parts)) + raw


def zip_checkpoint(tensors: Mapping[str, Array]) -> bytes:
    """A checkpoint as PyTorch writes it since 1.6."""
    content = ordered({name: tensor(str(i), array, legacy=False) for i, (name, array) in enumerate(tensors.items())})
    return archive(pickled(content), {str(i): array.tobytes() for i, array in enumerate(tensors.values())})


def archive(pickle: bytes, storages: Mapping[str, bytes], byteorder: str = "little") -> bytes:
    """The zip layout around any pickle and storages."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as target:
        target.writestr("model/data.pkl", pickle)
        target.writestr("model/byteorder", byteorder)
        for key, raw in storages.items():
            target.writestr(f"model/data/{key}", raw)
    return file.getvalue()


def example() -> dict[str, Array]:
    """A few tensors of several types and ranks."""
    return {
        "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
        "conv.bias": np.array([0.5, -1.5], np.float64),
        "half": np.array([1.0, 2.0], np.float16),
        "num_batches_tracked": np.array(7, np.int64),
        "mask": np.array([True, False]),
    }
