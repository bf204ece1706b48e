"""A stream without a transport: order, bounds, cancelling, and what it holds."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.clock import NEVER_NS
from service.errors import Draining, InvalidRequest
from service.frontend import stream as module
from service.frontend.stream import Held, InferStream, StreamCall
from service.pb import grpc_service_pb2 as pb

WAIT_S = 10.0


class Handler:
    """Keeps the calls, to be answered by the test."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.cancelled: list[bytes] = []
        self.came = threading.Semaphore(0)

    def __call__(self, message: bytes | memoryview, call: Any) -> None:
        call.on_cancel = lambda: self.cancelled.append(bytes(message))
        self.calls.append(call)
        self.came.release()


def message(name: str) -> bytes:
    serialized: bytes = pb.ModelInferRequest(model_name="m", id=name).SerializeToString()
    return serialized


def answer(call: StreamCall, name: str, padding: int = 0) -> None:
    response = pb.ModelInferResponse(id=name, raw_output_contents=[b"x" * padding])
    call.reply([response.SerializeToString()])


def read(stream: InferStream, messages: Sequence[bytes]) -> threading.Thread:
    thread = threading.Thread(target=stream.read, args=(iter(messages),))
    thread.start()
    return thread


def parsed(response: bytes) -> Any:
    return pb.ModelStreamInferResponse.FromString(response)


@given(st.permutations(range(8)), st.sets(st.integers(0, 7)))
@settings(deadline=None)
def test_whatever_the_order_of_the_answers(order: list[int], failed: set[int]) -> None:
    """They leave in the order of the requests, errors among them, and nothing is held afterwards."""
    handler, held = Handler(), Held(10_000)
    stream = InferStream(handler, NEVER_NS, 10_000, end_on_error=False, held=held)
    stream.read(iter([message(str(i)) for i in range(8)]))
    for number in order:
        if number in failed:
            handler.calls[number].fail(InvalidRequest(f"no {number}"))
        else:
            answer(handler.calls[number], str(number))
    found = [parsed(response) for response in stream.responses()]
    assert [response.infer_response.id for response in found] == [str(i) for i in range(8)]
    assert [response.error_message for response in found] == [f"no {i}" if i in failed else "" for i in range(8)]
    assert stream.in_flight == held.bytes == 0


def test_only_the_first_answer_counts() -> None:
    """As of any call."""
    handler = Handler()
    stream = InferStream(handler, NEVER_NS, 10_000, end_on_error=False)
    stream.read(iter([message("a")]))
    answer(handler.calls[0], "a")
    handler.calls[0].fail(InvalidRequest("too late"))
    (response,) = stream.responses()
    assert not parsed(response).error_message


def test_a_cancelled_stream_tells_the_handler() -> None:
    """Of what has no answer yet; later answers are dropped and hold nothing."""
    handler, held = Handler(), Held(10_000)
    stream = InferStream(handler, NEVER_NS, 10_000, end_on_error=False, held=held)
    stream.read(iter([message("a"), message("b")]))
    answer(handler.calls[0], "a")
    stream.cancel()
    assert handler.cancelled == [message("b")]
    answer(handler.calls[1], "b")
    assert list(stream.responses()) == []
    assert held.bytes == 0


def test_cancelled_while_the_handler_is_at_work() -> None:
    """Before the handler said whom to tell: it is told when it comes back."""
    cancelled = []

    def handler(_message: bytes | memoryview, call: Any) -> None:
        stream.cancel()
        call.on_cancel = lambda: cancelled.append(True)

    stream = InferStream(handler, NEVER_NS, 10_000, end_on_error=False)
    stream.read(iter([message("a")]))
    assert cancelled == [True]


def test_requests_in_flight_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next is read when an answer has left."""
    monkeypatch.setattr(module, "MAX_IN_FLIGHT", 2)
    handler = Handler()
    stream = InferStream(handler, NEVER_NS, 10_000, end_on_error=False)
    thread = read(stream, [message(str(i)) for i in range(3)])
    for _ in range(2):
        assert handler.came.acquire(timeout=WAIT_S)
    assert not handler.came.acquire(timeout=0.05)
    answer(handler.calls[0], "0")
    responses = stream.responses()
    next(responses)
    answer(handler.calls[1], "1")
    next(responses)  # the first has left when the second is asked for
    assert handler.came.acquire(timeout=WAIT_S)
    answer(handler.calls[2], "2")
    assert len(list(responses)) == 1
    thread.join(WAIT_S)


def test_unread_answers_hold_back_the_next_requests() -> None:
    """They count against the stream's share, and against what all streams hold."""
    handler, held = Handler(), Held(1_000_000)
    stream = InferStream(handler, NEVER_NS, 1000, end_on_error=False, held=held)
    source = iter([message("0"), message("1")])
    first_read = threading.Event()

    def messages() -> Iterator[bytes]:
        yield next(source)
        first_read.wait(WAIT_S)
        yield next(source)

    thread = threading.Thread(target=stream.read, args=(messages(),))
    thread.start()
    assert handler.came.acquire(timeout=WAIT_S)
    answer(handler.calls[0], "0", padding=5000)
    assert held.bytes > 5000
    first_read.set()
    assert not handler.came.acquire(timeout=0.05)
    responses = stream.responses()
    next(responses)
    sending = threading.Thread(target=lambda: list(responses))
    sending.start()
    assert handler.came.acquire(timeout=WAIT_S)
    answer(handler.calls[1], "1")
    sending.join(WAIT_S)
    thread.join(WAIT_S)
    assert held.bytes == 0


def test_what_all_streams_hold_is_bounded() -> None:
    """A message too many is refused within its stream."""
    handler, held = Handler(), Held(len(message("a")) + 3)
    stream = InferStream(handler, NEVER_NS, 1000, end_on_error=False, held=held)
    stream.read(iter([message("a"), message("b")]))
    answer(handler.calls[0], "a")
    first, second = (parsed(response) for response in stream.responses())
    assert not first.error_message
    assert "Exceeds maximum queue size" in second.error_message
    assert second.infer_response.id == "b"
    assert held.bytes == 0


def test_the_end_comes_after_the_answers_that_are_there() -> None:
    """And says why."""
    handler = Handler()
    stream = InferStream(handler, NEVER_NS, 1000, end_on_error=False)
    stream.read(iter([message("a"), message("b")]))
    answer(handler.calls[0], "a")
    stream.end(Draining("Server is stopping"))
    responses = stream.responses()
    assert parsed(next(responses)).infer_response.id == "a"
    with pytest.raises(Draining):
        next(responses)


def test_an_error_of_the_handler_is_an_answer() -> None:
    """Even one that nobody foresaw."""

    def handler(_message: bytes | memoryview, _call: Any) -> None:
        raise RuntimeError("a bug")

    stream = InferStream(handler, NEVER_NS, 1000, end_on_error=False)
    stream.read(iter([message("a")]))
    (response,) = stream.responses()
    assert "internal error" in parsed(response).error_message
