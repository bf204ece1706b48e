"""The load generator's HTTP/2 against `h2` as the server: requests of any size, answers of any shape, any chunking."""

from __future__ import annotations

import contextlib

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.settings
import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from loadtests.http2 import Ended, Http2Client, Http2Error, Message, encode_headers

HEADERS = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/inference.GRPCInferenceService/ModelInfer"),
    (":authority", "test"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
]


class Server:
    """A server made of `h2`: what the client sent is in `bodies`, answers are sent when asked for."""

    def __init__(self, window: int = 65_535, frame: int = 16_384, streams: int = 100) -> None:
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        self.h2.local_settings = h2.settings.Settings(
            client=False,
            initial_values={
                h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window,
                h2.settings.SettingCodes.MAX_FRAME_SIZE: frame,
                h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: streams,
            },
        )
        self.h2.max_inbound_frame_size = frame
        self.h2.initiate_connection()
        self.bodies: dict[int, bytes] = {}
        self.headers: dict[int, list[tuple[str, str]]] = {}
        self.ended: set[int] = set()
        self.reset: set[int] = set()

    def take(self, data: bytes) -> None:
        for event in self.h2.receive_data(data):
            if isinstance(event, h2.events.RequestReceived):
                self.headers[event.stream_id] = event.headers
                self.bodies[event.stream_id] = b""
            elif isinstance(event, h2.events.DataReceived):
                self.bodies[event.stream_id] += event.data
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.StreamEnded):
                self.ended.add(event.stream_id)
            elif isinstance(event, h2.events.StreamReset):
                self.reset.add(event.stream_id)

    def answer(self, stream: int, body: bytes, status: int, message: str = "") -> None:
        self.h2.send_headers(stream, [(":status", "200"), ("content-type", "application/grpc")])
        for i in range(0, len(body), 16_000):
            self.h2.send_data(stream, body[i : i + 16_000])
        trailers = [("grpc-status", str(status))]
        self.h2.send_headers(stream, trailers + ([("grpc-message", message)] if message else []), end_stream=True)


def exchange(client: Http2Client, server: Server, cut: int = 1 << 20) -> list[Ended | Message]:
    """Carry bytes to and fro until neither has more to say, in pieces of `cut` bytes towards the client."""
    events: list[Ended | Message] = []
    while True:
        out = bytes(client.out)
        client.out.clear()
        if out:
            server.take(out)
        back = server.h2.data_to_send()
        for i in range(0, len(back), cut):
            events += client.receive(back[i : i + cut])
        if not out and not back:
            return events


def connected(**settings: int) -> tuple[Http2Client, Server]:
    client, server = Http2Client(), Server(**settings)
    assert not client.ready
    exchange(client, server)
    assert client.ready
    return client, server


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 200_000), min_size=1, max_size=6),
    st.integers(1, 70_000),
    st.sampled_from([16_384, 20_000, 1 << 20]),
    st.integers(1, 3_000),
)
def test_bodies_of_any_size_arrive_whole(sizes: list[int], window: int, frame: int, cut: int) -> None:
    """Whatever the server's windows and frames, and however its bytes are cut."""
    client, server = connected(window=window, frame=frame)
    bodies = {
        client.open(encode_headers(HEADERS), bytes([i]) * size): bytes([i]) * size for i, size in enumerate(sizes)
    }
    exchange(client, server, cut)
    assert server.bodies == bodies
    assert server.ended == set(bodies)
    assert all([tuple(h) for h in headers] == HEADERS for headers in server.headers.values())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40_000), st.integers(0, 16), st.text(max_size=30)), min_size=1, max_size=8),
    st.integers(1, 500),
)
def test_answers_are_understood(answers: list[tuple[int, int, str]], cut: int) -> None:
    """Status, size and message of each, in whatever pieces they come; equal headers again and again."""
    from urllib.parse import quote

    client, server = connected()
    streams = [client.open(encode_headers(HEADERS), b"x") for _ in answers]
    exchange(client, server)
    expected = {}
    for stream, (size, status, message) in zip(streams, answers, strict=True):
        server.answer(stream, b"\x00" * size, status, quote(message))
        expected[stream] = (status, size, message)
    ended = [event for event in exchange(client, server, cut) if isinstance(event, Ended)]
    assert {event.stream: (event.status, event.received, event.message) for event in ended} == expected
    assert client.in_flight == 0


def test_headers_longer_than_a_frame_are_continued() -> None:
    """Metadata of 40 KB, as a token can be."""
    client, server = connected()
    token = "t" * 40_000
    stream = client.open(encode_headers([*HEADERS, ("authorization", token)]), b"")
    exchange(client, server)
    assert dict(server.headers[stream])["authorization"] == token


