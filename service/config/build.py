"""From a completed `ModelConfig` message to the frozen configuration: values checked, units converted.

Every function here reads one part of the message and raises `ConfigError` with the path of the wrong key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from types import MappingProxyType

from service.clock import NS_PER_US
from service.config.model import (
    Accelerator,
    All,
    DynamicBatching,
    GraphOptimization,
    InstanceGroup,
    InstanceKind,
    Latest,
    Optimization,
    QueuePolicy,
    Specific,
    TimeoutAction,
    VersionPolicy,
    Warmup,
    WarmupData,
    WarmupInput,
)
from service.config.providers import provider_options
from service.errors import ConfigError
from service.pb import model_config_pb2 as pb
from service.tensor import DataType, TensorSpec

# More instances of one model than a device has use for; each holds a copy of the weights.
MAX_INSTANCES = 64
# The scheduler keeps a queue per level. Finer shades of urgency belong into the request's deadline.
MAX_PRIORITY_LEVELS = 100
MAX_WARMUP_COUNT = 1000
# A day: waits beyond it are typing errors.
MAX_WAIT_US = 86_400_000_000

# Triton's enumeration to ours: the names agree but for strings.
DATATYPES: Mapping[int, DataType] = MappingProxyType(
    {pb.DataType.Value("TYPE_STRING" if d is DataType.BYTES else f"TYPE_{d.wire_name}"): d for d in DataType}
)
DATATYPE_NUMBERS: Mapping[DataType, int] = MappingProxyType({d: number for number, d in DATATYPES.items()})

_TIMEOUT_ACTIONS = {pb.ModelQueuePolicy.REJECT: TimeoutAction.REJECT, pb.ModelQueuePolicy.DELAY: TimeoutAction.DELAY}


def datatype_of(number: int, path: str) -> DataType | None:
    """The datatype of a `data_type` key; None when it is unset."""
    if number == pb.TYPE_INVALID:
        return None
    if number not in DATATYPES:
        raise ConfigError(path, f"unknown data type {number}")
    return DATATYPES[number]


def inner_file(name: str, path: str) -> str:
    """`name` if it is a file below the directory it is relative to, whatever that is."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise ConfigError(path, f"'{name}' is not a relative path that stays inside the model's directory")
    return name


def build_version_policy(config: pb.ModelConfig) -> VersionPolicy:
    """The policy; `Latest(1)` when unset."""
    policy = config.version_policy
    match policy.WhichOneof("policy_choice"):
        case "all":
            return All()
        case "specific":
            versions = tuple(sorted(policy.specific.versions))
            if not versions or versions[0] < 1 or len(set(versions)) != len(versions):
                raise ConfigError("version_policy.specific.versions", "expected different numbers above 0")
            return Specific(versions)
        case "latest":
            if policy.latest.num_versions < 1:
                raise ConfigError("version_policy.latest.num_versions", "expected 1 or more")
            return Latest(policy.latest.num_versions)
        case _:
            return Latest(1)


def build_instance_groups(config: pb.ModelConfig) -> tuple[InstanceGroup, ...]:
    """The groups, in order."""
    kinds = {kind.value: kind for kind in InstanceKind}
    groups = []
    for index, group in enumerate(config.instance_group):
        path = f"instance_group[{index}]"
        name = {v.number: v.name for v in pb.ModelInstanceGroup.Kind.DESCRIPTOR.values}.get(group.kind, str(group.kind))
        if name not in kinds:
            raise ConfigError(f"{path}.kind", f"'{name}' is not supported; expected one of {', '.join(kinds)}")
        if not 0 <= group.count <= MAX_INSTANCES:
            raise ConfigError(f"{path}.count", f"{group.count} is not in the range 0 to {MAX_INSTANCES}")
        gpus = tuple(group.gpus)
        if any(gpu < 0 for gpu in gpus) or len(set(gpus)) != len(gpus):
            raise ConfigError(f"{path}.gpus", f"{list(gpus)}: expected different CUDA device numbers, 0 or more")
        if gpus and kinds[name] is InstanceKind.CPU:
            raise ConfigError(f"{path}.gpus", "KIND_CPU takes no GPUs; remove them or say KIND_GPU")
        groups.append(InstanceGroup(group.name, kinds[name], group.count, gpus))
    return tuple(groups)


