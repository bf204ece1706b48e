"""Both ingresses on a real `grpc.Server` and a real connection, with handlers of the test's."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from service.clock import NEVER_NS, NS_PER_MS, NS_PER_S, now_ns
from service.errors import Cancelled, InvalidRequest, Overloaded, ServiceError
from service.frontend.call import Call, UnaryHandler, trace_headers
from service.frontend.ingress import Ingress, check_core
from service.frontend.native_ingress import NativeIngress
from tests.support.native import needs_native

METHOD = "/test.Service/Method"
# Long enough that only a fault reaches it.
PATIENCE_S = 20.0


# Which ingress the tests below are about.
KIND = "core"


@pytest.fixture(autouse=True, params=["core", "native"])
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test is about both, unless it says otherwise."""
    global KIND
    if request.param == "native":
        needs_native()
    KIND = request.param
    yield KIND
    KIND = "core"


only_core = pytest.mark.parametrize("kind", ["core"], indirect=True)


@dataclass
class Serving:
    ingress: Ingress | NativeIngress
    server: grpc.Server
    channel: grpc.Channel

    def call(self, message: bytes = b"m", timeout: float | None = PATIENCE_S, **options: Any) -> bytes:
        answer: bytes = self.method()(message, timeout=timeout, **options)
        return answer

    def future(self, message: bytes = b"m", timeout: float | None = PATIENCE_S) -> Any:
        return self.method().future(message, timeout=timeout)

    def end(self) -> None:
        """Stop without a grace period."""
        self.server.stop(grace=0).wait(PATIENCE_S)
        assert self.ingress.stop(0.0, PATIENCE_S), "the ingress thread did not end"

    def method(self) -> grpc.UnaryUnaryMultiCallable:
        return self.channel.unary_unary(METHOD, None, None)


@contextlib.contextmanager
def serving(
    handler: UnaryHandler,
    max_calls: int = 100,
    max_bytes: int = 10**9,
    options: tuple[tuple[str, Any], ...] = (),
    gate: Callable[[], ServiceError | None] = lambda: None,
    traced: bool = False,
) -> Iterator[Serving]:
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool, options=(("grpc.so_reuseport", 0), *options))
        ingress: Ingress | NativeIngress
        if KIND == "core":
            ingress = Ingress(server, METHOD, handler, max_calls, max_bytes, gate, traced=traced)
        else:
            most = dict(options).get("grpc.max_receive_message_length", 4 << 20)
            most = most if most > 0 else 2**31 - 1
            ingress = NativeIngress(server, METHOD, handler, max_calls, max_bytes, most, traced=traced)
        port = ingress.open("127.0.0.1", 0)
        server.start()
        ingress.start()
        own = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1))
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=own) as channel:
            served = Serving(ingress, server, channel)
            yield served
        served.end()


class Holding:
    """A handler that answers nothing by itself and remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[bytes, Call]] = []
        self.cancelled = 0
        self._changed = threading.Condition()

    def __call__(self, message: bytes | memoryview, call: Call) -> None:
        call.on_cancel = self._cancel
        with self._changed:
            self.calls.append((bytes(message), call))
            self._changed.notify_all()

    def _cancel(self) -> None:
        with self._changed:
            self.cancelled += 1
            self._changed.notify_all()

    def wait(self, calls: int = 0, cancelled: int = 0) -> None:
        with self._changed:
            assert self._changed.wait_for(
                lambda: len(self.calls) >= calls and self.cancelled >= cancelled, PATIENCE_S
            ), (len(self.calls), self.cancelled)


def until(condition: Callable[[], bool]) -> None:
    """Wait for what the ingress thread is about to do."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


def error_of(act: Callable[[], object]) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    with pytest.raises(grpc.RpcError) as caught:
        act()
    error: Any = caught.value
    return error.code(), error.details(), dict(error.trailing_metadata() or ())


