"""Captured batch sizes, with places on the CPU instead of a GPU: everything but the capture itself.

ONNX Runtime ignores the run option that names a graph on the CPU, so a "replay" is a run at fixed addresses.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine import graphs
from service.engine.gate import Gate
from service.engine.graphs import GraphInstance, obstacle
from service.engine.instances import captured_sizes, finish_graphs, make_instances
from service.engine.options import plan_session
from service.engine.pool import Instance
from service.engine.session import Binding, OnnxSession
from service.engine.warmup import first_run, samples
from service.engine.warmup import requests as warmup_requests
from service.errors import ConfigError, DeviceFailed, ExecutionFailed, OutOfMemory, ServiceError
from service.scheduler import bucket_ladder
from service.tensor import Array
from tests.support import onnx_models
from tests.unit.engine.support import CPU, GPU, Requests, config_of, split_rows, whole

GRAPHS = "max_batch_size: 16 optimization { cuda { graphs: true } }"


def graph_instance(directory: Path, model: onnx.ModelProto, kind: type[OnnxSession] = OnnxSession) -> Any:
    config, path = config_of(directory, model, GRAPHS)
    plan = plan_session(config, CPU)
    remake = partial(OnnxSession, path, plan)
    return GraphInstance(kind(path, plan), config.inputs, config.outputs, 16, Gate(), ("cpu", 0), remake), config


def plain_instance(directory: Path, model: onnx.ModelProto) -> Instance:
    config, path = config_of(directory, model, GRAPHS)
    return Instance(OnnxSession(path, plan_session(config, CPU)), config.inputs, config.outputs, 16)


BUILDERS: dict[str, Callable[[], onnx.ModelProto]] = {
    "mlp": onnx_models.mlp,
    "conv_net": lambda: onnx_models.conv_net(16),
    "half": lambda: onnx_models.identity("FP16"),
    "int64": lambda: onnx_models.identity("INT64"),
    "bool": lambda: onnx_models.identity("BOOL"),
    "average": lambda: onnx_models.global_average(8),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_a_replay_answers_as_an_ordinary_run(name: str, tmp_path: Path) -> None:
    """Batches of several requests, with padding, captured and again with other contents."""
    instance, config = graph_instance(tmp_path / "a", BUILDERS[name]())
    plain = plain_instance(tmp_path / "b", BUILDERS[name]())
    requests = Requests(config.inputs)
    rng = np.random.default_rng(0)
    for _ in range(3):
        sent = [
            requests.make(*((rng.standard_normal((n, *s.shape)) * 3).astype(s.datatype.dtype) for s in config.inputs))
            for n in (1, 2)
        ]
        got = split_rows(sent, instance.run(whole(*sent), 3, 4).outputs)
        wanted = split_rows(sent, plain.run(whole(*sent), 3, 4).outputs)
        for one, other in zip(got, wanted, strict=True):
            for left, right in zip(one, other, strict=True):
                np.testing.assert_array_equal(left, right)
    assert instance.why_not == ""
    assert instance.graphs == 1


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(-100, 100)), min_size=1, max_size=12))
@settings(max_examples=30, deadline=None)
def test_any_order_of_sizes(runs: list[tuple[int, int]]) -> None:
    """Sizes captured, replayed and, once warm-up is over, run as usual: every answer is its own request's."""
    instance, requests = SHARED.get()
    sealed = False
    for index, (rows, first) in enumerate(runs):
        if index == len(runs) // 2:
            instance.seal()
            sealed = True
        x = np.full((rows, 4), first, np.float32)
        request = requests.make(x)
        (answer,) = split_rows([request], instance.run(whole(request), rows, rows).outputs)
        np.testing.assert_array_equal(answer[0], x)
    assert sealed


class _Shared:
    """A new instance for each example, on one session."""

    def __init__(self) -> None:
        self._made: tuple[OnnxSession, Any] | None = None

    def get(self) -> tuple[GraphInstance, Requests]:
        if self._made is None:
            import tempfile

            config, path = config_of(Path(tempfile.mkdtemp()), onnx_models.identity(), GRAPHS)
            self._made = OnnxSession(path, plan_session(config, CPU)), config
        session, config = self._made
        specs = (config.inputs, config.outputs)
        return GraphInstance(session, *specs, 16, Gate(), ("cpu", 0), lambda: session), Requests(config.inputs)


SHARED = _Shared()


class Stale(OnnxSession):
    """Replays what it saw when it was captured, as a graph does whose inputs are not where it reads."""

    def run_fixed(self, binding: Binding, run_options: Any, inputs: Sequence[tuple[Any, Array]]) -> None:
        seen = self.__dict__.setdefault("seen", [array.copy() for _, array in inputs])
        super().run_fixed(binding, run_options, [(value, old) for (value, _), old in zip(inputs, seen, strict=True)])


