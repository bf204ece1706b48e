"""On an NVIDIA GPU: it is found and used, many kinds of models answer there as on the CPU, and its options are its own.

Skipped, and said so, where ONNX Runtime finds no GPU.
"""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from service.engine.devices import find_devices
from tests.support import corpus, onnx_models
from tests.support.client import Client, arrays, request
from tests.support.onnx_models import write_model
from tests.support.server import RunningServer, running_server

DEVICES = find_devices("auto", cpu_slots=1, gpu_slots=1, cpu_threads=1)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not DEVICES.gpus, reason=DEVICES.why)]

# Without TF32, whose 10 bits of mantissa are what a GPU is fast with, sums differ only by their order.
EXACT = """optimization { execution_accelerators { gpu_execution_accelerator {
  name: "cuda" parameters { key: "use_tf32" value: "0" }
} } }
"""
TOLERANCE = 1e-4
ORDINARY_MEMORY = EXACT.replace(
    "optimization {", "optimization { input_pinned_memory { enable: false } output_pinned_memory { enable: false }", 1
)
GRAPHS = EXACT.replace("optimization {", "max_batch_size: 16 optimization { cuda { graphs: true }", 1)
# What is captured, and what is done without, each as the CPU answers.
CAPTURED: Mapping[str, Callable[[], onnx.ModelProto]] = {
    "graphs_mlp": onnx_models.mlp,
    "graphs_conv_net": lambda: onnx_models.conv_net(64),
    "graphs_half": lambda: onnx_models.identity("FP16"),
    "graphs_int64": lambda: onnx_models.identity("INT64"),
}
NOT_CAPTURED: Mapping[str, Callable[[], onnx.ModelProto]] = {
    "graphs_branching": onnx_models.branching,
    "graphs_labels": onnx_models.string_labels,
    "graphs_growing": onnx_models.growing_cache,
}
REQUESTS = 8
# A model whose rows need 16 MiB each while they are computed, in an arena that holds a handful of them.
HUNGRY_ROWS = 64
HUNGRY = f"""max_batch_size: {HUNGRY_ROWS}
optimization {{ execution_accelerators {{ gpu_execution_accelerator {{
  name: "cuda" parameters {{ key: "gpu_mem_limit" value: "134217728" }}
}} }} }}
"""
# Models with convolutions, which are captured unasked. Those of `branching_conv` are in branches and cannot be.
CONVOLVING: Mapping[str, Callable[[], onnx.ModelProto]] = {
    "conv_net": lambda: onnx_models.conv_net(64),
    "ordinary_memory": lambda: onnx_models.conv_net(64),
}
BATCHED = "max_batch_size: 16 dynamic_batching {}\n"
# How much longer batches may take that change their size every time than batches that do not: planned anew they take
# 20 to 100 times as long.
CHANGING = 5.0
ROWS = 3
VOCABULARY = 100

