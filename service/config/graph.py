"""Read the signature of an ONNX file without reading its weights.

Promise: memory and time depend on the number of nodes, not on the size of the weights. The file is mapped and its
protobuf fields are walked; the data of tensors is skipped, everything else is parsed piece by piece by the ONNX
library. What is read: the tensors at the graph's ends, the operators (through subgraphs and functions), and the files
that hold external data.

A file that is no ONNX model, is cut off, or refers to data outside its directory raises `ModelLoadError`, which names
the file. A model that passes may still be refused by ONNX Runtime: operators and types are not checked here.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from google.protobuf.message import DecodeError
from onnx import AttributeProto, FunctionProto, NodeProto, OperatorSetIdProto, TensorProto, TypeProto, ValueInfoProto

from service.config.signature import Dimension, Graph, GraphTensor
from service.errors import ModelLoadError
from service.tensor import BY_ONNX_TYPE

MODEL_FILENAME = "model.onnx"

# Operators whose scale is taken over the whole tensor, so that a row's answer depends on its batch.
DYNAMIC_QUANTISATION = frozenset({"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"})
# Operators that cuDNN plans for the sizes of their tensors.
CONVOLUTIONS = frozenset({"Conv", "ConvTranspose", "FusedConv", "NhwcConv"})

# Field numbers of ModelProto, GraphProto and TensorProto in onnx.proto.
_MODEL_GRAPH, _MODEL_OPSET, _MODEL_FUNCTION = 7, 8, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_SPARSE = 1, 5, 11, 12, 15
_TENSOR_NAME, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 8, 13, 14
_SPARSE_VALUES = 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# Subgraphs and types nest; no exporter comes near this.
_MAX_DEPTH = 64


class _NotOnnx(Exception):
    """The bytes are not what they should be. Raised and caught in this module."""


@dataclass(slots=True)
class _Found:
    inputs: list[GraphTensor] = field(default_factory=list)
    outputs: list[GraphTensor] = field(default_factory=list)
    defaults: set[str] = field(default_factory=set)
    operators: set[str] = field(default_factory=set)
    external: set[str] = field(default_factory=set)


def read_graph(path: Path) -> Graph:
    """The signature of the model in `path` (a file, or a directory that holds `model.onnx`).

    Raises `ModelLoadError` for a file that cannot be read, is not an ONNX model, or has external data that is missing
    or lies outside its directory.
    """
    path = model_file(path)
    graph: Graph | None = None
    damage = ""
    try:
        if path.stat().st_size == 0:
            raise ModelLoadError(f"{path}: is empty; expected an ONNX model")
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as view,
        ):
            try:
                graph = _read_model(view)
            except (_NotOnnx, DecodeError, UnicodeDecodeError) as error:
                # Raised on after this block: the exception's frames hold views of the map, which then could not close.
                damage = str(error)
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror or error}") from error
    if graph is None:
        raise ModelLoadError(f"{path}: is not an ONNX model or is damaged: {damage}")
    _check_external(path, graph.external_files)
    return graph


def model_file(path: Path) -> Path:
    """The model file that `path` stands for: a directory stands for the `model.onnx` in it."""
    return path / MODEL_FILENAME if path.is_dir() else path


def _read_model(view: memoryview) -> Graph:
    if bytes(view[4:8]) == b"ORTM":
        raise _NotOnnx("it is in ONNX Runtime's own format; keep the .onnx file it was made from")
    found = _Found()
    opsets: dict[str, int] = {}
    graphs = 0
    for number, value in _fields(view):
        if number == _MODEL_GRAPH:
            graphs += 1
            _read_graph(_message(value), found)
        elif number == _MODEL_OPSET:
            opset = OperatorSetIdProto.FromString(bytes(_message(value)))
            opsets[_text(opset.domain) or "ai.onnx"] = opset.version
        elif number == _MODEL_FUNCTION:
            _walk_nodes(FunctionProto.FromString(bytes(_message(value))).node, found, 0)
    if graphs != 1 or not opsets:
        raise _NotOnnx(
            "it has no graph" if graphs == 0 else "it states no opset" if graphs == 1 else "it has two graphs"
        )
    return Graph(
        inputs=tuple(
            GraphTensor(t.name, t.onnx_type, t.shape, optional=t.name in found.defaults) for t in found.inputs
        ),
        outputs=tuple(found.outputs),
        dynamic_quantisation=tuple(sorted(found.operators & DYNAMIC_QUANTISATION)),
        external_files=tuple(sorted(found.external)),
        opsets=MappingProxyType(opsets),
        convolutions=not found.operators.isdisjoint(CONVOLUTIONS),
    )


def _read_graph(view: memoryview, found: _Found) -> None:
    for number, value in _fields(view):
        if number == _GRAPH_NODE:
            _walk_nodes([NodeProto.FromString(bytes(_message(value)))], found, 0)
        elif number == _GRAPH_INITIALIZER:
            found.defaults.add(_read_initializer(_message(value), found))
        elif number == _GRAPH_SPARSE:
            for inner, tensor in _fields(_message(value)):
                if inner == _SPARSE_VALUES:
                    found.defaults.add(_read_initializer(_message(tensor), found))
        elif number == _GRAPH_INPUT:
            found.inputs.append(_tensor(ValueInfoProto.FromString(bytes(_message(value)))))
        elif number == _GRAPH_OUTPUT:
            found.outputs.append(_tensor(ValueInfoProto.FromString(bytes(_message(value)))))


def _read_initializer(view: memoryview, found: _Found) -> str:
    """Note where an initializer's data lies; returns its name. The data itself is skipped."""
    header = bytearray()
    for number, _, start, end in _spans(view):
        if number in (_TENSOR_NAME, _TENSOR_EXTERNAL, _TENSOR_LOCATION):
            header += view[start:end]
    tensor = TensorProto.FromString(bytes(header))
    _note_external(tensor, found)
    return _text(tensor.name)