def test_no_more_streams_than_the_server_allows() -> None:
    """`can_open` says when one is free again."""
    client, server = connected(streams=2)
    first = client.open(encode_headers(HEADERS), b"")
    client.open(encode_headers(HEADERS), b"")
    assert not client.can_open
    exchange(client, server)
    server.answer(first, b"", 0)
    exchange(client, server)
    assert client.can_open


def test_a_cancelled_stream_is_reset_and_heard_of_no_more() -> None:
    """Also when its answer was already on its way, and when half of its request was not."""
    client, server = connected(window=10)
    stream = client.open(encode_headers(HEADERS), b"x" * 1000)
    client.cancel(stream)
    exchange(client, server)
    assert server.reset == {stream}
    assert client.in_flight == 0
    other = client.open(encode_headers(HEADERS), b"")
    server.take(bytes(client.out))
    client.out.clear()
    server.answer(other, b"late", 0)
    client.cancel(other)
    assert client.receive(server.h2.data_to_send()) == []


def test_messages_of_a_long_stream() -> None:
    """Each message of the answer is an event of its own, wherever frames are cut."""
    client, server = connected()
    stream = client.open(encode_headers(HEADERS), b"", end=False, messages=True)
    client.send(stream, b"one")
    client.send(stream, b"two", end=True)
    exchange(client, server)
    assert server.bodies[stream] == b"onetwo"
    framed = b"".join(b"\x00" + len(m).to_bytes(4, "big") + m for m in (b"a", b"", b"ccc" * 20_000))
    server.answer(stream, framed, 0)
    events = exchange(client, server, 777)
    assert [event.data for event in events if isinstance(event, Message)] == [b"a", b"", b"ccc" * 20_000]
    assert isinstance(events[-1], Ended)
    assert events[-1].status == 0


@pytest.mark.parametrize(("code", "status"), [(7, 14), (8, 1), (11, 8), (12, 7), (2, 13)])
def test_a_reset_has_the_status_that_grpc_gives_it(code: int, status: int) -> None:
    """As gRPC over HTTP/2 maps error codes."""
    client, server = connected()
    stream = client.open(encode_headers(HEADERS), b"")
    exchange(client, server)
    server.h2.reset_stream(stream, h2.errors.ErrorCodes(code))
    (event,) = exchange(client, server)
    assert isinstance(event, Ended)
    assert event.status == status


def test_a_server_that_goes_away() -> None:
    """What it has not taken fails as UNAVAILABLE; nothing new may be opened; what it took is still answered."""
    client, server = connected()
    taken = client.open(encode_headers(HEADERS), b"")
    exchange(client, server)
    client.open(encode_headers(HEADERS), b"")
    client.out.clear()  # the second never reached it
    server.h2.close_connection(last_stream_id=taken)
    (event,) = client.receive(server.h2.data_to_send())
    assert isinstance(event, Ended)
    assert (event.stream, event.status) == (taken + 2, 14)
    assert not client.can_open
    assert client.in_flight == 1


def test_a_broken_connection_ends_everything_once() -> None:
    """Every open stream as the client's own status."""
    client, _ = connected()
    streams = [client.open(encode_headers(HEADERS), b"x") for _ in range(3)]
    assert [(event.stream, event.status) for event in client.lost() if isinstance(event, Ended)] == [
        (stream, -1) for stream in streams
    ]
    assert client.lost() == []


@pytest.mark.parametrize(("http", "status"), [("200", 2), ("503", 14), ("404", 12), ("401", 16), ("418", 2)])
def test_an_answer_without_a_grpc_status(http: str, status: int) -> None:
    """A proxy in between says no in HTTP's words."""
    client, server = connected()
    stream = client.open(encode_headers(HEADERS), b"")
    exchange(client, server)
    server.h2.send_headers(stream, [(":status", http)], end_stream=True)
    (event,) = exchange(client, server)
    assert isinstance(event, Ended)
    assert event.status == status


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.integers(1, 50))
def test_no_bytes_crash_it(data: bytes, cut: int) -> None:
    """Garbage is understood, waited for or refused with `Http2Error`."""
    client, _ = connected()
    client.open(encode_headers(HEADERS), b"x")
    with contextlib.suppress(Http2Error):
        for i in range(0, len(data), cut):
            client.receive(data[i : i + cut])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 255), st.sampled_from([0, 1, 2, 3]), st.binary(max_size=40)),
        max_size=12,
    )
)
def test_no_frames_crash_it(frames: list[tuple[int, int, int, bytes]]) -> None:
    """Well-formed frames of any type, with any flags, in any order."""
    from loadtests.http2 import frame

    client, _ = connected()
    client.open(encode_headers(HEADERS), b"x" * 100_000)
    with contextlib.suppress(Http2Error):
        for kind, flags, stream, payload in frames:
            client.receive(frame(kind, flags, stream, payload))
