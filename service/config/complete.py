"""Complete a model's configuration from its graph, or say why the two do not fit.

Promise: a pure function of the configuration message and the graph's signature. What the configuration states is
checked against the graph and kept; what it leaves open is filled in as Triton Inference Server does; what was decided
without being asked is in `notes`. Completing a completed configuration changes nothing.

The completed message is what the ModelConfig call answers, in Triton's conventions: message fields that do not apply
are unset, `dims` leave the batch dimension out, strings are TYPE_STRING.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from service.config.batchable import BatchPlan, Declared, plan_batching
from service.config.build import (
    DATATYPE_NUMBERS,
    build_dynamic_batching,
    build_instance_groups,
    build_labels,
    build_optimization,
    build_version_policy,
    build_warmups,
    datatype_of,
    inner_file,
)
from service.config.build_sequences import build_sequences, server_filled
from service.config.model import DynamicBatching, ModelConfig
from service.config.parameters import parse_parameters
from service.config.sequences import SequenceBatching
from service.config.signature import GraphTensor
from service.config.support import check_supported
from service.errors import ConfigError
from service.pb import model_config_pb2 as pb
from service.tensor import DataType, TensorSpec

PLATFORM = "onnxruntime_onnx"
BACKEND = "onnxruntime"
MODEL_FILENAME = "model.onnx"
DEFAULT_MAX_BATCH_SIZE = 64

Kind = Literal["input", "output"]


@dataclass(frozen=True, slots=True)
class Completed:
    """A configuration in force: for the server, for the ModelConfig call, and what to tell the operator.

    `unverified_outputs` are taken to have one row per row although the file does not say so: check it by running.
    """

    config: ModelConfig
    proto: pb.ModelConfig
    notes: tuple[str, ...]
    unverified_outputs: tuple[str, ...] = ()


def complete(
    config: pb.ModelConfig | None,
    name: str,
    inputs: Sequence[GraphTensor],
    outputs: Sequence[GraphTensor],
    dynamic_quantisation: Collection[str] = (),
    default_max_batch_size: int = DEFAULT_MAX_BATCH_SIZE,
    gpus: Collection[int] | None = None,
    convolutions: bool = False,
) -> Completed:
    """Complete `config` (None: there is no file) for the model in directory `name`.

    `dynamic_quantisation` are operators of the graph that scale over the whole batch. `gpus` are the CUDA devices to
    be had, empty for none, None for not known. `convolutions`: whether the graph has any. Raises `ConfigError` with the
    path of the key at fault.
    """
    proto = pb.ModelConfig()
    if config is not None:
        check_supported(config)
        proto.CopyFrom(config)
    _fill_names(proto, name)
    parameters = parse_parameters({key: value.string_value for key, value in proto.parameters.items()})
    filled, kept = server_filled(proto, inputs, outputs)
    for index, io in enumerate(proto.input):
        if io.name in filled:
            raise ConfigError(f"input[{index}].name", f"'{io.name}' is filled by the server (sequence_batching)")
    listed = {io.name for io in proto.output}
    served_in, notes_in = _served("input", proto.input, [t for t in inputs if t.name not in filled])
    served_out, notes_out = _served(
        "output", proto.output, [t for t in outputs if t.name not in kept or t.name in listed]
    )
    plan = plan_batching(
        served_in,
        served_out,
        Declared(
            max_batch_size=proto.max_batch_size,
            dynamic_batching=proto.HasField("dynamic_batching"),
            batching=parameters.batching,
            side=parameters.unbatched_inputs,
            ranks={io.name: len(io.dims) for io in proto.input} | {io.name: len(io.dims) for io in proto.output},
        ),
        dynamic_quantisation,
        default_max_batch_size,
    )
    proto.max_batch_size = plan.max_batch_size
    sequences = _sequences(proto, inputs, outputs, parameters.state_axes, parameters.max_sequences)
    if plan.join and sequences is None:
        proto.dynamic_batching.SetInParent()
    input_specs = tuple(_fill_input(proto, tensor, plan, parameters.unbatched_inputs) for tensor in served_in)
    output_specs = tuple(_fill_output(proto, tensor, plan) for tensor in served_out)
    _fill_devices(proto, name, gpus)
    if not proto.version_policy.WhichOneof("policy_choice"):
        proto.version_policy.latest.num_versions = 1
    return Completed(
        config=ModelConfig(
            name=name,
            platform=proto.platform,
            backend=proto.backend,
            default_model_filename=proto.default_model_filename,
            max_batch_size=plan.max_batch_size,
            inputs=input_specs,
            outputs=output_specs,
            instance_groups=build_instance_groups(proto),
            version_policy=build_version_policy(proto),
            dynamic_batching=_joined(sequences, plan) if sequences else build_dynamic_batching(proto),
            sequences=sequences,
            backbone=parameters.backbone,
            optimization=build_optimization(proto, parameters.cuda_options),
            session=parameters.session,
            objective=parameters.objective,
            warmups=build_warmups(proto, input_specs),
            labels=build_labels(proto),
            parameters={key: value.string_value for key, value in sorted(proto.parameters.items())},
            convolutions=convolutions,
        ),
        proto=proto,
        notes=(*notes_in, *notes_out, *plan.notes),
        unverified_outputs=plan.unverified,
    )


def _sequences(
    proto: pb.ModelConfig,
    inputs: Sequence[GraphTensor],
    outputs: Sequence[GraphTensor],
    axes: Mapping[str, int],
    max_sequences: int | None,
) -> SequenceBatching | None:
    sequences = build_sequences(proto, inputs, outputs, axes, max_sequences)
    across = {state.output.name for state in sequences.states if state.output.axis} if sequences else set()
    for index, io in enumerate(proto.output):
        if io.name in across:
            raise ConfigError(
                f"output[{index}].name",
                f"'{io.name}' is a state with its batch dimension behind others: clients cannot get it",
            )
    return sequences


def _joined(sequences: SequenceBatching, plan: BatchPlan) -> DynamicBatching | None:
    """How rows of different sequences are joined."""
    if not plan.join:
        return None
    return DynamicBatching(
        preferred_batch_size=sequences.preferred_batch_size, max_queue_delay_ns=sequences.max_queue_delay_ns
    )


def _fill_names(proto: pb.ModelConfig, name: str) -> None:
    for key, wanted in (("name", name), ("platform", PLATFORM), ("backend", BACKEND)):
        given = getattr(proto, key)
        if given not in ("", wanted):
            why = "the name of the model's directory" if key == "name" else "the only one served"
            raise ConfigError(key, f"'{given}' is not '{wanted}', {why}")
        setattr(proto, key, wanted)
    filename = model_filename(proto)
    proto.default_model_filename = filename


def model_filename(config: pb.ModelConfig | None) -> str:
    """The file in a version's directory. Raises `ConfigError` for a name that leaves it."""
    given = config.default_model_filename if config is not None else ""
    if "/" in given:
        raise ConfigError("default_model_filename", f"'{given}' is not the name of a file in the version's directory")
    return inner_file(given, "default_model_filename") if given else MODEL_FILENAME


