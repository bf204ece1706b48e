"""What clients of the protocol send and expect, against a running server: the RPCs, parameters, outputs, limits."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from onnx import helper

from service.pb import grpc_service_pb2 as pb
from tests.support import onnx_models
from tests.support.client import SERVICE, TIMEOUT_S, Client, arrays, request, settled, words
from tests.support.corpus import model_file, open_session, run_directly
from tests.support.server import RunningServer, running_server

MAX_MESSAGE = 8 << 20
X = np.arange(16, dtype=np.float32).reshape(2, 8) / 16
PRIORITIES = """
max_batch_size: 8
dynamic_batching { priority_levels: 3 default_priority_level: 2 }
"""


def widening(columns: int) -> Any:
    """`x` FP32 [N, 1] -> `y` FP32 [N, columns]: a small request with a large answer."""
    return onnx_models.make_model(
        "widening",
        [helper.make_node("Mul", ["x", "ones"], ["y"])],
        [onnx_models.value("x", "FP32", ["N", 1])],
        [onnx_models.value("y", "FP32", ["N", columns])],
        {"ones": np.ones((1, columns), np.float32)},
    )


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("repository")
    onnx_models.write_model(directory, "mlp", onnx_models.mlp())
    onnx_models.write_model(directory, "many", onnx_models.recurrent())
    onnx_models.write_model(directory, "labels", onnx_models.string_labels())
    onnx_models.write_model(directory, "side", onnx_models.side_input())
    onnx_models.write_model(directory, "prior", onnx_models.mlp(seed=1), config=PRIORITIES)
    onnx_models.write_model(directory, "wide", widening(1 << 20))
    onnx_models.write_model(directory, "images", onnx_models.image_identity())
    versions = "version_policy { specific { versions: [1, 3] } }"
    for version in (1, 2, 3):
        onnx_models.write_model(directory, "three", onnx_models.mlp(seed=version), version, versions)
    (directory / "broken" / "1").mkdir(parents=True)
    (directory / "broken" / "1" / "model.onnx").write_bytes(b"this is no model")
    return directory


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[RunningServer]:
    with running_server(repository, "--max-message-bytes", str(MAX_MESSAGE), "--profile-budget-ms", "20") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Client:
    return Client(server.channel())


def direct(repository: Path, name: str, version: int = 1, /, **inputs: Any) -> dict[str, Any]:
    return run_directly(open_session(model_file(repository / name, version)), inputs)


def status_of(act: Any) -> tuple[StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        act()
    error: Any = caught.value
    return error.code(), error.details()


# Inference


@pytest.mark.parametrize("typed", [False, True])
def test_an_answer_has_everything_clients_read(client: Client, repository: Path, typed: bool) -> None:
    """Id, name, concrete version, datatype, shape, one raw entry per output; raw or typed makes no difference."""
    answer = client.infer(request("mlp", {"x": X}, request_id="\u00fcnique", typed=typed))
    assert (answer.id, answer.model_name, answer.model_version) == ("\u00fcnique", "mlp", "1")
    assert [(o.name, o.datatype, list(o.shape)) for o in answer.outputs] == [("y", "FP32", [2, 4])]
    assert len(answer.raw_output_contents) == 1
    assert not answer.outputs[0].HasField("contents")
    np.testing.assert_allclose(arrays(answer)["y"], direct(repository, "mlp", x=X)["y"], rtol=1e-5)


def test_no_id_no_id(client: Client) -> None:
    """A request without an id is answered without one."""
    assert client.infer(request("mlp", {"x": X})).id == ""


def test_outputs_asked_for_in_any_order(client: Client, repository: Path) -> None:
    """All by default; otherwise those that are asked for, in the client's order."""
    inputs = {"x": np.ones((1, 4), np.float32), "state": np.ones((2, 1, 4), np.float32)}
    expected = direct(repository, "many", **inputs)
    for wanted in ([], ["state_out", "y"], ["state_out"]):
        answer = client.infer(request("many", inputs, outputs=wanted))
        assert [o.name for o in answer.outputs] == (wanted or ["y", "state_out"])
        for name, array in arrays(answer).items():
            np.testing.assert_allclose(array, expected[name], rtol=1e-5)


