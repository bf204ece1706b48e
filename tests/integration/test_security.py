"""The wire secured: TLS, clients' certificates and API keys, changed under load; limits on connections.

Every test runs on both ingresses, since each has its own way to do it.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from service.config.keys import Group, entry_text, new_key
from service.frontend.access import GROUPS
from service.pb import grpc_service_pb2 as pb
from tests.support import onnx_models
from tests.support.certificates import Authority
from tests.support.client import Client, arrays, request
from tests.support.http2 import raw_client
from tests.support.native import needs_native
from tests.support.server import RunningServer, StartServer, running_server, start_server

__all__ = ["start_server"]

pytestmark = pytest.mark.parametrize("ingress", ["native", "core"])

POLL = ("--security-poll-secs", "0.1")
SERVICE = "/inference.GRPCInferenceService/"
PATIENCE_S = 20.0


@pytest.fixture(autouse=True)
def _built(ingress: str) -> None:
    if ingress == "native":
        needs_native()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    directory = tmp_path / "models"
    onnx_models.write_model(
        directory, "double", onnx_models.identity(), config="max_batch_size: 8\ndynamic_batching { }\n"
    )
    onnx_models.write_model(
        directory, "other", onnx_models.identity(), config="max_batch_size: 8\ndynamic_batching { }\n"
    )
    return directory


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "tls")


def rows(count: int = 1, width: int = 4) -> Any:
    return np.arange(count * width, dtype=np.float32).reshape(count, width)


def outcome(call: Any) -> str:
    """The status of a call: "OK" or the code's name."""
    try:
        call()
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def scraped(server: RunningServer, name: str) -> float:
    with urllib.request.urlopen(server.metrics_url, timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.rpartition(" ")[2])
    return 0.0


# ------------------------------------------------------------------------------------------------------------- TLS --


def test_everything_works_by_tls(
    ingress: str, repository: Path, authority: Authority, start_server: StartServer
) -> None:
    """Inference, the control plane, health, streams; small messages and some of many records."""
    server = start_server(repository, "--ingress", ingress, *authority.flags, credentials=authority.credentials())
    client = Client(server.channel())
    for count in (1, 3, 8):
        sent = rows(count)
        assert np.array_equal(arrays(client.infer(request("double", {"x": sent})))["y"], sent)
    assert client.call("ModelMetadata", name="double").name == "double"
    messages = [request("double", {"x": rows(number + 1)}) for number in range(5)]
    stream = server.channel().stream_stream(
        SERVICE + "ModelStreamInfer", pb.ModelInferRequest.SerializeToString, pb.ModelStreamInferResponse.FromString
    )
    answers = list(stream(iter(messages), timeout=PATIENCE_S))
    assert [answer.infer_response.outputs[0].shape[0] for answer in answers] == [1, 2, 3, 4, 5]


def test_large_tensors_by_tls(ingress: str, tmp_path: Path, authority: Authority, start_server: StartServer) -> None:
    """Of 16 MB each way, several at once: records, windows and a socket that takes only a part."""
    wide = 1_000_000
    model = onnx_models.identity(dims=("N", wide))
    onnx_models.write_model(tmp_path / "wide", "wide", model, config="max_batch_size: 8\ndynamic_batching { }\n")
    server = start_server(
        tmp_path / "wide", "--ingress", ingress, *authority.flags, credentials=authority.credentials()
    )
    failed: list[BaseException] = []

    def ask(seed: int) -> None:
        try:
            client = Client(server.channel())
            for _ in range(3):
                sent = np.random.default_rng(seed).random((4, wide), dtype=np.float32)
                assert np.array_equal(arrays(client.infer(request("wide", {"x": sent})))["y"], sent)
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_who_does_not_speak_tls_harms_nobody(
    ingress: str, repository: Path, authority: Authority, start_server: StartServer
) -> None:
    """Plain gRPC, noise, silence, another protocol inside: they get nothing, and others are served."""
    server = start_server(repository, "--ingress", ingress, *authority.flags, credentials=authority.credentials())
    client = Client(server.channel())
    with grpc.insecure_channel(server.address) as plain:
        assert outcome(lambda: Client(plain).call("ServerLive")) == "UNAVAILABLE"
    address = ("127.0.0.1", server.grpc_port)
    silent = socket.create_connection(address)
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" + b"\xff" * 500, b"\x00" * 70_000):
        with socket.create_connection(address) as sock:
            sock.settimeout(PATIENCE_S)
            sock.sendall(noise)
            # An alert, perhaps, and then the end, which may come as a reset.
            with contextlib.suppress(ConnectionError):
                while sock.recv(4096):
                    pass
    context = ssl.create_default_context(cadata=authority.root.decode())
    context.set_alpn_protocols(["http/1.1"])
    told = b""
    with socket.create_connection(address) as sock, contextlib.suppress(OSError):
        wrapped = context.wrap_socket(sock, server_hostname="localhost")
        wrapped.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        told = wrapped.recv(4096)
    assert not told.startswith(b"HTTP/1.1 200")
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.load_verify_locations(cadata=authority.root.decode())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(address) as sock, pytest.raises(OSError, match=r".+"):
        old.wrap_socket(sock, server_hostname="localhost")
    assert arrays(client.infer(request("double", {"x": rows()})))
    silent.close()


