"""Clients that misuse shared memory: their own requests fail, with the right status; nobody else's do."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from service.pb import grpc_service_pb2 as pb
from tests.support import onnx_models
from tests.support.client import Client, arrays, request
from tests.support.onnx_models import write_model
from tests.support.server import RunningServer, running_server

X = np.arange(4096 * 4, dtype=np.float32).reshape(4096, 4)
FOLDER = Path("/dev/shm")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    root = tmp_path_factory.mktemp("repository")
    write_model(root, "identity", onnx_models.identity(), config="max_batch_size: 4096\ndynamic_batching {}\n")
    with running_server(root, "--allow-client-shm", "true") as running:
        yield running


@pytest.fixture
def memory() -> Iterator[Path]:
    """An object of shared memory that holds `X`."""
    path = FOLDER / f"onclock_test_{uuid.uuid4().hex}"
    path.write_bytes(X.tobytes())
    yield path
    path.unlink(missing_ok=True)


def register(client: Client, memory: Path, name: str = "", byte_size: int = X.nbytes) -> str:
    name = name or memory.name
    client.call("SystemSharedMemoryRegister", name=name, key=f"/{memory.name}", byte_size=byte_size)
    return name


def from_memory(region: str, byte_size: int = X.nbytes, rows: int = 4096, into: str = "") -> Any:
    message = pb.ModelInferRequest(model_name="identity")
    tensor = message.inputs.add(name="x", datatype="FP32", shape=[rows, 4])
    tensor.parameters["shared_memory_region"].string_param = region
    tensor.parameters["shared_memory_byte_size"].int64_param = byte_size
    if into:
        output = message.outputs.add(name="y")
        output.parameters["shared_memory_region"].string_param = into
        output.parameters["shared_memory_byte_size"].int64_param = byte_size
    return message


def failure(client: Client, message: Any) -> tuple[grpc.StatusCode, str]:
    error = client.infer_future(message).exception()
    assert error is not None, "it was answered"
    return error.code(), error.details()


class Neighbour:
    """Somebody else, who asks all the while and must not notice."""

    def __init__(self, server: RunningServer) -> None:
        self.answers = 0
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask, args=(Client(server.channel()),))

    def _ask(self, client: Client) -> None:
        while not self._stop.is_set():
            try:
                answer = client.infer(request("identity", {"x": X[:2]}))
                assert np.array_equal(arrays(answer)["y"], X[:2])
                self.answers += 1
            except (grpc.RpcError, AssertionError) as error:
                self.failures.append(str(error))

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
        assert self.answers
        assert not self.failures, self.failures[0]


def test_an_object_that_shrinks_while_it_is_used(server: RunningServer, memory: Path) -> None:
    """Truncated and made long again without pause, under requests that read and write it: never the end of the server.

    A mapping would make it one: touching pages that are not there ends the process.
    """
    client = Client(server.channel())
    region = register(client, memory)
    stop = threading.Event()

    def shrink() -> None:
        while not stop.is_set():
            os.truncate(memory, 0)
            os.truncate(memory, X.nbytes)

    hostile = threading.Thread(target=shrink)
    with Neighbour(server):
        hostile.start()
        outcomes = [
            client.infer_future(from_memory(region, into=region if turn % 2 else "")).exception() for turn in range(300)
        ]
        stop.set()
        hostile.join(30)
    codes = {error.code() for error in outcomes if error is not None}
    assert codes <= {grpc.StatusCode.INVALID_ARGUMENT}
    memory.write_bytes(X.tobytes())
    assert np.array_equal(arrays(client.infer(from_memory(region)))["y"], X)


def test_an_object_that_is_gone(server: RunningServer, memory: Path) -> None:
    """Its owner removed it: what is registered is still open, what is not cannot be."""
    client = Client(server.channel())
    region = register(client, memory)
    memory.unlink()
    assert np.array_equal(arrays(client.infer(from_memory(region)))["y"], X)
    with pytest.raises(grpc.RpcError) as error:
        register(client, memory, "again")
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]


def test_a_region_that_is_unregistered_while_it_is_used(server: RunningServer, memory: Path) -> None:
    """Requests that were accepted are answered, later ones are told that there is none."""
    client = Client(server.channel())
    with Neighbour(server):
        for _ in range(20):
            region = register(client, memory)
            futures = [client.infer_future(from_memory(region, into=region)) for _ in range(5)]
            client.call("SystemSharedMemoryUnregister", name=region)
            for future in futures:
                error = future.exception()
                assert error is None or error.code() is grpc.StatusCode.NOT_FOUND, error
            assert failure(client, from_memory(region))[0] is grpc.StatusCode.NOT_FOUND


def test_places_outside(server: RunningServer, memory: Path) -> None:
    """Offsets and sizes that are not within the region, sizes that are not the tensor's, regions that do not exist."""
    client = Client(server.channel())
    region = register(client, memory)
    beyond = from_memory(region)
    beyond.inputs[0].parameters["shared_memory_offset"].int64_param = 16
    huge = from_memory(region)
    huge.inputs[0].parameters["shared_memory_offset"].int64_param = 2**63 - 1
    small = from_memory(region, into=region)
    small.outputs[0].parameters["shared_memory_byte_size"].int64_param = X.nbytes - 1
    for message, words in (
        (beyond, "Invalid offset + byte size"),
        (huge, "Invalid offset + byte size"),
        (small, "should be at least"),
        (from_memory(region, X.nbytes - 16), "byte size mismatch"),
    ):
        code, details = failure(client, message)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert words in details
    assert failure(client, from_memory("nobody"))[0] is grpc.StatusCode.NOT_FOUND
    assert failure(client, from_memory(region, into="nobody"))[0] is grpc.StatusCode.NOT_FOUND
    client.call("SystemSharedMemoryUnregister", name=region)


def test_registrations_without_end(server: RunningServer, memory: Path) -> None:
    """They end at a bound, and when they are taken away the server has no more files open than before."""
    client = Client(server.channel())
    files = Path(f"/proc/{server.process.pid}/fd")
    client.call("SystemSharedMemoryUnregister")
    before = len(list(files.iterdir()))
    with Neighbour(server):
        refused = 0
        for number in range(1200):
            message = pb.SystemSharedMemoryRegisterRequest(name=f"r{number}", key=f"/{memory.name}", byte_size=X.nbytes)
            error = client.method("SystemSharedMemoryRegister").future(message, timeout=30).exception()
            refused += error is not None
            assert error is None or error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert refused > 0
        client.call("SystemSharedMemoryUnregister")
    assert len(list(files.iterdir())) <= before + 5
    assert not client.call("SystemSharedMemoryStatus").regions
