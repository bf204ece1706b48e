"""What only the native ingress does: lists, dates, shares, compression, the relay, and HTTP/2 in all its forms."""

from __future__ import annotations

import contextlib
import gzip
import os
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from service.clock import NEVER_NS, NS_PER_MS, NS_PER_S, now_ns
from service.errors import Overloaded
from service.frontend.call import NO_LULL, Call, Lull, UnaryHandler
from service.frontend.native_ingress import NativeIngress, listen
from tests.support.http2 import PATIENCE_S, Headers, RawClient, framed, grpc_headers, raw_client
from tests.support.native import needs_native

METHOD = "/test.Service/Method"
MAX_MESSAGE = 1 << 20
MAX_BYTES = 16 << 20
MAX_CALLS = 1000
# HTTP/2 error codes.
NO_ERROR, CANCEL = 0, 8


@pytest.fixture(autouse=True)
def _native() -> None:
    needs_native()


def echo(message: bytes | memoryview, call: Call) -> None:
    call.reply([b"echo ", message])


@dataclass
class Serving:
    ingress: NativeIngress
    server: grpc.Server
    port: int

    def idle(self) -> None:
        """Wait until no call is in progress and nothing is held."""
        until(lambda: self.ingress.calls == 0 and self.ingress.bytes == 0)

    def works(self) -> None:
        """A new client is served, and nothing is left of anybody."""
        with raw_client(self.port) as client:
            assert client.call(METHOD, b"x").message == b"echo x"
        self.idle()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


class Behind(grpc.GenericRpcHandler):  # type: ignore[misc]
    """The ordinary server's methods: what is relayed to them comes back."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        # Released for every call that is held.
        self.holding = threading.Semaphore(0)
        self.deadline_s = 0.0
        self.metadata: dict[str, str] = {}

    def service(self, details: Any) -> grpc.RpcMethodHandler | None:
        name = details.method.rsplit("/", 1)[1]
        if name == "Unary":
            return grpc.unary_unary_rpc_method_handler(self.unary)
        if name == "Count":
            return grpc.unary_stream_rpc_method_handler(self.count)
        if name == "Mirror":
            return grpc.stream_stream_rpc_method_handler(self.mirror)
        if name == "Hold":
            return grpc.unary_unary_rpc_method_handler(self.hold)
        return None

    def unary(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self.metadata = {str(key): str(value) for key, value in context.invocation_metadata()}
        self.deadline_s = context.time_remaining() or 0.0
        context.send_initial_metadata((("early", "1"),))
        context.set_trailing_metadata((("late", "2"),))
        return request[::-1]

    def count(self, request: bytes, _: grpc.ServicerContext) -> Iterator[bytes]:
        for number in range(int(request)):
            yield b"%d" % number

    def mirror(self, requests: Iterator[bytes], _: grpc.ServicerContext) -> Iterator[bytes]:
        yield from requests

    def hold(self, _: bytes, context: grpc.ServicerContext) -> bytes:
        gone = threading.Event()
        context.add_callback(gone.set)
        self.holding.release()
        assert gone.wait(PATIENCE_S)
        self.cancelled.set()
        return b""


@contextlib.contextmanager
def serving(
    handler: UnaryHandler = echo,
    behind: Behind | None = None,
    share: Callable[[int], float] = lambda _: 0.0,
    lull: Callable[[], Lull] = lambda: NO_LULL,
    host: str = "127.0.0.1",
    traced: bool = False,
) -> Iterator[Serving]:
    with ThreadPoolExecutor(4) as pool:
        limits = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        server = grpc.server(pool, options=limits)
        if behind is not None:
            server.add_generic_rpc_handlers((behind,))
        refusal = Overloaded("not now", 3 * NS_PER_MS)
        ingress = NativeIngress(
            server, METHOD, handler, MAX_CALLS, MAX_BYTES, MAX_MESSAGE, share, lull, refusal, traced=traced
        )
        port = ingress.open(host, 0)
        server.start()
        ingress.start()
        try:
            yield Serving(ingress, server, port)
        finally:
            server.stop(grace=0).wait(PATIENCE_S)
            assert ingress.stop(0.0, PATIENCE_S), "the ingress thread did not end"


@contextlib.contextmanager
def channel_to(port: int, host: str = "127.0.0.1") -> Iterator[grpc.Channel]:
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
    ]
    with grpc.insecure_channel(f"{host}:{port}", options=options) as channel:
        yield channel


# ------------------------------------------------------------------------------------------------- dates and lists


@pytest.mark.timed
def test_arrivals_are_dated_when_they_come() -> None:
    """Between the client's sending and the handler's seeing, one after the other."""
    seen: list[tuple[int, int]] = []

    def note(message: bytes | memoryview, call: Call) -> None:
        seen.append((call.arrival_ns, now_ns()))
        call.reply([message])

    with serving(note) as served, raw_client(served.port) as client:
        before = now_ns()
        for number in range(20):
            client.call(METHOD, b"%d" % number)
        arrivals = [arrival for arrival, _ in seen]
        assert before <= arrivals[0]
        assert arrivals == sorted(arrivals)
        assert all(arrival <= handled for arrival, handled in seen)


@pytest.mark.parametrize(
    ("text", "expected_ns"),
    [
        ("5S", 5 * NS_PER_S),
        ("1500m", 1500 * NS_PER_MS),
        ("2000000u", 2 * NS_PER_S),
        ("99999999n", 99_999_999),
        ("2M", 120 * NS_PER_S),
        ("3H", 3 * 3600 * NS_PER_S),
        ("99999999H", None),
        ("", None),
        ("S", None),
        ("5", None),
        ("5x", None),
        ("-5S", None),
        ("1e3S", None),
        ("123456789S", None),
    ],
)
def test_deadlines_of_every_unit(text: str, expected_ns: int | None) -> None:
    """The client's time counts from the arrival; what is no time, or too long to matter, is no deadline."""
    calls: list[tuple[int, int]] = []

    def note(_: bytes | memoryview, call: Call) -> None:
        calls.append((call.arrival_ns, call.deadline_ns))
        call.reply([])

    with serving(note) as served, raw_client(served.port) as client:
        stream = client.begin(grpc_headers(METHOD, grpc_timeout=text))
        client.data(stream, framed(b"m"), end=True)
        assert client.answer(stream).message == b""
    ((arrival, deadline),) = calls
    assert deadline == (NEVER_NS if expected_ns is None else arrival + expected_ns)