def test_clients_need_a_certificate_of_the_right_authority(
    ingress: str, repository: Path, authority: Authority, tmp_path: Path, start_server: StartServer
) -> None:
    flags = (*authority.flags, "--tls-client-ca", str(authority.client_ca))
    server = start_server(repository, "--ingress", ingress, *flags, credentials=authority.mutual())
    assert arrays(Client(server.channel()).infer(request("double", {"x": rows()})))
    stranger = Authority(tmp_path / "stranger")
    for credentials in (authority.credentials(), stranger.mutual(authority)):
        client = Client(server.channel(credentials=credentials))
        assert outcome(lambda client=client: client.call("ServerLive")) == "UNAVAILABLE"


def served_certificate(server: RunningServer, authority: Authority, *others: Authority) -> bytes:
    context = ssl.create_default_context(cadata=(authority.root + b"".join(o.root for o in others)).decode())
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", server.grpc_port)) as sock,
        context.wrap_socket(sock, server_hostname="localhost") as wrapped,
    ):
        found = wrapped.getpeercert(binary_form=True)
    assert found
    return found


class Load:
    """Clients that ask without a pause, each of them sometimes on a new connection. Every answer must be right."""

    def __init__(self, make: Any, metadata: Any = None, threads: int = 3) -> None:
        self.failed: list[str] = []
        self.answered = 0
        self._make = make
        self.metadata = metadata
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work) for _ in range(threads)]

    def _work(self) -> None:
        while not self._stop.is_set():
            with self._make() as channel:
                client = Client(channel)
                for number in range(20):
                    sent = rows(1 + number % 3)
                    metadata = None if self.metadata is None else (("authorization", f"Bearer {self.metadata}"),)
                    try:
                        answer = client.method("ModelInfer")(
                            request("double", {"x": sent}), timeout=PATIENCE_S, metadata=metadata
                        )
                        assert np.array_equal(arrays(answer)["y"], sent)
                        self.answered += 1
                    except Exception as error:  # noqa: BLE001
                        self.failed.append(repr(error))
                        return

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def wait_for(condition: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.02)


