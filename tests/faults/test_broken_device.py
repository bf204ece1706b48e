"""A device that breaks, hangs or runs out of memory: who waits is told, and the process makes room for another."""

from __future__ import annotations

import contextlib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.server import EXIT_DEVICE_FAILED
from tests.support import onnx_models
from tests.support.client import Client, arrays, request
from tests.support.onnx_models import write_model
from tests.support.server import ROOT, RunningServer, running_server

X = np.arange(4, dtype=np.float32).reshape(1, 4)
FOREVER = np.array(10**15, np.int64)
ILLEGAL = "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=h ; expr=cudaStreamSynchronize"
FAULTS = Path(__file__).parents[1] / "support" / "faults"
# Memory for six rows of the hungry model.
ROOM = 100 << 20
MAX_ROWS = 16
NO_ARENA = """parameters { key: "enable_mem_arena" value { string_value: "0" } }
"""


@pytest.fixture
def fault(tmp_path: Path) -> Path:
    """The file that breaks the server when it is written."""
    return tmp_path / "fault"


@pytest.fixture
def environment(fault: Path) -> dict[str, str]:
    return {"PYTHONPATH": f"{FAULTS}:{ROOT}", "FAULT_FILE": str(fault)}


def errors(futures: list[Any]) -> list[grpc.RpcError]:
    return [future.exception(30) for future in futures]


def assert_replaced(server: RunningServer, reason: str) -> None:
    """It ends by itself, with the exit code that says why, and the log says the same."""
    assert server.wait_exit() == EXIT_DEVICE_FAILED
    (line,) = server.log_lines("a device has failed: the server drains and ends")
    assert line["device"] == "cpu"
    assert reason in line["reason"]


def test_a_batch_that_hangs(tmp_path: Path) -> None:
    """A loop without end: its client, and those who wait behind it, get UNAVAILABLE and why; the process ends."""
    write_model(tmp_path, "looping", onnx_models.looping())
    write_model(tmp_path, "identity", onnx_models.identity())
    flags = ("--hung-run-timeout-s", "1", "--cpu-run-slots", "1")
    with running_server(tmp_path, *flags, expect_exit=EXIT_DEVICE_FAILED) as server:
        client = Client(server.channel())
        watch = health_pb2_grpc.HealthStub(server.channel()).Watch(health_pb2.HealthCheckRequest(), timeout=30)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        hanging = client.infer_future(request("looping", {"x": X, "times": FOREVER}))
        # Requests that overtook it on the way are answered; the first that is not waits behind it.
        waiting = [client.infer_future(request("identity", {"x": X}))]
        with contextlib.suppress(grpc.FutureTimeoutError):
            while waiting[0].exception(timeout=0.2) is None:
                waiting = [client.infer_future(request("identity", {"x": X}))]
        waiting += [client.infer_future(request("identity", {"x": X})) for _ in range(8)]
        for error in errors([hanging, *waiting]):
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert "model 'looping' has run for" in error.details()
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert_replaced(server, "model 'looping' has run for")


def test_a_slow_batch_is_not_one_that_hangs(tmp_path: Path) -> None:
    """What takes less than the limit is answered, and nothing happens."""
    write_model(tmp_path, "looping", onnx_models.looping())
    with running_server(tmp_path, "--hung-run-timeout-s", "20") as server:
        client = Client(server.channel())
        (y,) = arrays(client.infer(request("looping", {"x": X * 0, "times": np.array(200_000, np.int64)}))).values()
        assert np.array_equal(y, X * 0)
        assert client.call("ServerReady").ready


