"""From a directory to a model that answers: real sessions, tiny models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from service.clock import NS_PER_MS, NS_PER_S
from service.config.model import InstanceKind
from service.engine.devices import Device, Devices
from service.engine.runtime import Runtime
from service.errors import ConfigError, ModelLoadError
from service.repository.loader import Loader, LoadOptions
from service.request import InferenceRequest
from service.scheduler import Segment
from tests.support import onnx_models
from tests.support.onnx_models import write_model
from tests.unit.engine.support import ANSWER_S, Answers, Requests, whole
from tests.unit.repository.loading import CPU, load, loader_of


def parameter(key: str, value: str) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'


BATCHED = {
    "mlp": onnx_models.mlp,
    "text_encoder": onnx_models.text_encoder,
    "string_labels": onnx_models.string_labels,
    "linear_classifier": onnx_models.linear_classifier,
    "tree_classifier": onnx_models.tree_classifier,
    "growing_cache": onnx_models.growing_cache,
    "poison": onnx_models.poison,
    "odd_names": onnx_models.odd_names,
    "empty_rows": onnx_models.empty_rows,
}
UNBATCHED = {
    "scalar_sum": onnx_models.scalar_sum,
    "constant_output": onnx_models.constant_output,
    "unbatched_matrix": onnx_models.unbatched_matrix,
    "recurrent": onnx_models.recurrent,
    "fixed_batch_cnn": onnx_models.fixed_batch_cnn,
    "mixed_batch_outputs": onnx_models.mixed_batch_outputs,
    "string_upper": onnx_models.string_upper,
    "branching": onnx_models.branching,
    "looping": onnx_models.looping,
}


@pytest.mark.parametrize("name", BATCHED)
def test_batched_models_load_without_a_configuration(tmp_path: Path, name: str) -> None:
    """Batch size and everything else from the file; warmed up, measured, joined."""
    write_model(tmp_path, name, BATCHED[name]())
    loaded = load(tmp_path, name)
    assert loaded.model.max_batch_size == 8
    assert loaded.model.config.joins_requests
    assert not [note for note in loaded.notes if "warm-up failed" in note]
    assert loaded.model.latency.table()
    assert loaded.load_ns > 0
    assert loaded.model.load_ns == loaded.load_ns
    assert not loaded.profiled_from_cache


@pytest.mark.parametrize("name", UNBATCHED)
def test_unbatched_models_load_without_a_configuration(tmp_path: Path, name: str) -> None:
    """A request is one execution, and the operator is told why."""
    write_model(tmp_path, name, UNBATCHED[name]())
    loaded = load(tmp_path, name)
    assert loaded.model.max_batch_size == 0
    assert loaded.model.policy.max_batch_rows == 1
    assert any(note.startswith("served unbatched: ") for note in loaded.notes)
    assert not [note for note in loaded.notes if "warm-up failed" in note]


def test_external_data_lies_beside_the_model(tmp_path: Path) -> None:
    """Found by its relative name; a changed weight is another profile."""
    onnx_models.external_data(tmp_path / "m" / "1")
    cache = tmp_path / "cache"
    assert not load(tmp_path, "m", loader_of(cache=cache)).profiled_from_cache
    assert load(tmp_path, "m", loader_of(cache=cache)).profiled_from_cache
    onnx_models.external_data(tmp_path / "m" / "1", seed=1)
    assert not load(tmp_path, "m", loader_of(cache=cache)).profiled_from_cache


def test_a_configuration_is_in_force(tmp_path: Path) -> None:
    """Batch size, objective, instances, thread count: as stated."""
    text = (
        "max_batch_size: 4\ninstance_group { count: 2 kind: KIND_CPU }\ndynamic_batching { preferred_batch_size: 2 }\n"
        + parameter("latency_slo_ms", "500")
        + parameter("intra_op_thread_count", "1")
    )
    write_model(tmp_path, "m", onnx_models.mlp(), config=text)
    model = load(tmp_path, "m").model
    assert (model.max_batch_size, model.policy.max_batch_rows) == (4, 4)
    assert model.policy.slo_ns == 500 * NS_PER_MS
    assert model.policy.max_concurrent == 2
    assert model.policy.preferred_rows == (2,)


def test_instances_on_the_cpu_share_a_session(tmp_path: Path) -> None:
    """Weights exist once, buffers per instance; each has been run before it serves."""
    write_model(tmp_path, "m", onnx_models.mlp(), config="instance_group { count: 3 }")
    model = load(tmp_path, "m").model
    instances = model._pools["cpu"].instances
    assert len(instances) == 3
    assert len({id(instance.session) for instance in instances}) == 1
    assert all(instance._buffers for instance in instances)
    assert model.config.instance_groups[0].kind is InstanceKind.CPU


def test_groups_on_one_device_add_up(tmp_path: Path) -> None:
    """Two groups of the CPU are as many instances as both state."""
    groups = "instance_group { count: 1 kind: KIND_CPU }\ninstance_group { count: 2 kind: KIND_AUTO }\n"
    write_model(tmp_path, "m", onnx_models.mlp(), config=groups)
    model = load(tmp_path, "m").model
    assert len(model._pools["cpu"].instances) == 3
    assert model.policy.devices == ("cpu",)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("instance_group { kind: KIND_GPU }", "instance_group[0].kind"),
        ("instance_group { kind: KIND_CPU }\ninstance_group { kind: KIND_GPU gpus: 3 }", "instance_group[1].gpus"),
        ("instance_group { kind: KIND_MODEL }", "instance_group[0].kind"),
        ("max_batch_size: -1", "max_batch_size"),
        (parameter("latency_slo", "5"), "parameters[latency_slo]"),
        ('input { name: "z" }', "input[0].name"),
        ('input { name: "x" data_type: TYPE_INT8 }', "input[0].data_type"),
        ("ensemble_scheduling { }", "ensemble_scheduling"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_key(tmp_path: Path, text: str, path: str) -> None:
    """Never silently ignored."""
    write_model(tmp_path, "m", onnx_models.mlp(), config=text)
    with pytest.raises(ConfigError) as error:
        load(tmp_path, "m")
    assert error.value.path == path


@pytest.mark.parametrize(
    ("config", "need"),
    [
        ("", 16),
        ('parameters { key: "gpu_mem_limit" value { string_value: "104857600" } }\n', 100),
        ('parameters { key: "gpu_mem_limit" value { string_value: "1048576" } }\n', 16),
    ],
)
def test_a_model_without_room_is_refused_before_a_session_is_made(tmp_path: Path, config: str, need: int) -> None:
    """Its weights, external ones too, or its budget, against what the GPU has free."""
    model = tmp_path / "m" / "1" / "model.onnx"
    model.parent.mkdir(parents=True)
    model.write_bytes(onnx_models.matmul_stack(1, 2048).SerializeToString())
    (tmp_path / "m" / "config.pbtxt").write_text(config + "instance_group { kind: KIND_GPU count: 1 }\n")
    gpu = Device("cuda:0", "gpu", 0, 1, uuid="GPU-1")
    devices = Devices(CPU, (gpu,), (gpu,), "1 NVIDIA GPU")
    asked: list[str] = []

    def free(uuid: str) -> int:
        asked.append(uuid)
        return 5 << 20

    loader = Loader(Runtime(devices.all), devices, LoadOptions(8, 0, None, free))
    with pytest.raises(ConfigError, match=rf"cuda:0 has 5 MiB free, 1 instance needs {need} MiB") as error:
        load(tmp_path, "m", loader)
    assert error.value.path == "instance_group[0]"
    assert asked == ["GPU-1"]


def test_a_file_that_is_no_model_is_refused_with_its_name(tmp_path: Path) -> None:
    """What the reader of graphs cannot read is not given to ONNX Runtime."""
    directory = write_model(tmp_path, "m", onnx_models.mlp())
    (directory / "1" / "model.onnx").write_bytes(b"garbage")
    with pytest.raises(ModelLoadError, match=r"m/1/model\.onnx"):
        load(tmp_path, "m")


def test_an_operator_nobody_knows_is_refused(tmp_path: Path) -> None:
    """The graph reads well, but ONNX Runtime cannot run it."""
    model = onnx_models.mlp()
    model.graph.node[1].op_type = "NoSuchOperator"
    write_model(tmp_path, "m", model)
    with pytest.raises(ModelLoadError, match="NoSuchOperator"):
        load(tmp_path, "m")


def test_a_model_without_a_warm_up_input_serves_all_the_same(tmp_path: Path) -> None:
    """Nothing that was tried is accepted: said in a note, learned from requests."""
    text = parameter("batching", "off")
    # An index table of no rows at all: every index is out of bounds.
    model = onnx_models.poison(rows=1)
    for initializer in model.graph.initializer:
        if initializer.name == "table":
            initializer.CopyFrom(onnx_models.numpy_helper.from_array(np.zeros((0, 4), np.float32), "table"))
    write_model(tmp_path, "m", model, config=text)
    loaded = load(tmp_path, "m")
    assert any("warm-up failed, so the first requests teach instead" in note for note in loaded.notes)
    assert not any(any(table.values()) for table in loaded.model.latency.table().values())


def warmup(rows: int, count: int, size: int) -> str:
    entry = f'inputs {{ key: "x" value {{ data_type: TYPE_FP32 dims: {size} zero_data: true }} }}'
    return f"model_warmup {{ name: 'w{size}' batch_size: {rows} count: {count} {entry} }}\n"


def test_every_stated_warm_up_is_run_on_every_instance(tmp_path: Path) -> None:
    """Not only the first: each shape has its buffers, and clients of that shape use them."""
    text = "max_batch_size: 4\ninstance_group { count: 2 }\n" + warmup(2, 1, 3) + warmup(4, 2, 5)
    # Fixed output sizes, so that buffers are bound.
    model = onnx_models.make_model(
        "sums",
        [onnx_models.helper.make_node("ReduceSum", ["x", "axis"], ["y"], keepdims=1)],
        [onnx_models.value("x", "FP32", ["N", "S"])],
        [onnx_models.value("y", "FP32", ["N", 1])],
        {"axis": np.array([1], np.int64)},
    )
    write_model(tmp_path, "m", model, config=text)
    loaded = load(tmp_path, "m")
    for instance in loaded.model._pools["cpu"].instances:
        for size in (3, 5):
            assert loaded.model.shape_class(((size,),), ()) in instance._buffers


def test_a_stated_warm_up_that_is_refused_fails_the_load(tmp_path: Path) -> None:
    """The operator knows what the model takes: when it does not, something is wrong with one of the two."""
    bad = "inputs { key: 'index' value { data_type: TYPE_INT64 dims: 1 input_data_file: 'bad' } }"
    good = "inputs { key: 'index' value { data_type: TYPE_INT64 dims: 1 zero_data: true } }"
    text = f"max_batch_size: 4\nmodel_warmup {{ batch_size: 1 {good} }}\nmodel_warmup {{ batch_size: 2 {bad} }}\n"
    directory = write_model(tmp_path, "m", onnx_models.poison(), config=text)
    (directory / "warmup").mkdir()
    (directory / "warmup" / "bad").write_bytes(np.array([99999], np.int64).tobytes())
    with pytest.raises(ModelLoadError, match=r"model_warmup\[1\]: the model refuses it: .*out of data bounds"):
        load(tmp_path, "m")


def test_a_model_that_cannot_be_joined_says_so_to_clients(tmp_path: Path) -> None:
    """Found out by running it: the completed configuration has no dynamic_batching, the note says why."""
    node = onnx_models.helper.make_node("ReduceSum", ["x", "axis"], ["total"], keepdims=1)
    model = onnx_models.make_model(
        "total",
        [node],
        [onnx_models.value("x", "FP32", ["N", 4])],
        [onnx_models.value("total", "FP32", ["N", 4])],
        {"axis": np.array([0], np.int64)},
    )
    write_model(tmp_path, "derived", model)
    loaded = load(tmp_path, "derived")
    assert not loaded.model.config.joins_requests
    assert not loaded.completed.config.joins_requests
    assert not loaded.completed.proto.HasField("dynamic_batching")
    assert any("requests are not joined: output 'total'" in note for note in loaded.notes)
    write_model(tmp_path, "explicit", model, config="max_batch_size: 4")
    with pytest.raises(ModelLoadError, match="set it to 0"):
        load(tmp_path, "explicit")


def test_dynamic_quantisation_is_joined_only_when_asked_for(tmp_path: Path) -> None:
    """By default not, with the reason; on request, with the consequence."""
    write_model(tmp_path, "default", onnx_models.dynamic_quantised())
    loaded = load(tmp_path, "default")
    assert not loaded.model.config.joins_requests
    assert any("DynamicQuantizeLinear" in note for note in loaded.notes)
    write_model(tmp_path, "asked", onnx_models.dynamic_quantised(), config=parameter("batching", "on"))
    loaded = load(tmp_path, "asked")
    assert loaded.model.config.joins_requests
    assert any("depend" in note for note in loaded.notes)


def test_what_was_measured_is_what_is_expected(tmp_path: Path) -> None:
    """The model's own shape is the measured one: no guess for the first client."""
    write_model(tmp_path, "m", onnx_models.mlp())
    model = load(tmp_path, "m", loader_of(budget_ns=NS_PER_S)).model
    shape = model.shape_class(((8,),), ())
    assert model.latency.curve(shape, 8).profiled
    assert 0 < model.latency.estimate(shape, 1, 8) <= model.latency.estimate(shape, 8, 8)
    assert model.policy.max_batch_rows == 8