def test_certificates_change_under_load(
    ingress: str, repository: Path, authority: Authority, start_server: StartServer
) -> None:
    """Ten times, without a failed request; new connections get the new certificate; a broken one changes nothing."""
    flags = ("--ingress", ingress, *authority.flags, *POLL, "--metrics-port", "0")
    server = start_server(repository, *flags, credentials=authority.credentials())
    options = [("grpc.use_local_subchannel_pool", 1)]
    with Load(lambda: grpc.secure_channel(server.address, authority.credentials(), options)) as load:
        used = 'onclock_security_changes_total{what="certificate",result="used"}'
        for number in range(10):
            before, answered = served_certificate(server, authority), load.answered
            authority.renew()
            wait_for(lambda number=number: scraped(server, used) > number)
            assert served_certificate(server, authority) != before
            wait_for(lambda answered=answered: load.answered > answered or load.failed)
        serves = served_certificate(server, authority)
        whole = authority.certificate.read_bytes()
        authority.certificate.write_bytes(whole[: len(whole) // 2])
        failed = 'onclock_security_changes_total{what="certificate",result="failed"}'
        wait_for(lambda: scraped(server, failed) >= 1)
        assert served_certificate(server, authority) == serves
    assert not load.failed
    assert load.answered > 100
    reasons = "expected a certificate"
    wait_for(lambda: any(reasons in line["reason"] for line in server.log_lines("a change cannot be used")))


def test_clients_authorities_change(
    ingress: str, repository: Path, authority: Authority, tmp_path: Path, start_server: StartServer
) -> None:
    """A second one is added, then the first is removed: who was let in before is not on a new connection."""
    flags = (*authority.flags, "--tls-client-ca", str(authority.client_ca), *POLL)
    server = start_server(repository, "--ingress", ingress, *flags, credentials=authority.mutual())
    second = Authority(tmp_path / "second")
    mine, theirs = authority.mutual(), second.mutual(authority)

    def let_in(credentials: grpc.ChannelCredentials) -> bool:
        return outcome(lambda: Client(server.channel(credentials=credentials)).call("ServerLive")) == "OK"

    assert let_in(mine)
    assert not let_in(theirs)
    authority.client_ca.write_bytes(authority.root + second.root)
    wait_for(lambda: let_in(theirs))
    assert let_in(mine)
    authority.client_ca.write_bytes(second.root)
    wait_for(lambda: not let_in(mine))
    assert let_in(theirs)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--tls-certificate", "{missing}", "--tls-key", "{key}"), "cannot be read: No such file"),
        (("--tls-certificate", "{key}", "--tls-key", "{key}"), "expected a certificate chain in PEM"),
        (("--tls-certificate", "{other}", "--tls-key", "{key}"), "expected a certificate chain in PEM"),
        (
            ("--tls-certificate", "{certificate}", "--tls-key", "{key}", "--tls-client-ca", "{key}"),
            "expected certificates",
        ),
        (("--api-keys", "{key}"), "not TOML"),
        (("--api-keys", "{missing}"), "cannot be read"),
    ],
)
def test_a_server_that_cannot_be_secured_does_not_start(
    ingress: str, flags: tuple[str, ...], said: str, repository: Path, authority: Authority, tmp_path: Path
) -> None:
    other = Authority(tmp_path / "other")
    names = {
        "missing": tmp_path / "missing",
        "key": authority.key,
        "certificate": authority.certificate,
        "other": other.certificate,
    }
    filled = [flag.format(**names) for flag in flags]
    server = RunningServer(
        ["--model-repository", str(repository), "--ingress", ingress, "--grpc-port", "0", *filled], {}
    )
    assert server.wait_exit() == 1
    (line,) = server.log_lines("cannot start")
    assert said in line["reason"]
    assert str(tmp_path) in line["reason"]


# ------------------------------------------------------------------------------------------------------------ keys --

SENT = request("double", {"x": rows()})
OTHER = request("other", {"x": rows()})
DOUBLE, ALL = "double", "*"

