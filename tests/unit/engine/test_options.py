"""From a configuration to ONNX Runtime's options: every key lands, or is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
from google.protobuf import text_format

from service.config.complete import complete
from service.config.model import ModelConfig
from service.config.signature import GraphTensor
from service.engine.devices import Device
from service.engine.options import plan_session
from service.errors import ConfigError
from service.pb import model_config_pb2 as pb
from tests.support import onnx_models
from tests.unit.engine.support import CPU, GPU, config_of, session_of

POOLED = Device("cpu", "cpu", 0, 1, 4)
ENDS = (
    [GraphTensor("x", "tensor(float)", ("N", 8))],
    [GraphTensor("y", "tensor(float)", ("N", 4))],
)


def config(text: str = "", gpus: tuple[int, ...] = ()) -> ModelConfig:
    return complete(text_format.Parse(text, pb.ModelConfig()), "model", *ENDS, gpus=gpus).config


def parameters(**given: str) -> str:
    return "".join(
        f'parameters {{ key: "{key.replace("__", ".")}" value {{ string_value: "{value}" }} }}\n'
        for key, value in given.items()
    )


def options(text: str = "", device: Device = CPU) -> Any:
    return plan_session(config(text), device).options()


def test_defaults_are_for_latency() -> None:
    """One thread of its own needs no pool; ONNX Runtime's own lines stay out of the log."""
    made = options()
    assert made.use_per_session_threads
    assert (made.intra_op_num_threads, made.inter_op_num_threads) == (1, 1)
    assert made.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert made.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert made.execution_mode == ort.ExecutionMode.ORT_SEQUENTIAL
    assert made.log_severity_level == 4


def test_several_threads_come_from_one_pool() -> None:
    """With more than one thread a batch, sessions share the process's pool."""
    assert not options(device=POOLED).use_per_session_threads


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (0, ort.GraphOptimizationLevel.ORT_ENABLE_ALL),
        (1, ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED),
        (-1, ort.GraphOptimizationLevel.ORT_ENABLE_BASIC),
        (2, ort.GraphOptimizationLevel.ORT_DISABLE_ALL),
    ],
)
def test_graph_optimization_level(level: int, expected: object) -> None:
    """optimization.graph.level in Triton's numbers."""
    assert options(f"optimization {{ graph {{ level: {level} }} }}").graph_optimization_level == expected


def test_session_settings_land() -> None:
    """Threads, mode and memory, under their ONNX Runtime names."""
    made = options(
        parameters(
            intra_op_thread_count="3",
            inter_op_thread_count="2",
            execution_mode="1",
            enable_mem_arena="0",
            enable_mem_pattern="0",
            session__set_denormal_as_zero="1",
        )
    )
    assert (made.intra_op_num_threads, made.inter_op_num_threads) == (3, 2)
    assert made.execution_mode == ort.ExecutionMode.ORT_PARALLEL
    assert not made.enable_cpu_mem_arena
    assert not made.enable_mem_pattern
    assert made.get_session_config_entry("session.set_denormal_as_zero") == "1"


def test_zero_threads_are_all_cores() -> None:
    """0 is passed on: ONNX Runtime's word for as many as there are."""
    made = options(parameters(intra_op_threads="0", inter_op_thread_count="0"))
    assert (made.intra_op_num_threads, made.inter_op_num_threads) == (0, 0)
    assert options(parameters(execution_mode="1")).inter_op_num_threads == 0


def test_a_stated_entry_wins_over_the_default() -> None:
    """Spinning is off unless the model asks for it."""
    made = options(parameters(session__intra_op__allow_spinning="1"))
    assert made.get_session_config_entry("session.intra_op.allow_spinning") == "1"


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"intra_op_thread_count": "3"}, "intra_op_thread_count"),
        ({"intra_op_threads": "3"}, "intra_op_threads"),
        ({"inter_op_thread_count": "3", "execution_mode": "1"}, "inter_op_thread_count"),
        ({"session__intra_op__allow_spinning": "1"}, "session.intra_op.allow_spinning"),
        ({"session__inter_op__spin_duration_us": "1"}, "session.inter_op.spin_duration_us"),
    ],
)
def test_what_the_shared_pool_cannot_honour_is_refused(given: dict[str, str], key: str) -> None:
    """ONNX Runtime gives no session threads of its own beside a pool that is shared: the key is named."""
    with pytest.raises(ConfigError, match="one pool of 4 threads") as error:
        plan_session(config(parameters(**given)), POOLED)
    assert error.value.path == f"parameters[{key}]"


