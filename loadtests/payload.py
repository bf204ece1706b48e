"""What requests carry: messages made and encoded once, before the first is sent.

Every message is `ModelInferRequest` with raw contents behind gRPC's five-byte prefix. The same seed gives the same
bytes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from loadtests.errors import LoadTestError
from loadtests.model_info import Input, ModelInfo
from loadtests.scenario import Entry, Payload
from service.pb import grpc_service_pb2 as pb

Array = npt.NDArray[Any]

# All messages of a run together: each worker holds them.
MAX_BYTES = 1 << 30
# Random integers are small, so that they are valid indices of most vocabularies; texts are words of these letters.
INTEGERS = (0, 100)
LETTERS = "etaoinshrdlu"
WORDS_PER_TEXT = 8
DTYPES: Mapping[str, str] = {
    "BOOL": "bool", "INT8": "i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8", "UINT8": "u1", "UINT16": "<u2",
    "UINT32": "<u4", "UINT64": "<u8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "BF16": "<u2", "BYTES": "O",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Template:
    """One message, ready to be sent: `body` is the message behind its prefix."""

    rows: int
    priority: int
    variant: int
    body: bytes


Samples = list[dict[str, Array]]


def templates(entry: Entry, info: ModelInfo, seed: Sequence[int]) -> list[Template]:
    """The messages of an entry, for each number of rows and each priority, in that order, `variants` of each.

    Raises `LoadTestError` when the model cannot be asked so.
    """
    if not info.batched and set(entry.rows) != {1}:
        raise LoadTestError(f"load entry '{entry.title}': model {info.name} does not batch, so `rows` must be 1")
    most = max(entry.rows)
    if 0 < info.max_batch_size < most:
        raise LoadTestError(
            f"load entry '{entry.title}': {most} rows in a request, and model {info.name} takes {info.max_batch_size}"
        )
    samples = None if _is_random(entry.payload) else _samples(entry, info)
    made: list[Template] = []
    size = 0
    for rows in entry.rows:
        for variant in range(entry.variants):
            rng = np.random.default_rng([*seed, rows, variant])
            tensors = _random(entry, info, rows, rng) if samples is None else _drawn(samples, info, rows, rng)
            for priority in entry.priority or {0: 1.0}:
                body = encode(entry, info, tensors, priority)
                size += len(body)
                if size > MAX_BYTES:
                    raise LoadTestError(
                        f"load entry '{entry.title}': its messages take more than {MAX_BYTES >> 20} MiB; "
                        f"lower `variants` ({entry.variants})"
                    )
                made.append(Template(rows, priority, variant, body))
    return made


def encode(entry: Entry, info: ModelInfo, tensors: Mapping[str, Array], priority: int = 0) -> bytes:
    """One message behind its prefix."""
    message = pb.ModelInferRequest(model_name=info.name, model_version=info.version)
    if priority:
        message.parameters["priority"].uint64_param = priority
    for key, value in entry.parameters.items():
        if isinstance(value, bool):
            message.parameters[key].bool_param = value
        elif isinstance(value, int):
            message.parameters[key].int64_param = value
        else:
            message.parameters[key].string_param = value
    for tensor in info.inputs:
        if tensor.name not in tensors:
            continue
        array = tensors[tensor.name]
        message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=array.shape)
        message.raw_input_contents.append(raw(tensor, array))
    for name in entry.outputs:
        message.outputs.add(name=name)
    body = message.SerializeToString()
    return b"\x00" + len(body).to_bytes(4, "big") + body


def raw(tensor: Input, array: Array) -> bytes:
    """The array's bytes as the protocol wants them: little-endian, row by row; texts each behind its length."""
    if tensor.datatype != "BYTES":
        return np.ascontiguousarray(array, DTYPES[tensor.datatype]).tobytes()
    parts: list[bytes] = []
    for element in array.ravel():
        data = element if isinstance(element, bytes) else str(element).encode()
        parts += [len(data).to_bytes(4, "little"), data]
    return b"".join(parts)


def _is_random(payload: Payload) -> bool:
    return payload.npz is None and not payload.npy and payload.images is None and payload.texts is None


def _random(entry: Entry, info: ModelInfo, rows: int, rng: np.random.Generator) -> dict[str, Array]:
    names = {tensor.name for tensor in info.inputs}
    for given in (*entry.payload.dims, *entry.payload.ranges):
        if given not in names:
            raise LoadTestError(
                f"load entry '{entry.title}': model {info.name} has no input '{given}'; "
                f"it has {', '.join(sorted(names))}"
            )
    return {tensor.name: _random_tensor(entry, info, tensor, rows, rng) for tensor in info.inputs}


