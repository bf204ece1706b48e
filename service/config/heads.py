"""Models that are only a head on another one: what their configuration may say, and whether the two fit.

A head's file takes what its backbone gives (an output of the same name). So its clients send what the backbone takes
and get what the head gives. How it is batched and where it runs is the backbone's to say; a head states its objective,
its labels, its versions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from service.config.complete import Completed, complete
from service.config.model import BackboneReference, ModelConfig
from service.config.parameters import PARAMETERS, parse_backbone
from service.config.signature import Graph, GraphTensor
from service.errors import ConfigError
from service.pb import model_config_pb2 as pb
from service.tensor import TensorSpec

# What would be ignored, because the backbone decides it.
_OF_THE_BACKBONE = ("instance_group", "optimization", "sequence_batching", "model_warmup", "input")
_OWN_PARAMETERS = ("backbone", "backbone_sha256", "latency_slo_ms")


def backbone_of(config: pb.ModelConfig | None) -> BackboneReference | None:
    """The backbone that a configuration names; None for a model of its own. Raises `ConfigError`."""
    if config is None:
        return None
    given = {key: config.parameters[key].string_value for key in _OWN_PARAMETERS[:2] if key in config.parameters}
    return parse_backbone(given)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal: what `backbone_sha256` is compared with. Raises `OSError`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def complete_head(
    config: pb.ModelConfig, name: str, graph: Graph, backbone: Completed, below: Graph
) -> tuple[Completed, tuple[TensorSpec, ...]]:
    """The configuration in force of the head in `graph`, and its inputs as its backbone (with the graph `below`) gives
    them. Raises `ConfigError`."""
    inputs = joint(backbone.config, graph.inputs)
    completed = complete(
        _head_proto(config, backbone.proto), name, below.inputs, graph.outputs, below.dynamic_quantisation
    )
    taken = replace(completed.config, inputs=backbone.config.inputs, dynamic_batching=backbone.config.dynamic_batching)
    # That the outputs have a row per row is found out by running the head.
    return replace(completed, config=taken, notes=(), unverified_outputs=()), inputs


def _head_proto(config: pb.ModelConfig, backbone: pb.ModelConfig) -> pb.ModelConfig:
    """The configuration of a head, with what it takes over from its backbone's completed one.

    Raises `ConfigError` for what a head cannot decide.
    """
    for key in _OF_THE_BACKBONE:
        if config.HasField(key) if key in ("optimization", "sequence_batching") else len(getattr(config, key)):
            raise ConfigError(
                key, f"a head runs as its backbone does; state it in the configuration of '{backbone.name}'"
            )
    if config.HasField("dynamic_batching") and config.dynamic_batching.ByteSize():
        raise ConfigError("dynamic_batching", f"requests are batched as '{backbone.name}' says; leave it empty or out")
    for key in config.parameters:
        if key in PARAMETERS and key not in _OWN_PARAMETERS:
            raise ConfigError(
                f"parameters[{key}]", f"a head runs as its backbone does; state it with '{backbone.name}'"
            )
    if config.max_batch_size not in (0, backbone.max_batch_size):
        raise ConfigError(
            "max_batch_size", f"{config.max_batch_size} is not the {backbone.max_batch_size} of '{backbone.name}'"
        )
    proto = pb.ModelConfig()
    proto.CopyFrom(config)
    proto.max_batch_size = backbone.max_batch_size
    proto.input.extend(backbone.input)
    proto.instance_group.extend(backbone.instance_group)
    for group in proto.instance_group:
        group.name = ""
    if "unbatched_inputs" in backbone.parameters:
        proto.parameters["unbatched_inputs"].CopyFrom(backbone.parameters["unbatched_inputs"])
    return proto


def joint(backbone: ModelConfig, inputs: Sequence[GraphTensor]) -> tuple[TensorSpec, ...]:
    """The inputs of a head, as its backbone gives them. Raises `ConfigError` where it gives no such thing."""
    if backbone.sequences is not None or backbone.backbone is not None or not backbone.batched:
        why = (
            "is stateful" if backbone.sequences is not None else "is a head" if backbone.backbone else "is not batched"
        )
        raise ConfigError("parameters[backbone]", f"'{backbone.name}' {why}, so nothing can be built on it")
    given = {spec.name: spec for spec in backbone.outputs}
    taken = []
    for tensor in inputs:
        if tensor.optional:
            continue
        spec = given.get(tensor.name)
        if spec is None:
            raise ConfigError(
                "parameters[backbone]",
                f"the head takes '{tensor.name}', which '{backbone.name}' does not give; it gives {', '.join(given)}",
            )
        if tensor.datatype is not spec.datatype or not _fits(tensor, spec):
            raise ConfigError(
                "parameters[backbone]",
                f"the head takes {tensor}, '{backbone.name}' gives {spec.datatype.wire_name} {list(spec.full_shape)}",
            )
        taken.append(spec)
    if not taken:
        raise ConfigError("parameters[backbone]", "the head takes nothing")
    return tuple(taken)


def _fits(tensor: GraphTensor, spec: TensorSpec) -> bool:
    if tensor.shape is None:
        return True
    if len(tensor.shape) != len(spec.shape) + 1:
        return False
    sizes = tensor.sizes(skip=1)
    return all(-1 in (size, given) or size == given for size, given in zip(sizes, spec.shape, strict=True))
