"""The life of a server: what is there before it is ready, what a stop does to those who are still sending, how it ends.

Stopping is tested under load that does not wait for answers, as clients behind a load balancer send it.
"""

from __future__ import annotations

import queue
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support import onnx_models
from tests.support.client import Client, arrays, request
from tests.support.onnx_models import write_model
from tests.support.server import RunningServer, running_server

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
# Nothing below may take longer: what waits this long hangs.
HANG_S = 30.0
# Requests that a shutdown of the port may cut off, of a thousand a second.
MAX_CUT_OFF = 10
X = np.arange(4, dtype=np.float32).reshape(1, 4)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick model, and one whose run takes almost half a second."""
    directory = tmp_path_factory.mktemp("models")
    write_model(directory, "quick", onnx_models.slow_for(20))
    write_model(directory, "long", onnx_models.slow_for(400), config="max_batch_size: 1\n")
    return directory


@dataclass
class Sent:
    """One request of the load: when it was sent and answered (monotonic seconds), and how."""

    sent_s: float
    done_s: float = 0.0
    code: grpc.StatusCode | None = None
    details: str = ""


@dataclass
class Load:
    """Open loop: a thread that sends `rate` requests a second, whatever becomes of them."""

    client: Client
    model: str
    rate: float
    requests: list[Sent] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._left = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def _send(self) -> None:
        message = request(self.model, {"x": X})
        next_s = time.monotonic()
        while not self._stop.is_set():
            sent = Sent(time.monotonic())
            self.requests.append(sent)
            future = self.client.infer_future(message, timeout=HANG_S)
            future.add_done_callback(lambda future, sent=sent: self._done(future, sent))
            next_s += 1 / self.rate
            self._stop.wait(max(0.0, next_s - time.monotonic()))

    def _done(self, future: Any, sent: Sent) -> None:
        sent.done_s = time.monotonic()
        sent.code = future.code()
        sent.details = future.details() or ""
        self._left.release()

    def wait_answered(self, count: int) -> None:
        """Wait until `count` requests have been answered."""
        for _ in range(count):
            assert self._left.acquire(timeout=HANG_S)

    def finish(self) -> list[Sent]:
        """Send no more; all requests, each answered. Fails when one hangs."""
        self._stop.set()
        self._thread.join(HANG_S)
        end = time.monotonic() + HANG_S
        while any(sent.code is None for sent in self.requests):
            assert time.monotonic() < end, "a request was never answered"
            self._left.acquire(timeout=0.1)
        return self.requests


def health(server: RunningServer, name: str = "") -> Any:
    return health_pb2_grpc.HealthStub(server.channel()).Check(health_pb2.HealthCheckRequest(service=name), timeout=10)


def wait_queued(server: RunningServer, model: str, count: int) -> None:
    """Wait until `count` requests for `model` wait in its queue: they have been accepted, and so have those before."""
    line = f'onclock_queue_requests{{model="{model}",version="1"}} {count}\n'
    end = time.monotonic() + HANG_S
    while True:
        with urllib.request.urlopen(server.metrics_url, timeout=10) as page:
            if line in page.read().decode():
                return
        assert time.monotonic() < end, f"never {count} requests for {model} in the queue"


# Stopping


def test_stop_under_load(repository: Path) -> None:
    """Accepted requests are answered, new ones are refused as UNAVAILABLE, nobody hangs, and the stop ends by itself.

    The load goes on until after the end: refusing it must not keep the server alive until the grace period is over.
    """
    # Measured long enough to know that a batch of 64 costs what one row does: the load is far below capacity.
    with running_server(repository, "--grace-period-s", "20", "--profile-budget-ms", "1000") as server:
        load = Load(Client(server.channel()), "quick", rate=1000)
        load.wait_answered(500)
        before_s = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_log("draining")
        assert server.wait_exit(10) == 0
        ended_s = time.monotonic()
        requests = load.finish()

    assert ended_s - before_s < 6, "a few batches of 20 ms were left, and it took longer to stop"
    # What was sent a little before the signal had been accepted when it came.
    accepted = [sent for sent in requests if sent.sent_s < before_s - 0.1]
    assert len(accepted) > 300
    assert {sent.code for sent in accepted} == {grpc.StatusCode.OK}
    refused = [sent for sent in requests if sent.code is not grpc.StatusCode.OK]
    # gRPC's core cancels what arrives between its own shutdown and the client's hearing of it: one round trip.
    cancelled = [sent for sent in refused if sent.code is grpc.StatusCode.CANCELLED]
    assert len(cancelled) <= MAX_CUT_OFF
    assert {sent.code for sent in refused} - {grpc.StatusCode.CANCELLED} == {grpc.StatusCode.UNAVAILABLE}
    # Until the port closed, the server said itself what it was doing.
    assert any("Server is stopping" in sent.details for sent in refused)
    assert {line["level"] for line in server.log_lines()} <= {"info", "warning"}
    assert server.log_lines("stopped")


def test_not_ready_comes_before_the_first_refusal(repository: Path) -> None:
    """Whoever is refused because of the stop can see that the server is not ready; it stays alive until the end."""
    with running_server(repository, "--metrics-port", "0") as server:
        client = Client(server.channel())
        changes: list[int] = []
        watching = threading.Event()

        def watch() -> None:
            stub = health_pb2_grpc.HealthStub(server.channel())
            try:
                for answer in stub.Watch(health_pb2.HealthCheckRequest()):
                    changes.append(answer.status)
                    watching.set()
            except grpc.RpcError:
                return

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        assert watching.wait(HANG_S)
        assert client.call("ServerReady").ready
        long = [client.infer_future(request("long", {"x": X})) for _ in range(2)]
        wait_queued(server, "long", 1)
        server.process.send_signal(signal.SIGTERM)
        refused = first_refusal(client)
        assert refused.code() is grpc.StatusCode.UNAVAILABLE
        assert "Server is stopping" in refused.details()
        assert not client.call("ServerReady").ready
        assert client.call("ServerLive").live
        assert not client.call("ModelReady", name="quick").ready
        assert health(server).status == NOT_SERVING
        assert health(server, "quick").status == NOT_SERVING
        for future in long:
            assert np.array_equal(arrays(future.result(timeout=HANG_S))["y"], X)
        assert server.wait_exit() == 0
        watcher.join(HANG_S)
    assert changes == [SERVING, NOT_SERVING]


def first_refusal(client: Client) -> Any:
    """The first of many requests that is refused: the signal is taken a moment after it is sent."""
    refused: queue.SimpleQueue[Any] = queue.SimpleQueue()
    end = time.monotonic() + HANG_S
    while time.monotonic() < end:
        future = client.infer_future(request("quick", {"x": X}))
        future.add_done_callback(lambda f: refused.put(f) if f.code() is not grpc.StatusCode.OK else None)
        try:
            return refused.get(timeout=0.005)
        except queue.Empty:
            continue
    raise AssertionError("nothing was refused")


def test_a_second_signal_changes_nothing(repository: Path) -> None:
    """SIGTERM and SIGINT while it drains: what was accepted is still answered, the exit code is still 0."""
    with running_server(repository, "--metrics-port", "0") as server:
        client = Client(server.channel())
        long = [client.infer_future(request("long", {"x": X})) for _ in range(2)]
        wait_queued(server, "long", 1)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_log("draining")
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGINT)
        for future in long:
            assert np.array_equal(arrays(future.result(timeout=HANG_S))["y"], X)
        assert server.wait_exit() == 0
        assert len(server.log_lines("draining")) == 1


def test_the_grace_period_ends_a_stop(tmp_path: Path) -> None:
    """A run that outlives the grace period does not keep the process: queued and running requests are told, it ends."""
    # Warm-up asks for no rounds, the requests for so many that they take minutes.
    write_model(tmp_path, "endless", onnx_models.looping())
    endless = request("endless", {"x": X, "times": np.array(10**9)})
    with running_server(tmp_path, "--grace-period-s", "0.3", "--metrics-port", "0") as server:
        client = Client(server.channel())
        futures = [client.infer_future(endless, timeout=60) for _ in range(3)]
        wait_queued(server, "endless", 2)
        began_s = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_exit(15) == 0
        assert time.monotonic() - began_s < 10
        codes = [future.exception(timeout=HANG_S).code() for future in futures]
    assert set(codes) <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    assert server.log_lines("grace period over")[0]["in_flight"] == 3


def test_a_signal_while_loading_ends_it(tmp_path: Path) -> None:
    """Models that are still to be loaded are not loaded any more."""
    for number in range(20):
        write_model(tmp_path, f"m{number:02d}", onnx_models.slow_for(20))
    with running_server(tmp_path, "--profile-budget-ms", "500", ready=False) as server:
        server.wait_for_log("model ready")
        assert Client(server.channel()).call("ServerLive").live
        assert not Client(server.channel()).call("ServerReady").ready
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_exit(15) == 0
    assert len(server.log_lines("model ready")) < 20
    assert not server.log_lines("ready")


# Starting


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


@pytest.mark.parametrize("flag", ["--grpc-port", "--metrics-port"])
def test_a_port_that_is_taken(repository: Path, taken_port: int, flag: str) -> None:
    """Exit code 1, and an error that names the port and the flag to choose another."""
    server = start_and_end(repository, flag, str(taken_port))
    (line,) = server.log_lines("cannot start")
    assert str(taken_port) in line["reason"]
    assert flag in line["reason"]


def test_two_servers_do_not_share_a_port(repository: Path) -> None:
    """The second one fails; the first one is not disturbed."""
    with running_server(repository) as first:
        second = start_and_end(repository, "--grpc-port", str(first.grpc_port))
        assert str(first.grpc_port) in second.log_lines("cannot start")[0]["reason"]
        assert Client(first.channel()).call("ServerReady").ready


def start_and_end(repository: Path, *flags: str, exit_code: int = 1) -> RunningServer:
    """A server that is expected to end by itself."""
    arguments = ["--model-repository", str(repository), "--device", "cpu", "--profile-cache", "none"]
    defaults = {"--grpc-port": "0", "--metrics-port": "off"}
    for flag, value in defaults.items():
        if flag not in flags:
            arguments += [flag, value]
    server = RunningServer([*arguments, *flags], {})
    try:
        assert server.wait_exit(HANG_S) == exit_code
    finally:
        server.process.kill()
    return server


# Models that do not load


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good model beside several that cannot be served, each for another reason."""
    directory = tmp_path_factory.mktemp("mixed")
    write_model(directory, "good", onnx_models.identity())
    (directory / "garbage" / "1").mkdir(parents=True)
    (directory / "garbage" / "1" / "model.onnx").write_bytes(b"\x00garbage")
    (directory / "no_versions").mkdir()
    write_model(directory, "bad_config", onnx_models.identity(), config="max_batch_size: lots\n")
    write_model(directory, "bad_key", onnx_models.identity(), config='backend: "python"\n')
    write_model(
        directory, "missing_version", onnx_models.identity(), config="version_policy { specific { versions: 7 } }"
    )
    return directory


