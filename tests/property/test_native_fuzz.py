"""Whatever a client sends, the native ingress stays up, serves the others, and keeps nothing of it."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.frontend.call import Call
from service.frontend.native_ingress import NativeIngress
from tests.support.http2 import PATIENCE_S, framed, grpc_headers, raw_client
from tests.support.native import needs_native

METHOD = "/test.Service/Method"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


def echo(message: bytes | memoryview, call: Call) -> None:
    call.reply([message])


@pytest.fixture(scope="module")
def serving() -> Iterator[tuple[NativeIngress, int]]:
    needs_native()
    server = grpc.server(None)  # nothing behind it: what is relayed ends there
    ingress = NativeIngress(server, METHOD, echo, 100, 1 << 20, 1 << 16, traced=True)
    port = ingress.open("127.0.0.1", 0)
    server.start()
    ingress.start()
    yield ingress, port
    server.stop(grace=0).wait(PATIENCE_S)
    assert ingress.stop(0.0, PATIENCE_S)


def valid_call(stream: int, message: bytes) -> bytes:
    """The bytes of a whole call on `stream`: literal headers without compression, one DATA frame."""
    block = b""
    for name, value in grpc_headers(METHOD):
        block += b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
    data = framed(message)
    return frame(1, 4, stream, block) + frame(0, 1, stream, data)


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


FRAMES = st.builds(
    frame,
    st.integers(0, 11),
    st.sampled_from([0, 1, 4, 5, 8, 0x20, 0x2D, 0xFF]),
    st.sampled_from([0, 1, 2, 3, 5, 7, 2**31 - 1]),
    st.binary(max_size=40) | st.sampled_from([framed(b"x"), b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff", bytes(8)]),
)
CALLS = st.builds(valid_call, st.sampled_from([1, 3, 5, 7, 9]), st.binary(max_size=60))


@st.composite
def streams_of_bytes(draw: st.DrawFn) -> bytes:
    """Valid calls and stray frames in any order, then bytes changed, cut out and put in."""
    parts = draw(st.lists(CALLS | FRAMES, min_size=1, max_size=8))
    data = bytearray(SETTINGS + b"".join(parts))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data) - 1))
        change = draw(st.sampled_from(["flip", "cut", "put"]))
        if change == "flip":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif change == "cut":
            del data[at : at + draw(st.integers(1, 20))]
        else:
            data[at:at] = draw(st.binary(min_size=1, max_size=20))
        if not data:
            break
    return (PREFACE if draw(st.integers(0, 9)) else b"") + bytes(data)


def send(port: int, data: bytes) -> None:
    """Send bytes on a connection of their own, end it, and wait until the server has done so, too."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client, contextlib.suppress(ConnectionError):
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        while client.recv(65536):
            pass


@given(streams_of_bytes() | st.binary(max_size=200))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes(serving: tuple[NativeIngress, int], data: bytes) -> None:
    """A valid call on another connection is answered afterwards, and no call and no byte is still held."""
    ingress, port = serving
    with raw_client(port) as bystander:
        send(port, data)
        assert bystander.call(METHOD, b"still here").message == b"still here"
    end = time.monotonic() + PATIENCE_S
    while ingress.calls or ingress.bytes:
        assert time.monotonic() < end, (ingress.calls, ingress.bytes)
        time.sleep(0.001)


def test_a_valid_call_of_the_fuzzer_is_valid(serving: tuple[NativeIngress, int]) -> None:
    """What is mutated above is a call that would be answered."""
    _, port = serving
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
        client.sendall(PREFACE + SETTINGS + valid_call(1, b"abc"))
        received = b""
        while b"abc" not in received:
            data = client.recv(65536)
            assert data
            received += data