@pytest.mark.parametrize("where", ["server", "model"])
def test_a_budget_of_nothing_measures_nothing(tmp_path: Path, where: str) -> None:
    """The model has run once, its batch size stands, and requests teach the rest."""
    text = parameter("profile_budget_ms", "0") if where == "model" else None
    write_model(tmp_path, "m", onnx_models.mlp(), config=text)
    model = load(tmp_path, "m", loader_of(budget_ns=0 if where == "server" else 10**9)).model
    shape = model.shape_class(((8,),), ())
    assert model.latency.estimate(shape, 8, 8) == 0
    assert model.policy.max_batch_rows == 8
    assert shape in model._pools["cpu"].instances[0]._buffers


def test_a_loaded_model_runs(tmp_path: Path) -> None:
    """Its pool executes what a worker would hand it."""
    write_model(tmp_path, "m", onnx_models.identity())
    model = load(tmp_path, "m").model
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    request: InferenceRequest = Requests(model.inputs).make(x)
    instance = model._pools["cpu"].acquire()
    segments: list[Segment] = whole(request)
    assert np.array_equal(instance.run(segments, 3, 3).outputs[0].array, x)


def test_a_model_that_cannot_be_joined_answers_each_request_as_one(tmp_path: Path) -> None:
    """Three rows are one execution of three rows, whatever waits beside it: the sum is the sum of its own."""
    node = onnx_models.helper.make_node("ReduceSum", ["x", "axis"], ["total"], keepdims=1)
    ends = [onnx_models.value("x", "FP32", ["N", 2])], [onnx_models.value("total", "FP32", ["N", 2])]
    model = onnx_models.make_model("total", [node], *ends, {"axis": np.array([0], np.int64)})
    write_model(tmp_path, "m", model)
    loader = loader_of()
    loaded = load(tmp_path, "m", loader).model
    answers, requests = Answers(), Requests(loaded.inputs)
    sent = []
    for rows in (3, 1, 8, 3):
        x = np.arange(2 * rows, dtype=np.float32).reshape(rows, 2) + rows
        sent.append((requests.make(x, responder=answers), x))
        loaded.submit(sent[-1][0])
    loader._runtime.start()
    answers.wait(4)
    assert loader._runtime.stop(ANSWER_S)
    for request, x in sent:
        assert np.array_equal(answers.of(request)[0], x.sum(axis=0, keepdims=True))
    assert loaded.metrics.statistics().execution_count == 4
