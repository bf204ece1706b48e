"""A repository of many small models of many kinds, and what each must answer.

`write_corpus` writes `count` models that differ in kind, datatype, rank and dimensions, reproducibly from a seed: every
builder of `onnx_models` whose answers are tensors, and random graphs of element-wise, reducing and reshaping operators.
`expected` gives inputs and the answers of ONNX Runtime called directly.

What an input may hold beyond its datatype (ids of a vocabulary, a small count) is in the model's metadata under
`range:<input>` as `low,high` (both included).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from tests.support import onnx_models

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

WORDS = ("ham", "spam", "eggs", "cat", "dog", "bird", "", "two words", "zo\u00eb")
# The most rows, and the largest other dynamic dimension, that `expected` draws.
MAX_ROWS = 4
MAX_DIMENSION = 5

_FLOATS = ("FP32", "FP64", "FP16")
_INTEGERS = ("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64")
_NUMPY_OF: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bool)": np.dtype(np.bool_),
    **{f"tensor({name})": np.dtype(name) for name in ("int8", "int16", "int32", "int64")},
    **{f"tensor({name})": np.dtype(name) for name in ("uint8", "uint16", "uint32", "uint64")},
}


@dataclass(frozen=True, slots=True)
class CorpusModel:
    """One model of the corpus: `directory` is its place in the repository, `kind` the builder's name."""

    name: str
    kind: str
    directory: Path


def write_corpus(directory: Path, count: int = 1000, seed: int = 0) -> list[CorpusModel]:
    """Write `count` models as a repository in `directory`; the same `count` and `seed` give the same bytes.

    The kinds take turns, so that any 40 models in a row hold each kind. 1,000 models take a second and 1 MB.
    """
    models = []
    for index in range(count):
        kind, build = _KINDS[index % len(_KINDS)]
        rng = np.random.default_rng([seed, index])
        name = f"{kind}_{index:04d}"
        if kind == "external_data":
            target = directory / name
            onnx_models.external_data(target / "1", _size(rng, 64), _size(rng, 64), seed=index)
        else:
            target = onnx_models.write_model(directory, name, build(rng))
        models.append(CorpusModel(name, kind, target))
    return models


def model_file(model_dir: Path, version: int = 1) -> Path:
    """The ONNX file of a model of the corpus."""
    return model_dir / str(version) / "model.onnx"


def open_session(path: Path) -> ort.InferenceSession:
    """A single-threaded session on the CPU, to compare with."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])


def expected(model_dir: Path, seed: int = 0, rows: int | None = None) -> tuple[Arrays, Arrays]:
    """Inputs drawn from `seed` for the model in `model_dir`, and the outputs ONNX Runtime gives for them.

    `rows` fixes the dimension `N` where it is dynamic (drawn from 1 to 4 otherwise). Strings are `str` in object
    arrays, BF16 elements uint16 bit patterns.
    """
    session = open_session(model_file(model_dir))
    inputs = draw_inputs(session, np.random.default_rng(seed), rows)
    return inputs, run_directly(session, inputs)


def differences(got: Mapping[str, Array], wanted: Mapping[str, Array], tolerance: float = 1e-5) -> list[str]:
    """What is wrong with the answers `got`, in words; empty when they equal `wanted`.

    Floats may differ by `tolerance`, absolutely or relative to the wanted value; strings may be `bytes` or `str`.
    """
    wrong = [f"output '{name}' is missing" for name in wanted if name not in got]
    for name in wanted.keys() & got.keys():
        one, other = got[name], wanted[name]
        if one.shape != other.shape:
            wrong.append(f"output '{name}' has shape {one.shape}, expected {other.shape}")
        elif other.dtype.kind == "f":
            if not np.allclose(one.astype("f8"), other.astype("f8"), rtol=tolerance, atol=tolerance, equal_nan=True):
                wrong.append(f"output '{name}' differs by {np.nanmax(np.abs(one.astype('f8') - other)):.2g}")
        elif list(map(_plain, one.ravel())) != list(map(_plain, other.ravel())):
            wrong.append(f"output '{name}' is {one.ravel()[:5]}..., expected {other.ravel()[:5]}...")
    return wrong


def _plain(element: Any) -> Any:
    return element.encode() if isinstance(element, str) else element


def draw_inputs(session: ort.InferenceSession, rng: np.random.Generator, rows: int | None = None) -> Arrays:
    """Random inputs that fit the session's declared types, shapes and the ranges in its metadata."""
    ranges = session.get_modelmeta().custom_metadata_map
    sizes: dict[str, int] = {} if rows is None else {"N": rows}
    inputs = {}
    for tensor in session.get_inputs():
        shape = []
        for dim in tensor.shape:
            if isinstance(dim, int):
                shape.append(dim)
            else:
                most = MAX_ROWS if dim == "N" else MAX_DIMENSION
                shape.append(sizes.setdefault(str(dim), int(rng.integers(1, most + 1))))
        inputs[tensor.name] = _draw(rng, tensor.type, shape, ranges.get(f"range:{tensor.name}"))
    return inputs