def test_strings_in_and_out(client: Client, repository: Path) -> None:
    """BYTES travel as length-prefixed elements both ways."""
    names = words("dog", "nobody", "", shape=(3, 1))
    answer = arrays(client.infer(request("labels", {"name": names})))
    expected = direct(repository, "labels", name=names)
    np.testing.assert_array_equal(answer["id"], expected["id"])
    assert [text.decode() for text in answer["echo"].ravel()] == expected["echo"].ravel().tolist()
    assert answer["echo"][0, 0] == b"dog"


def test_side_values_are_each_requests_own(client: Client) -> None:
    """Requests that differ in an input without a batch dimension never get each other's."""
    x = np.ones((1, 4), np.float32)
    futures = [client.infer_future(request("side", {"x": x, "rate": np.array(n % 5, np.int64)})) for n in range(60)]
    for n, future in enumerate(futures):
        np.testing.assert_array_equal(arrays(future.result())["y"], x * (n % 5))


def test_versions(client: Client, repository: Path) -> None:
    """None asked for means the latest that is served; others by number; one that is not served is not ready."""
    for asked, version in (("", 3), ("3", 3), ("1", 1)):
        answer = client.infer(request("three", {"x": X}, version=asked))
        assert answer.model_version == str(version)
        np.testing.assert_allclose(arrays(answer)["y"], direct(repository, "three", version, x=X)["y"], rtol=1e-5)
    code, details = status_of(lambda: client.infer(request("three", {"x": X}, version="2")))
    assert code is StatusCode.UNAVAILABLE
    assert "'three' version 2 is not at ready state" in details


@pytest.mark.parametrize(
    "parameters",
    [
        {"triton_enable_empty_final_response": False},
        {"triton_enable_empty_final_response": True},
        {"sequence_id": 0, "sequence_start": False, "sequence_end": False},
        {"sequence_id": ""},
        {"timeout": 10_000_000},
        {"priority": 0},
        {"my own": "text", "and": True, "another": 7, "half": 0.5},
    ],
)
def test_parameters_that_pass(client: Client, parameters: dict[str, Any]) -> None:
    """What clients send with every request, and what means nothing to the server."""
    assert client.infer(request("mlp", {"x": X}, parameters=parameters)).outputs


@pytest.mark.parametrize("kind", ["int64_param", "uint64_param"])
@pytest.mark.parametrize("level", [0, 1, 3, 99])
def test_priority_signed_or_unsigned(client: Client, kind: str, level: int) -> None:
    """Clients send the priority as int64 or as uint64."""
    message = request("prior", {"x": X})
    setattr(message.parameters["priority"], kind, level)
    assert client.infer(message).outputs


@pytest.mark.parametrize("kind", ["int64_param", "uint64_param"])
def test_a_timeout_that_cannot_be_kept_is_refused_by_the_server(client: Client, kind: str) -> None:
    """One microsecond is over before the request is queued: the client need not wait for its own deadline."""
    message = request("mlp", {"x": X})
    setattr(message.parameters["timeout"], kind, 1)
    start = time.monotonic()
    code, details = status_of(lambda: client.infer(message))
    assert code is StatusCode.DEADLINE_EXCEEDED
    assert "'mlp'" in details
    assert time.monotonic() - start < TIMEOUT_S / 2


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_requests(client: Client, repository: Path, compression: grpc.Compression) -> None:
    """Both of gRPC's compressions; the answer is the same."""
    answer = client.infer(request("mlp", {"x": X}), compression=compression)
    np.testing.assert_allclose(arrays(answer)["y"], direct(repository, "mlp", x=X)["y"], rtol=1e-5)


