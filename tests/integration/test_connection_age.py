"""Connections that are ended because they are old: no call is lost, and clients find servers that came later."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest

from tests.support import onnx_models
from tests.support.client import Client, request
from tests.support.native import needs_native
from tests.support.onnx_models import write_model
from tests.support.server import running_server
from tests.support.stream import Stream

X = np.ones((1, 4), np.float32)
AGE_S = 1.0
# An old connection is noticed within a second, its client told within another, and closed within a third.
CLOSED_S = AGE_S * 1.1 + 3
HANG_S = 30.0
# What a connection of HTTP/2 begins with, and the type of the frame that ends it.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
EMPTY_SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
GOAWAY = 7


@pytest.fixture(params=["native", "core"])
def ingress(request: pytest.FixtureRequest) -> str:
    if request.param == "native":
        needs_native()
    return str(request.param)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    write_model(directory, "m", onnx_models.identity())
    write_model(directory, "long", onnx_models.slow_for(300), config="max_batch_size: 1")
    return directory


def flags(ingress: str, grace_s: float) -> tuple[str, ...]:
    return ("--ingress", ingress, "--max-connection-age-s", str(AGE_S), "--grace-period-s", str(grace_s))


def told(port: int) -> float:
    """Seconds after which a client that asks for nothing is told that its connection ends, by a frame of HTTP/2."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=HANG_S) as connection,
        connection.makefile("rb") as frames,
    ):
        began = time.monotonic()
        connection.sendall(PREFACE + EMPTY_SETTINGS)
        while True:
            header = frames.read(9)
            assert len(header) == 9, "closed without a word"
            frames.read(int.from_bytes(header[:3], "big"))
            if header[3] == GOAWAY:
                return time.monotonic() - began


def test_a_connection_is_ended_and_no_call_is_lost(ingress: str, repository: Path) -> None:
    """Calls all the while, short ones and one that is in progress at any time: each is answered."""
    with running_server(repository, *flags(ingress, 20), "--profile-budget-ms", "50") as server:
        client = Client(server.channel())
        end = time.monotonic() + CLOSED_S + 1
        long = client.infer_future(request("long", {"x": X}))
        with ThreadPoolExecutor(1) as pool:
            ended = pool.submit(told, server.grpc_port)
            while time.monotonic() < end:
                client.infer(request("m", {"x": X}))
                if long.done():
                    assert long.result()
                    long = client.infer_future(request("long", {"x": X}))
            assert AGE_S * 0.9 <= ended.result(HANG_S) < CLOSED_S
        assert long.result()


def test_what_outlives_the_grace_period_is_cut(ingress: str, repository: Path) -> None:
    """A stream that stays open does not keep its connection."""
    with running_server(repository, *flags(ingress, 0.5)) as server:
        began = time.monotonic()
        stream = Stream(server)
        stream.send(request("m", {"x": X}))
        assert stream.read()
        with pytest.raises(grpc.RpcError) as caught:
            stream.read()
        assert AGE_S * 0.9 <= time.monotonic() - began < HANG_S / 2
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


class Balancer:
    """A balancer of connections: each new one goes to the next server; what was begun stays where it is."""

    def __init__(self, ports: list[int]) -> None:
        self.ports = ports
        self._turn = itertools.count()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                front, _ = self._listener.accept()
                back = socket.create_connection(("127.0.0.1", self.ports[next(self._turn) % len(self.ports)]))
                for source, sink in ((front, back), (back, front)):
                    threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


def test_a_server_that_comes_later_is_found(ingress: str, repository: Path) -> None:
    """Behind a balancer of connections, a client with one channel comes to use the second server."""
    with (
        running_server(repository, *flags(ingress, 5)) as first,
        running_server(repository, *flags(ingress, 5)) as second,
    ):
        balancer = Balancer([first.grpc_port])
        with contextlib.closing(balancer), grpc.insecure_channel(balancer.address) as channel:
            client = Client(channel)
            client.infer(request("m", {"x": X}))
            balancer.ports = [second.grpc_port]
            end = time.monotonic() + HANG_S
            while not Client(second.channel()).statistics("m").inference_stats.success.count:
                client.infer(request("m", {"x": X}))
                assert time.monotonic() < end, "the second server is never asked"