def _served(
    kind: Kind, listed: Iterable[pb.ModelInput | pb.ModelOutput], tensors: Sequence[GraphTensor]
) -> tuple[list[GraphTensor], list[str]]:
    """The tensors of the graph that are served, in the graph's order, and notes on those that are not.

    All inputs without a default; outputs that are listed, or all that can travel when none is.
    """
    known = {tensor.name: tensor for tensor in tensors}
    names: list[str] = []
    for index, io in enumerate(listed):
        if io.name not in known:
            has = ", ".join(known) or "none"
            raise ConfigError(f"{kind}[{index}].name", f"the model has no {kind} '{io.name}'; it has {has}")
        if io.name in names:
            raise ConfigError(f"{kind}[{index}].name", f"'{io.name}' is listed twice")
        names.append(io.name)
    if kind == "input":
        served = [tensor for tensor in tensors if not tensor.optional or tensor.name in names]
        return [_must_travel(kind, tensor) for tensor in served], []
    if names:
        return [_must_travel(kind, tensor) for tensor in tensors if tensor.name in names], []
    served = [tensor for tensor in tensors if tensor.datatype is not None]
    if tensors and not served:
        _must_travel(kind, tensors[0])
    left_out = [
        f"output {tensor} is left out: the protocol has no such type" for tensor in tensors if tensor not in served
    ]
    return served, left_out


def _must_travel(kind: Kind, tensor: GraphTensor) -> GraphTensor:
    if tensor.datatype is None:
        advice = "convert the model so that it returns tensors (skl2onnx: options={'zipmap': False})"
        raise ConfigError(
            kind,
            f"'{tensor.name}' is of type {tensor.onnx_type}, which the protocol cannot carry"
            + (f"; {advice}" if kind == "output" and tensor.onnx_type.startswith(("seq", "map")) else ""),
        )
    return tensor