def test_messages_up_to_the_limit(client: Client) -> None:
    """Several megabytes each way below the limit; above it RESOURCE_EXHAUSTED, for requests and for answers."""
    rows = np.random.default_rng(0).standard_normal((12, 3, 224, 224)).astype(np.float32)
    np.testing.assert_array_equal(arrays(client.infer(request("images", {"x": rows})))["y"], rows)
    code, details = status_of(lambda: client.infer(request("images", {"x": np.concatenate([rows, rows])})))
    assert code is StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in details
    one = np.ones((1, 1), np.float32)
    assert arrays(client.infer(request("wide", {"x": one})))["y"].shape == (1, 1 << 20)
    code, details = status_of(lambda: client.infer(request("wide", {"x": np.ones((3, 1), np.float32)})))
    assert code is StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in details
    assert client.infer(request("wide", {"x": one})).outputs


def test_a_small_message_that_unpacks_to_a_large_one(client: Client) -> None:
    """The limit is on what a compressed message unpacks to."""
    bomb = request("images", {"x": np.zeros((24, 3, 224, 224), np.float32)})
    code, _ = status_of(lambda: client.infer(bomb, compression=grpc.Compression.Gzip))
    assert code is StatusCode.RESOURCE_EXHAUSTED


def test_cancelled_requests_do_not_disturb_others(client: Client, repository: Path) -> None:
    """Every second of many requests is cancelled at once; the others are answered, and rightly."""
    expected = direct(repository, "mlp", x=X)["y"]
    futures = [client.infer_future(request("mlp", {"x": X})) for _ in range(200)]
    for future in futures[::2]:
        future.cancel()
    for future in futures[1::2]:
        np.testing.assert_allclose(arrays(future.result())["y"], expected, rtol=1e-5)


# The control plane


def test_live_ready_and_models_ready(client: Client) -> None:
    """Unknown models are errors; known ones that cannot answer are not ready."""
    assert client.call("ServerLive").live
    assert client.call("ServerReady").ready
    assert client.call("ModelReady", name="mlp").ready
    assert client.call("ModelReady", name="mlp", version="1").ready
    assert not client.call("ModelReady", name="broken").ready
    assert not client.call("ModelReady", name="three", version="2").ready
    code, details = status_of(lambda: client.call("ModelReady", name="nobody"))
    assert code is StatusCode.INVALID_ARGUMENT
    assert "Request for unknown model: 'nobody' is not found" in details
    assert status_of(lambda: client.call("ModelReady", name="mlp", version="7"))[0] is StatusCode.NOT_FOUND


def test_server_metadata(client: Client) -> None:
    """perf_analyzer looks for "statistics" here."""
    metadata = client.call("ServerMetadata")
    assert metadata.name == "onclock"
    assert metadata.version
    assert {"statistics", "model_configuration"} <= set(metadata.extensions)


def test_model_metadata(client: Client) -> None:
    """Shapes begin with the batch where there is one; versions are numbers."""
    metadata = client.call("ModelMetadata", name="many")
    assert (metadata.name, metadata.platform, list(metadata.versions)) == ("many", "onnxruntime_onnx", ["1"])
    assert {(t.name, t.datatype) for t in metadata.inputs} == {("x", "FP32"), ("state", "FP32")}
    three = client.call("ModelMetadata", name="three")
    assert list(three.versions) == ["1", "3"]
    assert list(three.inputs[0].shape) == [-1, 8]


def test_model_config_leaves_out_what_is_not_there(client: Client) -> None:
    """An empty `sequence_batching` would make clients believe in a sequence model."""
    config = client.call("ModelConfig", name="prior").config
    assert config.max_batch_size == 8
    assert config.HasField("dynamic_batching")
    assert not config.HasField("sequence_batching")
    assert not config.HasField("ensemble_scheduling")
    assert list(config.input[0].dims) == [8]


