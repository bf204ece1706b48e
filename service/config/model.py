"""A model's configuration, complete and checked: what the rest of the server reads.

Promise: every value here is in force. Nothing is unset, nothing has a unit that is not in its name, and nothing that
the configuration file asked for is missing: what cannot be honoured was refused when the file was read
(`service.config.pbtxt`). The schema of the file is Triton Inference Server's `ModelConfig`; `docs/configuration.md`
says what each of its keys means here.

A configuration does not change while its model is loaded.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from service.clock import NS_PER_S
from service.config.sequences import SequenceBatching
from service.tensor import TensorSpec


def _no_texts() -> Mapping[str, str]:
    return field(default_factory=lambda: MappingProxyType({}))


# Without an objective nothing was promised, and a load test that counts on no refusal must run to its end:
# perf_analyzer stops at the first. Half a minute is about what callers wait before they give up by themselves.
DEFAULT_MAX_QUEUE_NS = 30 * NS_PER_S


class InstanceKind(enum.Enum):
    """Which sort of device the instances of a group run on. AUTO: GPU where there is one, else CPU."""

    AUTO = "KIND_AUTO"
    CPU = "KIND_CPU"
    GPU = "KIND_GPU"


@dataclass(frozen=True, slots=True)
class InstanceGroup:
    """`count` instances on each device. `gpus` are CUDA numbers; empty: every GPU. `count` 0: the server's default."""

    name: str
    kind: InstanceKind = InstanceKind.AUTO
    count: int = 0
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Latest:
    """Serve the `count` versions with the highest numbers."""

    count: int = 1


@dataclass(frozen=True, slots=True)
class All:
    """Serve every version."""


@dataclass(frozen=True, slots=True)
class Specific:
    """Serve exactly these versions."""

    versions: tuple[int, ...]


VersionPolicy = Latest | All | Specific

SERVE_NEWEST: VersionPolicy = Latest(1)


class TimeoutAction(enum.Enum):
    """What happens to a request that waited too long: refused, or run after all that are still in time."""

    REJECT = "REJECT"
    DELAY = "DELAY"


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """Bounds of one priority level's queue. 0 = no bound of its own."""

    max_queue_size: int = 0
    default_timeout_ns: int = 0
    allow_timeout_override: bool = False
    timeout_action: TimeoutAction = TimeoutAction.REJECT


@dataclass(frozen=True, slots=True)
class DynamicBatching:
    """Requests may be joined into one execution.

    `preferred_batch_size` and `max_queue_delay_ns` matter only without a latency objective: with one, the scheduler
    knows itself how long to wait. `priority_levels` 0 or 1: all requests are equal; else 1 is the most urgent and
    `default_priority_level` in [1, priority_levels] is a request's that names none.
    """

    preferred_batch_size: tuple[int, ...] = ()
    max_queue_delay_ns: int = 0
    priority_levels: int = 0
    default_priority_level: int = 0
    default_queue_policy: QueuePolicy = QueuePolicy()
    priority_queue_policy: Mapping[int, QueuePolicy] = field(default_factory=lambda: MappingProxyType({}))
    preserve_ordering: bool = False

    def queue_policy(self, level: int) -> QueuePolicy:
        """The bounds of the queue of one priority level."""
        return self.priority_queue_policy.get(level, self.default_queue_policy)


class GraphOptimization(enum.Enum):
    """How much ONNX Runtime may rewrite the graph; the value is `optimization.graph.level` of the file."""

    ALL = 0
    EXTENDED = 1
    BASIC = -1
    NONE = 2


@dataclass(frozen=True, slots=True)
class Accelerator:
    """An execution provider to use besides the device's own: "cuda" or "tensorrt", with ONNX Runtime's option names."""

    name: str
    provider_options: Mapping[str, str] = _no_texts()


@dataclass(frozen=True, slots=True)
class Optimization:
    """How the graph is executed. `gpu_accelerators` apply to instances on GPUs, in the order of preference.

    `cuda_options` are the CUDA provider's options, wherever the file gave them; `cuda_graphs`: whether batch sizes are
    to be captured; None where the file does not say (`ModelConfig.captures_graphs`).
    """

    graph: GraphOptimization = GraphOptimization.ALL
    gpu_accelerators: tuple[Accelerator, ...] = ()
    cuda_options: Mapping[str, str] = _no_texts()
    cuda_graphs: bool | None = None
    input_pinned_memory: bool = True
    output_pinned_memory: bool = True


@dataclass(frozen=True, slots=True)
class SessionTuning:
    """ONNX Runtime session settings. None: the server's default. `config_entries` are its `session.*` entries."""

    intra_op_threads: int | None = None
    inter_op_threads: int | None = None
    parallel_execution: bool = False
    memory_arena: bool | None = None
    memory_pattern: bool | None = None
    arena_shrinkage: str = ""
    config_entries: Mapping[str, str] = _no_texts()