def test_what_headers_say_of_traces() -> None:
    """Several of one name are a list, whatever characters they have; a second request says nothing again."""
    told: list[tuple[str | None, str | None]] = []

    def note(message: bytes | memoryview, call: Call) -> None:
        told.append((call.traceparent, call.tracestate))
        call.reply([])

    long = "x" * 40_000
    with serving(note, traced=True) as served, raw_client(served.port) as client:
        for more in (
            [("traceparent", "a")],
            [("traceparent", "a"), ("traceparent", "b"), ("tracestate", "\u00e9")],
            [("tracestate", long)],
            [("traceparent", "")],
            [],
        ):
            stream = client.begin([*grpc_headers(METHOD), *more])
            client.data(stream, framed(b"m"), end=True)
            assert client.answer(stream).status == 0
    assert told == [("a", None), ("a,b", "\u00c3\u00a9"), (None, long), (None, None), (None, None)]


@pytest.mark.timed  # ten messages are to come within one lull
def test_in_a_lull_arrivals_wait_for_each_other() -> None:
    """They are handed over together when somebody says that a batch was answered, each with its own date."""
    busy = Lull(NS_PER_S, 1000 * NS_PER_S)  # looked at every 5 ms, handed over after 50 ms at the latest
    lulls = [NO_LULL, busy]
    arrivals: list[int] = []

    def note(message: bytes | memoryview, call: Call) -> None:
        arrivals.append(call.arrival_ns)
        call.reply([message])

    with serving(note, lull=lambda: lulls[min(1, len(arrivals))]) as served, raw_client(served.port) as client:
        client.call(METHOD, b"first")
        streams = []
        for number in range(10):
            streams.append(client.begin(grpc_headers(METHOD)))
            client.data(streams[-1], framed(b"%d" % number), end=True)
            # What comes in one read has one date: the next is sent when this one was read, or answered already.
            until(lambda sent=number + 1: served.ingress.bytes + len(arrivals) - 1 >= sent)
        assert [client.answer(stream).message for stream in streams] == [b"%d" % number for number in range(10)]
        assert arrivals == sorted(arrivals)
        assert len(set(arrivals[1:])) == 10