# Who may call what. For each method: a request about the model `double`, one about `other` (None: there is none such),
# and one about all of them.
CALLS: dict[str, tuple[Any, Any, Any]] = {
    "ServerLive": (None, None, pb.ServerLiveRequest()),
    "ServerReady": (None, None, pb.ServerReadyRequest()),
    "ModelReady": (pb.ModelReadyRequest(name="double"), pb.ModelReadyRequest(name="other"), None),
    "ServerMetadata": (None, None, pb.ServerMetadataRequest()),
    "ModelMetadata": (pb.ModelMetadataRequest(name="double"), pb.ModelMetadataRequest(name="other"), None),
    "ModelConfig": (pb.ModelConfigRequest(name="double"), pb.ModelConfigRequest(name="other"), None),
    "ModelStatistics": (
        pb.ModelStatisticsRequest(name="double"),
        pb.ModelStatisticsRequest(name="other"),
        pb.ModelStatisticsRequest(),
    ),
    "RepositoryIndex": (None, None, pb.RepositoryIndexRequest()),
    "ModelInfer": (SENT, OTHER, None),
    "ModelStreamInfer": (SENT, OTHER, None),
    "RepositoryModelLoad": (
        pb.RepositoryModelLoadRequest(model_name="double"),
        pb.RepositoryModelLoadRequest(model_name="other"),
        None,
    ),
    "RepositoryModelUnload": (
        pb.RepositoryModelUnloadRequest(model_name="double"),
        pb.RepositoryModelUnloadRequest(model_name="other"),
        None,
    ),
    "SystemSharedMemoryStatus": (None, None, pb.SystemSharedMemoryStatusRequest()),
    "SystemSharedMemoryRegister": (
        None,
        None,
        pb.SystemSharedMemoryRegisterRequest(name="r", key="/none", byte_size=4),
    ),
    "SystemSharedMemoryUnregister": (None, None, pb.SystemSharedMemoryUnregisterRequest()),
    "CudaSharedMemoryStatus": (None, None, pb.CudaSharedMemoryStatusRequest()),
    "CudaSharedMemoryRegister": (None, None, pb.CudaSharedMemoryRegisterRequest(name="r")),
    "CudaSharedMemoryUnregister": (None, None, pb.CudaSharedMemoryUnregisterRequest()),
    "TraceSetting": (None, None, pb.TraceSettingRequest()),
    "LogSettings": (None, None, pb.LogSettingsRequest()),
}
# Methods that need all models although they name none; the others about "all" need the group only.
ABOUT_ALL = {"ModelStatistics", "RepositoryIndex"}
CALLERS: dict[str, tuple[tuple[Group, ...], tuple[str, ...]]] = {
    **{group.value: ((group,), (ALL,)) for group in Group},
    "infers double": ((Group.INFERENCE,), (DOUBLE,)),
    "sees double": ((Group.METADATA, Group.HEALTH), (DOUBLE,)),
    "changes double": ((Group.REPOSITORY,), ("dou*",)),
    "everything": (tuple(Group), (ALL,)),
    "nothing": ((), ()),
}
REFUSED = {"UNAUTHENTICATED", "PERMISSION_DENIED"}


class Secured:
    """A server with a key for each of `CALLERS`."""

    def __init__(self, server: RunningServer, keys: dict[str, str], path: Path) -> None:
        self.server = server
        self.keys = keys
        self.path = path
        self.channel = server.channel()

    def call(self, method: str, message: Any, key: str | None) -> str:
        metadata = None if key is None else (("authorization", f"Bearer {key}"),)
        descriptor = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name[method]
        answer_class = getattr(pb, descriptor.output_type.name)
        if method == "ModelStreamInfer":
            stream = self.channel.stream_stream(
                SERVICE + method, type(message).SerializeToString, answer_class.FromString
            )

            def ask() -> None:
                sent = (*(metadata or ()), ("triton_grpc_error", "true"))
                list(stream(iter([message]), timeout=PATIENCE_S, metadata=sent))

            return outcome(ask)
        unary = self.channel.unary_unary(SERVICE + method, type(message).SerializeToString, answer_class.FromString)
        return outcome(lambda: unary(message, timeout=PATIENCE_S, metadata=metadata))


def write_keys(path: Path, keys: dict[str, str], *, more: str = "") -> None:
    text = "".join(entry_text(name, key, *CALLERS[name]) + "\n" for name, key in keys.items()) + more
    aside = path.with_suffix(".aside")
    aside.write_text(text)
    aside.rename(path)


@pytest.fixture
def secured(ingress: str, repository: Path, tmp_path: Path) -> Iterator[Secured]:
    keys = {name: new_key() for name in CALLERS}
    path = tmp_path / "keys.toml"
    write_keys(path, keys)
    flags = ("--ingress", ingress, "--api-keys", str(path), *POLL, "--metrics-port", "0", "--allow-client-shm")
    more = ("--model-control-mode", "explicit", "--load-model", "*")
    with running_server(repository, *flags, *more) as server:
        yield Secured(server, keys, path)


def expected(caller: str | None, method: str, about: str) -> bool:
    """Whether the table lets a caller do it. `about`: a model, or "" for all."""
    group = GROUPS[SERVICE + method]
    groups, models = CALLERS[caller] if caller is not None else ((Group.HEALTH,), ())
    if group not in groups:
        return False
    if about:
        return ALL in models or about in models or (about == DOUBLE and "dou*" in models)
    return method not in ABOUT_ALL or ALL in models