BUILT: Mapping[str, Callable[[], onnx.ModelProto]] = {
    "mlp": onnx_models.mlp,
    "conv_net": lambda: onnx_models.conv_net(64),
    "text_encoder": onnx_models.text_encoder,
    "string_labels": onnx_models.string_labels,
    "string_upper": onnx_models.string_upper,
    "fixed_batch_cnn": onnx_models.fixed_batch_cnn,
    "linear_classifier": onnx_models.linear_classifier,
    "tree_classifier": onnx_models.tree_classifier,
    "side_input": onnx_models.side_input,
    "recurrent": onnx_models.recurrent,
    "growing_cache": onnx_models.growing_cache,
    "half": lambda: onnx_models.identity("FP16"),
    "bfloat16": lambda: onnx_models.identity("BF16"),
    "int64": lambda: onnx_models.identity("INT64"),
    "bool": lambda: onnx_models.identity("BOOL"),
    "scalar_sum": onnx_models.scalar_sum,
    "constant_output": onnx_models.constant_output,
    "dynamic_quantised": onnx_models.dynamic_quantised,
    "mixed_batch_outputs": onnx_models.mixed_batch_outputs,
    "branching": onnx_models.branching,
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    for name, build in BUILT.items():
        write_model(root, name, build(), config=EXACT)
    for name, build in {**CAPTURED, **NOT_CAPTURED}.items():
        batched = name not in ("graphs_branching", "graphs_growing")
        config = GRAPHS if batched else GRAPHS.replace("max_batch_size: 16", "")
        write_model(root, name, build(), config=config)
    write_model(root, "wide", onnx_models.matmul_stack(2, 1024), config=EXACT)
    write_model(root, "wide_tf32", onnx_models.matmul_stack(2, 1024))
    write_model(root, "branching_conv", onnx_models.branching_conv(), config=BATCHED + EXACT)
    write_model(root, "on_cpu", onnx_models.mlp(), config="instance_group { kind: KIND_CPU count: 1 }\n")
    write_model(root, "hungry", onnx_models.hungry(), config=HUNGRY)
    write_model(root, "ordinary_memory", onnx_models.conv_net(64), config=ORDINARY_MEMORY)
    # 64 MiB of weights in an arena of 32.
    little = EXACT.replace('"use_tf32" value: "0"', '"gpu_mem_limit" value: "33554432"')
    write_model(root, "too_large", onnx_models.matmul_stack(1, 4096), config=little)
    return root


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[RunningServer]:
    flags = ("--device", "cuda", "--metrics-port", "0", "--profile-budget-ms", "500", "--profile-cache", "none")
    with running_server(repository, *flags) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Client:
    return Client(server.channel())


def drawn(name: str, session: Any, seed: int) -> dict[str, Any]:
    inputs = corpus.draw_inputs(session, np.random.default_rng(seed), 1 if name == "dynamic_quantised" else ROWS)
    if name == "text_encoder":
        inputs["input_ids"] = np.abs(inputs["input_ids"]) % VOCABULARY
    return inputs


@pytest.mark.parametrize("name", [*BUILT, *CAPTURED, *NOT_CAPTURED])
def test_answers_are_those_of_the_cpu(name: str, repository: Path, client: Client) -> None:
    """Several requests at once, each with the answer that a session on the CPU gives it alone."""
    session = corpus.open_session(corpus.model_file(repository / name))
    datatypes = {i.name: "BF16" for i in session.get_inputs() if i.type == "tensor(bfloat16)"}
    feeds = [drawn(name, session, seed) for seed in range(REQUESTS)]
    futures = [client.infer_future(request(name, inputs, datatypes=datatypes)) for inputs in feeds]
    for inputs, future in zip(feeds, futures, strict=True):
        got, wanted = arrays(future.result(60)), corpus.run_directly(session, inputs)
        assert not corpus.differences(got, wanted, TOLERANCE)


def test_options_reach_the_provider(repository: Path, client: Client) -> None:
    """With TF32 switched off in its configuration a product of matrices is exact; with the default it is not."""
    session = corpus.open_session(corpus.model_file(repository / "wide"))
    (name,) = (node.name for node in session.get_inputs())
    x = np.random.default_rng(0).standard_normal((16, 1024)).astype(np.float32)
    (wanted,) = corpus.run_directly(session, {name: x}).values()

    def error(model: str) -> float:
        (got,) = arrays(client.infer(request(model, {name: x}))).values()
        return float(np.abs(got - wanted).max() / np.abs(wanted).max())

    assert error("wide") < 1e-5
    assert 1e-5 < error("wide_tf32") < 1e-2


def test_where_models_run(server: RunningServer, client: Client) -> None:
    """The GPU is in the metrics; a model that asks for the CPU has it; configurations say which."""
    with_gpu = client.call("ModelConfig", name="mlp").config
    assert [group.kind for group in with_gpu.instance_group] == [1]  # KIND_GPU
    assert [group.kind for group in client.call("ModelConfig", name="on_cpu").config.instance_group] == [2]
    text = urllib.request.urlopen(server.metrics_url, timeout=10).read().decode()
    line = next(line for line in text.splitlines() if line.startswith("onclock_device_info") and "cuda:0" in line)
    assert 'provider="CUDAExecutionProvider"' in line


def test_a_model_too_large_for_its_memory_is_refused_alone(server: RunningServer, client: Client) -> None:
    """It is not served, the index says why, and its neighbours are."""
    index = {entry.name: entry for entry in client.call("RepositoryIndex").models}
    assert index["too_large"].state == "UNAVAILABLE"
    assert "memory" in index["too_large"].reason.lower()
    assert index["wide"].state == "READY"


def test_page_locked_and_ordinary_memory_give_the_same(repository: Path, server: RunningServer, client: Client) -> None:
    """Where batches are gathered changes how long they take to copy, not what comes of them; nothing was refused."""
    session = corpus.open_session(corpus.model_file(repository / "ordinary_memory"))
    for seed in range(REQUESTS):
        inputs = drawn("conv_net", session, seed)
        locked, ordinary = (arrays(client.infer(request(name, inputs))) for name in ("conv_net", "ordinary_memory"))
        assert not corpus.differences(locked, ordinary, TOLERANCE)
    assert not server.log_lines("buffers are not page-locked: copies to the GPU are slower")


def test_out_of_memory_is_learned(client: Client, server: RunningServer) -> None:
    """A cap far too high for the arena: every request that fits alone is answered, and the limit is a metric."""
    sent = [np.full((1, 4), number, np.float32) for number in range(2 * HUNGRY_ROWS)]
    futures = [client.infer_future(request("hungry", {"x": x})) for x in sent]
    for x, future in zip(sent, futures, strict=True):
        assert np.array_equal(arrays(future.result(60))["y"], x[:, :1])
    text = urllib.request.urlopen(server.metrics_url, timeout=10).read().decode()
    (line,) = (x for x in text.splitlines() if x.startswith("onclock_batch_rows_limit") and '"hungry"' in x)
    assert 1 <= int(line.split()[-1]) < HUNGRY_ROWS


def test_the_gpu_has_metrics(server: RunningServer) -> None:
    """NVML's figures of the card, under its UUID."""
    text = urllib.request.urlopen(server.metrics_url, timeout=10).read().decode()
    for name in ("nv_gpu_utilization", "nv_gpu_memory_total_bytes", "nv_gpu_memory_used_bytes", "nv_gpu_power_usage"):
        line = next(line for line in text.splitlines() if line.startswith(f"{name}{{gpu_uuid="))
        assert "e+" not in line
        assert DEVICES.gpus[0].uuid in line


def test_graphs_are_captured_where_they_can_be(server: RunningServer, client: Client) -> None:
    """Each model's metric says how many; where there are none, the log says why."""
    text = urllib.request.urlopen(server.metrics_url, timeout=10).read().decode()
    captured = {
        line.split('model="')[1].split('"')[0]: int(line.split()[-1])
        for line in text.splitlines()
        if line.startswith("onclock_cuda_graphs{")
    }
    fixed = {"fixed_batch_cnn", "branching_conv"}
    assert set(captured) == {*CAPTURED, *NOT_CAPTURED, *CONVOLVING, *fixed}
    assert all(captured[name] >= 3 for name in (*CAPTURED, *CONVOLVING)), captured
    assert not any(captured[name] for name in (*NOT_CAPTURED, "branching_conv")), captured
    notes = [line for line in server.log_lines("model note") if "CUDA graphs: none" in str(line)]
    assert len(notes) >= len(NOT_CAPTURED)


@pytest.mark.parametrize("name", ["conv_net", "branching_conv"])
def test_a_change_of_the_batch_size_costs_nothing(name: str, repository: Path, client: Client) -> None:
    """Requests of one row and of eight in turn take about as long as all of one and all of eight."""
    session = corpus.open_session(corpus.model_file(repository / name))
    rng = np.random.default_rng(0)
    sent = {rows: request(name, corpus.draw_inputs(session, rng, rows)) for rows in (1, 8)}

    def seconds(order: tuple[int, ...]) -> float:
        laps = []
        for rows in order:
            began = time.perf_counter()
            client.infer(sent[rows])
            laps.append(time.perf_counter() - began)
        return sum(sorted(laps)[:-2])

    same = seconds((1,) * 20 + (8,) * 20)
    assert seconds((1, 8) * 20) < CHANGING * same


def test_why_convolutions_are_not_captured(server: RunningServer) -> None:
    """The log says it."""
    notes = [str(line) for line in server.log_lines("model note") if "branching_conv" in str(line)]
    assert any("CUDA graphs: none" in note for note in notes)