def test_statistics_count_requests_rows_and_runs(client: Client) -> None:
    """The three compute counts are equal, as perf_analyzer demands; rows and failures are counted."""
    before = client.statistics("labels")
    for rows in (1, 3):
        client.infer(request("labels", {"name": words(*["cat"] * rows, shape=(rows, 1))}))
    after = settled(client, "labels", before.execution_count + 2)
    assert (after.name, after.version) == ("labels", "1")
    assert after.inference_count - before.inference_count == 4
    assert after.execution_count - before.execution_count == 2
    stats, earlier = after.inference_stats, before.inference_stats
    for field in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
        assert getattr(stats, field).count - getattr(earlier, field).count == 2
        assert getattr(stats, field).ns > getattr(earlier, field).ns
    assert {b.batch_size for b in after.batch_stats} >= {1, 3}


def test_statistics_of_everything_or_of_one_version(client: Client) -> None:
    """No name means every model; a version without a name is a mistake."""
    everything = {(s.name, s.version) for s in client.call("ModelStatistics").model_stats}
    assert everything >= {("mlp", "1"), ("three", "1"), ("three", "3")}
    assert [s.version for s in client.call("ModelStatistics", name="three").model_stats] == ["1", "3"]
    assert [s.version for s in client.call("ModelStatistics", name="three", version="1").model_stats] == ["1"]
    code, details = status_of(lambda: client.call("ModelStatistics", version="1"))
    assert code is StatusCode.INVALID_ARGUMENT
    assert "without the name of a model" in details


def test_repository_index(client: Client) -> None:
    """Every version with its state; what failed says why; `ready` leaves out the others."""
    index = {(m.name, m.version): m for m in client.call("RepositoryIndex").models}
    assert index["mlp", "1"].state == "READY"
    assert index["broken", "1"].state == "UNAVAILABLE"
    assert index["broken", "1"].reason
    assert index["three", "2"].state == "UNAVAILABLE"
    ready = client.call("RepositoryIndex", ready=True).models
    assert {m.state for m in ready} == {"READY"}
    assert ("three", "3") in {(m.name, m.version) for m in ready}
    code, _ = status_of(lambda: client.call("RepositoryIndex", repository_name="other"))
    assert code is StatusCode.INVALID_ARGUMENT


def test_a_model_that_failed_to_load_says_why(client: Client) -> None:
    """The reason is in the answer to a request, too."""
    code, details = status_of(lambda: client.infer(request("broken", {"x": X})))
    assert code is StatusCode.UNAVAILABLE
    assert "'broken' is not at ready state: " in details


def test_every_method_is_offered(client: Client) -> None:
    """None of the protocol's answers UNIMPLEMENTED for want of a handler."""
    for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
        if method.client_streaming:
            continue
        outcome: Any = client.method(method.name).future(getattr(pb, method.input_type.name)(), timeout=TIMEOUT_S)
        error = outcome.exception()
        assert error is None or "Method not found" not in error.details(), method.name


def test_unknown_methods(server: RunningServer) -> None:
    """A method that the protocol does not have."""
    call = server.channel().unary_unary(f"/{SERVICE}/Nothing", None, None)
    assert status_of(lambda: call(b"", timeout=TIMEOUT_S))[0] is StatusCode.UNIMPLEMENTED


# Health and reflection


def test_health_of_server_and_models(server: RunningServer) -> None:
    """The server by the empty name and by the service's, each model by its own; an unknown name is NOT_FOUND."""
    check = health_pb2_grpc.HealthStub(server.channel()).Check
    statuses = {
        name: check(health_pb2.HealthCheckRequest(service=name), timeout=TIMEOUT_S).status
        for name in ("", SERVICE, "mlp", "three", "broken")
    }
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    assert statuses == {"": serving, SERVICE: serving, "mlp": serving, "three": serving, "broken": not_serving}
    code, _ = status_of(lambda: check(health_pb2.HealthCheckRequest(service="nobody"), timeout=TIMEOUT_S))
    assert code is StatusCode.NOT_FOUND


