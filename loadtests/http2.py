"""The client's side of HTTP/2 as gRPC needs it (RFC 9113, 7541): bytes in, bytes and events out, no I/O.

Made to be cheap in Python, where a general library costs more for a request than a server does: request headers are
encoded once per kind of request (literals, which leave no state behind), and the peer is told to keep no header table,
so that equal answers are equal bytes and are decoded once.

A peer that breaks the protocol raises `Http2Error`; the connection is of no use afterwards.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import unquote

import hpack

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 5, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 1, 2, 3, 4, 5
DEFAULT_WINDOW = 65_535
MAX_WINDOW = 2**31 - 1
MAX_STREAM_ID = 2**31 - 1
# Answers are read as fast as they come: a window that never closes, topped up before it is half used.
TOP_UP = MAX_WINDOW // 2
# Frames we accept (we never announce more) and header blocks over several frames (gRPC's own bound is 8 KiB).
OUR_MAX_FRAME = 16_384
MAX_HEADER_BLOCK = 65_536
# Different answer headers remembered; a server that puts a date into each would otherwise fill memory.
MAX_CACHED = 4_096
CANCEL = 8

# gRPC over HTTP/2: error codes of RST_STREAM and HTTP statuses without a gRPC status.
RESET_STATUS = {7: 14, 8: 1, 11: 8, 12: 7}
HTTP_STATUS = {400: 13, 401: 16, 403: 7, 404: 12, 429: 14, 502: 14, 503: 14, 504: 14}
INTERNAL, UNKNOWN, UNAVAILABLE = 13, 2, 14

_FRAME = struct.Struct(">HBBBL")
_STREAM = struct.Struct(">L")
_SETTING = struct.Struct(">HL")


class Http2Error(Exception):
    """The peer broke the protocol, or closed the connection on us."""


@dataclass(slots=True)
class Ended:
    """A stream has ended: gRPC `status`, the bytes of its messages, and the server's words for an error."""

    stream: int
    status: int
    received: int
    message: str = ""


@dataclass(slots=True)
class Message:
    """A message of a stream that was opened with `messages=True`."""

    stream: int
    data: bytes


Event = Ended | Message


@dataclass(slots=True)
class _Stream:
    received: int = 0
    status: int = -1  # of the first headers, when they carry one
    http: int = 200
    message: str = ""
    buffer: bytearray | None = None


@dataclass(slots=True)
class _Pending:
    data: memoryview
    window: int
    end: bool


@dataclass(slots=True)
class _Decoded:
    http: int
    status: int
    message: str


def encode_headers(headers: Iterable[tuple[str, str]]) -> bytes:
    """A header block of literals without indexing and without Huffman coding (RFC 7541, 6.2.2): stateless."""
    block = bytearray()
    for name, value in headers:
        block.append(0)
        for text in (name.encode(), value.encode()):
            block += _length(len(text)) + text
    return bytes(block)