def run_directly(session: ort.InferenceSession, inputs: Mapping[str, Array]) -> Arrays:
    """All outputs of a session by name. BF16, which has no NumPy type, goes in and out through buffers."""
    types = {tensor.name: tensor.type for tensor in (*session.get_inputs(), *session.get_outputs())}
    names = [output.name for output in session.get_outputs()]
    if "tensor(bfloat16)" not in types.values():
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))
    binding = session.io_binding()
    for name, array in inputs.items():
        element = TensorProto.BFLOAT16 if types[name] == "tensor(bfloat16)" else array.dtype
        binding.bind_input(name, "cpu", 0, element, array.shape, array.ctypes.data)
    outputs: Arrays = {}
    for name in names:
        # The BF16 graphs of the corpus are element-wise: outputs have the shape of the only input.
        (source,) = inputs.values()
        is_bf16 = types[name] == "tensor(bfloat16)"
        outputs[name] = np.empty(source.shape, np.dtype(np.uint16) if is_bf16 else _NUMPY_OF[types[name]])
        element = TensorProto.BFLOAT16 if is_bf16 else outputs[name].dtype
        binding.bind_output(name, "cpu", 0, element, outputs[name].shape, outputs[name].ctypes.data)
    session.run_with_iobinding(binding)
    return outputs


def _draw(rng: np.random.Generator, onnx_type: str, shape: Sequence[int], limits: str | None) -> Array:
    """Random elements of an ONNX Runtime type; `limits` is `low,high`, or None for small values of either sign."""
    if onnx_type == "tensor(string)":
        words = np.empty(shape, object)
        words[...] = rng.choice(np.array(WORDS, object), size=shape)
        return words
    if onnx_type == "tensor(bool)":
        return np.asarray(rng.integers(0, 2, shape), np.bool_)
    if onnx_type == "tensor(bfloat16)":
        return np.asarray((rng.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16), np.uint16)
    dtype = _NUMPY_OF[onnx_type]
    if dtype.kind == "f":
        return np.asarray(rng.standard_normal(shape), dtype)
    low, high = (int(part) for part in limits.split(",")) if limits else (0 if dtype.kind == "u" else -9, 9)
    return np.asarray(rng.integers(low, high + 1, shape), dtype)


# Kinds of models


def _limit(model: onnx.ModelProto, **ranges: tuple[int, int]) -> onnx.ModelProto:
    """Note in the metadata what the inputs may hold."""
    helper.set_model_props(model, {f"range:{name}": f"{low},{high}" for name, (low, high) in ranges.items()})
    return model


def _size(rng: np.random.Generator, most: int) -> int:
    return int(rng.integers(1, most + 1))


def _sizes(rng: np.random.Generator, count: int, most: int) -> list[int]:
    return [int(size) for size in rng.integers(1, most + 1, count)]


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(1 << 30))


def _dims(rng: np.random.Generator) -> list[int | str]:
    """0 to 4 dimensions: the first dynamic (`N`) three times in four, others dynamic once in four, sizes 1 to 4."""
    rank = int(rng.integers(0, 5))
    dims: list[int | str] = list(_sizes(rng, rank, 4))
    for axis in range(rank):
        if rng.random() < (0.75 if axis == 0 else 0.25):
            dims[axis] = "N" if axis == 0 else f"D{axis}"
    return dims


def _text_encoder(rng: np.random.Generator) -> onnx.ModelProto:
    vocabulary, width = _sizes(rng, 2, 40)
    model = onnx_models.text_encoder(vocabulary, width, _seed(rng))
    return _limit(model, input_ids=(0, vocabulary - 1), attention_mask=(0, 1))


def _poison(rng: np.random.Generator) -> onnx.ModelProto:
    rows, columns = _sizes(rng, 2, 40)
    return _limit(onnx_models.poison(rows, columns, _seed(rng)), index=(0, rows - 1))


def _identity(rng: np.random.Generator) -> onnx.ModelProto:
    return onnx_models.identity(str(rng.choice(list(onnx_models.ELEMENT_TYPES))), _dims(rng))


