"""Heads on one backbone, on a real server: batched together, answered as if composed, each with a name of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from tests.support import onnx_models
from tests.support.client import Client, arrays, request
from tests.support.native import needs_native
from tests.support.onnx_models import HEAD_CONFIG, write_model
from tests.support.server import RunningServer, running_server
from tests.support.stream import metric, wait_for

HEADS = 5
ON_BACKBONE = HEAD_CONFIG.replace("BACKBONE", "backbone")
BACKBONE = onnx_models.backbone()
BACKBONE_CONFIG = "max_batch_size: 16\ndynamic_batching {}\n"


def head(number: int, **how: Any) -> onnx.ModelProto:
    return onnx_models.head(classes=3 + number, seed=number, **how)


def write_repository(directory: Path) -> Path:
    # Named so that it would be loaded after its heads.
    write_model(directory, "backbone", BACKBONE, config=BACKBONE_CONFIG)
    for number in range(HEADS):
        write_model(directory, f"a{number}", head(number), config=ON_BACKBONE)
    labelled = ON_BACKBONE + 'output { name: "probabilities" label_filename: "labels.txt" }\noutput { name: "label" }\n'
    write_model(directory, "labelled", head(0), config=labelled)
    (directory / "labelled" / "labels.txt").write_text("one\ntwo\nthree\n")
    promised = ON_BACKBONE + 'parameters { key: "latency_slo_ms" value { string_value: "5000" } }\n'
    write_model(directory, "promised", head(1), config=promised)
    return directory


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture(scope="module", params=["native", "core"])
def server(request: pytest.FixtureRequest, repository: Path) -> Iterator[RunningServer]:
    if request.param == "native":
        needs_native()
    flags = ("--ingress", request.param, "--metrics-port", "0", "--model-control-mode", "explicit", "--load-model", "*")
    with running_server(repository, *flags) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Client:
    return Client(server.channel())


def wanted(number: int, x: Any) -> list[Any]:
    """What backbone and head as one model answer."""
    model = onnx_models.composed(BACKBONE, head(number))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(["probabilities", "label"], {"x": x}))


def test_a_head_answers_as_the_composed_model(client: Client) -> None:
    rng = np.random.default_rng(0)
    for number in range(HEADS):
        x = rng.standard_normal((3, 8)).astype(np.float32)
        answer = arrays(client.infer(request(f"a{number}", {"x": x})))
        probabilities, label = wanted(number, x)
        assert np.array_equal(answer["label"], label)
        np.testing.assert_allclose(answer["probabilities"], probabilities, rtol=1e-5)


def test_metadata_and_configuration_are_the_heads_own(client: Client) -> None:
    metadata = client.call("ModelMetadata", name="a1")
    assert [(tensor.name, list(tensor.shape)) for tensor in metadata.inputs] == [("x", [-1, 8])]
    assert [(t.name, list(t.shape)) for t in metadata.outputs] == [("probabilities", [-1, 4]), ("label", [-1, 1])]
    config = client.call("ModelConfig", name="a1").config
    assert config.max_batch_size == 16
    assert config.HasField("dynamic_batching")
    assert config.parameters["backbone"].string_value == "backbone"


def test_classes_of_a_head(client: Client) -> None:
    message = request("labelled", {"x": np.ones((1, 8), np.float32)})
    message.outputs.add(name="probabilities").parameters["classification"].int64_param = 1
    (best,) = arrays(client.infer(message))["probabilities"][0]
    assert best.split(b":")[2] in (b"one", b"two", b"three")


def test_requests_of_all_heads_share_batches(server: RunningServer) -> None:
    """Clients of five heads and of the backbone itself, all at once: each gets its own answers, and statistics say who
    was answered, and that batches were shared."""
    before = {name: Client(server.channel()).statistics(name).inference_count for name in names()}
    batches = metric(server, 'onclock_batches_total{model="backbone"')
    rng = np.random.default_rng(7)
    failures: list[BaseException] = []
    together = threading.Barrier(12)

    def ask(number: int) -> None:
        try:
            client = Client(server.channel())
            xs = rng.standard_normal((60, 2, 8)).astype(np.float32)
            together.wait(30)
            for x in xs:
                if number % 6 == 5:
                    answer = arrays(client.infer(request("backbone", {"x": x})))
                    assert answer["features"].shape == (2, 16)
                    continue
                answer = arrays(client.infer(request(f"a{number % 6}", {"x": x})))
                probabilities, label = wanted(number % 6, x)
                assert np.array_equal(answer["label"], label)
                np.testing.assert_allclose(answer["probabilities"], probabilities, rtol=1e-5)
        except BaseException as error:  # noqa: BLE001 - reported by the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures, failures[0]
    for name in names():
        assert Client(server.channel()).statistics(name).inference_count - before[name] == 2 * 60 * 2
    assert metric(server, 'onclock_batches_total{model="backbone"') - batches < 12 * 60


def names() -> list[str]:
    return [*(f"a{number}" for number in range(HEADS)), "backbone"]


def test_a_bad_request_to_a_head_names_the_head(client: Client) -> None:
    with pytest.raises(grpc.RpcError, match="'a1'") as caught:
        client.infer(request("a1", {"features": np.zeros((1, 16), np.float32)}))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError, match="'a1'"):
        client.infer(request("a1", {"x": np.zeros((17, 8), np.float32)}))


def test_a_deadline_is_the_heads_own(server: RunningServer, client: Client) -> None:
    assert arrays(client.infer(request("promised", {"x": np.ones((1, 8), np.float32)})))
    assert metric(server, 'onclock_slo_seconds{model="promised"') == 5
    assert metric(server, 'onclock_slo_seconds{model="a1"') == 0


@pytest.mark.parametrize(
    ("model", "config", "said"),
    [
        (head(1, width=17), ON_BACKBONE, "gives FP32 [-1, 16]"),
        (head(1), HEAD_CONFIG.replace("BACKBONE", "nobody"), "no model 'nobody' serves; load it first"),
        (head(1), HEAD_CONFIG.replace("BACKBONE", "backbone/7"), "no model 'backbone' version 7 serves"),
        (head(1), HEAD_CONFIG.replace("BACKBONE", "a1"), "'a1' is a head"),
        (onnx_models.mlp(), ON_BACKBONE, "takes 'x', which 'backbone' does not give; it gives features, scores"),
        (
            head(1),
            ON_BACKBONE + f'parameters {{ key: "backbone_sha256" value {{ string_value: "{"0" * 64}" }} }}',
            "is another one than this head was made for",
        ),
        (head(1), ON_BACKBONE + "instance_group { count: 2 }", "instance_group: a head runs as its backbone does"),
        (head(1), ON_BACKBONE + "max_batch_size: 4", "4 is not the 16 of 'backbone'"),
        (
            head(1),
            ON_BACKBONE + 'parameters { key: "batching" value { string_value: "off" } }',
            "parameters[batching]: a head runs as its backbone does",
        ),
        (head(1), ON_BACKBONE + 'input { name: "features" }', "input: a head runs as its backbone does"),
    ],
)
def test_what_does_not_fit_is_refused(
    model: onnx.ModelProto, config: str, said: str, server: RunningServer, repository: Path, client: Client
) -> None:
    write_model(repository, "wrong", model, config=config)
    with pytest.raises(grpc.RpcError) as caught:
        client.call("RepositoryModelLoad", model_name="wrong")
    assert said in caught.value.details()
    assert arrays(client.infer(request("a1", {"x": np.ones((1, 8), np.float32)})))


def test_a_head_that_fails_on_a_row_fails_that_request_alone(
    server: RunningServer, repository: Path, client: Client
) -> None:
    """Its rows are looked up in a table: what is outside fails, what rides beside it does not."""
    # Its table has a place for every row but those whose largest feature is next to nothing.
    quiet = onnx_models.make_model(
        "quiet",
        [
            onnx_models.helper.make_node("ReduceMax", ["features"], ["most"], axes=[1], keepdims=1),
            onnx_models.helper.make_node("Abs", ["most"], ["size"]),
            onnx_models.helper.make_node("Div", ["tiny", "size"], ["scaled"]),
            onnx_models.helper.make_node("Cast", ["scaled"], ["index"], to=7),
            onnx_models.helper.make_node("Gather", ["table", "index"], ["found"]),
        ],
        [onnx_models.value("features", "FP32", ["N", 16])],
        [onnx_models.value("found", "FP32", ["N", 1])],
        {"tiny": np.array(1e-6, np.float32), "table": np.zeros(100, np.float32)},
    )
    write_model(repository, "picky", quiet, config=ON_BACKBONE)
    client.call("RepositoryModelLoad", model_name="picky")
    good = request("picky", {"x": np.ones((1, 8), np.float32)})
    # Features of a row of zeros are zeros: the index is out of any table.
    bad = request("picky", {"x": np.zeros((1, 8), np.float32)})
    calls = [client.infer_future(bad if at % 4 == 1 else good) for at in range(40)]
    for at, call in enumerate(calls):
        if at % 4 == 1:
            with pytest.raises(grpc.RpcError, match="'picky'") as caught:
                call.result()
            assert caught.value.code() is grpc.StatusCode.INTERNAL
        else:
            assert arrays(call.result())["found"].shape == (1, 1)
    assert metric(server, 'onclock_failures_total{model="picky"') == 10
    client.call("RepositoryModelUnload", model_name="picky")


def test_a_head_comes_and_goes_under_load(server: RunningServer, repository: Path) -> None:
    """Others go on; requests of the one that goes are answered or refused, none is lost; the backbone stays."""
    over = threading.Event()
    failures: list[str] = []
    answered = 0

    def ask(number: int) -> None:
        nonlocal answered
        client = Client(server.channel())
        while not over.is_set():
            try:
                client.infer(request(f"a{number}", {"x": np.ones((1, 8), np.float32)}))
                answered += 1
            except grpc.RpcError as error:
                failures.append(error.details())

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(HEADS)]
    for thread in threads:
        thread.start()
    control = Client(server.channel())
    write_model(repository, "fresh", head(2), config=ON_BACKBONE)
    for _ in range(20):
        control.call("RepositoryModelLoad", model_name="fresh")
        assert arrays(control.infer(request("fresh", {"x": np.ones((1, 8), np.float32)})))
        control.call("RepositoryModelUnload", model_name="fresh")
    over.set()
    for thread in threads:
        thread.join(30)
    assert not failures, failures[0]
    assert answered > 100


def test_a_backbone_that_is_replaced_stays_for_its_heads(tmp_path: Path) -> None:
    """Heads go on as they are until they are loaded again; then they build on the new one, and the old one goes."""
    write_repository(tmp_path)
    flags = ("--model-control-mode", "explicit", "--load-model", "*", "--metrics-port", "0", "--log-level", "info")
    x = np.ones((1, 8), np.float32)
    with running_server(tmp_path, *flags) as server:
        client = Client(server.channel())
        before = arrays(client.infer(request("a1", {"x": x})))["probabilities"]
        write_model(tmp_path, "backbone", onnx_models.backbone(seed=9), config=BACKBONE_CONFIG)
        client.call("RepositoryModelLoad", model_name="backbone")
        assert np.array_equal(arrays(client.infer(request("a1", {"x": x})))["probabilities"], before)
        client.call("RepositoryModelLoad", model_name="a1")
        after = arrays(client.infer(request("a1", {"x": x})))["probabilities"]
        assert not np.array_equal(after, before)
        assert arrays(client.infer(request("a2", {"x": x})))["probabilities"].shape == (1, 5)
        client.call("RepositoryModelUnload", model_name="backbone")
        index = client.call("RepositoryIndex").models
        assert {m.name: m.state for m in index}["backbone"] != "READY"
        assert np.array_equal(arrays(client.infer(request("a1", {"x": x})))["probabilities"], after)
        for number in (*range(HEADS),):
            client.call("RepositoryModelUnload", model_name=f"a{number}")
        for name in ("labelled", "promised"):
            client.call("RepositoryModelUnload", model_name=name)
        wait_for(
            lambda: all(
                m.reason != "unloading" and m.state == "UNAVAILABLE" for m in client.call("RepositoryIndex").models
            ),
            "everything is gone",
        )


def test_heads_that_come_with_their_backbone_or_before_it(tmp_path: Path) -> None:
    """In `poll` mode, whatever the order of their names and of their coming: served once both are there."""
    write_model(tmp_path, "other", onnx_models.mlp())
    flags = ("--model-control-mode", "poll", "--repository-poll-secs", "0.2")
    with running_server(tmp_path, *flags) as server:
        client = Client(server.channel())

        def state(name: str) -> str:
            return next((m.state for m in client.call("RepositoryIndex").models if m.name == name), "")

        write_model(tmp_path, "a0", head(0), config=ON_BACKBONE)
        wait_for(lambda: state("a0") == "UNAVAILABLE", "it is tried without its backbone")
        write_model(tmp_path, "a1", head(1), config=ON_BACKBONE)
        write_model(tmp_path, "backbone", BACKBONE, config=BACKBONE_CONFIG)
        wait_for(lambda: state("a0") == state("a1") == state("backbone") == "READY", "all three serve")
        assert arrays(client.infer(request("a1", {"x": np.ones((1, 8), np.float32)})))