def _note_external(tensor: TensorProto, found: _Found) -> None:
    if tensor.data_location == TensorProto.EXTERNAL:
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        found.external.add(_text(location))


def _walk_nodes(nodes: Iterable[NodeProto], found: _Found, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise _NotOnnx(f"its subgraphs are nested deeper than {_MAX_DEPTH}")
    for node in nodes:
        found.operators.add(_text(node.op_type))
        for attribute in node.attribute:
            for tensor in (attribute.t, *attribute.tensors) if attribute.type in _TENSOR_ATTRIBUTES else ():
                _note_external(tensor, found)
            for graph in (attribute.g, *attribute.graphs) if attribute.type in _GRAPH_ATTRIBUTES else ():
                for tensor in graph.initializer:
                    _note_external(tensor, found)
                _walk_nodes(graph.node, found, depth + 1)


_TENSOR_ATTRIBUTES = (AttributeProto.TENSOR, AttributeProto.TENSORS)
_GRAPH_ATTRIBUTES = (AttributeProto.GRAPH, AttributeProto.GRAPHS)


def _tensor(info: ValueInfoProto) -> GraphTensor:
    kind = info.type.WhichOneof("value")
    shape: tuple[Dimension, ...] | None = None
    if kind in ("tensor_type", "sparse_tensor_type"):
        tensor = getattr(info.type, kind)
        if tensor.HasField("shape"):
            shape = tuple(_dimension(dim) for dim in tensor.shape.dim)
    return GraphTensor(_text(info.name), _type_name(info.type, 0), shape)


def _dimension(dim: object) -> Dimension:
    match dim.WhichOneof("value"):  # type: ignore[attr-defined]
        case "dim_value":
            size = int(dim.dim_value)  # type: ignore[attr-defined]
            return size if size >= 0 else None
        case "dim_param":
            return _text(dim.dim_param) or None  # type: ignore[attr-defined]
        case _:
            return None


def _text(value: str | bytes) -> str:
    """A name. Protobuf gives bytes where the file has no valid UTF-8."""
    if isinstance(value, bytes):
        raise _NotOnnx(f"the name {value!r} is not UTF-8")
    return value


def _element(number: int) -> str:
    if number in BY_ONNX_TYPE:
        return BY_ONNX_TYPE[number].onnx_name.removeprefix("tensor(").removesuffix(")")
    names: dict[int, str] = {value: name for name, value in TensorProto.DataType.items()}
    return names.get(number, str(number)).lower()


def _type_name(kind: TypeProto, depth: int) -> str:
    """The type as ONNX Runtime writes it."""
    if depth > _MAX_DEPTH:
        raise _NotOnnx(f"a type is nested deeper than {_MAX_DEPTH}")
    match kind.WhichOneof("value"):
        case "tensor_type":
            return f"tensor({_element(kind.tensor_type.elem_type)})"
        case "sparse_tensor_type":
            return f"sparse_tensor({_element(kind.sparse_tensor_type.elem_type)})"
        case "sequence_type":
            return f"seq({_type_name(kind.sequence_type.elem_type, depth + 1)})"
        case "map_type":
            value = _type_name(kind.map_type.value_type, depth + 1)
            return f"map({_element(kind.map_type.key_type)},{value})"
        case "optional_type":
            return f"optional({_type_name(kind.optional_type.elem_type, depth + 1)})"
        case other:
            return other or "unknown"


def _check_external(path: Path, locations: Iterable[str]) -> None:
    for location in locations:
        inside = PurePosixPath(location)
        if not location or inside.is_absolute() or ".." in inside.parts or "\\" in location or "\0" in location:
            raise ModelLoadError(
                f"{path}: external data '{location}' is not a path inside the model's directory; "
                f"save the model again with its data beside it"
            )
        if not (path.parent / location).resolve().is_relative_to(path.parent.resolve()):
            raise ModelLoadError(f"{path}: external data '{location}' is a link out of the model's directory")
        if not (path.parent / location).is_file():
            raise ModelLoadError(
                f"{path}: external data '{location}' is missing; copy the file into {path.parent} under that name"
            )


# --------------------------------------------------------------------------------------- protobuf's wire format --
# https://protobuf.dev/programming-guides/encoding/


def _message(value: memoryview | int) -> memoryview:
    if isinstance(value, int):
        raise _NotOnnx("a number stands where a message should")
    return value


def _fields(view: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """(number, content) of each field: a view for messages, strings and bytes, 0 for what is not looked at here."""
    for number, body, _, end in _spans(view):
        yield number, view[body:end] if body >= 0 else 0


def _spans(view: memoryview) -> Iterator[tuple[int, int, int, int]]:
    """(number, start of the content or -1 for a plain number, start of the field, end) of each field."""
    position, total = 0, len(view)
    while position < total:
        start = position
        tag, position = _varint(view, position)
        number, wire_type = tag >> 3, tag & 7
        body = -1
        if wire_type == _VARINT:
            _, position = _varint(view, position)
        elif wire_type == _BYTES:
            length, position = _varint(view, position)
            body = position
            position += length
        elif wire_type in (_FIXED64, _FIXED32):
            position += 8 if wire_type == _FIXED64 else 4
        else:
            raise _NotOnnx(f"byte {start} is no field")
        if position > total or number == 0:
            raise _NotOnnx("it ends in the middle of a field" if number else f"byte {start} is no field")
        yield number, body, start, position


def _varint(view: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(view):
            raise _NotOnnx("it ends in the middle of a field")
        if shift > 63:
            raise _NotOnnx("a number is longer than 64 bits")
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