def test_a_flush_hands_over_at_once() -> None:
    """Whoever has answered a batch does not wait for the end of the lull, nor does a cancellation."""
    from service.frontend._native import Endpoint

    (listener,) = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    fds = [listener.detach()]
    endpoint = Endpoint(
        fds, METHOD, "/nowhere", MAX_MESSAGE, MAX_BYTES, 9, 9, 9, 0, 0, 0, (14, "", ""), lambda _: (13, "", "")
    )
    # Left to itself, it would hand over after a minute.
    paced = (NS_PER_MS, 60 * NS_PER_S, 0.0)
    with ThreadPoolExecutor(1) as pool, raw_client(port) as client:
        stream = client.begin(grpc_headers(METHOD))
        client.data(stream, framed(b"first"), end=True)
        polled = pool.submit(endpoint.poll, *paced)
        until(lambda: endpoint.bytes == 5)
        assert not polled.done()

        def flushed() -> bool:
            # The bytes are counted a moment before the call is complete, and a flush before that finds nothing.
            endpoint.hold()
            endpoint.flush()
            return polled.done()

        until(flushed)
        (call,), cancelled, unseen, ended = polled.result(PATIENCE_S)
        assert (bytes(memoryview(call)), cancelled, unseen, ended) == (b"first", [], 0, False)
        polled = pool.submit(endpoint.poll, *paced)
        client.h2.reset_stream(stream, CANCEL)
        client.flush()
        arrived, gone, _, _ = polled.result(PATIENCE_S)
        assert (arrived, gone) == ([], [call])
        endpoint.stop(0)
        assert endpoint.poll(0, 0, 0.0)[3]


def test_held_answers_leave_with_the_flush() -> None:
    """Answers of other threads may wait for it, and none is lost when two threads hold."""
    calls: list[Call] = []
    arrived = threading.Semaphore(0)

    def keep(_: bytes | memoryview, call: Call) -> None:
        calls.append(call)
        arrived.release()

    with serving(keep) as served, raw_client(served.port) as client:
        streams = []
        for _ in range(4):
            streams.append(client.begin(grpc_headers(METHOD)))
            client.data(streams[-1], framed(b""), end=True)
        for _ in streams:
            assert arrived.acquire(timeout=PATIENCE_S)
        served.ingress.hold()
        served.ingress.hold()
        for number, call in enumerate(calls):
            call.reply([b"%d" % number])
        served.ingress.flush()
        served.ingress.flush()
        assert [client.answer(stream).message for stream in streams] == [b"0", b"1", b"2", b"3"]


