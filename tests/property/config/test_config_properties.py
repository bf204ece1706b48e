"""Configurations whatever they hold: they round-trip, complete to a fixed point, or end in ConfigError."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from service.config.complete import complete
from service.config.graph import read_graph
from service.config.parameters import PARAMETERS, parse_parameters
from service.config.pbtxt import parse_json, parse_text, to_text
from service.config.signature import GraphTensor
from service.config.support import check_supported
from service.errors import ConfigError, ModelLoadError
from service.pb import model_config_pb2 as pb
from tests.support import onnx_models

NAMES = st.sampled_from(["x", "y", "z", "w", "labels", "", "ü\n", "model.onnx"])
SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_STRING: NAMES,
    FieldDescriptor.TYPE_INT32: st.sampled_from([0, 1, 4, 64, -1, 2**31 - 1]),
    FieldDescriptor.TYPE_INT64: st.sampled_from([0, 1, 4, -1, 2**63 - 1]),
    FieldDescriptor.TYPE_UINT32: st.sampled_from([0, 1, 4, 2**32 - 1]),
    FieldDescriptor.TYPE_UINT64: st.sampled_from([0, 1, 4, 2**64 - 1]),
    FieldDescriptor.TYPE_FLOAT: st.sampled_from([0.0, 0.5]),
    FieldDescriptor.TYPE_DOUBLE: st.sampled_from([0.0, 0.5]),
}


@st.composite
def messages(draw: st.DrawFn, descriptor: Descriptor, only: frozenset[str] = frozenset()) -> dict[str, Any]:
    """A message as the dictionary that protobuf's JSON would have; `only` limits the fields at the top."""
    fields = [field for field in descriptor.fields if not only or field.name in only]
    chosen = draw(st.lists(st.sampled_from(fields), max_size=5, unique_by=lambda field: field.name)) if fields else []
    oneofs: set[str] = set()
    result: dict[str, Any] = {}
    for field in chosen:
        if field.containing_oneof is not None:
            if field.containing_oneof.name in oneofs:
                continue
            oneofs.add(field.containing_oneof.name)
        result[field.name] = draw(_values(field))
    return result


def _values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        keys = {"string": NAMES}.get("string" if field.message_type.fields[0].type == 9 else "", st.integers(0, 3))
        return st.dictionaries(keys, _single(field.message_type.fields[1]), max_size=2)
    return st.lists(_single(field), max_size=2) if field.is_repeated else _single(field)


