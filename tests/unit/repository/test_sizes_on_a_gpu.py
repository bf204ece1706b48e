"""Models with convolutions on a GPU, with sessions on the CPU in its place: which batch sizes they are run in.

What ONNX Runtime does there and not here is done by `Planning`: a run takes long after one of another size. Only runs
move the clock that the loader measures by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.clock import NS_PER_MS, NS_PER_S
from service.config.model import ModelConfig
from service.engine import warmup
from service.engine.devices import Device, Devices
from service.engine.gate import Gate
from service.engine.graphs import GraphInstance
from service.engine.options import plan_session
from service.engine.pool import Executed, Instance
from service.engine.session import OnnxSession
from service.errors import DeviceFailed, ModelLoadError, OutOfMemory
from service.repository import loader
from service.repository.loader import Loaded
from service.scheduler import Segment, bucket_ladder
from tests.support import corpus, onnx_models
from tests.support.onnx_models import write_model
from tests.unit.engine.support import ANSWER_S, CPU, Answers, Requests
from tests.unit.repository.loading import load, loader_of

GPU = Device("cuda:0", "gpu", 0, 1)
ON_GPU = Devices(CPU, (GPU,), (GPU,), "1 NVIDIA GPU")
RUN_NS, PLANNING_NS = NS_PER_MS, 190 * NS_PER_MS
MAX_ROWS = 16
# Time enough to measure the whole ladder.
BUDGET_NS = 60 * NS_PER_S
WITHOUT_GRAPHS = "dynamic_batching {} optimization { cuda { graphs: false } }"

Maker = Callable[[Path, ModelConfig, Device, int], list[Instance]]


class Clock:
    """Moved by runs alone."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(warmup, "now_ns", made)
    return made


class Plain(Instance):
    """Takes as long for any size, and keeps which it ran."""

    planning_ns = 0

    def __init__(self, clock: Clock, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.sizes: list[int] = []
        self._clock = clock

    def run(self, segments: Sequence[Segment], rows: int, bucket: int) -> Executed:
        self._clock.now_ns += RUN_NS + (self.planning_ns if self.sizes[-1:] != [bucket] else 0)
        self.sizes.append(bucket)
        return super().run(segments, rows, bucket)


class Planning(Plain):
    """Plans anew whenever the size changes."""

    planning_ns = PLANNING_NS


class Filling(Planning):
    """Has no memory any more for what it was measured with."""

    def run(self, segments: Sequence[Segment], rows: int, bucket: int) -> Executed:
        if len(self.sizes) > len(bucket_ladder(MAX_ROWS)) and bucket == MAX_ROWS and self.sizes[-1] == 1:
            raise OutOfMemory("no memory")
        return super().run(segments, rows, bucket)


class Breaking(OnnxSession):
    """Breaks its device with a batch larger than those that show whether rows can be joined."""

    def run_fixed(self, binding: Any, run_options: Any, inputs: Any) -> None:
        if any(len(array) > 8 for _, array in inputs):
            raise DeviceFailed("CUDA failure 700")
        super().run_fixed(binding, run_options, inputs)


def instances(kind: type[Plain], clock: Clock) -> Maker:
    def make(path: Path, config: ModelConfig, _: Device, count: int) -> list[Instance]:
        session = OnnxSession(path, plan_session(config, CPU))
        return [kind(clock, session, config.inputs, config.outputs, MAX_ROWS) for _ in range(count)]

    return make


def capturing(kind: type[OnnxSession] = OnnxSession) -> Maker:
    def make(path: Path, config: ModelConfig, _: Device, count: int) -> list[Instance]:
        assert config.captures_graphs
        specs = (config.inputs, config.outputs)
        remake = partial(kind, path, plan_session(config, CPU))
        return [GraphInstance(remake(), *specs, MAX_ROWS, Gate(), ("cpu", 0), remake) for _ in range(count)]

    return make


def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Maker, text: str, budget_ns: int) -> Loaded:
    monkeypatch.setattr(loader, "make_instances", make)
    write_model(tmp_path, "conv", onnx_models.conv_net(16), config=f"max_batch_size: {MAX_ROWS}\n{text}")
    return load(tmp_path, "conv", loader_of(budget_ns, devices=ON_GPU))


@pytest.mark.parametrize("budget_ns", [0, 5_000_000, 500_000_000])
def test_what_is_captured_is_what_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget_ns: int) -> None:
    """Every rung of the ladder, however little time there was to measure them: none is left to be planned for later."""
    found = loaded(tmp_path, monkeypatch, capturing(), "dynamic_batching {}", budget_ns)
    ladder = bucket_ladder(MAX_ROWS)
    assert f"CUDA graphs: {len(ladder)} batch sizes captured" in found.notes
    assert set(found.model.policy.buckets) <= set(ladder)
    assert found.model.state().cuda_graphs == len(ladder)


def test_a_device_that_breaks_while_sizes_are_captured_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is not loaded, and the device is known to be lost."""
    with pytest.raises(ModelLoadError, match="device cuda:0 has failed: CUDA failure 700"):
        loaded(tmp_path, monkeypatch, capturing(Breaking), "dynamic_batching {}", 0)


def test_without_graphs_every_batch_has_one_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """Requests of one to many rows are answered right, padded to the size that was chosen; it never changes."""
    found = loaded(tmp_path, monkeypatch, instances(Planning, clock), WITHOUT_GRAPHS, BUDGET_NS)
    (size,) = found.model.policy.buckets
    assert any(f"every batch is padded to {size} rows" in note for note in found.notes)
    (instance,) = found.model._pools["cuda:0"].instances
    assert isinstance(instance, Planning)
    instance.sizes.clear()
    requests = Requests(found.model.inputs)
    answers = Answers()
    rng = np.random.default_rng(0)
    sent = [rng.standard_normal((rows, *found.model.inputs[0].shape)).astype(np.float32) for rows in (1, 5, 16, 2, 3)]
    asked = [requests.make(x, responder=answers) for x in sent]
    for request in asked:
        found.model.submit(request)
    found.model._runtime.start()
    answers.wait(len(sent))
    assert found.model._runtime.stop(ANSWER_S)
    direct = corpus.open_session(tmp_path / "conv" / "1" / "model.onnx")
    for x, request in zip(sent, asked, strict=True):
        (wanted,) = corpus.run_directly(direct, {found.model.inputs[0].name: x}).values()
        np.testing.assert_allclose(answers.of(request)[0], wanted, atol=1e-5)
    assert set(instance.sizes) == {size}


def test_memory_that_is_gone_when_changes_are_timed_is_no_reason_not_to_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """The model is loaded, with its ladder."""
    found = loaded(tmp_path, monkeypatch, instances(Filling, clock), WITHOUT_GRAPHS, BUDGET_NS)
    assert found.model.policy.buckets == bucket_ladder(MAX_ROWS)


def test_a_model_that_plans_nothing_keeps_its_ladder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """Changing the size costs nothing: every rung is used."""
    found = loaded(tmp_path, monkeypatch, instances(Plain, clock), WITHOUT_GRAPHS, BUDGET_NS)
    assert found.model.policy.buckets == bucket_ladder(MAX_ROWS)
    assert found.model.state().cuda_graphs is None