class Failing(OnnxSession):
    """Fails at the replay."""

    error: ServiceError = ExecutionFailed("CUDA failure 901: operation failed due to a previous error during capture")

    def run_fixed(self, binding: Binding, run_options: Any, inputs: Sequence[tuple[Any, Array]]) -> None:
        raise self.error


class Full(Failing):
    """Has no memory for it."""

    error = OutOfMemory("no memory")


class Broken(Failing):
    """The device is gone."""

    error = DeviceFailed("CUDA failure 700")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Stale, "a graph of 2 rows fails: output 'y' of a replay is not that of an ordinary run"),
        (Failing, "a graph of 2 rows fails: CUDA failure 901"),
        (Full, "no device memory for a graph of 2 rows"),
    ],
)
def test_a_graph_that_cannot_be_had_is_done_without(kind: type[OnnxSession], reason: str, tmp_path: Path) -> None:
    """The answer is right all the same, the reason is kept, and nothing is tried again."""
    instance, config = graph_instance(tmp_path, onnx_models.identity(), kind)
    requests = Requests(config.inputs)
    for first in (1, 5):
        x = np.arange(first, first + 8, dtype=np.float32).reshape(2, 4)
        request = requests.make(x)
        (answer,) = split_rows([request], instance.run(whole(request), 2, 2).outputs)
        np.testing.assert_array_equal(answer[0], x)
    assert instance.why_not.startswith(reason)
    assert instance.graphs == 0
    # A session in the middle of a capture is not used again.
    assert type(instance.session) is OnnxSession


class Planning(OnnxSession):
    """Notes for each run whether somebody is alone with the GPU; ordinary ones, the first of which plans, are not."""

    held: list[bool]
    gate: Gate

    def run(self, feeds: Any, outputs: Any) -> Any:
        assert self.gate.owner is None
        self.held.append(False)
        return super().run(feeds, outputs)

    def run_fixed(self, binding: Binding, run_options: Any, inputs: Sequence[tuple[Any, Array]]) -> None:
        self.held.append(self.gate.owner is not None)
        super().run_fixed(binding, run_options, inputs)


def test_what_is_planned_for_a_size_keeps_nobody_waiting(tmp_path: Path) -> None:
    """The first run of a size comes before the gate is closed for the capture, and what is compared after it."""
    instance, config = graph_instance(tmp_path, onnx_models.conv_net(16), Planning)
    instance.session.held, instance.session.gate = [], instance._gate
    request = Requests(config.inputs).make(np.ones((3, *config.inputs[0].shape), np.float32))
    instance.run(whole(request), 3, 3)
    # The batch itself is the last.
    assert instance.session.held == [False, *[True] * graphs.CAPTURE_RUNS, *[False] * 5]
    assert instance.captured(request.shape) == {3}


class Small(OnnxSession):
    """Has memory for eight rows."""

    def run(self, feeds: Any, outputs: Any) -> Any:
        if any(len(array) > 8 for _, array in feeds.values()):
            raise OutOfMemory("no memory")
        return super().run(feeds, outputs)

    def run_bound(self, binding: Binding) -> None:
        raise AssertionError("every size up to eight rows is captured")


def test_sizes_that_fit_stay_captured(tmp_path: Path) -> None:
    """A size for which there is no memory costs none of the smaller ones their graphs."""
    instance, config = graph_instance(tmp_path, onnx_models.identity(), Small)
    sample = samples(config, tmp_path)[0]
    notes = finish_graphs([instance], config, sample)
    assert captured_sizes([instance], sample) == tuple(rows for rows in bucket_ladder(16) if rows <= 8)
    assert "no memory" in notes[1]
    instance.run(warmup_requests(sample, config, 2), 2, 2)


def test_a_broken_device_is_not_hidden(tmp_path: Path) -> None:
    """It is for the server to know."""
    instance, config = graph_instance(tmp_path, onnx_models.identity(), Broken)
    request = Requests(config.inputs).make(np.ones((2, 4), np.float32))
    with pytest.raises(DeviceFailed):
        instance.run(whole(request), 2, 2)


