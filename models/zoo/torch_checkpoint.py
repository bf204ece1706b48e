"""Read the tensors of a PyTorch checkpoint with NumPy alone.

A checkpoint (`torch.save(model.state_dict(), path)`) is a pickle that names tensors by storage, offset, size and
stride, beside the raw storages. Two layouts exist: since PyTorch 1.6 a zip archive (`<name>/data.pkl`,
`<name>/data/<key>`), before that a sequence of pickles followed by the storages.

A pickle may name any function to call, so reading one is running it. Here the only names accepted are those a
state dictionary needs (`_SAFE`); everything else raises `CheckpointError`, as does anything torn or inconsistent.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# First object of the older layout (torch/serialization.py, MAGIC_NUMBER), and the one protocol version it ever had.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
# Every storage of the older layout starts with its number of elements.
_COUNT = struct.Struct("<q")

# A bound on what a torn count can make this module allocate; 4 GB of float32 are far beyond any model of the zoo.
MAX_ELEMENTS = 1 << 30

# Storage class -> NumPy type of its elements; BFloat16 has none and is widened to float32 after reading.
_BFLOAT16 = "BFloat16Storage"
_STORAGES: dict[str, np.dtype[Any]] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    _BFLOAT16: np.dtype("<u2"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}

# What the unpickler of the standard library raises on data that is torn or not a pickle of this kind.
_TORN = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    MemoryError,
    struct.error,
    zipfile.BadZipFile,
    RuntimeError,
    zlib.error,
)


class CheckpointError(ValueError):
    """The file is not a checkpoint this module reads. The message names the file, and the entry if one is at fault."""


@dataclass(frozen=True, slots=True)
class _StorageType:
    """Stands for a storage class, e.g. `torch.FloatStorage`."""

    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    """A storage by key; its elements may only be known once the whole file is read."""

    kind: _StorageType
    key: str
    elements: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A view on a storage: offset, size and stride in elements."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def load_state_dict(path: Path) -> dict[str, Array]:
    """Every tensor of the state dictionary in `path`, by name, each an array of its own.

    Types are kept (BFloat16 becomes float32); buffers such as `num_batches_tracked` are included. Raises
    `CheckpointError` when the file is torn, asks for anything unsafe, or is not a flat dictionary of tensors, and
    `OSError` when it cannot be read.
    """
    return parse_state_dict(path.read_bytes(), str(path))


def parse_state_dict(content: bytes, origin: str) -> dict[str, Array]:
    """The same for a file's content; `origin` names it in errors. Raises `CheckpointError`."""
    try:
        read = _read_zip if content.startswith(b"PK") else _read_legacy
        tensors, storages = read(io.BytesIO(content))
        return {name: _materialise(name, tensor, storages) for name, tensor in _named(tensors)}
    except CheckpointError as error:
        raise CheckpointError(f"{origin}: {error}") from None
    except _TORN as error:
        raise CheckpointError(f"{origin}: not a whole PyTorch checkpoint ({type(error).__name__}: {error})") from error


def _read_zip(file: BinaryIO) -> tuple[object, dict[str, Array]]:
    with zipfile.ZipFile(file) as archive:
        pickles = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise CheckpointError(f"expected one data.pkl in the archive, found {pickles}")
        prefix = pickles[0].removesuffix("data.pkl")
        if f"{prefix}byteorder" in archive.namelist() and archive.read(f"{prefix}byteorder") != b"little":
            raise CheckpointError("only little-endian checkpoints are read")
        unpickler = _Unpickler(io.BytesIO(archive.read(pickles[0])))
        content = unpickler.load()
        storages = {}
        for key, storage in unpickler.storages.items():
            storages[key] = _elements(storage, archive.read(f"{prefix}data/{key}"))
    return content, storages