def echo(message: bytes | memoryview, call: Call) -> None:
    call.reply([b"echo " + message])


def test_a_reply_from_the_handler() -> None:
    """The message's bytes go in and the answer's bytes come out, one call after another and many at once."""
    with serving(echo) as served:
        for number in range(50):
            assert served.call(b"%d" % number) == b"echo %d" % number
        # As many at once as the ingress takes here, less than its bound.
        for first in range(0, 200, 50):
            numbers = range(first, first + 50)
            futures = [served.future(b"%d" % number) for number in numbers]
            assert [future.result() for future in futures] == [b"echo %d" % number for number in numbers]
        until(lambda: served.ingress.calls == 0 and served.ingress.bytes == 0)


@pytest.mark.parametrize("message", [b"", b"x" * 3_000_000])
def test_messages_of_any_size(message: bytes) -> None:
    """An empty message is a message."""
    with serving(echo, options=(("grpc.max_receive_message_length", -1),)) as served:
        assert served.channel.unary_unary(METHOD, None, len)(message, timeout=PATIENCE_S) == len(message) + 5


def test_a_reply_later_from_another_thread() -> None:
    """Calls may be answered in any order by whoever has the answer."""
    handler = Holding()
    with serving(handler) as served:
        futures = [served.future(b"%d" % number) for number in range(20)]
        handler.wait(calls=20)
        threads = [
            threading.Thread(target=call.reply, args=([b"late " + message],))
            for message, call in reversed(handler.calls)
        ]
        for thread in threads:
            thread.start()
        assert sorted(f.result() for f in futures) == sorted(b"late %d" % number for number in range(20))
        for thread in threads:
            thread.join()
        assert handler.cancelled == 0


def test_an_error_has_code_message_and_trailers() -> None:
    """A refusal says when to come back; text that is not ASCII arrives as it was."""

    def refuse(_: bytes | memoryview, call: Call) -> None:
        call.fail(Overloaded("f\u00fcr 100 % zu viel\n", 5 * NS_PER_MS))

    with serving(refuse) as served:
        code, details, trailers = error_of(served.call)
        assert code is grpc.StatusCode.UNAVAILABLE
        assert details == "f\u00fcr 100 % zu viel\n"
        assert trailers["grpc-retry-pushback-ms"] == "5"


def test_only_the_first_answer_counts() -> None:
    """A second reply, an error after the answer, an exception after the answer: dropped silently."""

    def answer_again(message: bytes | memoryview, call: Call) -> None:
        call.reply([b"first"])
        call.reply([b"second"])
        call.fail(InvalidRequest("third"))
        raise RuntimeError("after the answer")

    with serving(answer_again) as served:
        assert [served.call() for _ in range(3)] == [b"first"] * 3


def test_an_exception_in_the_handler_is_internal_and_the_thread_lives_on(caplog: pytest.LogCaptureFixture) -> None:
    """The client learns what kind of bug it met; the next call is served."""

    def break_once(message: bytes | memoryview, call: Call) -> None:
        if bytes(message) == b"bad":
            raise ZeroDivisionError("secret")
        call.reply([message])

    with serving(break_once) as served:
        code, details, _ = error_of(lambda: served.call(b"bad"))
        assert code is grpc.StatusCode.INTERNAL
        assert details == f"internal error while serving {METHOD}: ZeroDivisionError"
        assert served.call(b"good") == b"good"
    assert any(record.exc_info for record in caplog.records)


def test_a_client_that_cancels_is_heard_and_a_late_reply_is_dropped() -> None:
    """`on_cancel` runs once; answering afterwards harms nobody, and what the call held is released."""
    handler = Holding()
    with serving(handler) as served:
        future = served.future(b"12345")
        handler.wait(calls=1)
        assert (served.ingress.calls, served.ingress.bytes) == (1, 5)
        future.cancel()
        handler.wait(cancelled=1)
        until(lambda: served.ingress.calls == 0 and served.ingress.bytes == 0)
        call = handler.calls[0][1]
        call.reply([b"too late"])
        call.fail(Cancelled("too late"))
        assert call.on_cancel is None
        assert handler.cancelled == 1