@pytest.mark.parametrize(("share", "refused"), [(0.0, 0), (0.25, 25), (0.5, 50), (0.95, 95)])
def test_a_share_is_refused_unread(share: float, refused: int) -> None:
    """That share, evenly; it is told how many they were, and no handler saw them."""
    handled: list[bytes] = []
    told: list[int] = []

    def note(message: bytes | memoryview, call: Call) -> None:
        handled.append(bytes(message))
        call.reply([message])

    def ask(unseen: int) -> float:
        told.append(unseen)
        return share

    with serving(note, share=ask) as served, raw_client(served.port) as client:
        client.call(METHOD, b"first")  # from now on the share is known
        statuses = []
        for number in range(100):
            answer = client.call(METHOD, b"%d" % number)
            statuses.append(answer.status)
            if answer.status:
                assert (answer.status, answer.details) == (14, "not now")
                assert answer.headers["grpc-retry-pushback-ms"] == "3"
        # What is left of a call is carried over: in binary fractions, up to one call.
        assert abs(statuses.count(14) - refused) <= 1
        assert len(handled) == 1 + 100 - statuses.count(14)
        until(lambda: sum(told) == statuses.count(14))
        served.idle()
        if share == 0.5:
            assert all(sum(1 for s in statuses[i : i + 10] if s) == 5 for i in range(0, 100, 10))


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_nothing_is_left_of_many_calls() -> None:
    """Answered, refused and abandoned: no memory and no file stays."""
    number = 0

    def mixed(message: bytes | memoryview, call: Call) -> None:
        nonlocal number
        number += 1
        call.on_cancel = lambda: call.deadline_ns  # a cycle, as real handlers make
        if number % 3 == 0:
            call.reply([message])
        elif number % 3 == 1:
            call.fail(Overloaded("no"))
        # else: never answered; the client goes away

    def round_of_clients(served: Serving) -> None:
        for _ in range(10):
            with raw_client(served.port) as client:
                for _ in range(10):
                    client.data(client.begin(grpc_headers(METHOD)), framed(bytes(6000)), end=True)
        served.idle()

    with serving(mixed) as served:
        round_of_clients(served)
        files, memory = open_files(), resident_bytes()
        for _ in range(20):
            round_of_clients(served)
        assert number > 500
        until(lambda: open_files() <= files)
        # What came of the messages was several MB, a third of them never answered.
        assert resident_bytes() - memory < 3_000_000


# ---------------------------------------------------------------------------------------------------- compression


def compressed(client: RawClient, encoding: str, data: bytes) -> Any:
    stream = client.begin(grpc_headers(METHOD, grpc_encoding=encoding))
    client.data(stream, framed(data, flag=1), end=True)
    return client.answer(stream)


def test_compressed_messages() -> None:
    """gzip and deflate are undone; anything damaged, incomplete, too large or unknown is refused with the reason."""
    plain = b"0123456789" * 1000
    with serving() as served, raw_client(served.port) as client:
        assert compressed(client, "gzip", gzip.compress(plain)).message == b"echo " + plain
        assert compressed(client, "deflate", zlib.compress(plain)).message == b"echo " + plain
        damaged = compressed(client, "gzip", b"\x1f\x8b" + os.urandom(100))
        assert (damaged.status, "damaged" in damaged.details) == (3, True)
        short = compressed(client, "gzip", gzip.compress(plain)[:-20])
        assert (short.status, "incomplete" in short.details) == (3, True)
        bomb = compressed(client, "gzip", gzip.compress(bytes(MAX_MESSAGE + 1)))
        assert (bomb.status, "larger than max" in bomb.details) == (8, True)
        unknown = compressed(client, "br", plain)
        assert (unknown.status, "gzip or deflate" in unknown.details) == (12, True)
        bare = compressed(client, "identity", plain)
        assert (bare.status, "grpc-encoding" in bare.details) == (13, True)
    served.idle()


def test_what_a_message_unpacks_to_is_held() -> None:
    """Small messages that unpack to large ones count as what they are: together they stay within the bound."""
    held: list[Call] = []
    packed = gzip.compress(bytes(MAX_MESSAGE))

    def keep(_: bytes | memoryview, call: Call) -> None:
        held.append(call)

    with serving(keep) as served, raw_client(served.port) as client:
        room = MAX_BYTES // (MAX_MESSAGE + len(packed))
        for _ in range(room):
            stream = client.begin(grpc_headers(METHOD, grpc_encoding="gzip"))
            client.data(stream, framed(packed, flag=1), end=True)
        until(lambda: len(held) == room)
        assert served.ingress.bytes == room * (MAX_MESSAGE + len(packed))
        refused = compressed(client, "gzip", packed)
        assert (refused.status, "requests in progress hold more than" in refused.details) == (14, True)
        for call in held:
            call.reply([])
        served.idle()


# ---------------------------------------------------------------------------------------------------- addresses


def test_a_name_is_every_address_it_stands_for() -> None:
    """`localhost` may be two addresses: both are served, on one port."""
    with serving(host="localhost") as served:
        for family, _, _, _, address in socket.getaddrinfo("localhost", served.port, type=socket.SOCK_STREAM):
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.connect(address)
        served.works()