REASONS = {
    ("garbage", "1"): "model.onnx",
    ("no_versions", ""): "no version to serve",
    ("bad_config", ""): "max_batch_size",
    ("bad_key", "1"): "backend",
    ("missing_version", "7"): "no such version",
}


def test_broken_models_are_reported_and_the_others_serve(mixed: Path) -> None:
    """RepositoryIndex has the reason of each; inference on one says the same; the good one answers."""
    with running_server(mixed) as server:
        client = Client(server.channel())
        index = {(m.name, m.version): m for m in client.call("RepositoryIndex").models}
        assert index["good", "1"].state == "READY"
        for key, fragment in REASONS.items():
            assert index[key].state == "UNAVAILABLE", key
            assert fragment in index[key].reason, index[key].reason
        ready = client.call("RepositoryIndex", ready=True).models
        assert [m.name for m in ready] == ["good"]
        for name, _ in REASONS:
            assert not client.call("ModelReady", name=name).ready
            assert health(server, name).status == NOT_SERVING
            with pytest.raises(grpc.RpcError) as refused:
                client.infer(request(name, {"x": X}))
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "is not at ready state" in refused.value.details()
        assert health(server, "good").status == SERVING
        assert np.array_equal(arrays(client.infer(request("good", {"x": X})))["y"], X)
        assert {line["model"] for line in server.log_lines("model not loaded")} == {name for name, _ in REASONS}