def test_graphs_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more size is run as usual."""
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    instance, config = graph_instance(tmp_path, onnx_models.identity())
    requests = Requests(config.inputs)
    for rows in (1, 2, 3):
        request = requests.make(np.full((rows, 4), rows, np.float32))
        (answer,) = split_rows([request], instance.run(whole(request), rows, rows).outputs)
        assert np.all(answer[0] == rows)
    assert instance.graphs == 2


def test_runs_are_always_on_one_thread(tmp_path: Path) -> None:
    """ONNX Runtime keeps a graph with the thread that captured it."""
    seen: set[int] = set()

    class Watching(OnnxSession):
        def run_fixed(self, binding: Binding, run_options: Any, inputs: Sequence[tuple[Any, Array]]) -> None:
            seen.add(threading.get_ident())
            super().run_fixed(binding, run_options, inputs)

    instance, config = graph_instance(tmp_path, onnx_models.identity(), Watching)
    request = Requests(config.inputs).make(np.ones((1, 4), np.float32))
    instance.run(whole(request), 1, 1)
    other = threading.Thread(target=instance.run, args=(whole(request), 1, 1))
    other.start()
    other.join(10)
    assert len(seen) == 1
    assert threading.get_ident() not in seen


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (onnx_models.string_labels, "BYTES"),
        (lambda: onnx_models.identity("BF16"), "BF16"),
        (onnx_models.growing_cache, "depends on the input"),
        (onnx_models.mlp, ""),
    ],
)
def test_what_is_known_before_trying(build: Callable[[], onnx.ModelProto], reason: str, tmp_path: Path) -> None:
    """And said."""
    config, path = config_of(tmp_path, build())
    found = obstacle(OnnxSession(path, plan_session(config, CPU)), config.inputs, config.outputs)
    assert reason in found
    assert bool(reason) == bool(found)


def test_without_a_gpu_the_log_says_so(tmp_path: Path) -> None:
    """The same configuration serves on both machines."""
    config, path = config_of(tmp_path, onnx_models.mlp(), GRAPHS)
    instances = make_instances(path, config, CPU, 2)
    (sample, *_) = samples(config, path.parent)
    assert finish_graphs(instances, config, sample, [1, 2]) == ["CUDA graphs: none: there is no GPU"]


def test_every_instance_captures_every_size(tmp_path: Path) -> None:
    """Also those that were not measured, and those whose latencies came from the cache."""
    config, path = config_of(tmp_path, onnx_models.mlp(), GRAPHS)
    session = OnnxSession(path, plan_session(config, CPU))
    specs = (config.inputs, config.outputs)
    instances = [GraphInstance(session, *specs, 16, Gate(), ("cpu", 0), lambda: session) for _ in range(2)]
    candidates = samples(config, path.parent)
    sample, _ = first_run(instances[0], config, candidates)
    assert finish_graphs(instances, config, sample, [1, 2, 4]) == ["CUDA graphs: 3 batch sizes captured"]
    assert [instance.graphs for instance in instances] == [3, 3]
    assert not any(instance.capturing for instance in instances)


def test_the_session_of_a_gpu_is_asked_for_graphs() -> None:
    """Ordinary runs of it say that they are none."""
    from tests.unit.engine.test_options import config as config_from

    plan = plan_session(config_from("optimization { cuda { graphs: true } }", gpus=(1,)), GPU)
    assert plan.graphs
    assert dict(plan.providers)["CUDAExecutionProvider"]["enable_cuda_graph"] == "1"
    assert plan.run_options().get_run_config_entry("gpu_graph_id") == "-1"
    assert not plan.without_graphs().graphs
    assert plan.without_graphs().run_options() is None


def test_memory_that_graphs_go_on_using_is_not_given_back() -> None:
    """The two options contradict each other."""
    from tests.unit.engine.test_options import config as config_from
    from tests.unit.engine.test_options import parameters

    shrinking = parameters(**{"memory.enable_memory_arena_shrinkage": "gpu:1"})
    text = f"optimization {{ cuda {{ graphs: true }} }}\n{shrinking}"
    with pytest.raises(ConfigError, match=r"optimization\.cuda\.graphs"):
        plan_session(config_from(text, gpus=(1,)), GPU)


TENSORRT = 'optimization { execution_accelerators { gpu_execution_accelerator { name: "tensorrt" } } }'
SHRINKING = """parameters { key: "memory.enable_memory_arena_shrinkage" value { string_value: "gpu:0" } }"""


@pytest.mark.parametrize(
    ("text", "convolutions", "others"),
    [
        ("", True, False),
        ("optimization { graph { level: 1 } }", True, False),
        ("optimization { cuda { graphs: true } }", True, True),
        ("optimization { cuda { graphs: false } }", False, False),
        (TENSORRT, False, False),
        (SHRINKING, False, False),
    ],
)
def test_unasked_models_with_convolutions_are_captured(
    text: str, convolutions: bool, others: bool, tmp_path: Path
) -> None:
    """Unless the file says otherwise, or asks for what captured graphs contradict."""
    assert config_of(tmp_path / "conv", onnx_models.conv_net(16), text)[0].captures_graphs is convolutions
    assert config_of(tmp_path / "mlp", onnx_models.mlp(), text)[0].captures_graphs is others


def test_on_the_cpu_nobody_is_told_about_graphs_unasked(tmp_path: Path) -> None:
    """There is nothing to say about what nobody asked for."""
    config, path = config_of(tmp_path, onnx_models.conv_net(16), "max_batch_size: 4")
    instances = make_instances(path, config, CPU, 1)
    assert finish_graphs(instances, config, samples(config, tmp_path)[0]) == []