def _length(size: int) -> bytes:
    if size < 127:
        return bytes((size,))
    rest, out = size - 127, bytearray((127,))
    while rest >= 128:
        out.append(rest & 127 | 128)
        rest >>= 7
    out.append(rest)
    return bytes(out)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame."""
    size = len(payload)
    return _FRAME.pack(size >> 8, size & 255, kind, flags, stream) + payload


@dataclass(slots=True)
class Http2Client:
    """One connection. `out` holds the bytes to be sent; whoever sends them removes them."""

    out: bytearray = field(default_factory=bytearray)
    ready: bool = False  # the peer has acknowledged our settings: headers can be decoded, requests may be sent
    closing: bool = False  # the peer wants no new streams
    max_streams: int = 100
    peer_frame: int = OUR_MAX_FRAME
    _peer_window: int = DEFAULT_WINDOW
    _send_window: int = DEFAULT_WINDOW
    _consumed: int = 0
    _next: int = 1
    _input: bytes = b""
    _block: bytearray = field(default_factory=bytearray)
    _block_stream: int = 0
    _block_ends: bool = False
    _streams: dict[int, _Stream] = field(default_factory=dict)
    _pending: dict[int, _Pending] = field(default_factory=dict)
    _decoder: hpack.Decoder = field(default_factory=hpack.Decoder)
    _cache: dict[bytes, _Decoded] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.max_streams = MAX_WINDOW  # until the peer says otherwise (RFC 9113, 6.5.2)
        settings = ((HEADER_TABLE_SIZE, 0), (ENABLE_PUSH, 0), (INITIAL_WINDOW_SIZE, MAX_WINDOW))
        self.out += PREFACE + frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(*pair) for pair in settings))
        self.out += frame(WINDOW_UPDATE, 0, 0, _STREAM.pack(MAX_WINDOW - DEFAULT_WINDOW))

    # ---------------------------------------------------------------- what we send

    @property
    def in_flight(self) -> int:
        """Streams that have not ended."""
        return len(self._streams)

    @property
    def can_open(self) -> bool:
        """Whether the peer allows one more stream now."""
        return self.ready and not self.closing and len(self._streams) < self.max_streams and self._next <= MAX_STREAM_ID

    def open(self, headers: bytes, body: bytes, end: bool = True, messages: bool = False) -> int:
        """A new stream with this header block (`encode_headers`) and body; its id. Only when `can_open`.

        With `end=False` more can be sent with `send`; with `messages=True` the answer's messages come as events.
        """
        stream = self._next
        self._next += 2
        self._streams[stream] = _Stream(buffer=bytearray() if messages else None)
        size = len(headers)
        if size <= self.peer_frame:
            self.out += _FRAME.pack(size >> 8, size & 255, HEADERS, END_HEADERS, stream)
            self.out += headers
        else:
            parts = [headers[i : i + self.peer_frame] for i in range(0, size, self.peer_frame)]
            for index, part in enumerate(parts):
                flags = END_HEADERS if index == len(parts) - 1 else 0
                self.out += frame(CONTINUATION if index else HEADERS, flags, stream, part)
        size = len(body)
        if end and size <= self.peer_frame and size <= self._send_window and size <= self._peer_window:
            # The usual case: all of it fits, and nothing needs to be remembered.
            self._send_window -= size
            self.out += _FRAME.pack(size >> 8, size & 255, DATA, END_STREAM, stream)
            self.out += body
        else:
            self._pending[stream] = _Pending(memoryview(body), self._peer_window, end)
            self._pump(stream)
        return stream

    def send(self, stream: int, body: bytes, end: bool = False) -> None:
        """More data on a stream opened with `end=False`."""
        pending = self._pending[stream]
        pending.data = memoryview(bytes(pending.data) + body)
        pending.end = end
        self._pump(stream)

    def cancel(self, stream: int) -> None:
        """Give a stream up: no event will come for it."""
        if self._streams.pop(stream, None) is not None:
            self._pending.pop(stream, None)
            self.out += frame(RST_STREAM, 0, stream, _STREAM.pack(CANCEL))

    def _pump(self, stream: int) -> None:
        pending = self._pending[stream]
        data = pending.data
        while True:
            size = min(len(data), self.peer_frame, self._send_window, pending.window)
            last = size == len(data)
            if size == 0 and not (last and pending.end):
                break
            if size < 0:
                break
            self._send_window -= size
            pending.window -= size
            self.out += frame(DATA, END_STREAM if last and pending.end else 0, stream, bytes(data[:size]))
            data = data[size:]
            if last:
                break
        pending.data = data
        if not len(data) and pending.end:
            del self._pending[stream]

    def _pump_all(self) -> None:
        for stream in list(self._pending):
            if self._send_window <= 0:
                return
            if len(self._pending[stream].data):
                self._pump(stream)

    # ---------------------------------------------------------------- what we hear

    def receive(self, data: bytes) -> list[Event]:
        """What the peer's bytes mean for our streams. Raises `Http2Error`."""
        events: list[Event] = []
        buffer = self._input + data if self._input else data
        position, size = 0, len(buffer)
        while size - position >= 9:
            high, low, kind, flags, stream = _FRAME.unpack_from(buffer, position)
            length = high << 8 | low
            if length > OUR_MAX_FRAME:
                raise Http2Error(f"a frame of {length} bytes, more than the {OUR_MAX_FRAME} allowed")
            end = position + 9 + length
            if end > size:
                break
            self._frame(kind, flags, stream & MAX_STREAM_ID, buffer[position + 9 : end], events)
            position = end
        self._input = buffer[position:]
        return events

    def lost(self) -> list[Event]:
        """The connection is gone: every open stream ends as the client's own status -1."""
        events: list[Event] = [Ended(stream, -1, state.received) for stream, state in self._streams.items()]
        self._streams.clear()
        self._pending.clear()
        self.closing = True
        return events

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes, events: list[Event]) -> None:
        if self._block_stream and kind != CONTINUATION:
            raise Http2Error("headers were not continued")
        if kind == DATA:
            self._data(flags, stream, payload, events)
        elif kind in (HEADERS, CONTINUATION):
            self._header_frame(kind, flags, stream, payload, events)
        elif kind == WINDOW_UPDATE:
            self._window(stream, payload)
        elif kind == SETTINGS:
            self._settings(flags, payload)
        elif kind == PING:
            if not flags & ACK:
                self.out += frame(PING, ACK, 0, payload)
        elif kind == RST_STREAM:
            self._reset(stream, payload, events)
        elif kind == GOAWAY:
            self._goaway(payload, events)
        elif kind == PUSH_PROMISE:
            raise Http2Error("a push, which we do not allow")

    def _header_frame(self, kind: int, flags: int, stream: int, payload: bytes, events: list[Event]) -> None:
        """HEADERS, and what continues them."""
        if kind == HEADERS:
            if stream == 0:
                raise Http2Error("headers on stream 0")
            payload = _unpadded(flags, payload)
            if flags & PRIORITY:
                payload = payload[5:]
            if not flags & END_HEADERS:
                self._block_stream, self._block_ends = stream, bool(flags & END_STREAM)
                self._block = bytearray(payload)
                return
            self._headers(stream, payload, bool(flags & END_STREAM), events)
            return
        if stream != self._block_stream or not stream:
            raise Http2Error("a continuation without headers")
        self._block += payload
        if len(self._block) > MAX_HEADER_BLOCK:
            raise Http2Error(f"headers of more than {MAX_HEADER_BLOCK} bytes")
        if flags & END_HEADERS:
            self._block_stream = 0
            self._headers(stream, bytes(self._block), self._block_ends, events)

    def _reset(self, stream: int, payload: bytes, events: list[Event]) -> None:
        state = self._streams.pop(stream, None)
        self._pending.pop(stream, None)
        if state is not None:
            (code,) = _STREAM.unpack_from(_exactly(payload, 4, "RST_STREAM"))
            # After an answer that has a status, a reset only says that the rest of the request is not wanted.
            status = state.status if state.status >= 0 else RESET_STATUS.get(code, INTERNAL)
            events.append(Ended(stream, status, state.received, state.message or f"reset by the server ({code})"))

    def _goaway(self, payload: bytes, events: list[Event]) -> None:
        if len(payload) < 8:
            raise Http2Error("GOAWAY too short")
        last, code = struct.unpack_from(">LL", payload)
        self.closing = True
        for number in [n for n in self._streams if n > last & MAX_STREAM_ID]:
            self._pending.pop(number, None)
            state = self._streams.pop(number)
            events.append(Ended(number, UNAVAILABLE, state.received, f"the server is going away ({code})"))

    def _data(self, flags: int, stream: int, payload: bytes, events: list[Event]) -> None:
        self._consumed += len(payload)
        if self._consumed >= TOP_UP:
            self.out += frame(WINDOW_UPDATE, 0, 0, _STREAM.pack(self._consumed))
            self._consumed = 0
        state = self._streams.get(stream)
        if state is None:
            return  # cancelled
        if flags & PADDED:
            payload = _unpadded(flags, payload)
        state.received += len(payload)
        if state.buffer is not None:
            state.buffer += payload
            # The window of a stream that lives long has to be opened again; those of the others never close.
            if payload:
                self.out += frame(WINDOW_UPDATE, 0, stream, _STREAM.pack(len(payload)))
            while len(state.buffer) >= 5:
                size = int.from_bytes(state.buffer[1:5], "big")
                if len(state.buffer) < 5 + size:
                    break
                events.append(Message(stream, bytes(state.buffer[5 : 5 + size])))
                del state.buffer[: 5 + size]
        if flags & END_STREAM:
            self._end(stream, state, events)

    def _headers(self, stream: int, block: bytes, ends: bool, events: list[Event]) -> None:
        decoded = self._cache.get(block)
        if decoded is None:
            decoded = self._decode(block)
            if len(self._cache) < MAX_CACHED:
                self._cache[block] = decoded
        state = self._streams.get(stream)
        if state is None:
            return  # cancelled
        if decoded.http:
            state.http = decoded.http
        if decoded.status >= 0:
            state.status = decoded.status
            state.message = decoded.message
        if ends:
            self._end(stream, state, events)

    def _end(self, stream: int, state: _Stream, events: list[Event]) -> None:
        del self._streams[stream]
        self._pending.pop(stream, None)
        status, message = state.status, state.message
        if status < 0:
            status = UNKNOWN if state.http == 200 else HTTP_STATUS.get(state.http, UNKNOWN)
            message = f"HTTP status {state.http} and no grpc-status"
        events.append(Ended(stream, status, state.received, message))

    def _decode(self, block: bytes) -> _Decoded:
        try:
            fields = {str(name): str(value) for name, value in self._decoder.decode(block)}
        except hpack.HPACKError as error:
            raise Http2Error(f"headers cannot be decoded: {error}") from error
        try:
            status = int(fields.get("grpc-status", -1))
            return _Decoded(int(fields.get(":status", 0)), status, unquote(fields.get("grpc-message", "")))
        except ValueError as error:
            raise Http2Error(f"headers make no sense: {fields}") from error

    def _window(self, stream: int, payload: bytes) -> None:
        (increment,) = _STREAM.unpack(_exactly(payload, 4, "WINDOW_UPDATE"))
        increment &= MAX_WINDOW
        if stream == 0:
            self._send_window += increment
            if self._send_window > MAX_WINDOW:
                raise Http2Error("the connection's window grew too large")
            if self._pending:
                self._pump_all()
            return
        pending = self._pending.get(stream)
        if pending is not None:
            pending.window += increment
            if len(pending.data):
                self._pump(stream)

    def _settings(self, flags: int, payload: bytes) -> None:
        if flags & ACK:
            # From here on the peer's encoder has no table: what was decoded once means the same again.
            self._cache.clear()
            self._decoder.max_allowed_table_size = 0
            self._decoder.header_table_size = 0
            self.ready = True
            return
        if len(payload) % 6:
            raise Http2Error("SETTINGS of a wrong length")
        for key, value in _SETTING.iter_unpack(payload):
            if key == MAX_CONCURRENT_STREAMS:
                self.max_streams = value
            elif key == INITIAL_WINDOW_SIZE:
                if value > MAX_WINDOW:
                    raise Http2Error(f"an initial window of {value} bytes")
                for pending in self._pending.values():
                    pending.window += value - self._peer_window
                self._peer_window = value
            elif key == MAX_FRAME_SIZE:
                if not OUR_MAX_FRAME <= value < 2**24:
                    raise Http2Error(f"a largest frame of {value} bytes")
                self.peer_frame = value
        self.out += frame(SETTINGS, ACK, 0)
        self._pump_all()


def _exactly(payload: bytes, size: int, name: str) -> bytes:
    if len(payload) != size:
        raise Http2Error(f"{name} of {len(payload)} bytes, expected {size}")
    return payload


def _unpadded(flags: int, payload: bytes) -> bytes:
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise Http2Error("padding longer than its frame")
    return payload[1 : len(payload) - payload[0]]