def _bfloat16(rng: np.random.Generator) -> onnx.ModelProto:
    """BF16 in and out, or cast to or from FP32."""
    types = [("BF16", "BF16"), ("BF16", "FP32"), ("FP32", "BF16")][int(rng.integers(3))]
    dims = _dims(rng)
    element = onnx_models.ELEMENT_TYPES[types[1]]
    node = helper.make_node("Cast", ["x"], ["y"], to=element)
    return onnx_models.make_model(
        "bfloat16", [node], [onnx_models.value("x", types[0], dims)], [onnx_models.value("y", types[1], dims)]
    )


def _elementwise(rng: np.random.Generator) -> onnx.ModelProto:
    """One or two inputs of one datatype through one to four element-wise operators, in float or as they are."""
    datatype = str(rng.choice([*_FLOATS, *_INTEGERS]))
    dims = _dims(rng)
    inputs = ["a"] if rng.random() < 0.5 else ["a", "b"]
    nodes = []
    # Few integer types have arithmetic of their own on the CPU: those go through a cast to FP32 and back.
    native = datatype in ("FP32", "FP64", "INT32", "INT64")
    names = list(inputs)
    if not native:
        names = [f"{name}_f" for name in inputs]
        nodes = [
            helper.make_node("Cast", [name], [cast], to=TensorProto.FLOAT)
            for name, cast in zip(inputs, names, strict=True)
        ]
    current = names[0]
    if len(names) == 2:
        operator = str(rng.choice(["Add", "Sub", "Mul"]))
        nodes.append(helper.make_node(operator, names, ["joined"]))
        current = "joined"
    unary = ["Neg", "Abs", "Sign"] if datatype in _INTEGERS else ["Neg", "Abs", "Tanh", "Sigmoid", "Relu", "Floor"]
    for step in range(int(rng.integers(1, 4))):
        nodes.append(helper.make_node(str(rng.choice(unary)), [current], [f"step{step}"]))
        current = f"step{step}"
    if not native and datatype.startswith("U"):
        # A negative float has no value as an unsigned integer.
        nodes.append(helper.make_node("Relu", [current], ["positive"]))
        current = "positive"
    last = helper.make_node("Cast", [current], ["y"], to=onnx_models.ELEMENT_TYPES[datatype])
    nodes.append(last if not native else helper.make_node("Identity", [current], ["y"]))
    values = [onnx_models.value(name, datatype, dims) for name in inputs]
    return onnx_models.make_model("elementwise", nodes, values, [onnx_models.value("y", datatype, dims)])


def _reducing(rng: np.random.Generator) -> onnx.ModelProto:
    """A reduction over the last axis, with and without keeping it, beside the argument of the maximum."""
    dims: list[int | str] = ["N" if rng.random() < 0.75 else 3, *_sizes(rng, int(rng.integers(1, 4)), 4)]
    operator = str(rng.choice(["ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2"]))
    keep = int(rng.integers(2))
    datatype = "FP32" if operator == "ReduceL2" else str(rng.choice(["FP32", "FP64", "INT32"]))
    nodes = [
        helper.make_node(operator, ["x"], ["reduced"], axes=[-1], keepdims=keep),
        helper.make_node("ArgMax", ["x"], ["where"], axis=-1, keepdims=keep),
    ]
    left = [*dims[:-1], 1] if keep else dims[:-1]
    outputs = [onnx_models.value("reduced", datatype, left), onnx_models.value("where", "INT64", left)]
    return onnx_models.make_model("reducing", nodes, [onnx_models.value("x", datatype, dims)], outputs)


def _reshaping(rng: np.random.Generator) -> onnx.ModelProto:
    """Transpose, concatenation with itself and flattening of the dimensions behind the first, of any datatype."""
    datatype = str(rng.choice(["FP32", "FP16", "INT8", "UINT8", "INT64", "BOOL", "BYTES"]))
    height, width = _sizes(rng, 2, 4)
    first: int | str = "N" if rng.random() < 0.75 else 2
    nodes = [
        helper.make_node("Transpose", ["x"], ["turned"], perm=[0, 2, 1]),
        helper.make_node("Concat", ["x", "x"], ["doubled"], axis=2),
        helper.make_node("Flatten", ["turned"], ["flat"]) if datatype != "BYTES" else _identity_node("turned", "flat"),
    ]
    flat = [first, height * width] if datatype != "BYTES" else [first, width, height]
    outputs = [
        onnx_models.value("turned", datatype, [first, width, height]),
        onnx_models.value("doubled", datatype, [first, height, 2 * width]),
        onnx_models.value("flat", datatype, flat),
    ]
    inputs = [onnx_models.value("x", datatype, [first, height, width])]
    return onnx_models.make_model("reshaping", nodes, inputs, outputs)