def _random_tensor(entry: Entry, info: ModelInfo, tensor: Input, rows: int, rng: np.random.Generator) -> Array:
    declared = tensor.shape[1:] if info.batched else tensor.shape
    dims = entry.payload.dims.get(tensor.name, declared)
    if len(dims) != len(declared) or any(d not in (-1, n) for d, n in zip(declared, dims, strict=True)):
        raise LoadTestError(
            f"load entry '{entry.title}': dims {list(dims)} for input '{tensor.name}', which has {list(declared)}"
        )
    if any(size < 0 for size in dims):
        raise LoadTestError(
            f"load entry '{entry.title}': input '{tensor.name}' of model {info.name} has open dimensions "
            f"{list(declared)}; say their sizes in payload.dims.{tensor.name}"
        )
    shape = (rows, *dims) if info.batched else tuple(dims)
    low, high = entry.payload.ranges.get(tensor.name, (0.0, 1.0))
    ranged = tensor.name in entry.payload.ranges
    if tensor.datatype == "BYTES":
        return _random_texts(shape, rng)
    if tensor.datatype == "BOOL":
        return rng.random(shape) < 0.5
    if tensor.datatype == "BF16":
        return (rng.uniform(low, high, shape).astype("<f4").view("<u4") >> 16).astype("<u2")
    if tensor.datatype not in DTYPES:
        raise LoadTestError(
            f"model {info.name}: input '{tensor.name}' has the datatype {tensor.datatype}, unknown here"
        )
    dtype = np.dtype(DTYPES[tensor.datatype])
    if dtype.kind == "f":
        return rng.uniform(low, high, shape).astype(dtype)
    least, most = (int(low), int(high)) if ranged else INTEGERS
    return rng.integers(least, max(most, least + 1), shape).astype(dtype)


def _random_texts(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    texts = np.empty(shape, object)
    for position in np.ndindex(*shape):
        words = ("".join(rng.choice(list(LETTERS), rng.integers(2, 9))) for _ in range(WORDS_PER_TEXT))
        texts[position] = " ".join(words).encode()
    return texts


def _samples(entry: Entry, info: ModelInfo) -> Samples:
    """Single rows (or whole inputs of a model that does not batch) from files."""
    payload = entry.payload
    if payload.npz is not None or payload.npy:
        try:
            if payload.npz is not None:
                with np.load(payload.npz) as archive:
                    arrays = {name: archive[name] for name in archive.files}
            else:
                arrays = {name: np.load(path) for name, path in payload.npy.items()}
        except (OSError, ValueError) as error:
            raise LoadTestError(f"load entry '{entry.title}': {error}") from error
        return _checked(entry, info, _split(entry, arrays) if info.batched else [arrays])
    function = _function(entry)
    made: Samples = []
    for item in _items(entry):
        try:
            made.append({name: np.asarray(array) for name, array in dict(function(item)).items()})
        except Exception as error:
            # Whatever the user's own function raises: say for which file, keep the cause.
            raise LoadTestError(
                f"load entry '{entry.title}': {payload.preprocess} failed on {item!s:.200}: {error}"
            ) from error
    return _checked(entry, info, made)


def _split(entry: Entry, arrays: Mapping[str, Array]) -> Samples:
    counts = {name: array.shape[0] if array.ndim else 0 for name, array in arrays.items()}
    if not counts or len(set(counts.values())) != 1 or not min(counts.values()):
        raise LoadTestError(f"load entry '{entry.title}': the arrays have different numbers of samples: {counts}")
    return [{name: array[i] for name, array in arrays.items()} for i in range(next(iter(counts.values())))]


def _items(entry: Entry) -> list[Any]:
    payload = entry.payload
    source = payload.images or payload.texts
    assert source is not None
    try:
        if payload.texts is not None and source.is_file():
            items: list[Any] = [line for line in source.read_text().splitlines() if line.strip()]
        else:
            files = sorted(path for path in source.iterdir() if path.is_file() and not path.name.startswith("."))
            items = [path.read_text() for path in files] if payload.texts is not None else list(files)
    except OSError as error:
        raise LoadTestError(f"load entry '{entry.title}': {error}") from error
    if not items:
        raise LoadTestError(f"load entry '{entry.title}': nothing to send in {source}")
    return items[: entry.variants]


def _function(entry: Entry) -> Callable[[Any], Mapping[str, Any]]:
    spec = entry.payload.preprocess
    if spec is None:  # texts as they are
        return lambda text: {"": np.array([text.encode()], object)}
    module, _, name = spec.partition(":")
    try:
        function: Callable[[Any], Mapping[str, Any]] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise LoadTestError(
            f"load entry '{entry.title}': preprocess '{spec}' cannot be imported: {error}; "
            "expected package.module:function"
        ) from error
    return function


def _checked(entry: Entry, info: ModelInfo, samples: Samples) -> Samples:
    known = {tensor.name: tensor for tensor in info.inputs}
    for sample in samples:
        if "" in sample:  # texts without a function, for a model with one input
            (name,) = known if len(known) == 1 else ("",)
            sample[name] = sample.pop("")
        for name, array in sample.items():
            if name not in known:
                raise LoadTestError(
                    f"load entry '{entry.title}': model {info.name} has no input '{name}'; it has {', '.join(known)}"
                )
            wanted = known[name].shape[1:] if info.batched else known[name].shape
            if len(wanted) != array.ndim or any(w not in (-1, g) for w, g in zip(wanted, array.shape, strict=True)):
                raise LoadTestError(
                    f"load entry '{entry.title}': a sample of input '{name}' has shape {list(array.shape)}, "
                    f"expected {list(wanted)}"
                )
    return samples


def _drawn(samples: Samples, info: ModelInfo, rows: int, rng: np.random.Generator) -> dict[str, Array]:
    chosen = [samples[int(i)] for i in rng.integers(0, len(samples), rows)]
    if not info.batched:
        return chosen[0]
    try:
        return {name: np.stack([sample[name] for sample in chosen]) for name in chosen[0]}
    except (KeyError, ValueError) as error:
        raise LoadTestError(
            f"samples of different inputs or shapes cannot share a request: {error}; use 1 row"
        ) from error
