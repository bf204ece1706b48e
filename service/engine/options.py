"""A model's configuration and a device, made into ONNX Runtime session options and execution providers.

Defaults are for latency: heuristic convolution search (exhaustive search stalls every new shape), arenas that grow by
what is asked, threads sized to the device's share of the cores.

Threads: sessions of one thread need no pool. With more, all sessions share the process's pool, so that the number of
threads does not grow with the number of models. ONNX Runtime then allows no session a pool of its own, so a model that
asks for another number of threads, or for other ways of waiting, is refused.
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
_SPINNING = ("session.intra_op.allow_spinning", "session.inter_op.allow_spinning")
GRAPHS_OPTION = "enable_cuda_graph"
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

    @property
    def graphs(self) -> bool:
        """Whether the session can capture CUDA graphs."""
        return any(GRAPHS_OPTION in options for _, options in self.providers)

    def without_graphs(self) -> SessionPlan:
        """The same, for a model that ONNX Runtime will not capture."""
        kept = tuple((name, {k: v for k, v in o.items() if k != GRAPHS_OPTION}) for name, o in self.providers)
        return SessionPlan(self.device, self.config, kept)

    def options(self) -> Any:
        tuning = self.config.session
        options = ort.SessionOptions()
        options.log_severity_level = _LOG_FATAL
        options.graph_optimization_level = _GRAPH_LEVEL[self.config.optimization.graph]
        if self.device.threads > 1:
            options.use_per_session_threads = False
        else:
            # 0 is ONNX Runtime's word for as many as there are cores.
            options.intra_op_num_threads = 1 if tuning.intra_op_threads is None else tuning.intra_op_threads
            unstated = 0 if tuning.parallel_execution else 1
            options.inter_op_num_threads = unstated if tuning.inter_op_threads is None else tuning.inter_op_threads
            for entry in _SPINNING:
                # Spinning threads answer a little sooner and burn a core for it, on a machine shared by many models.
                if entry not in tuning.config_entries:
                    options.add_session_config_entry(entry, "0")
        if tuning.parallel_execution:
            options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
        if tuning.memory_arena is not None:
            options.enable_cpu_mem_arena = tuning.memory_arena
        if tuning.memory_pattern is not None:
            options.enable_mem_pattern = tuning.memory_pattern
        for key, value in tuning.config_entries.items():
            options.add_session_config_entry(key, value)
        return options

    def run_options(self) -> Any:
        """What each run is given: None unless memory is to be given back after it."""
        given_back = [entry for entry in self.config.session.arena_shrinkage.split(";") if entry in self._arenas()]
        if not given_back and not self.graphs:
            return None
        options = ort.RunOptions()
        if given_back:
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", ";".join(given_back))
        if self.graphs:
            # An ordinary run of a session that captures graphs.
            options.add_run_config_entry("gpu_graph_id", "-1")
        return options

    def _arenas(self) -> list[str]:
        """The arenas a session of this plan has, under ONNX Runtime's names: others cannot be shrunk."""
        arenas = [] if self.config.session.memory_arena is False else ["cpu:0"]
        return arenas if self.device.kind == "cpu" else [*arenas, f"gpu:{self.device.index}"]


def plan_session(config: ModelConfig, device: Device) -> SessionPlan:
    """The plan for a session of `config` on `device`. Raises `ConfigError` when the device cannot do what is asked."""
    _check_threads(config, device)
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
    if config.captures_graphs:
        if "gpu:" in config.session.arena_shrinkage:
            # A captured graph goes on using what the arena gave back.
            raise ConfigError("optimization.cuda.graphs", "contradicts memory.enable_memory_arena_shrinkage of a GPU")
        cuda[GRAPHS_OPTION] = "1"
    providers.append((CUDA_PROVIDER, cuda))
    # The CPU provider runs what the GPU's cannot (shapes, strings); ONNX Runtime always adds it, here it is stated.
    providers.append((CPU_PROVIDER, {}))
    return SessionPlan(device, config, tuple(providers))


def _check_threads(config: ModelConfig, device: Device) -> None:
    """Raises `ConfigError` for thread settings that the shared pool cannot honour."""
    tuning, pool = config.session, device.threads
    if tuning.parallel_execution and device.kind == "gpu":
        raise ConfigError(
            "parameters[execution_mode]",
            "the CUDA provider runs one operator after the other; remove it or set it to 0",
        )
    if pool == 1:
        return
    advice = f"the models of a server share one pool of {pool} threads; start it with --intra-op-threads or remove this"
    stated = {"intra_op_thread_count": tuning.intra_op_threads}
    if "intra_op_threads" in config.parameters:
        stated = {"intra_op_threads": tuning.intra_op_threads}
    if tuning.parallel_execution:
        stated["inter_op_thread_count"] = tuning.inter_op_threads
    for key, threads in stated.items():
        if threads not in (None, 0, pool):
            raise ConfigError(f"parameters[{key}]", f"{threads} cannot be had: {advice}")
    for key in tuning.config_entries:
        if key.startswith(("session.intra_op", "session.inter_op")):
            raise ConfigError(f"parameters[{key}]", f"has no effect: {advice}")


@functools.cache
def share_threads(threads: int) -> None:
    """Give all sessions one pool of `threads` threads, one for operators and one for branches of graphs that are run in
    parallel. Called before the first session is made.

    The pool belongs to the process and is made once: asking again for the same number changes nothing. One thread is
    the caller's own: no pool is made.
    """
    ort.disable_telemetry_events()
    if threads > 1:
        ort.set_global_thread_pool_sizes(threads, threads)