def test_watching_a_model(server: RunningServer) -> None:
    """A watch begins with the present state; an unknown name is SERVICE_UNKNOWN and stays watched."""
    watch = health_pb2_grpc.HealthStub(server.channel()).Watch
    for name, expected in (("mlp", "SERVING"), ("broken", "NOT_SERVING"), ("nobody", "SERVICE_UNKNOWN")):
        stream = watch(health_pb2.HealthCheckRequest(service=name), timeout=TIMEOUT_S)
        first = next(iter(stream)).status
        assert health_pb2.HealthCheckResponse.ServingStatus.Name(first) == expected
        stream.cancel()


def test_many_watches_do_not_starve_requests(server: RunningServer, client: Client) -> None:
    """Open streams hold none of the threads that answer unary calls."""
    watch = health_pb2_grpc.HealthStub(server.channel()).Watch
    streams = [watch(health_pb2.HealthCheckRequest(service="mlp")) for _ in range(40)]
    for stream in streams:
        next(iter(stream))
    assert client.infer(request("mlp", {"x": X})).outputs
    assert client.call("ServerReady").ready
    for stream in streams:
        stream.cancel()


def reflected(server: RunningServer, *questions: Any) -> Sequence[Any]:
    stub = reflection_pb2_grpc.ServerReflectionStub(server.channel())
    return list(stub.ServerReflectionInfo(iter(questions), timeout=TIMEOUT_S))


def test_reflection_finds_methods(server: RunningServer) -> None:
    """As the file of their service; one that does not exist is not found."""
    Request = reflection_pb2.ServerReflectionRequest  # noqa: N806
    names = (SERVICE, f"{SERVICE}.ModelInfer", f"{SERVICE}.Nothing", "no.Such.Service")
    service, method, *missing = reflected(server, *(Request(file_containing_symbol=name) for name in names))
    assert method.file_descriptor_response.file_descriptor_proto
    assert method.file_descriptor_response == service.file_descriptor_response
    assert [answer.error_response.error_code for answer in missing] == [StatusCode.NOT_FOUND.value[0]] * 2


def test_reflection_lists_services_and_describes_them(server: RunningServer) -> None:
    """grpcurl finds the protocol without its files."""
    ask = reflection_pb2.ServerReflectionRequest
    symbols = (SERVICE, "inference.ModelInferRequest", "inference.ModelConfig")
    listed, *described = reflected(
        server, ask(list_services=""), *(ask(file_containing_symbol=symbol) for symbol in symbols)
    )
    names = {service.name for service in listed.list_services_response.service}
    assert names == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert all(answer.file_descriptor_response.file_descriptor_proto for answer in described)


def test_how_perf_analyzer_begins(client: Client) -> None:
    """Its calls in its order, and what it reads of the answers: else it ends before the first request."""
    metadata = client.call("ModelMetadata", name="mlp")
    config = client.call("ModelConfig", name="mlp").config
    assert {i.name for i in config.input} == {i.name for i in metadata.inputs}
    assert metadata.inputs[0].shape[0] == -1
    assert not config.HasField("sequence_batching")
    # Whether shared memory is allowed or not, it takes away what may be left of an earlier run.
    client.call("SystemSharedMemoryUnregister", name="")
    client.call("CudaSharedMemoryUnregister", name="")
    assert "statistics" in client.call("ServerMetadata").extensions
    before = client.statistics("mlp")
    for rows in (1, 3):
        client.infer(request("mlp", {"x": np.ones((rows, 8), np.float32)}))
    after = settled(client, "mlp", before.execution_count + 2)
    assert int(after.version) == 1
    assert after.inference_count - before.inference_count == 4
    counts = [
        getattr(after.inference_stats, part).count - getattr(before.inference_stats, part).count
        for part in ("success", "queue", "compute_input", "compute_infer", "compute_output")
    ]
    assert counts == [2] * 5