def test_who_may_call_what(ingress: str, secured: Secured) -> None:
    """Every caller, every method, every model: what the table does not allow is denied, and nothing else is."""
    assert {SERVICE + method for method in CALLS} == {name for name in GROUPS if name.startswith(SERVICE)}
    wrong = []
    for caller in (None, *CALLERS):
        key = None if caller is None else secured.keys[caller]
        for method, messages in CALLS.items():
            for about, message in zip((DOUBLE, "other", ""), messages, strict=True):
                if message is None:
                    continue
                code = secured.call(method, message, key)
                allowed = expected(caller, method, about)
                denied = "UNAUTHENTICATED" if caller is None else "PERMISSION_DENIED"
                if (code in REFUSED) == allowed or (not allowed and code != denied):
                    wrong.append((caller, method, about, code, allowed))
        # What a caller unloaded is needed by the next.
        for model in (DOUBLE, "other"):
            load = pb.RepositoryModelLoadRequest(model_name=model)
            assert secured.call("RepositoryModelLoad", load, secured.keys["everything"]) == "OK"
    assert not wrong


def test_a_key_that_is_not_known_is_no_key(ingress: str, secured: Secured) -> None:
    """For every method, health included: a client with a wrong key is told so."""
    for key in ("onclock_wrong", "-", secured.keys["everything"] + "x"):
        for method, messages in CALLS.items():
            message = next(message for message in messages if message is not None)
            assert secured.call(method, message, key) == "UNAUTHENTICATED", (key, method)


def test_health_and_reflection_have_their_groups(ingress: str, secured: Secured) -> None:
    """Probes need no key; what a model's health is, and what the server offers, needs one."""
    check = health_pb2_grpc.HealthStub(secured.channel).Check
    watch = health_pb2_grpc.HealthStub(secured.channel).Watch

    def with_key(caller: str) -> Any:
        return (("authorization", f"Bearer {secured.keys[caller]}"),)

    assert outcome(lambda: check(health_pb2.HealthCheckRequest())) == "OK"
    assert outcome(lambda: next(watch(health_pb2.HealthCheckRequest(), timeout=5))) == "OK"
    asked = health_pb2.HealthCheckRequest(service="double")
    assert outcome(lambda: check(asked)) == "UNAUTHENTICATED"
    assert outcome(lambda: next(watch(asked, timeout=5))) == "UNAUTHENTICATED"
    assert outcome(lambda: check(asked, metadata=with_key("sees double"))) == "OK"
    assert outcome(lambda: next(watch(asked, timeout=5, metadata=with_key("sees double")))) == "OK"
    assert outcome(lambda: check(asked, metadata=with_key("inference"))) == "PERMISSION_DENIED"
    reflect = reflection_pb2_grpc.ServerReflectionStub(secured.channel).ServerReflectionInfo
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    assert outcome(lambda: list(reflect(iter([question]), timeout=5))) == "UNAUTHENTICATED"
    assert outcome(lambda: list(reflect(iter([question]), timeout=5, metadata=with_key("metadata")))) == "OK"
    assert (
        outcome(lambda: list(reflect(iter([question]), timeout=5, metadata=with_key("health")))) == "PERMISSION_DENIED"
    )


def test_shared_memory_needs_its_group_in_requests_as_well(ingress: str, secured: Secured) -> None:
    """Whoever may only infer cannot read what others have registered."""
    from multiprocessing import shared_memory

    region = shared_memory.SharedMemory(create=True, size=16)
    try:
        register = pb.SystemSharedMemoryRegisterRequest(name="region", key="/" + region.name, byte_size=16)
        assert secured.call("SystemSharedMemoryRegister", register, secured.keys["everything"]) == "OK"
        message = pb.ModelInferRequest(model_name="double")
        tensor = message.inputs.add(name="x", datatype="FP32", shape=[1, 4])
        tensor.parameters["shared_memory_region"].string_param = "region"
        tensor.parameters["shared_memory_byte_size"].int64_param = 16
        assert secured.call("ModelInfer", message, secured.keys["everything"]) == "OK"
        assert secured.call("ModelInfer", message, secured.keys["inference"]) == "PERMISSION_DENIED"
        assert secured.call("ModelStreamInfer", message, secured.keys["inference"]) == "PERMISSION_DENIED"
        assert (
            secured.call(
                "SystemSharedMemoryUnregister", pb.SystemSharedMemoryUnregisterRequest(), secured.keys["everything"]
            )
            == "OK"
        )
    finally:
        region.close()
        region.unlink()