def test_a_bug_in_on_cancel_does_not_end_the_ingress(caplog: pytest.LogCaptureFixture) -> None:
    """One client's cancellation must not take the server away from all others."""

    def break_on_cancel(message: bytes | memoryview, call: Call) -> None:
        if message == b"stay":
            call.reply([message])
        else:
            call.on_cancel = lambda: 1 // 0
            arrived.set()

    arrived = threading.Event()
    with serving(break_on_cancel) as served:
        future = served.future(b"go")
        assert arrived.wait(PATIENCE_S)
        future.cancel()
        until(lambda: served.ingress.calls == 0)
        assert served.call(b"stay") == b"stay"
    assert any("ZeroDivisionError" in (record.exc_text or str(record.exc_info)) for record in caplog.records)


def test_an_answered_call_is_not_cancelled_by_its_end() -> None:
    """The end of a call that was answered in time is not a cancellation."""
    handler = Holding()
    with serving(handler) as served:
        future = served.future()
        handler.wait(calls=1)
        handler.calls[0][1].reply([b"in time"])
        assert future.result() == b"in time"
        until(lambda: served.ingress.calls == 0)
        assert handler.cancelled == 0


def test_the_clients_deadline_is_passed_on() -> None:
    """As an instant on the server's monotonic clock; without one it is never."""
    handler = Holding()
    with serving(handler) as served:
        before = now_ns()
        with_deadline = served.future(timeout=5)
        handler.wait(calls=1)
        without = served.future(timeout=None)
        handler.wait(calls=2)
        deadlines = [call.deadline_ns for _, call in handler.calls]
        # gRPC sends what is left of the time, rounded to milliseconds, and the server adds it to its own clock.
        assert abs(deadlines[0] - (before + 5 * NS_PER_S)) < NS_PER_S
        assert deadlines[1] == NEVER_NS
        for _, call in handler.calls:
            call.reply([b""])
        assert with_deadline.result() == without.result() == b""


def test_a_deadline_that_passes_cancels_the_call() -> None:
    """The client has given up: the handler hears of it as of any other end."""
    handler = Holding()
    with serving(handler) as served:
        code, _, _ = error_of(lambda: served.call(timeout=0.1))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        handler.wait(calls=1, cancelled=1)
        until(lambda: served.ingress.calls == 0)


def test_calls_beyond_the_bound_are_refused_at_once() -> None:
    """The bound is on calls in progress: when one ends, the next is let in."""
    handler = Holding()
    with serving(handler, max_calls=3) as served:
        held = {message: served.future(message) for message in (b"a", b"b", b"c")}
        handler.wait(calls=3)
        for _ in range(20):
            code, details, trailers = error_of(served.call)
            assert code is grpc.StatusCode.UNAVAILABLE
            assert details == "Exceeds maximum queue size: 3 calls are in progress"
            assert trailers["grpc-retry-pushback-ms"] == "1"
        assert served.ingress.calls == 3
        first, call = handler.calls[0]
        call.reply([b"done"])
        assert held[first].result() == b"done"
        until(lambda: served.ingress.calls == 2)
        fourth = served.future()
        handler.wait(calls=4)
        for _, call in handler.calls:
            call.reply([b"done"])
        assert fourth.result() == b"done"
        until(lambda: served.ingress.calls == 0)