def _read_legacy(file: BinaryIO) -> tuple[object, dict[str, Array]]:
    if _Unpickler(file).load() != LEGACY_MAGIC:
        raise CheckpointError("neither a zip archive nor a PyTorch checkpoint of the older layout")
    protocol = _Unpickler(file).load()
    if protocol != LEGACY_PROTOCOL:
        raise CheckpointError(f"layout version {protocol}, expected {LEGACY_PROTOCOL}")
    system = _Unpickler(file).load()
    if not isinstance(system, Mapping) or not system.get("little_endian", False):
        raise CheckpointError("only little-endian checkpoints are read")
    unpickler = _Unpickler(file)
    content = unpickler.load()
    storages = {}
    # The storages follow in the order of this list, each as a count and its elements.
    for key in _Unpickler(file).load():
        storage = unpickler.storages[str(key)]
        (count,) = _COUNT.unpack(file.read(_COUNT.size))
        if count != storage.elements:
            raise CheckpointError(f"storage {key} holds {count} elements, its tensors expect {storage.elements}")
        storages[storage.key] = _elements(storage, file.read(count * _STORAGES[storage.kind.name].itemsize))
    return content, storages


def _elements(storage: _Storage, raw: bytes) -> Array:
    dtype = _STORAGES[storage.kind.name]
    if len(raw) != storage.elements * dtype.itemsize:
        raise CheckpointError(
            f"storage {storage.key} has {len(raw)} bytes, expected {storage.elements} elements of {dtype.itemsize}"
        )
    flat = np.frombuffer(raw, dtype)
    if storage.kind.name == _BFLOAT16:
        # A bfloat16 is the upper half of a float32.
        return (flat.astype("<u4") << np.uint32(16)).view("<f4")
    return flat


def _named(content: object) -> list[tuple[str, _Tensor]]:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"expected a state dictionary, found {type(content).__name__}")
    named = []
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise CheckpointError(
                f"entry {name!r} is {type(tensor).__name__}, not a tensor; save `model.state_dict()` by itself"
            )
        named.append((name, tensor))
    return named


def _materialise(name: str, tensor: _Tensor, storages: dict[str, Array]) -> Array:
    flat = storages[tensor.storage.key]
    if len(tensor.size) != len(tensor.stride) or min((tensor.offset, *tensor.size, *tensor.stride)) < 0:
        raise CheckpointError(f"entry '{name}': size {tensor.size}, stride {tensor.stride}, offset {tensor.offset}")
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.size, tensor.stride, strict=True))
    if 0 in tensor.size:
        return np.zeros(tensor.size, flat.dtype)
    if math.prod(tensor.size) > flat.size:
        raise CheckpointError(f"entry '{name}' of size {tensor.size} repeats elements of its storage of {flat.size}")
    if last >= flat.size:
        raise CheckpointError(f"entry '{name}' reaches element {last} of a storage of {flat.size}")
    strides = [stride * flat.itemsize for stride in tensor.stride]
    return np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.size, strides, writeable=False).copy()


def _rebuild_tensor(
    storage: object, offset: object, size: object, stride: object, *_: object
) -> _Tensor:  # requires_grad, hooks and metadata do not matter here
    if not isinstance(storage, _Storage) or not isinstance(offset, int):
        raise CheckpointError(f"a tensor on {type(storage).__name__} at {offset!r}")
    return _Tensor(storage, offset, _integers(size), _integers(stride))


def _rebuild_parameter(tensor: object, *_: object) -> object:
    return tensor


def _integers(values: object) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not all(isinstance(value, int) for value in values):
        raise CheckpointError(f"expected a tuple of integers, found {values!r}")
    return values


# All that a state dictionary may name.
_SAFE: dict[tuple[str, str], Callable[..., object] | _StorageType] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): _StorageType(name) for name in _STORAGES},
}


class _Unpickler(pickle.Unpickler):
    """An unpickler that knows the names in `_SAFE` and no others, and collects the storages it meets."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return _SAFE[(module_name, global_name)]
        except KeyError:
            raise CheckpointError(
                f"asks for '{module_name}.{global_name}', which a state dictionary does not need; refused"
            ) from None

    def persistent_load(self, pid: Any) -> _Storage:
        # ('storage', class, key, location, elements), and in the older layout a view of the storage, or None.
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], _StorageType):
            raise CheckpointError(f"unknown reference {pid!r}")
        if len(pid) > 5 and pid[5] is not None:
            raise CheckpointError("a storage that is a view of another is not supported; save the checkpoint anew")
        storage = _Storage(pid[1], str(pid[2]), int(pid[4]))
        if not 0 <= storage.elements <= MAX_ELEMENTS:
            raise CheckpointError(f"storage {storage.key} states {storage.elements} elements, at most {MAX_ELEMENTS}")
        return self.storages.setdefault(storage.key, storage)