def test_strict_readiness(mixed: Path) -> None:
    """Never ready while a model is missing; alive, and the good model answers those who ask."""
    with running_server(mixed, "--strict-readiness", "true", ready=False) as server:
        server.wait_for_log("not ready: strict_readiness, and models failed to load")
        client = Client(server.channel())
        assert client.call("ServerLive").live
        assert not client.call("ServerReady").ready
        assert health(server).status == NOT_SERVING
        assert np.array_equal(arrays(client.infer(request("good", {"x": X})))["y"], X)


def test_exit_on_error(mixed: Path) -> None:
    """A model that does not load ends the server with exit code 1."""
    server = start_and_end(mixed, "--exit-on-error", "true")
    assert server.log_lines("stopping: a model failed to load and exit_on_error is set")


# Versions


POLICIES = {
    "newest": ("", [3], 3),
    "latest_two": ("version_policy { latest { num_versions: 2 } }", [2, 3], 3),
    "every": ("version_policy { all {} }", [1, 2, 3], 3),
    "chosen": ("version_policy { specific { versions: [1, 2] } }", [1, 2], 2),
}


def test_versions_by_policy(tmp_path: Path) -> None:
    """Each version answers as itself, no version means the newest that is served, others are not served."""
    for name, (config, _, _) in POLICIES.items():
        for version in (1, 2, 3):
            columns = version + 1
            write_model(tmp_path, name, onnx_models.identity("FP32", ("N", columns)), version, config or None)
    with running_server(tmp_path) as server:
        client = Client(server.channel())
        for name, (_, served, newest) in POLICIES.items():
            metadata = client.call("ModelMetadata", name=name)
            assert list(metadata.versions) == [str(version) for version in served], name
            for version in (1, 2, 3):
                x = np.zeros((1, version + 1), np.float32)
                message = request(name, {"x": x}, version=str(version))
                if version in served:
                    answer = client.infer(message)
                    assert answer.model_version == str(version)
                    assert arrays(answer)["y"].shape == x.shape
                else:
                    with pytest.raises(grpc.RpcError) as refused:
                        client.infer(message)
                    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            answer = client.infer(request(name, {"x": np.zeros((1, newest + 1), np.float32)}))
            assert answer.model_version == str(newest)
            index = {m.version: m.state for m in client.call("RepositoryIndex").models if m.name == name}
            assert index == {str(v): "READY" if v in served else "UNAVAILABLE" for v in (1, 2, 3)}