def test_keys_change_under_load(ingress: str, secured: Secured) -> None:
    """A second key beside the first, clients move to it, the first goes: no failed request, and then it is no key."""
    server = secured.server
    options = [("grpc.use_local_subchannel_pool", 1)]
    with Load(lambda: grpc.insecure_channel(server.address, options), secured.keys["infers double"]) as load:
        for _ in range(5):
            first, second = secured.keys["infers double"], new_key()
            extra = entry_text("infers double", second, *CALLERS["infers double"])
            write_keys(secured.path, secured.keys, more=extra)
            wait_for(lambda second=second: secured.call("ModelInfer", SENT, second) == "OK")
            load.metadata = second
            answered = load.answered
            wait_for(lambda answered=answered: load.answered > answered + 20 or load.failed)
            secured.keys["infers double"] = second
            write_keys(secured.path, secured.keys)
            wait_for(lambda first=first: secured.call("ModelInfer", SENT, first) == "UNAUTHENTICATED")
        secured.path.write_text("[[key]")
        wait_for(lambda: secured.server.log_lines("a change cannot be used"))
        answered = load.answered
        wait_for(lambda: load.answered > answered + 20 or load.failed)
    assert not load.failed


def test_a_stream_ends_with_its_key(ingress: str, secured: Secured) -> None:
    """A key that is removed is no key for what comes on a stream that was opened with it, either."""
    send = threading.Event()

    def messages() -> Iterator[Any]:
        yield SENT
        assert send.wait(PATIENCE_S)
        yield SENT

    key = secured.keys["inference"]
    stream = secured.channel.stream_stream(
        SERVICE + "ModelStreamInfer", pb.ModelInferRequest.SerializeToString, pb.ModelStreamInferResponse.FromString
    )(messages(), timeout=PATIENCE_S, metadata=(("authorization", f"Bearer {key}"),))
    assert not next(stream).error_message
    del secured.keys["inference"]
    write_keys(secured.path, secured.keys)
    wait_for(lambda: secured.call("ModelInfer", SENT, key) == "UNAUTHENTICATED")
    send.set()
    assert "the API key is not valid any more" in next(stream).error_message


def test_the_metrics_port_needs_a_key_as_well(ingress: str, secured: Secured) -> None:
    asked: list[str | None] = []

    def status(key: str | None) -> int:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        try:
            with urllib.request.urlopen(urllib.request.Request(secured.server.metrics_url, headers=headers)) as answer:
                assert b"onclock_build_info" in answer.read()
                return int(answer.status)
        except urllib.error.HTTPError as error:
            asked.append(error.headers["WWW-Authenticate"])
            return int(error.code)

    assert status(None) == 401
    assert status("wrong") == 401
    assert status(secured.keys["inference"]) == 401
    assert asked == ["Bearer"] * 3
    for probe in ("livez", "readyz"):
        with urllib.request.urlopen(secured.server.metrics_url.replace("metrics", probe)) as answer:
            assert answer.read() == b"ok\n"
    assert status(secured.keys["metrics"]) == 200


