"""A model's configuration and a device, made into ONNX Runtime session options and execution providers.

Defaults are for latency: heuristic convolution search (exhaustive search stalls every new shape), arenas that grow by
what is asked, threads sized to the device's share of the cores and shared by all models, so that their number does not
grow with the number of models.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import onnxruntime as ort

from service.config.model import GraphOptimization, ModelConfig
from service.engine.devices import CPU_PROVIDER, CUDA_PROVIDER, TENSORRT_PROVIDER, Device
from service.errors import ConfigError

ProviderOptions = dict[str, str]

_GRAPH_LEVEL = {
    GraphOptimization.ALL: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    GraphOptimization.EXTENDED: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    GraphOptimization.BASIC: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    GraphOptimization.NONE: ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
# Errors reach the client and the log as ours; ONNX Runtime's own lines would let any bad request fill the log.
_LOG_FATAL = 4
_CUDA_DEFAULTS = {
    "cudnn_conv_algo_search": "HEURISTIC",
    "arena_extend_strategy": "kSameAsRequested",
}


@dataclass(frozen=True, slots=True)
class SessionPlan:
    """How to create a session. `options()` makes fresh `SessionOptions`, since ONNX Runtime keeps what it is given."""

    device: Device
    config: ModelConfig
    providers: tuple[tuple[str, ProviderOptions], ...] = field(default=())

    def options(self) -> Any:
        tuning = self.config.session
        options = ort.SessionOptions()
        options.log_severity_level = _LOG_FATAL
        options.graph_optimization_level = _GRAPH_LEVEL[self.config.optimization.graph]
        if tuning.intra_op_threads is None and tuning.inter_op_threads is None:
            options.use_per_session_threads = False
        else:
            options.intra_op_num_threads = tuning.intra_op_threads or self.device.threads
            options.inter_op_num_threads = tuning.inter_op_threads or 1
            # Spinning threads answer a little sooner and burn a core for it, on a machine shared by many models.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if tuning.parallel_execution:
            options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
        if tuning.memory_arena is not None:
            options.enable_cpu_mem_arena = tuning.memory_arena
        if tuning.memory_pattern is not None:
            options.enable_mem_pattern = tuning.memory_pattern
        for key, value in tuning.config_entries.items():
            options.add_session_config_entry(key, value)
        return options


def plan_session(config: ModelConfig, device: Device) -> SessionPlan:
    """The plan for a session of `config` on `device`. Raises `ConfigError` when the device cannot do what is asked."""
    if device.kind == "cpu":
        return SessionPlan(device, config, ((CPU_PROVIDER, {}),))
    available = ort.get_available_providers()
    providers: list[tuple[str, ProviderOptions]] = []
    for index, accelerator in enumerate(config.optimization.gpu_accelerators):
        if accelerator.name == "tensorrt":
            if TENSORRT_PROVIDER not in available:
                path = f"optimization.execution_accelerators.gpu_execution_accelerator[{index}]"
                raise ConfigError(path, "this onnxruntime has no TensorRT provider")
            providers.append((TENSORRT_PROVIDER, {"device_id": str(device.index), **accelerator.provider_options}))
    cuda = {"device_id": str(device.index), **_CUDA_DEFAULTS, **config.optimization.cuda_options}
    if config.optimization.cuda_graphs:
        cuda["enable_cuda_graph"] = "1"
    providers.append((CUDA_PROVIDER, cuda))
    # The CPU provider runs what the GPU's cannot (shapes, strings); ONNX Runtime always adds it, here it is stated.
    providers.append((CPU_PROVIDER, {}))
    return SessionPlan(device, config, tuple(providers))


@functools.cache
def share_threads(threads: int) -> None:
    """Give all sessions one pool of `threads` intra-op threads. Called before the first session is made.

    The pool belongs to the process and is made once: asking again for the same number changes nothing.
    """
    ort.set_global_thread_pool_sizes(threads, 1)
    ort.disable_telemetry_events()
