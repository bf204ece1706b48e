"""A gRPC client that can misbehave: HTTP/2 frame by frame on a plain socket, with `h2` to understand the answers.

`h2` refuses to send what the protocol forbids, so what is forbidden is sent as bytes.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

import h2.config
import h2.connection
import h2.events
import h2.settings

# Long enough that only a fault reaches it.
PATIENCE_S = 20.0

Headers = list[tuple[str, str]]


def grpc_headers(path: str, **more: str) -> Headers:
    """The headers of a call; `grpc_timeout="1S"` and the like are added."""
    usual = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "test"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    ]
    given = {name.replace("_", "-"): value for name, value in more.items()}
    return [(name, given.pop(name.strip(":"), value)) for name, value in usual] + list(given.items())


def framed(message: bytes, flag: int = 0) -> bytes:
    """A message behind gRPC's prefix."""
    return struct.pack(">BI", flag, len(message)) + message


class Answer:
    """What came back on a stream."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.trailers: dict[str, str] = {}
        self.data = b""
        self.ended = False
        self.reset: int | None = None

    @property
    def status(self) -> int:
        """The gRPC status."""
        return int(self.trailers.get("grpc-status", self.headers.get("grpc-status", "-1")))

    @property
    def details(self) -> str:
        return self.trailers.get("grpc-message", self.headers.get("grpc-message", ""))

    @property
    def message(self) -> bytes:
        """The one message."""
        flag, size = struct.unpack(">BI", self.data[:5])
        assert flag == 0
        assert len(self.data) == 5 + size
        return self.data[5:]


class RawClient:
    """One connection. `settings` are sent at the start; `consume` False: the windows are never opened again."""

    def __init__(self, port: int, settings: dict[int, int] | None = None, consume: bool = True) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        if settings:
            self.h2.local_settings = h2.settings.Settings(client=True, initial_values=settings)  # type: ignore[arg-type]
        self.answers: dict[int, Answer] = {}
        self.consume = consume
        self.ended = False
        self.h2.initiate_connection()
        self.flush()

    def flush(self) -> None:
        """Send what `h2` has to send."""
        self.socket.sendall(self.h2.data_to_send())

    def begin(self, headers: Headers, end: bool = False) -> int:
        """Open a stream."""
        stream = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream, headers, end_stream=end)
        self.answers[stream] = Answer()
        self.flush()
        return stream

    def data(self, stream: int, data: bytes, end: bool = False, pieces: int = 16384) -> None:
        """Send data in frames of `pieces` bytes."""
        for start in range(0, max(1, len(data)), pieces):
            piece = data[start : start + pieces]
            self.h2.send_data(stream, piece, end_stream=end and start + pieces >= len(data))
        self.flush()

    def call(self, path: str, message: bytes) -> Answer:
        """A well-behaved call."""
        stream = self.begin(grpc_headers(path))
        self.data(stream, framed(message), end=True)
        return self.answer(stream)

    def receive(self) -> bool:
        """Take in what the server sends next; False when it has closed the connection."""
        data = self.socket.recv(65536)
        if not data:
            self.ended = True
            return False
        for event in self.h2.receive_data(data):
            self._take(event)
        self.flush()
        return True

    def _take(self, event: h2.events.Event) -> None:
        answer = self.answers.get(getattr(event, "stream_id", 0) or 0)
        if isinstance(event, h2.events.ConnectionTerminated):
            self.ended = True
        if answer is None:
            return
        if isinstance(event, h2.events.ResponseReceived):
            answer.headers = dict(event.headers)  # type: ignore[arg-type]
        elif isinstance(event, h2.events.TrailersReceived):
            answer.trailers = dict(event.headers)  # type: ignore[arg-type]
        elif isinstance(event, h2.events.DataReceived):
            answer.data += event.data
            if self.consume and event.flow_controlled_length:
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            answer.ended = True
        elif isinstance(event, h2.events.StreamReset):
            answer.reset = int(event.error_code)

    def answer(self, stream: int) -> Answer:
        """Wait for the end of a stream."""
        answer = self.answers[stream]
        while not answer.ended and answer.reset is None and self.receive():
            pass
        assert answer.ended or answer.reset is not None, "the server closed the connection"
        return answer

    def close(self) -> None:
        self.socket.close()


@contextlib.contextmanager
def raw_client(port: int, settings: dict[int, int] | None = None, consume: bool = True) -> Iterator[RawClient]:
    """A connection for a while."""
    client = RawClient(port, settings, consume)
    try:
        yield client
    finally:
        client.close()