class WarmupData(enum.Enum):
    """Where the values of a warm-up input come from."""

    ZERO = "zero_data"
    RANDOM = "random_data"
    FILE = "input_data_file"


@dataclass(frozen=True, slots=True)
class WarmupInput:
    """One input of a warm-up request. `shape` is one row's; `file` (under `warmup/` of the model) only with FILE."""

    spec: TensorSpec
    shape: tuple[int, ...]
    data: WarmupData
    file: str = ""


@dataclass(frozen=True, slots=True)
class Warmup:
    """A request of `rows` rows (0: unbatched) that is run `count` times before the model is ready."""

    name: str
    rows: int
    count: int
    inputs: tuple[WarmupInput, ...]


class LatePolicy(enum.Enum):
    """What becomes of a request that cannot be answered in time: refused, or run when nothing else waits."""

    SHED = "shed"
    BEST_EFFORT = "best_effort"


@dataclass(frozen=True, slots=True)
class Objective:
    """What was promised and what it may cost. The file's `parameters` hold it (`service.config.parameters`).

    `slo_ns` None: answer as fast as possible, never refuse for lateness. `max_queue_ns` bounds the predicted wait when
    there is no objective. `shed_eagerness` 0 to 1: how early to refuse what will probably be late.
    `profile_budget_ns` None: the server's default.
    """

    slo_ns: int | None = None
    max_queue_ns: int = DEFAULT_MAX_QUEUE_NS
    shed_eagerness: float = 0.0
    late_policy: LatePolicy = LatePolicy.SHED
    profile_budget_ns: int | None = None


@dataclass(frozen=True, slots=True)
class BackboneReference:
    """The model that a head builds on: `version` None is the newest that serves; `sha256` of its file, if given."""

    name: str
    version: int | None = None
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The configuration of one model, all versions.

    `max_batch_size` 0: the model has no batch dimension and a request is one execution. Above 0: a request has 1 to
    `max_batch_size` rows (larger ones are split). Requests are joined only when `dynamic_batching` is set, too.
    `inputs` and `outputs` are what clients send and get. `sequences`, if the model is stateful: its requests have one
    row each, and `dynamic_batching` says whether those of different sequences are joined. `backbone`: the model is a
    head on another one.
    `labels` maps an output to the file (beside config.pbtxt) that names its classes. `convolutions`: whether the graph
    has any.
    """

    name: str
    max_batch_size: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    instance_groups: tuple[InstanceGroup, ...]
    platform: str = "onnxruntime_onnx"
    backend: str = "onnxruntime"
    default_model_filename: str = "model.onnx"
    version_policy: VersionPolicy = SERVE_NEWEST
    dynamic_batching: DynamicBatching | None = None
    sequences: SequenceBatching | None = None
    backbone: BackboneReference | None = None
    optimization: Optimization = Optimization()
    session: SessionTuning = SessionTuning()
    objective: Objective = Objective()
    warmups: tuple[Warmup, ...] = ()
    labels: Mapping[str, str] = _no_texts()
    parameters: Mapping[str, str] = _no_texts()
    convolutions: bool = False

    @property
    def captures_graphs(self) -> bool:
        """Whether batch sizes are captured on a GPU. Unless the file says: those of models with convolutions, which
        otherwise cost 100 ms and more whenever the size changes (docs/adr/0016-sizes-on-a-gpu.md)."""
        asked = self.optimization.cuda_graphs
        if asked is not None:
            return asked
        contradicted = "gpu:" in self.session.arena_shrinkage or any(
            accelerator.name == "tensorrt" for accelerator in self.optimization.gpu_accelerators
        )
        return self.convolutions and not contradicted

    @property
    def batched(self) -> bool:
        """Whether tensors carry a batch dimension in front."""
        return self.max_batch_size > 0

    @property
    def joins_requests(self) -> bool:
        """Whether rows of different requests may share an execution."""
        return self.max_batch_size > 1 and self.dynamic_batching is not None

    @property
    def session_inputs(self) -> tuple[TensorSpec, ...]:
        """What a session is fed: the clients' inputs, then the controls, then the states."""
        if self.sequences is None:
            return self.inputs
        controls = (control.spec for control in self.sequences.controls)
        return (*self.inputs, *controls, *(state.input for state in self.sequences.states))

    @property
    def session_outputs(self) -> tuple[TensorSpec, ...]:
        """What a session is asked for: the clients' outputs, then those states that are not among them."""
        if self.sequences is None:
            return self.outputs
        names = {spec.name for spec in self.outputs}
        return (*self.outputs, *(s.output for s in self.sequences.states if s.output.name not in names))

    @property
    def side_inputs(self) -> tuple[TensorSpec, ...]:
        """Inputs without a batch dimension beside batched ones. Requests are joined only when these are equal."""
        return tuple(spec for spec in self.inputs if not spec.batched) if self.batched else ()