@pytest.mark.parametrize(
    "given",
    [
        {"intra_op_thread_count": "4"},
        {"intra_op_threads": "0"},
        {"execution_mode": "1"},
        {"execution_mode": "1", "inter_op_thread_count": "4"},
        {"inter_op_thread_count": "2"},
    ],
)
def test_what_the_shared_pool_has_anyway_is_accepted(given: dict[str, str]) -> None:
    """Its own size, all there are, and what has no effect without parallel execution."""
    assert not plan_session(config(parameters(**given)), POOLED).options().use_per_session_threads


def test_a_model_with_threads_of_its_own_runs(tmp_path: Path) -> None:
    """Not only the options: ONNX Runtime accepts them beside a session without."""
    session_of(tmp_path / "a", onnx_models.mlp())
    session, made = session_of(tmp_path / "b", onnx_models.mlp(), parameters(intra_op_thread_count="2"))
    assert made.session.intra_op_threads == 2
    assert session.providers == ("CPUExecutionProvider",)


def test_memory_shrinkage_is_asked_of_the_arenas_there_are() -> None:
    """A run option for the device it runs on; other devices, or an arena switched off, have nothing to shrink."""
    key = "memory.enable_memory_arena_shrinkage"
    text = parameters(memory__enable_memory_arena_shrinkage="cpu:0;gpu:1;gpu:2")
    on_cpu = plan_session(config(text), CPU).run_options()
    assert on_cpu.get_run_config_entry(key) == "cpu:0"
    on_gpu = plan_session(config(text), GPU).run_options()
    assert on_gpu.get_run_config_entry(key) == "cpu:0;gpu:1"
    without = config(text + parameters(enable_mem_arena="0"))
    assert plan_session(without, CPU).run_options() is None
    assert plan_session(config(), CPU).run_options() is None


def test_the_cpu_plan_is_the_cpu() -> None:
    """Accelerators of GPUs do not concern an instance on the CPU."""
    text = "optimization { execution_accelerators { gpu_execution_accelerator { name: 'tensorrt' } } }"
    assert plan_session(config(text), CPU).providers == (("CPUExecutionProvider", {}),)


def test_cuda_defaults_and_device() -> None:
    """Heuristic convolution search, arenas that grow by what is asked, the device's number, the CPU behind it."""
    plan = plan_session(config(gpus=(0, 1)), GPU)
    assert plan.providers == (
        (
            "CUDAExecutionProvider",
            {
                "device_id": "1",
                "cudnn_conv_algo_search": "HEURISTIC",
                "arena_extend_strategy": "kSameAsRequested",
            },
        ),
        ("CPUExecutionProvider", {}),
    )


def test_cuda_options_land() -> None:
    """From parameters and from the accelerator, under ONNX Runtime's names and values."""
    text = (
        parameters(
            cudnn_conv_algo_search="0",
            gpu_mem_limit="1000000",
            arena_extend_strategy="0",
            do_copy_in_default_stream="1",
        )
        + "optimization { execution_accelerators { gpu_execution_accelerator { name: 'cuda' "
        + "parameters { key: 'use_tf32' value: '0' } } } }"
    )
    (name, cuda), _ = plan_session(config(text, (1,)), GPU).providers
    assert name == "CUDAExecutionProvider"
    assert cuda == {
        "device_id": "1",
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "arena_extend_strategy": "kNextPowerOfTwo",
        "gpu_mem_limit": "1000000",
        "do_copy_in_default_stream": "1",
        "use_tf32": "0",
    }


def test_tensorrt_goes_before_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of preference, with the same device."""
    accelerator = "gpu_execution_accelerator { name: 'tensorrt' parameters { key: 'precision_mode' value: 'FP16' } }"
    made = config(f"optimization {{ execution_accelerators {{ {accelerator} }} }}", (1,))
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["TensorrtExecutionProvider", "CUDAExecutionProvider"])
    names = [name for name, _ in plan_session(made, GPU).providers]
    assert names == ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    tensorrt = plan_session(made, GPU).providers[0][1]
    assert tensorrt == {"device_id": "1", "trt_fp16_enable": "1"}
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(ConfigError, match="no TensorRT provider") as error:
        plan_session(made, GPU)
    assert error.value.path == "optimization.execution_accelerators.gpu_execution_accelerator[0]"


def test_parallel_execution_on_a_gpu_is_refused() -> None:
    """The CUDA provider would quietly run one operator after the other."""
    with pytest.raises(ConfigError, match="one operator after the other"):
        plan_session(config(parameters(execution_mode="1"), (1,)), GPU)


def test_each_session_gets_options_of_its_own(tmp_path: Path) -> None:
    """ONNX Runtime keeps what it is given: two sessions of one plan must not share it."""
    made, path = config_of(tmp_path, onnx_models.mlp())
    plan = plan_session(made, CPU)
    assert plan.options() is not plan.options()
    assert replace(plan).config is made
    assert path.is_file()