def test_ipv6() -> None:
    """An address in brackets, as in a URL."""
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    with contextlib.ExitStack() as stack:
        try:
            served = stack.enter_context(serving(host="[::1]"))
        except OSError as error:
            pytest.skip(f"no IPv6: {error}")
        channel = stack.enter_context(channel_to(served.port, "[::1]"))
        assert channel.unary_unary(METHOD)(b"x", timeout=PATIENCE_S) == b"echo x"


def test_a_port_in_use_is_an_error() -> None:
    """Two servers must not share a port."""
    with serving() as served, pytest.raises(OSError, match="in use"):
        listen("127.0.0.1", served.port)


# ------------------------------------------------------------------------------------------------------- the relay


def test_a_unary_call_is_relayed_with_all_that_belongs_to_it() -> None:
    """Message, metadata and deadline there; message, metadata and trailers back."""
    behind = Behind()
    with serving(behind=behind) as served, channel_to(served.port) as channel:
        method = channel.unary_unary("/other.Service/Unary")
        answer, call = method.with_call(b"abc", timeout=7, metadata=(("mine", "3"), ("bin-bin", b"\x00\xff")))
        assert answer == b"cba"
        assert behind.metadata["mine"] == "3"
        assert 5 < behind.deadline_s < 7.1
        assert dict(call.initial_metadata())["early"] == "1"
        assert dict(call.trailing_metadata())["late"] == "2"


def test_errors_are_relayed() -> None:
    """A method that nobody has is answered by the server that would have it."""
    with serving(behind=Behind()) as served, channel_to(served.port) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/other.Service/Nobody")(b"", timeout=PATIENCE_S)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("size", [0, 1, 65_535, 10_000_000])
def test_messages_of_any_size_are_relayed(size: int) -> None:
    """Also those larger than all windows between the two."""
    with serving(behind=Behind()) as served, channel_to(served.port) as channel:
        message = os.urandom(size)
        assert channel.unary_unary("/other.Service/Unary")(message, timeout=PATIENCE_S) == message[::-1]


def test_streams_are_relayed() -> None:
    """Many messages back for one there; many both ways, in step; several streams at once."""
    with serving(behind=Behind()) as served, channel_to(served.port) as channel:
        counted = channel.unary_stream("/other.Service/Count")(b"1000", timeout=PATIENCE_S)
        assert list(counted) == [b"%d" % number for number in range(1000)]
        mirrors = [channel.stream_stream("/other.Service/Mirror") for _ in range(3)]
        messages = [[os.urandom(50_000) for _ in range(20)] for _ in mirrors]
        streams = [mirror(iter(sent), timeout=PATIENCE_S) for mirror, sent in zip(mirrors, messages, strict=True)]
        assert [list(stream) for stream in streams] == messages
        # In step: the next message is sent when the answer to the last has come.
        ready = threading.Semaphore(1)

        def in_step() -> Iterator[bytes]:
            for number in range(5):
                assert ready.acquire(timeout=PATIENCE_S)
                yield b"%d" % number

        seen = []
        for message in mirrors[0](in_step(), timeout=PATIENCE_S):
            seen.append(message)
            ready.release()
        assert seen == [b"%d" % number for number in range(5)]


def test_cancelling_is_relayed() -> None:
    """The server behind hears of a client that goes away; a later call is served."""
    behind = Behind()
    with serving(behind=behind) as served, channel_to(served.port) as channel:
        future = channel.unary_unary("/other.Service/Hold").future(b"", timeout=PATIENCE_S)
        assert not future.done()
        assert behind.holding.acquire(timeout=PATIENCE_S)
        with raw_client(served.port) as client:
            client.data(client.begin(grpc_headers("/other.Service/Hold")), framed(b""), end=True)
            client.call("/other.Service/Unary", b"ab")
            assert behind.holding.acquire(timeout=PATIENCE_S)
        # That client closed its connection.
        assert behind.cancelled.wait(PATIENCE_S)
        behind.cancelled.clear()
        future.cancel()
        assert behind.cancelled.wait(PATIENCE_S)
        assert channel.unary_unary("/other.Service/Unary")(b"ab", timeout=PATIENCE_S) == b"ba"