def _single(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.message_type is not None:
        return messages(field.message_type)
    if field.enum_type is not None:
        return st.sampled_from([*(value.number for value in field.enum_type.values), 99])
    return SCALARS[field.type]


def message_of(fields: dict[str, Any]) -> pb.ModelConfig:
    return json_format.ParseDict(fields, pb.ModelConfig())


CONFIGS = messages(pb.ModelConfig.DESCRIPTOR).map(message_of)
# Pieces that are mostly fine by themselves: joined at random they reach completion more often than a refusal.
PIECES = [
    "max_batch_size: 8",
    "max_batch_size: 1",
    "dynamic_batching {}",
    "dynamic_batching { priority_levels: 3 default_priority_level: 2 priority_queue_policy { key: 1 value {} } }",
    "dynamic_batching { preferred_batch_size: [4, 8] max_queue_delay_microseconds: 5 }",
    "instance_group { count: 2 }",
    "instance_group { kind: KIND_CPU }",
    "instance_group { gpus: 0 }",
    "version_policy { all {} }",
    "version_policy { specific { versions: [3, 1] } }",
    'input { name: "x" }',
    'input { name: "x" dims: [-1, 4] }',
    'input { name: "z" data_type: TYPE_FP32 }',
    'output { name: "y" label_filename: "labels.txt" }',
    "optimization { input_pinned_memory { enable: false } graph { level: 1 } }",
    'parameters { key: "latency_slo_ms" value { string_value: "7" } }',
    'parameters { key: "unbatched_inputs" value { string_value: "z" } }',
    'parameters { key: "batching" value { string_value: "on" } }',
    'parameters { key: "batching" value { string_value: "off" } }',
    'model_warmup { batch_size: 1 inputs { key: "x" value { zero_data: true } } }',
]


def merged(pieces: list[str]) -> pb.ModelConfig:
    config = pb.ModelConfig()
    for piece in pieces:
        config.MergeFrom(parse_text(piece))
    return config


LIKELY = st.lists(st.sampled_from(PIECES), max_size=4, unique=True).map(merged)
SHAPES = st.one_of(
    st.none(), st.lists(st.sampled_from(["N", "M", None, 0, 1, 4, "unk__1"]), max_size=3).map(lambda dims: tuple(dims))
)
TYPES = st.sampled_from(
    ["tensor(float)", "tensor(int64)", "tensor(string)", "seq(map(int64,tensor(float)))", "tensor(float8e4m3fn)"]
)


ROWS = st.sampled_from([("N", 4), ("N",), (None, 4), ("N", "S", 2)])


def tensors(names: list[str]) -> st.SearchStrategy[list[GraphTensor]]:
    """Any tensors, or rows of floats."""
    any_kind = st.builds(GraphTensor, st.sampled_from(names), TYPES, SHAPES, st.booleans())
    rows = st.builds(GraphTensor, st.sampled_from(names), st.just("tensor(float)"), ROWS)
    return st.one_of(
        st.lists(rows, min_size=1, max_size=2, unique_by=lambda tensor: tensor.name),
        st.lists(any_kind, max_size=3, unique_by=lambda tensor: tensor.name),
    )


def refused(action: Callable[[], object]) -> str | None:
    """The path of the ConfigError that `action` raises, or None. Anything else that it raises is a failure."""
    try:
        action()
    except ConfigError as error:
        return error.path
    return None


@settings(deadline=None)  # the machine that runs this may be busy
@given(CONFIGS)
def test_text_and_json_forms_read_back(config: pb.ModelConfig) -> None:
    """Whatever is supported is the same message after a trip through either form; the rest is refused by both."""
    refusal = refused(lambda: check_supported(config))
    if refusal is not None:
        assert refused(lambda: parse_text(to_text(config))) == refusal
        assert refused(lambda: parse_json(json_format.MessageToJson(config))) == refusal
        return
    assert parse_text(to_text(config)) == config
    assert parse_json(json_format.MessageToJson(config)) == config


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(
    config=st.one_of(st.none(), LIKELY, LIKELY, CONFIGS),
    inputs=tensors(["x", "z"]),
    outputs=tensors(["y", "w"]),
    quantised=st.sampled_from([(), ("DynamicQuantizeLinear",)]),
    size=st.sampled_from([0, 1, 64]),
    gpus=st.sampled_from([None, (), (0,), (0, 1)]),
)
def test_completion_is_a_fixed_point_or_a_config_error(
    config: pb.ModelConfig | None,
    inputs: list[GraphTensor],
    outputs: list[GraphTensor],
    quantised: tuple[str, ...],
    size: int,
    gpus: tuple[int, ...] | None,
) -> None:
    """A completed configuration loads again to the same, and every tensor has the rank that the graph states."""
    before = pb.ModelConfig() if config is None else pb.ModelConfig.FromString(config.SerializeToString())
    path = refused(lambda: complete(config, "m", inputs, outputs, quantised, size, gpus))
    assert config is None or config == before
    if path is not None:
        event(f"refused: {path.split('[')[0]}")
        assert path
        return
    first = complete(config, "m", inputs, outputs, quantised, size, gpus)
    event(f"completed, {'batched' if first.config.batched else 'unbatched'}")
    second = complete(parse_text(to_text(first.proto)), "m", inputs, outputs, quantised, size, gpus)
    assert (second.proto, second.config) == (first.proto, first.config)
    known = {tensor.name: tensor.shape for tensor in (*inputs, *outputs)}
    for spec in (*first.config.inputs, *first.config.outputs):
        shape = known[spec.name]
        if shape is not None and spec.name not in first.unverified_outputs:
            assert len(spec.full_shape) == len(shape)
        assert not spec.batched or first.config.batched


@settings(deadline=None)  # the machine that runs this may be busy
@given(st.text(max_size=200))
def test_random_text_is_a_config_error_or_a_configuration(text: str) -> None:
    """Nothing else leaves the reader, for text or JSON."""
    refused(lambda: parse_text(text))
    refused(lambda: parse_json(text))


FRAGMENTS = ["name", ":", '"x"', "{", "}", "[", "]", ",", "input", "dims", "-1", "parameters", "key", "value", "<", ">"]


@settings(deadline=None)  # the machine that runs this may be busy
@given(st.lists(st.sampled_from([*FRAGMENTS, "dynamic_batching", "1e999", "0x", "'", "\\", "#", "\n"]), max_size=30))
def test_almost_valid_text_is_a_config_error_or_a_configuration(parts: list[str]) -> None:
    """Tokens of the format in a random order reach deeper than random characters."""
    refused(lambda: parse_text(" ".join(parts)))


@settings(deadline=None)  # the machine that runs this may be busy
@given(st.dictionaries(st.one_of(st.sampled_from(sorted(PARAMETERS)), st.text()), st.text(), max_size=4))
def test_random_parameters_are_a_config_error_or_values(raw: dict[str, str]) -> None:
    """No value of any parameter raises anything else."""
    path = refused(lambda: parse_parameters(raw))
    assert path is None or path.startswith("parameters[")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10_000), patch=st.binary(min_size=1, max_size=4), cut=st.booleans())
def test_a_damaged_file_is_a_load_error_or_a_graph(tmp_path: Path, position: int, patch: bytes, cut: bool) -> None:
    """Flipped and missing bytes in a model file raise ModelLoadError and nothing else."""
    data = bytearray(MODEL)
    position %= len(data)
    data[position : len(data) if cut else position + len(patch)] = patch
    file = tmp_path / "model.onnx"
    file.write_bytes(data)
    try:
        graph = read_graph(file)
    except ModelLoadError as error:
        event(str(error).rsplit(": ", 1)[-1])
        return
    refused(lambda: complete(None, "m", graph.inputs, graph.outputs, graph.dynamic_quantisation))


MODEL = onnx_models.branching().SerializeToString()