@only_core
def test_a_gate_refuses_before_the_message_is_read() -> None:
    """The handler never sees a call that the gate has a reason against; all others are served."""
    decisions = iter([None, Overloaded("not now", 3_000_000), None])
    handler = Holding()
    with serving(handler, gate=lambda: next(decisions)) as served:
        first = served.future(b"first")
        handler.wait(calls=1)
        code, details, trailers = error_of(lambda: served.call(b"second"))
        assert (code, details) == (grpc.StatusCode.UNAVAILABLE, "not now")
        assert trailers["grpc-retry-pushback-ms"] == "3"
        third = served.future(b"third")
        handler.wait(calls=2)
        for message, call in handler.calls:
            call.reply([message])
        assert (first.result(), third.result()) == (b"first", b"third")
        until(lambda: served.ingress.calls == 0)


@only_core
def test_a_bug_in_the_gate_does_not_end_the_ingress(caplog: pytest.LogCaptureFixture) -> None:
    """A call that cannot be judged is answered as the server's fault, and the thread lives on."""
    faults = iter([True, False])

    def gate() -> ServiceError | None:
        if next(faults):
            raise ZeroDivisionError("secret")
        return None

    with serving(echo, gate=gate) as served:
        code, details, _ = error_of(served.call)
        assert code is grpc.StatusCode.INTERNAL
        assert details == f"internal error while admitting a call of {METHOD}: ZeroDivisionError"
        assert served.call(b"m") == b"echo m"
    assert any(record.exc_info for record in caplog.records)


def test_bytes_beyond_the_bound_are_refused() -> None:
    """A message that would bring what is held beyond the bound is refused and released; a smaller one is let in."""
    handler = Holding()
    with serving(handler, max_bytes=1000) as served:
        held = served.future(b"x" * 900)
        handler.wait(calls=1)
        code, details, trailers = error_of(lambda: served.call(b"x" * 101))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert details == "Exceeds maximum queue size: requests in progress hold more than 1000 bytes"
        assert "grpc-retry-pushback-ms" in trailers
        until(lambda: served.ingress.bytes == 900)
        small = served.future(b"x" * 100)
        handler.wait(calls=2)
        for _, call in handler.calls:
            call.reply([b"done"])
        assert held.result() == small.result() == b"done"
        until(lambda: served.ingress.bytes == 0)


def test_a_message_larger_than_allowed_never_reaches_the_handler() -> None:
    """gRPC answers it, and the call leaves nothing behind."""
    handler = Holding()
    with serving(handler, options=(("grpc.max_receive_message_length", 1000),)) as served:
        code, details, _ = error_of(lambda: served.call(b"x" * 2000))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in details
        until(lambda: served.ingress.calls == 0)
        assert not handler.calls
        assert handler.cancelled == 0


def test_an_answer_larger_than_allowed_is_an_error_for_the_client() -> None:
    """The client learns of it, and the server goes on."""

    cancelled = []

    def large(message: bytes | memoryview, call: Call) -> None:
        call.on_cancel = lambda: cancelled.append(message)
        call.reply([b"x" * int(message)])

    limits = (("grpc.max_send_message_length", 1000), ("grpc.max_receive_message_length", 1000))
    with serving(large, options=limits) as served:
        code, details, _ = error_of(lambda: served.call(b"2000"))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in details
        assert served.call(b"10") == b"x" * 10
        until(lambda: served.ingress.calls == 0)
    # It was answered: that the answer did not arrive is no cancellation.
    assert not cancelled


def test_a_call_without_a_message_is_invalid() -> None:
    """A client that ends its side without sending anything is told what was expected."""
    handler = Holding()
    with serving(handler) as served:
        call = served.channel.stream_unary(METHOD, None, None)
        code, details, _ = error_of(lambda: call(iter(()), timeout=PATIENCE_S))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert details == f"{METHOD} needs exactly one request message"
        assert not handler.calls
        until(lambda: served.ingress.calls == 0)