def _queue_policy(policy: pb.ModelQueuePolicy, path: str) -> QueuePolicy:
    if policy.timeout_action not in _TIMEOUT_ACTIONS:
        raise ConfigError(f"{path}.timeout_action", f"unknown action {policy.timeout_action}")
    if policy.default_timeout_microseconds > MAX_WAIT_US:
        raise ConfigError(f"{path}.default_timeout_microseconds", f"expected at most {MAX_WAIT_US} (a day)")
    return QueuePolicy(
        max_queue_size=policy.max_queue_size,
        default_timeout_ns=policy.default_timeout_microseconds * NS_PER_US,
        allow_timeout_override=policy.allow_timeout_override,
        timeout_action=_TIMEOUT_ACTIONS[policy.timeout_action],
    )


def build_dynamic_batching(config: pb.ModelConfig) -> DynamicBatching | None:
    """The batcher's settings; None when requests are not joined."""
    if not config.HasField("dynamic_batching"):
        return None
    batching, path = config.dynamic_batching, "dynamic_batching"
    preferred = tuple(sorted(set(batching.preferred_batch_size)))
    if preferred and not 1 <= preferred[0] <= preferred[-1] <= config.max_batch_size:
        raise ConfigError(
            f"{path}.preferred_batch_size", f"{list(preferred)}: expected 1 to max_batch_size ({config.max_batch_size})"
        )
    if batching.max_queue_delay_microseconds > MAX_WAIT_US:
        raise ConfigError(f"{path}.max_queue_delay_microseconds", f"expected at most {MAX_WAIT_US} (a day)")
    levels, default = batching.priority_levels, batching.default_priority_level
    if levels > MAX_PRIORITY_LEVELS:
        raise ConfigError(f"{path}.priority_levels", f"{levels} is more than {MAX_PRIORITY_LEVELS}")
    if (levels == 0 and default) or (levels and not 1 <= default <= levels):
        wanted = f"1 to priority_levels ({levels})" if levels else "priority_levels to be set, too"
        raise ConfigError(f"{path}.default_priority_level", f"{default}: expected {wanted}")
    for level in sorted(batching.priority_queue_policy):
        if not 1 <= level <= levels:
            raise ConfigError(f"{path}.priority_queue_policy[{level}]", f"there are {levels} priority levels")
    policies = {
        level: _queue_policy(policy, f"{path}.priority_queue_policy[{level}]")
        for level, policy in sorted(batching.priority_queue_policy.items())
    }
    result = DynamicBatching(
        preferred_batch_size=preferred,
        max_queue_delay_ns=batching.max_queue_delay_microseconds * NS_PER_US,
        priority_levels=levels,
        default_priority_level=default,
        default_queue_policy=_queue_policy(batching.default_queue_policy, f"{path}.default_queue_policy"),
        priority_queue_policy=MappingProxyType(policies),
        preserve_ordering=batching.preserve_ordering,
    )
    _check_ordering(result)
    return result


def _check_ordering(batching: DynamicBatching) -> None:
    if not batching.preserve_ordering:
        return
    if batching.priority_levels > 1:
        raise ConfigError("dynamic_batching.preserve_ordering", "contradicts priority_levels above 1; remove one")
    for policy in (batching.default_queue_policy, *batching.priority_queue_policy.values()):
        if policy.timeout_action is TimeoutAction.DELAY and policy.default_timeout_ns:
            raise ConfigError("dynamic_batching.preserve_ordering", "contradicts timeout_action DELAY; remove one")


