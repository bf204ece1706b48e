"""The control plane over a real repository of small models, and its RPCs on a real `grpc.Server`."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.engine.devices import find_devices
from service.engine.runtime import Runtime
from service.errors import InvalidRequest, ModelNotReady, Overloaded, UnknownModel, UnknownVersion
from service.frontend.admin import Admin
from service.frontend.control import EXTENSIONS, Control
from service.frontend.health import SERVICE, Health
from service.frontend.model_control import ModelControlRpcs
from service.frontend.services import register
from service.frontend.shared_memory import Regions
from service.frontend.stream import StreamService
from service.logs import LogControl
from service.metrics import MetricsRegistry
from service.pb import grpc_service_pb2 as pb
from service.repository.changing import ModelControl
from service.repository.loader import Loader, LoadOptions
from service.repository.repository import ModelRepository
from service.state import Phase, ServerState
from service.tracing import Tracer
from tests.support import onnx_models
from tests.support.client import TIMEOUT_S, Client


class Silent:
    """Nobody watches the loading."""

    def started(self, total: int) -> None: ...
    def loaded(self, name: str, version: str, seconds: float) -> None: ...
    def failed(self, name: str, version: str, reason: str) -> None: ...
    def finished(self) -> None: ...


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> ModelRepository:
    """`mlp` of versions 1 and 2 (both served), `scalar`, and `broken`, which cannot be loaded."""
    directory: Path = tmp_path_factory.mktemp("repository")
    policy = "version_policy { all {} }"
    onnx_models.write_model(directory, "mlp", onnx_models.mlp(), 1, policy)
    onnx_models.write_model(directory, "mlp", onnx_models.mlp(), 2, policy)
    onnx_models.write_model(directory, "scalar", onnx_models.scalar_sum())
    (directory / "broken" / "1").mkdir(parents=True)
    (directory / "broken" / "1" / "model.onnx").write_bytes(b"this is no model")
    devices = find_devices("cpu", cpu_slots=1, gpu_slots=1, cpu_threads=1)
    loader = Loader(Runtime(devices.all), devices, LoadOptions(8, 0, None))
    repository = ModelRepository([directory], loader, MetricsRegistry())
    repository.load_all(Silent(), 1, stopping=lambda: False)
    return repository


@pytest.fixture
def state() -> ServerState:
    state = ServerState()
    state.enter(Phase.READY)
    return state


@pytest.fixture
def control(repository: ModelRepository, state: ServerState) -> Control:
    return Control(repository, state)


def test_live_always_ready_only_while_ready(repository: ModelRepository) -> None:
    """A draining server is alive and not ready; so is one that is starting."""
    state = ServerState()
    control = Control(repository, state)
    assert control.server_live(pb.ServerLiveRequest()).live
    assert not control.server_ready(pb.ServerReadyRequest()).ready
    assert not control.model_ready(pb.ModelReadyRequest(name="mlp")).ready
    state.enter(Phase.READY)
    assert control.server_ready(pb.ServerReadyRequest()).ready
    assert control.model_ready(pb.ModelReadyRequest(name="mlp")).ready
    state.enter(Phase.DRAINING)
    assert control.server_live(pb.ServerLiveRequest()).live
    assert not control.server_ready(pb.ServerReadyRequest()).ready
    assert not control.model_ready(pb.ModelReadyRequest(name="mlp")).ready


def test_model_ready_of_known_and_unknown_models(control: Control) -> None:
    """Known but not able to answer is an answer; unknown is an error."""
    assert control.model_ready(pb.ModelReadyRequest(name="mlp", version="2")).ready
    assert not control.model_ready(pb.ModelReadyRequest(name="broken")).ready
    with pytest.raises(UnknownModel, match="'nobody'"):
        control.model_ready(pb.ModelReadyRequest(name="nobody"))
    with pytest.raises(UnknownVersion, match="version 7"):
        control.model_ready(pb.ModelReadyRequest(name="mlp", version="7"))
    with pytest.raises(InvalidRequest, match="'x' is not a number"):
        control.model_ready(pb.ModelReadyRequest(name="mlp", version="x"))


def test_metadata_of_the_server(control: Control) -> None:
    """Exactly the extensions that are there."""
    metadata = control.server_metadata(pb.ServerMetadataRequest())
    assert metadata.name == "onclock"
    assert metadata.version
    assert tuple(metadata.extensions) == EXTENSIONS


def test_metadata_of_a_server_that_was_started_with_more(repository: ModelRepository, state: ServerState) -> None:
    """What only some servers support is listed by those."""
    metadata = Control(repository, state, ["trace"]).server_metadata(pb.ServerMetadataRequest())
    assert tuple(metadata.extensions) == tuple(sorted((*EXTENSIONS, "trace")))


def test_metadata_of_models(control: Control) -> None:
    """With the batch dimension where there is one; all ready versions are listed, whichever was asked for."""
    metadata = control.model_metadata(pb.ModelMetadataRequest(name="mlp", version="1"))
    assert (metadata.name, metadata.platform, list(metadata.versions)) == ("mlp", "onnxruntime_onnx", ["1", "2"])
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [("x", "FP32", [-1, 8])]
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.outputs] == [("y", "FP32", [-1, 4])]
    scalar = control.model_metadata(pb.ModelMetadataRequest(name="scalar"))
    assert [list(t.shape) for t in scalar.inputs] == [[], []]
    with pytest.raises(ModelNotReady, match="'broken' is not at ready state: "):
        control.model_metadata(pb.ModelMetadataRequest(name="broken"))


def test_configuration_in_force(control: Control) -> None:
    """Completed from the model file; what is absent is unset."""
    config = control.model_config(pb.ModelConfigRequest(name="mlp")).config
    assert config.name == "mlp"
    assert config.max_batch_size == 8
    assert [(i.name, list(i.dims)) for i in config.input] == [("x", [8])]
    assert not config.HasField("sequence_batching")
    with pytest.raises(UnknownModel):
        control.model_config(pb.ModelConfigRequest(name="nobody"))


def test_statistics_of_all_of_one_of_a_version(control: Control) -> None:
    """Models that were never asked count zero, and are there."""

    def listed(**request: str) -> list[tuple[str, str]]:
        statistics = control.model_statistics(pb.ModelStatisticsRequest(**request)).model_stats
        assert all(s.inference_count == 0 and s.inference_stats.success.count == 0 for s in statistics)
        return [(s.name, s.version) for s in statistics]

    assert listed() == [("mlp", "1"), ("mlp", "2"), ("scalar", "1")]
    assert listed(name="mlp") == [("mlp", "1"), ("mlp", "2")]
    assert listed(name="mlp", version="1") == [("mlp", "1")]
    with pytest.raises(InvalidRequest, match="without the name"):
        listed(version="1")
    with pytest.raises(UnknownModel):
        listed(name="nobody")
    with pytest.raises(ModelNotReady):
        listed(name="broken")


def test_the_index_lists_every_version_found(control: Control) -> None:
    """With its state, and the reason where it cannot be served."""
    index = control.repository_index(pb.RepositoryIndexRequest()).models
    assert [(m.name, m.version, m.state) for m in index] == [
        ("broken", "1", "UNAVAILABLE"),
        ("mlp", "1", "READY"),
        ("mlp", "2", "READY"),
        ("scalar", "1", "READY"),
    ]
    assert index[0].reason
    assert not index[1].reason
    ready = control.repository_index(pb.RepositoryIndexRequest(ready=True)).models
    assert [(m.name, m.version) for m in ready] == [("mlp", "1"), ("mlp", "2"), ("scalar", "1")]
    with pytest.raises(InvalidRequest, match="'repository_name' is not supported"):
        control.repository_index(pb.RepositoryIndexRequest(repository_name="x"))


# On a server


@dataclass
class Serving:
    channel: grpc.Channel
    health: Health
    client: Client


@pytest.fixture
def serving(control: Control, repository: ModelRepository) -> Iterator[Serving]:
    with ThreadPoolExecutor(2) as calls, ThreadPoolExecutor(2) as streams:
        server = grpc.server(calls, options=(("grpc.so_reuseport", 0),))
        health = Health(streams)
        health.register(server)
        admin = Admin(repository, Tracer(None), LogControl("info", "json"))
        changes = ModelControlRpcs(ModelControl(repository, []), allowed=False)
        register(
            server,
            control,
            admin,
            Regions(allowed=False),
            changes,
            calls,
            StreamService(refuse_everything, 1, 1, 1),
            streams,
        )
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        own = (("grpc.use_local_subchannel_pool", 1),)
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=own) as channel:
            yield Serving(channel, health, Client(channel))
        server.stop(grace=0).wait(TIMEOUT_S)


def refuse_everything(_message: bytes | memoryview, call: Any) -> None:
    call.fail(InvalidRequest("no streams here"))


def failure(act: Any) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    with pytest.raises(grpc.RpcError) as caught:
        act()
    error: Any = caught.value
    return error.code(), error.details(), dict(error.trailing_metadata() or ())


def test_rpcs_answer_or_fail_by_the_table(serving: Serving) -> None:
    """An answer is the method's message, an error its status code and text."""
    assert serving.client.call("ModelReady", name="mlp").ready
    assert serving.client.call("ModelMetadata", name="mlp").name == "mlp"
    code, details, _ = failure(lambda: serving.client.call("ModelMetadata", name="nobody"))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details == "Request for unknown model: 'nobody' is not found"
    assert failure(lambda: serving.client.call("ModelConfig", name="broken"))[0] is grpc.StatusCode.UNAVAILABLE