def _logical(rng: np.random.Generator) -> onnx.ModelProto:
    """Comparison and logic: numbers in, BOOL out, chosen by a BOOL input."""
    dims = _dims(rng)
    datatype = str(rng.choice(["FP32", "FP64", "INT32", "INT64"]))
    nodes = [
        helper.make_node(str(rng.choice(["Less", "Greater", "Equal"])), ["a", "b"], ["compared"]),
        helper.make_node("Xor", ["compared", "flip"], ["result"]),
        helper.make_node("Where", ["result", "a", "b"], ["chosen"]),
    ]
    inputs = [onnx_models.value(name, datatype, dims) for name in ("a", "b")]
    outputs = [onnx_models.value("result", "BOOL", dims), onnx_models.value("chosen", datatype, dims)]
    return onnx_models.make_model("logical", nodes, [*inputs, onnx_models.value("flip", "BOOL", dims)], outputs)


def _identity_node(source: str, target: str) -> onnx.NodeProto:
    return helper.make_node("Identity", [source], [target])


def _image_size(rng: np.random.Generator) -> int:
    return int(rng.integers(16, 33))


Build = Callable[[np.random.Generator], onnx.ModelProto]

_KINDS: tuple[tuple[str, Build], ...] = (
    ("mlp", lambda rng: onnx_models.mlp(_size(rng, 64), _size(rng, 64), _size(rng, 64), _seed(rng))),
    ("identity", _identity),
    ("elementwise", _elementwise),
    ("text_encoder", _text_encoder),
    ("reducing", _reducing),
    ("string_tfidf", lambda rng: onnx_models.string_tfidf(WORDS[: int(rng.integers(1, 7))], _size(rng, 6))),
    ("logical", _logical),
    ("conv_net", lambda rng: onnx_models.conv_net(_image_size(rng), 8, 1, 10, "N", _seed(rng))),
    ("elementwise", _elementwise),
    ("side_input", lambda rng: onnx_models.side_input(_size(rng, 8))),
    ("identity", _identity),
    ("linear_classifier", lambda rng: onnx_models.linear_classifier(_size(rng, 8), 3, _seed(rng))),
    ("reshaping", _reshaping),
    ("fixed_batch_cnn", lambda rng: onnx_models.fixed_batch_cnn(_image_size(rng), _seed(rng))),
    ("bfloat16", _bfloat16),
    ("recurrent", lambda rng: onnx_models.recurrent(_size(rng, 8))),
    ("elementwise", _elementwise),
    ("string_labels", lambda rng: onnx_models.string_labels(WORDS[:5], _size(rng, 4))),
    ("poison", _poison),
    ("mixed_batch_outputs", lambda rng: onnx_models.mixed_batch_outputs(_size(rng, 8))),
    ("reducing", _reducing),
    ("dynamic_quantised", lambda rng: onnx_models.dynamic_quantised(_size(rng, 32), _size(rng, 32), _seed(rng))),
    ("scalar_sum", lambda _: onnx_models.scalar_sum()),
    ("external_data", lambda rng: onnx_models.mlp(seed=_seed(rng))),
    ("growing_cache", lambda rng: onnx_models.growing_cache(_size(rng, 8))),
    ("branching", lambda rng: onnx_models.branching(_size(rng, 8))),
    ("logical", _logical),
    ("looping", lambda rng: _limit(onnx_models.looping(_size(rng, 8)), times=(0, 8))),
    ("constant_output", lambda _: onnx_models.constant_output()),
    ("tree_classifier", lambda rng: onnx_models.tree_classifier(int(rng.integers(2, 8)))),
    ("empty_rows", lambda _: onnx_models.empty_rows()),
    ("unbatched_matrix", lambda _: onnx_models.unbatched_matrix()),
    ("default_input", lambda rng: onnx_models.default_input(_size(rng, 8))),
    ("odd_names", lambda _: onnx_models.odd_names()),
    ("string_upper", lambda _: onnx_models.string_upper()),
    ("global_average", lambda rng: onnx_models.global_average(_image_size(rng))),
    ("slow", lambda rng: onnx_models.slow(int(rng.integers(1, 20)), 16, _seed(rng))),
    ("reshaping", _reshaping),
    ("identity", _identity),
    ("elementwise", _elementwise),
)
