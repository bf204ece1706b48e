"""A client's end of `ModelStreamInfer`, and what else tests of streams look at."""

from __future__ import annotations

import queue
import time
import urllib.request
from collections.abc import Callable
from typing import Any

from service.pb import grpc_service_pb2 as pb
from tests.support.client import SERVICE, TIMEOUT_S
from tests.support.server import RunningServer


class Stream:
    """One stream: messages are sent as they are put in, answers read as they are asked for."""

    def __init__(self, server: RunningServer, metadata: tuple[tuple[str, str], ...] = (), timeout: float = 60) -> None:
        self._outbox: queue.Queue[bytes | None] = queue.Queue()
        method = server.channel().stream_stream(f"/{SERVICE}/ModelStreamInfer", None, None)
        self.call = method(iter(self._outbox.get, None), timeout=timeout, metadata=metadata)

    def send(self, *messages: Any) -> None:
        for message in messages:
            self._outbox.put(message if isinstance(message, bytes) else message.SerializeToString())

    def done(self) -> None:
        self._outbox.put(None)

    def read(self) -> Any:
        return pb.ModelStreamInferResponse.FromString(next(self.call))

    def rest(self) -> list[Any]:
        return [pb.ModelStreamInferResponse.FromString(answer) for answer in self.call]


def metric(server: RunningServer, name: str) -> float:
    text = urllib.request.urlopen(server.metrics_url, timeout=10).read().decode()
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def wait_for(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end, what