def test_a_client_that_vanishes_before_its_message() -> None:
    """A call opened and abandoned leaves nothing behind."""
    handler = Holding()
    with serving(handler) as served:
        gate = threading.Event()

        def nothing_yet() -> Iterator[bytes]:
            gate.wait(PATIENCE_S)
            yield from ()

        future = served.channel.stream_unary(METHOD, None, None).future(nothing_yet(), timeout=PATIENCE_S)
        until(lambda: served.ingress.calls == 1)
        future.cancel()
        until(lambda: served.ingress.calls == 0)
        gate.set()
        assert not handler.calls


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_messages_arrive_whole(compression: grpc.Compression) -> None:
    """gRPC undoes the client's compression before the handler sees the message."""
    with serving(echo) as served:
        assert served.call(b"x" * 10_000, compression=compression) == b"echo " + b"x" * 10_000


def test_other_methods_stay_with_the_ordinary_server() -> None:
    """The ingress takes its own method and no other."""
    with serving(echo) as served:
        other = served.channel.unary_unary("/test.Service/Other", None, None)
        code, _, _ = error_of(lambda: other(b"", timeout=PATIENCE_S))
        assert code is grpc.StatusCode.UNIMPLEMENTED


def test_calls_in_progress_end_with_the_server() -> None:
    """Stopping the server cancels what is held; answers that come later are dropped."""
    handler = Holding()
    with serving(handler) as served:
        future = served.future()
        handler.wait(calls=1)
        served.end()
        code, _, _ = error_of(future.result)
        assert code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        handler.wait(cancelled=1)
    handler.calls[0][1].reply([b"after the end"])


def test_stop_says_when_a_handler_does_not_let_go() -> None:
    """A handler that blocks is a bug; `stop` reports it instead of waiting for ever."""
    entered, gate = threading.Event(), threading.Event()

    def block(message: bytes | memoryview, call: Call) -> None:
        entered.set()
        gate.wait(PATIENCE_S)

    with serving(block) as served:
        future = served.future()
        assert entered.wait(PATIENCE_S)
        served.server.stop(grace=0)
        assert not served.ingress.stop(0.0, 0.05)
        gate.set()
        error_of(future.result)


def test_answers_race_with_the_end_of_the_server() -> None:
    """Workers answering while everything is torn down must not bring the process down."""
    for _ in range(100):
        handler = Holding()
        with serving(handler) as served:
            futures = [served.future() for _ in range(50)]
            handler.wait(calls=50)
            replies = threading.Thread(target=lambda calls: [c.reply([b"x"]) for _, c in calls], args=(handler.calls,))
            replies.start()
            served.server.stop(grace=0)
            for future in futures:
                with contextlib.suppress(grpc.RpcError):
                    future.result()
        replies.join()


@only_core
def test_another_grpcio_is_refused_by_name() -> None:
    """What the ingress needs of gRPC's core is checked before anything is served."""

    class Unknown:
        _state = None

    with pytest.raises(RuntimeError, match=f"grpcio {grpc.__version__} is not supported"):
        check_core(Unknown())  # type: ignore[arg-type]


def test_what_metadata_says_of_traces_is_told(kind: str) -> None:
    """Where traces are wanted, and there alone; several of one name are a list."""
    metadata = (("traceparent", "p"), ("tracestate", "a=1"), ("x", "y"), ("tracestate", "b=2"))
    for traced, expected in ((True, ("p", "a=1,b=2")), (False, (None, None))):
        told: list[tuple[str | None, str | None]] = []

        def handler(_message: bytes | memoryview, call: Call, told: list[Any] = told) -> None:
            told.append((call.traceparent, call.tracestate))
            call.reply([b"r"])

        with serving(handler, traced=traced) as served:
            served.call(metadata=metadata)
            served.call()
        assert told == [expected, (None, None)]


def test_parents_that_are_several_are_a_list() -> None:
    """Which is no `traceparent`, so that nobody chooses between them."""
    metadata = (("traceparent", "a"), ("other", b"\xff"), ("traceparent", b"b"), ("tracestate", b"\xe9"))
    assert trace_headers(metadata) == ("a,b", "\u00e9")
    assert trace_headers(()) == (None, None)