def test_a_broken_device(tmp_path: Path, fault: Path, environment: dict[str, str]) -> None:
    """An error of the kind that no later call recovers from: nobody's request is tried again there."""
    write_model(tmp_path / "models", "identity", onnx_models.identity())
    expected = {"environment": environment, "expect_exit": EXIT_DEVICE_FAILED}
    with running_server(tmp_path / "models", "--metrics-port", "0", **expected) as server:
        client = Client(server.channel())
        assert np.array_equal(arrays(client.infer(request("identity", {"x": X})))["y"], X)
        assert 'onclock_device_healthy{device="cpu"} 1\n' in metrics(server)
        fault.write_text(ILLEGAL)
        for error in errors([client.infer_future(request("identity", {"x": X})) for _ in range(20)]):
            assert error.code() is grpc.StatusCode.UNAVAILABLE, error
        assert_replaced(server, "CUDA failure 700")


def test_a_device_that_breaks_while_models_load(tmp_path: Path, fault: Path, environment: dict[str, str]) -> None:
    """No model is blamed for it: the process ends to be replaced."""
    write_model(tmp_path / "models", "identity", onnx_models.identity())
    fault.write_text(ILLEGAL)
    expected = {"environment": environment, "expect_exit": EXIT_DEVICE_FAILED, "ready": False}
    with running_server(tmp_path / "models", **expected) as server:
        assert_replaced(server, "while model 'identity' was loading")


def test_an_ordinary_error_of_the_device_library_breaks_nothing(
    tmp_path: Path, fault: Path, environment: dict[str, str]
) -> None:
    """An invalid argument fails the request; the next one succeeds."""
    write_model(tmp_path / "models", "identity", onnx_models.identity())
    with running_server(tmp_path / "models", environment=environment) as server:
        client = Client(server.channel())
        fault.write_text("CUDA failure 1: invalid argument ; GPU=0")
        with pytest.raises(grpc.RpcError) as failed:
            client.infer(request("identity", {"x": X}))
        assert failed.value.code() is grpc.StatusCode.INTERNAL  # type: ignore[attr-defined]
        fault.unlink()
        assert np.array_equal(arrays(client.infer(request("identity", {"x": X})))["y"], X)


@pytest.fixture
def starved(tmp_path: Path, fault: Path, environment: dict[str, str]) -> Iterator[tuple[RunningServer, Client]]:
    """A server whose model had memory for its largest batch while it was measured, and now has it for six rows."""
    write_model(tmp_path / "models", "hungry", onnx_models.hungry(), config=f"max_batch_size: {MAX_ROWS}\n{NO_ARENA}")
    flags = ("--metrics-port", "0", "--profile-budget-ms", "3000")
    with running_server(tmp_path / "models", *flags, environment=environment) as server:
        client = Client(server.channel())
        assert f'onclock_batch_rows_limit{{model="hungry",version="1"}} {MAX_ROWS}\n' in metrics(server)
        fault.write_text(f"address space +{ROOM}")
        yield server, client


def test_out_of_memory(starved: tuple[RunningServer, Client]) -> None:
    """Allocations that really fail: every request that fits alone is answered, and the limit learned is a metric."""
    server, client = starved
    sent = [np.full((1, 4), number, np.float32) for number in range(4 * MAX_ROWS)]
    futures = [client.infer_future(request("hungry", {"x": x})) for x in sent]
    for x, future in zip(sent, futures, strict=True):
        assert np.array_equal(arrays(future.result(60))["y"], x[:, :1])
    # A request of more rows than fit at once is run in parts.
    many = np.arange(MAX_ROWS * 4, dtype=np.float32).reshape(MAX_ROWS, 4)
    assert np.array_equal(arrays(client.infer(request("hungry", {"x": many})))["y"], many[:, 3:])
    line = next(line for line in metrics(server).splitlines() if line.startswith("onclock_batch_rows_limit"))
    assert 1 <= int(line.split()[-1]) <= ROOM // onnx_models.HUNGRY_BYTES
    assert not server.log_lines("a device has failed: the server drains and ends")


def metrics(server: RunningServer) -> str:
    text: str = urllib.request.urlopen(server.metrics_url, timeout=10).read().decode()
    return text