def test_requests_while_loading_are_refused_with_the_reason(tmp_path: Path) -> None:
    """A model that is not loaded yet: UNAVAILABLE, so that clients try again; the port answers from the start."""
    for number in range(12):
        write_model(tmp_path, f"m{number:02d}", onnx_models.slow_for(20))
    with running_server(tmp_path, "--profile-budget-ms", "500", ready=False) as server:
        client = Client(server.channel())
        server.wait_for_log("model ready")
        assert not client.call("ServerReady").ready
        with ThreadPoolExecutor(1) as pool:
            early = pool.submit(client.infer, request("m11", {"x": X})).exception(HANG_S)
        assert isinstance(early, grpc.RpcError)
        assert early.code() is grpc.StatusCode.UNAVAILABLE
        assert "is not at ready state" in early.details()
        server.wait_ready()
        assert np.array_equal(arrays(client.infer(request("m11", {"x": X})))["y"], X)


def test_models_that_break_each_others_promise_are_reported(tmp_path: Path) -> None:
    """A slow one beside one with a short objective: the log names both; the two that go together are not mentioned."""
    objective = 'parameters { key: "latency_slo_ms" value { string_value: "20" } }\n'
    write_model(tmp_path, "fast", onnx_models.identity(), config=objective)
    write_model(tmp_path, "easy", onnx_models.mlp(), config=objective)
    write_model(tmp_path, "slow", onnx_models.slow_for(100))
    with running_server(tmp_path, "--cpu-run-slots", "1") as server:
        # It has been said by then, and read from the log here as well.
        server.wait_for_log("ready")
        said = [line["detail"] for line in server.log_lines("promises that break each other")]
    assert len(said) == 2
    for detail, name in zip(sorted(said, key=lambda text: "'easy'" not in text), ("easy", "fast"), strict=True):
        assert detail.startswith("model 'slow' takes ")
        assert f"requests for '{name}'" in detail