def build_optimization(config: pb.ModelConfig, cuda_parameters: Mapping[str, str]) -> Optimization:
    """How to execute. `cuda_parameters` are CUDA options given as `parameters`, the older place for them."""
    optimization = config.optimization
    level = optimization.graph.level
    if level not in [graph.value for graph in GraphOptimization]:
        raise ConfigError("optimization.graph.level", f"{level}: expected -1, 0, 1 or 2")
    accelerators: list[Accelerator] = []
    cuda = dict(cuda_parameters)
    base = "optimization.execution_accelerators.gpu_execution_accelerator"
    for index, item in enumerate(optimization.execution_accelerators.gpu_execution_accelerator):
        path = f"{base}[{index}]"
        if any(item.name == earlier.name for earlier in accelerators):
            raise ConfigError(f"{path}.name", f"'{item.name}' is listed twice")
        options = provider_options(path, item.name, item.parameters)
        if item.name == "cuda":
            for key in sorted(options.keys() & cuda.keys()):
                if options[key] != cuda[key]:
                    raise ConfigError(
                        f"{path}.parameters[{key}]",
                        f"'{options[key]}' contradicts parameters[{key}], '{cuda[key]}'; remove one",
                    )
            cuda.update(options)
        if item.name == "tensorrt" and optimization.cuda.graphs:
            raise ConfigError("optimization.cuda.graphs", "graphs are captured without TensorRT only; remove one")
        accelerators.append(Accelerator(item.name, MappingProxyType(options)))
    return Optimization(
        graph=GraphOptimization(level),
        gpu_accelerators=tuple(accelerators),
        cuda_options=MappingProxyType(cuda),
        cuda_graphs=optimization.cuda.graphs if optimization.HasField("cuda") else None,
        input_pinned_memory=not optimization.HasField("input_pinned_memory") or optimization.input_pinned_memory.enable,
        output_pinned_memory=(
            not optimization.HasField("output_pinned_memory") or optimization.output_pinned_memory.enable
        ),
    )


def build_labels(config: pb.ModelConfig) -> Mapping[str, str]:
    """Output name to label file, relative to the model's directory."""
    return MappingProxyType(
        {
            output.name: inner_file(output.label_filename, f"output[{index}].label_filename")
            for index, output in enumerate(config.output)
            if output.label_filename
        }
    )


def build_warmups(config: pb.ModelConfig, inputs: Sequence[TensorSpec]) -> tuple[Warmup, ...]:
    """The warm-up requests, checked against the model's inputs."""
    specs = {spec.name: spec for spec in inputs}
    warmups = []
    for index, item in enumerate(config.model_warmup):
        path = f"model_warmup[{index}]"
        low, high = (1, config.max_batch_size) if config.max_batch_size else (0, 0)
        if not low <= item.batch_size <= high:
            raise ConfigError(f"{path}.batch_size", f"{item.batch_size}: expected {low} to {high} (max_batch_size)")
        if item.count > MAX_WARMUP_COUNT:
            raise ConfigError(f"{path}.count", f"{item.count} is more than {MAX_WARMUP_COUNT}")
        missing = [s.name for s in inputs if not s.optional and s.name not in item.inputs]
        if missing:
            raise ConfigError(f"{path}.inputs", f"no value for input {', '.join(missing)}")
        values = tuple(
            _warmup_input(specs.get(name), entry, f"{path}.inputs[{name}]")
            for name, entry in sorted(item.inputs.items())
        )
        warmups.append(Warmup(item.name, item.batch_size, max(item.count, 1), values))
    return tuple(warmups)


def _warmup_input(spec: TensorSpec | None, entry: pb.ModelWarmup.Input, path: str) -> WarmupInput:
    if spec is None:
        raise ConfigError(path, "the model has no such input")
    if datatype_of(entry.data_type, f"{path}.data_type") not in (None, spec.datatype):
        raise ConfigError(f"{path}.data_type", f"the model takes {spec.datatype.wire_name}")
    shape = tuple(entry.dims) or spec.shape
    fits = len(shape) == len(spec.shape) and all(w in (-1, s) for w, s in zip(spec.shape, shape, strict=True))
    if not fits or any(size < 0 for size in shape):
        raise ConfigError(f"{path}.dims", f"{list(shape)} does not give all sizes of {list(spec.shape)}")
    source = entry.WhichOneof("input_data_type")
    if source is None:
        raise ConfigError(path, "expected zero_data, random_data or input_data_file")
    data = WarmupData(source)
    file = inner_file(entry.input_data_file, f"{path}.input_data_file") if data is WarmupData.FILE else ""
    return WarmupInput(spec, shape, data, file)