def _fill_input(proto: pb.ModelConfig, tensor: GraphTensor, plan: BatchPlan, side: Collection[str]) -> TensorSpec:
    index = next((i for i, io in enumerate(proto.input) if io.name == tensor.name), len(proto.input))
    io = proto.input[index] if index < len(proto.input) else proto.input.add(name=tensor.name)
    path = f"input[{index}]"
    spec = _reconcile(path, io, tensor, batched=plan.max_batch_size > 0 and tensor.name not in side, trusted=True)
    if io.optional and not tensor.optional:
        raise ConfigError(f"{path}.optional", f"the model file holds no default for input '{tensor.name}'")
    if io.format not in (pb.ModelInput.FORMAT_NONE, pb.ModelInput.FORMAT_NHWC, pb.ModelInput.FORMAT_NCHW):
        raise ConfigError(f"{path}.format", f"unknown format {io.format}")
    if io.format != pb.ModelInput.FORMAT_NONE and len(spec.shape) != 3:
        raise ConfigError(f"{path}.format", f"an image has 3 dims, '{tensor.name}' has {len(spec.shape)}")
    return TensorSpec(spec.name, spec.datatype, spec.shape, spec.batched, optional=io.optional)


def _fill_output(proto: pb.ModelConfig, tensor: GraphTensor, plan: BatchPlan) -> TensorSpec:
    index = next((i for i, io in enumerate(proto.output) if io.name == tensor.name), len(proto.output))
    io = proto.output[index] if index < len(proto.output) else proto.output.add(name=tensor.name)
    trusted = tensor.name not in plan.unverified
    return _reconcile(f"output[{index}]", io, tensor, batched=plan.max_batch_size > 0, trusted=trusted)


def _reconcile(
    path: str, io: pb.ModelInput | pb.ModelOutput, tensor: GraphTensor, batched: bool, trusted: bool
) -> TensorSpec:
    """Check a listed tensor against the graph's and fill in what it leaves open.

    An output that is not `trusted` may be declared wrongly in the file: listed dims win over it.
    """
    datatype = tensor.datatype
    assert datatype is not None
    given = datatype_of(io.data_type, f"{path}.data_type")
    if given not in (None, datatype):
        raise ConfigError(f"{path}.data_type", f"{_type_name(given)} is not the model's {_type_name(datatype)}")
    io.data_type = DATATYPE_NUMBERS[datatype]  # type: ignore[assignment]
    dims = tuple(io.dims)
    if any(size < -1 for size in dims):
        raise ConfigError(f"{path}.dims", f"{list(dims)}: expected sizes of 0 or more, or -1 for any")
    if tensor.shape is None or (not trusted and dims):
        if not dims and path.startswith("input"):
            raise ConfigError(f"{path}.dims", f"the file does not state the rank of '{tensor.name}'; list its dims")
        shape = dims or (() if batched else (-1,))
    else:
        shape = _narrowed(path, dims, tensor, tensor.sizes(skip=1 if batched else 0), batched)
    del io.dims[:]
    io.dims.extend(shape)
    return TensorSpec(tensor.name, datatype, shape, batched)


def _narrowed(
    path: str, dims: tuple[int, ...], tensor: GraphTensor, sizes: tuple[int, ...], batched: bool
) -> tuple[int, ...]:
    """The graph's sizes, narrowed by the listed ones."""
    if not dims:
        return sizes
    if len(dims) != len(sizes):
        without = " without the batch dimension" if batched else ""
        raise ConfigError(f"{path}.dims", f"{list(dims)} has not the {len(sizes)} dims of {tensor}{without}")
    for position, (listed, size) in enumerate(zip(dims, sizes, strict=True)):
        if size not in (-1, listed):
            raise ConfigError(f"{path}.dims[{position}]", f"{listed} is not the model's {size} (of {tensor})")
    return dims


def _type_name(datatype: DataType | None) -> str:
    return pb.DataType.Name(DATATYPE_NUMBERS[datatype]) if datatype is not None else "TYPE_INVALID"


def _fill_devices(proto: pb.ModelConfig, name: str, gpus: Collection[int] | None) -> None:
    """Turn KIND_AUTO and missing groups into what the machine has, where that is known."""
    group_kind = pb.ModelInstanceGroup
    if not proto.instance_group:
        proto.instance_group.add()
    for index, group in enumerate(proto.instance_group):
        group.name = group.name or f"{name}_{index}"
        group.count = group.count or 1
        if gpus is None:
            continue
        if group.kind == group_kind.KIND_AUTO:
            group.kind = group_kind.KIND_GPU if gpus or group.gpus else group_kind.KIND_CPU
        if group.kind != group_kind.KIND_GPU:
            continue
        have = ", ".join(str(gpu) for gpu in sorted(gpus)) or "none"
        if not group.gpus and not gpus:
            raise ConfigError(f"instance_group[{index}].kind", "KIND_GPU, but the server has no GPU")
        if not group.gpus:
            group.gpus.extend(sorted(gpus))
        for gpu in group.gpus:
            if gpu not in gpus:
                raise ConfigError(f"instance_group[{index}].gpus", f"{gpu} is not among the server's GPUs: {have}")