def test_a_bug_in_a_method_is_internal(
    serving: Serving, repository: ModelRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client learns the method and the kind of error, no more; a refusal keeps its trailers."""

    def break_down() -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(repository, "index", break_down)
    code, details, _ = failure(lambda: serving.client.call("RepositoryIndex"))
    assert code is grpc.StatusCode.INTERNAL
    assert details == "internal error while serving RepositoryIndex: ZeroDivisionError"

    def refuse() -> None:
        raise Overloaded("later", 7_000_000)

    monkeypatch.setattr(repository, "index", refuse)
    code, details, trailers = failure(lambda: serving.client.call("RepositoryIndex"))
    assert (code, details) == (grpc.StatusCode.UNAVAILABLE, "later")
    assert trailers["grpc-retry-pushback-ms"] == "7"


def test_health_follows_what_it_is_told(serving: Serving) -> None:
    """Not serving at first; the server and each model by name; nothing serves once draining has begun."""
    stub = health_pb2_grpc.HealthStub(serving.channel)
    names = health_pb2.HealthCheckResponse.ServingStatus.Name

    def check(name: str) -> str:
        return names(stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=TIMEOUT_S).status)

    assert check("") == check(SERVICE) == "NOT_SERVING"
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=""), timeout=TIMEOUT_S)
    assert names(next(watch).status) == "NOT_SERVING"
    serving.health.models([("mlp", True), ("broken", False)])
    serving.health.server(ready=True)
    assert names(next(watch).status) == "SERVING"
    assert (check(""), check("mlp"), check("broken")) == ("SERVING", "SERVING", "NOT_SERVING")
    assert failure(lambda: check("nobody"))[0] is grpc.StatusCode.NOT_FOUND
    serving.health.drain()
    assert names(next(watch).status) == "NOT_SERVING"
    serving.health.server(ready=True)
    serving.health.models([("mlp", True)])
    assert check("") == check("mlp") == "NOT_SERVING"