def test_health_watches_and_their_changes() -> None:
    """A watch is a stream that waits: it hears of every change, and ends with the server."""
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        servicer = health.HealthServicer(experimental_non_blocking=True, experimental_thread_pool=pool)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        ingress = NativeIngress(server, METHOD, echo, MAX_CALLS, MAX_BYTES, MAX_MESSAGE)
        port = ingress.open("127.0.0.1", 0)
        server.start()
        ingress.start()
        serving_, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        with channel_to(port) as channel:
            servicer.set("model", serving_)
            request = health_pb2.HealthCheckRequest(service="model")
            watch = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=PATIENCE_S)
            assert next(watch).status == serving_
            servicer.set("model", not_serving)
            assert next(watch).status == not_serving
            server.stop(grace=0).wait(PATIENCE_S)
            with pytest.raises(grpc.RpcError):
                next(watch)
        assert ingress.stop(0.0, PATIENCE_S)


def test_without_the_server_behind_the_rest_is_served() -> None:
    """Relayed methods answer UNAVAILABLE, at once."""
    with serving(behind=Behind()) as served, raw_client(served.port) as client:
        served.server.stop(grace=0).wait(PATIENCE_S)
        assert client.call("/other.Service/Unary", b"").status == 14
        assert client.call(METHOD, b"x").message == b"echo x"


# --------------------------------------------------------------------------------------------------------- the end


def test_answers_on_their_way_arrive_although_the_server_ends() -> None:
    """Whatever was answered before the end is received by a client that goes on sending."""
    calls: list[Call] = []
    arrived = threading.Event()

    def keep(_: bytes | memoryview, call: Call) -> None:
        calls.append(call)
        arrived.set()

    with serving(keep) as served, raw_client(served.port) as client:
        stream = client.begin(grpc_headers(METHOD))
        client.data(stream, framed(b"m"), end=True)
        assert arrived.wait(PATIENCE_S)
        calls[0].reply([b"x" * 50_000])
        client.data(client.begin(grpc_headers(METHOD)), framed(b"n" * 5000), end=True)
        assert served.ingress.stop(0.05, PATIENCE_S)
        assert client.answer(stream).message == b"x" * 50_000


def test_a_client_that_stays_does_not_hold_up_the_end() -> None:
    """An idle connection is closed; one with an open call is cut after the grace period, and the handler is told."""
    cancelled = threading.Event()

    def keep(_: bytes | memoryview, call: Call) -> None:
        call.on_cancel = cancelled.set

    with serving(keep) as served, raw_client(served.port) as busy, raw_client(served.port) as idle:
        busy.data(busy.begin(grpc_headers(METHOD)), framed(b"m"), end=True)
        until(lambda: served.ingress.calls == 1)
        begun = time.monotonic()
        assert served.ingress.stop(0.2, PATIENCE_S)
        assert time.monotonic() - begun < PATIENCE_S / 2
        assert cancelled.is_set()
        while idle.receive():
            pass
        assert idle.ended


# ------------------------------------------------------------------------------------------------- HTTP/2, all of it


@pytest.mark.parametrize("pieces", [1, 2, 3, 7, 5000])
def test_a_message_in_any_pieces(pieces: int) -> None:
    """Frames may end anywhere, in the prefix as well."""
    with serving() as served, raw_client(served.port) as client:
        stream = client.begin(grpc_headers(METHOD))
        client.data(stream, framed(b"0123456789" * 30), end=True, pieces=pieces)
        assert client.answer(stream).message == b"echo " + b"0123456789" * 30
        served.idle()