def test_calls_that_are_denied_are_seen(ingress: str, secured: Secured) -> None:
    """Each once, wherever it was denied: before its message was read, for what it asks, at the metrics port."""

    def denied() -> tuple[float, float]:
        key = {"Authorization": f"Bearer {secured.keys['metrics']}"}
        with urllib.request.urlopen(urllib.request.Request(secured.server.metrics_url, headers=key)) as answer:
            text = answer.read().decode()
        found = dict(re.findall(r'^onclock_unrouted_requests_total\{reason="(\w+)"\} (\d+)$', text, re.MULTILINE))
        return int(found["unauthenticated"]), int(found["forbidden"])

    assert denied() == (0, 0)
    metrics, infers, sees = (secured.keys[name] for name in ("metrics", "infers double", "sees double"))
    sent = 0
    for key, code in ((None, "UNAUTHENTICATED"), ("wrong", "UNAUTHENTICATED"), (metrics, "PERMISSION_DENIED")):
        for method in ("ModelInfer", "ModelMetadata", "RepositoryIndex", "ModelStreamInfer"):
            message = next(message for message in CALLS[method] if message is not None)
            assert secured.call(method, message, key) == code
        sent += 4
    assert denied() == (sent * 2 // 3, sent // 3)
    # A key for another model: the message was read.
    assert secured.call("ModelInfer", CALLS["ModelInfer"][1], infers) == "PERMISSION_DENIED"
    assert secured.call("ModelMetadata", CALLS["ModelMetadata"][1], sees) == "PERMISSION_DENIED"
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(secured.server.metrics_url)
    assert denied() == (sent * 2 // 3 + 1, sent // 3 + 2)
    secured.server.wait_for_log("calls were denied")


def test_the_metrics_port_by_tls(
    ingress: str, repository: Path, authority: Authority, start_server: StartServer
) -> None:
    """With the same certificates, changed in the same way, on an address of its own."""
    flags = (*authority.flags, "--metrics-tls", "--metrics-port", "0", "--metrics-host", "localhost", *POLL)
    server = start_server(repository, "--ingress", ingress, *flags, credentials=authority.credentials())
    context = ssl.create_default_context(cadata=authority.root.decode())

    def scrape() -> tuple[bytes, bytes]:
        connection = http.client.HTTPSConnection("localhost", server.metrics_port, context=context, timeout=10)
        connection.request("GET", "/metrics")
        sock = connection.sock
        assert isinstance(sock, ssl.SSLSocket)
        certificate = sock.getpeercert(binary_form=True)
        assert certificate
        body = connection.getresponse().read()
        connection.close()
        return certificate, body

    first, body = scrape()
    assert b"onclock_build_info" in body
    assert (b"onclock_certificate_end_timestamp_seconds" in body) is (ingress == "native")
    authority.renew()
    wait_for(lambda: scrape()[0] != first)
    with pytest.raises((http.client.HTTPException, OSError)):
        urllib.request.urlopen(f"http://localhost:{server.metrics_port}/metrics", timeout=10)


# ---------------------------------------------------------------------------------------------------------- limits --


def test_connections_without_a_call_are_ended(ingress: str, repository: Path, start_server: StartServer) -> None:
    """A client does not notice: it connects again when it has something to ask."""
    server = start_server(repository, "--ingress", ingress, "--idle-timeout-s", "0.5", "--metrics-port", "0")
    client = Client(server.channel())
    assert arrays(client.infer(request("double", {"x": rows()})))
    with raw_client(server.grpc_port) as raw:
        while not raw.ended and raw.receive():
            pass
    assert arrays(client.infer(request("double", {"x": rows()})))
    if ingress == "native":
        wait_for(lambda: scraped(server, "onclock_connections") == 0)


def test_one_connection_too_many_is_closed(ingress: str, repository: Path, start_server: StartServer) -> None:
    if ingress == "core":
        # It has no such limit; that it was asked for is not ignored.
        flags = ("--ingress", ingress, "--max-connections", "3", "--grpc-port", "0")
        refused = RunningServer(["--model-repository", str(repository), *flags], {})
        assert refused.wait_exit() == 1
        assert "--max-connections needs the native ingress" in refused.log_lines("cannot start")[0]["reason"]
        return
    server = start_server(repository, "--ingress", ingress, "--max-connections", "3", "--metrics-port", "0")
    wait_for(lambda: scraped(server, "onclock_connections") == 0)
    held = [socket.create_connection(("127.0.0.1", server.grpc_port)) for _ in range(3)]
    wait_for(lambda: scraped(server, "onclock_connections") == 3)
    assert outcome(lambda: Client(server.channel()).call("ServerLive")) == "UNAVAILABLE"
    assert scraped(server, "onclock_connections_refused_total") >= 1
    for sock in held:
        sock.close()
    wait_for(lambda: outcome(lambda: Client(server.channel()).call("ServerLive")) == "OK")