def test_bytes_in_any_packets() -> None:
    """Several calls in one packet, and one call in packets of one byte."""
    with serving() as served, raw_client(served.port) as client:
        sent, client.socket = client.socket, Recorder()  # type: ignore[assignment]
        recorder: Any = client.socket
        streams = []
        for number in range(30):
            streams.append(client.begin(grpc_headers(METHOD)))
            client.data(streams[-1], framed(b"%d" % number), end=True)
        client.socket = sent
        sent.sendall(recorder.data[: len(recorder.data) // 2])
        for byte in recorder.data[len(recorder.data) // 2 :]:
            sent.sendall(bytes([byte]))
        assert [client.answer(stream).message for stream in streams] == [b"echo %d" % number for number in range(30)]


class Recorder:
    """Keeps what would be sent."""

    def __init__(self) -> None:
        self.data = b""

    def sendall(self, data: bytes) -> None:
        self.data += data


def test_what_follows_the_message_is_ignored_and_padding_too() -> None:
    """As gRPC's own server does."""
    with serving() as served, raw_client(served.port) as client:
        stream = client.begin(grpc_headers(METHOD))
        client.h2.send_data(stream, framed(b"one"), pad_length=100)
        client.h2.send_data(stream, framed(b"two") + b"more", end_stream=True, pad_length=7)
        client.flush()
        assert client.answer(stream).message == b"echo one"
        served.idle()


def test_an_answer_before_the_end_of_the_request_ends_the_stream() -> None:
    """A message is handled when it is whole; the client is then told that nobody listens any more."""
    with serving() as served, raw_client(served.port) as client:
        stream = client.begin(grpc_headers(METHOD))
        client.data(stream, framed(b"x"))
        assert client.answer(stream).message == b"echo x"
        while client.answers[stream].reset is None:
            assert client.receive()
        assert client.answers[stream].reset == NO_ERROR
        served.idle()


@pytest.mark.parametrize("sent", [b"", b"\x00", b"\x00\x00\x00\x00\x05", framed(b"hello")[:-1]])
def test_a_request_that_ends_too_soon(sent: bytes) -> None:
    """Without a whole message it is invalid."""
    with serving() as served, raw_client(served.port) as client:
        stream = client.begin(grpc_headers(METHOD))
        client.data(stream, sent, end=True)
        answer = client.answer(stream)
        assert (answer.status, answer.details) == (3, f"{METHOD} needs exactly one request message")
        served.idle()


def test_trailers_in_the_request() -> None:
    """HTTP/2 allows them; gRPC does not use them."""
    with serving() as served, raw_client(served.port) as client:
        stream = client.begin(grpc_headers(METHOD))
        client.data(stream, framed(b"x"))
        client.h2.send_headers(stream, [("x-late", "1")], end_stream=True)
        client.flush()
        assert client.answer(stream).message == b"echo x"


@pytest.mark.parametrize(
    "headers",
    [
        grpc_headers(METHOD, content_type="application/json"),
        grpc_headers(METHOD, content_type="application/grpc-web"),
        grpc_headers(METHOD, method="GET"),
    ],
    ids=["json", "web", "get"],
)
def test_what_is_not_grpc_is_refused(headers: Headers) -> None:
    """With the HTTP status that gRPC prescribes."""
    with serving() as served, raw_client(served.port) as client:
        stream = client.begin(headers, end=True)
        assert client.answer(stream).headers[":status"] == "415"
        served.works()


@pytest.mark.parametrize("content_type", ["application/grpc", "application/grpc+proto", "application/grpc;x=1"])
def test_content_types_of_grpc(content_type: str) -> None:
    """All that the protocol allows."""
    with serving() as served, raw_client(served.port) as client:
        stream = client.begin(grpc_headers(METHOD, content_type=content_type))
        client.data(stream, framed(b"x"), end=True)
        assert client.answer(stream).message == b"echo x"


@pytest.mark.parametrize("size", [12_000, 60_000, 100_000])
def test_many_headers(size: int) -> None:
    """A call may have many (they come in several frames); beyond a bound its stream is refused, and no other."""
    with serving() as served, raw_client(served.port) as client:
        headers = [*grpc_headers(METHOD), *((f"x-{i}", "y" * 1000) for i in range(size // 1000))]
        stream = client.begin(headers)
        client.data(stream, framed(b"x"), end=True)
        answer = client.answer(stream)
        assert (answer.reset is None) == (size < 65_000)
        assert client.call(METHOD, b"x").message == b"echo x"
        served.works()


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01" * 300, b"PRI * HTTP/2.0\r\n\r\nXX\r\n"]
)
def test_what_is_not_http2_is_dropped(garbage: bytes) -> None:
    """The connection ends; no other does."""
    with serving() as served, raw_client(served.port) as bystander:
        with socket.create_connection(("127.0.0.1", served.port), PATIENCE_S) as client:
            client.sendall(garbage)
            with contextlib.suppress(ConnectionError):
                while client.recv(65536):
                    pass
        assert bystander.call(METHOD, b"x").message == b"echo x"


def test_resets_at_every_stage() -> None:
    """Before data, within the prefix, within the message, after the arrival, after the answer: nothing is left."""
    held: list[Call] = []
    cancelled = threading.Semaphore(0)

    def keep(message: bytes | memoryview, call: Call) -> None:
        if bytes(message) == b"hold":
            call.on_cancel = cancelled.release
            held.append(call)
        else:
            echo(message, call)

    with serving(keep) as served, raw_client(served.port) as client:
        for part in (b"", b"\x00\x00", framed(b"hold")[:7], framed(b"hold")):
            stream = client.begin(grpc_headers(METHOD))
            client.data(stream, part) if part else None
            client.h2.reset_stream(stream, CANCEL)
            client.flush()
        stream = client.begin(grpc_headers(METHOD))
        client.data(stream, framed(b"hold"), end=True)
        until(lambda: served.ingress.calls == 1 and len(held) >= 1)
        seen = len(held)
        client.h2.reset_stream(stream, CANCEL)
        client.flush()
        for _ in range(seen):
            assert cancelled.acquire(timeout=PATIENCE_S)
        for call in held:
            call.reply([b"too late"])
        served.works()


def test_floods_harm_nobody_else() -> None:
    """Streams opened and reset by the thousand, pings, settings: others are served, and nothing is left."""
    with serving() as served, raw_client(served.port) as bystander:
        with raw_client(served.port) as client:
            for _ in range(3000):
                stream = client.h2.get_next_available_stream_id()
                client.h2.send_headers(stream, grpc_headers(METHOD))
                client.h2.reset_stream(stream, CANCEL)
            with contextlib.suppress(OSError):
                client.flush()
            assert bystander.call(METHOD, b"x").message == b"echo x"
        for kind, payload in ((6, bytes(8)), (4, b"")):  # PING, SETTINGS
            with raw_client(served.port) as client, contextlib.suppress(OSError):
                frame = struct.pack(">I", len(payload))[1:] + bytes([kind, 0]) + bytes(4) + payload
                client.socket.settimeout(0.5)
                for _ in range(50):
                    client.socket.sendall(frame * 1000)
            assert bystander.call(METHOD, b"x").message == b"echo x"
        served.works()


def test_a_client_that_does_not_read_holds_up_nobody() -> None:
    """Its answers wait for its windows; when it opens them, they come."""
    with serving() as served, raw_client(served.port, consume=False) as slow, raw_client(served.port) as other:
        message = os.urandom(200_000)
        stream = slow.begin(grpc_headers(METHOD))
        for start in range(0, len(message) + 5, 16_384):
            while slow.h2.local_flow_control_window(stream) < 16_384:
                slow.receive()
            slow.data(stream, framed(message)[start : start + 16_384], end=start + 16_384 >= len(message) + 5)
        while len(slow.answers[stream].data) < 65_535:
            assert slow.receive()
        for number in range(20):
            assert other.call(METHOD, b"%d" % number).message == b"echo %d" % number
        slow.consume = True
        slow.h2.increment_flow_control_window(1 << 20)
        slow.h2.increment_flow_control_window(1 << 20, stream)
        slow.flush()
        assert slow.answer(stream).message == b"echo " + message
        served.idle()


@pytest.mark.parametrize("window", [1, 100, 16_384])
def test_small_windows(window: int) -> None:
    """Answers leave in as small pieces as the client allows."""
    initial = {4: window}  # SETTINGS_INITIAL_WINDOW_SIZE
    with serving() as served, raw_client(served.port, settings=initial) as client:
        assert client.call(METHOD, b"0123456789" * 20).message == b"echo " + b"0123456789" * 20
        served.idle()
