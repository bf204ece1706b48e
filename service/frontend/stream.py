"""`ModelStreamInfer`: requests of any models on one stream, answered in the order in which they came.

Each message takes the way of a unary call, with a `StreamCall` in the call's place. An error is an answer like any
other (`error_message`, the request's id), and the stream goes on; a client that sends the metadata
`triton_grpc_error: true` has the stream end with the error's status instead. Every answer says that it is the last of
its request (`triton_final_response`), since models answer once.

Promise: whoever runs a batch never waits for a stream. Answers are kept until the stream's own thread sends them; what
a client does not read holds back its next requests (at most `MAX_IN_FLIGHT`, and the stream's share of bytes), nobody
else's. A stream that is cancelled cancels what is queued for it.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from service.clock import NEVER_NS, NS_PER_MS, NS_PER_S, now_ns
from service.errors import Draining, QueueFull, ServiceError
from service.frontend.access import Access
from service.frontend.call import UnaryHandler, trace_headers
from service.frontend.codec.wire import delimited, delimiter, split
from service.frontend.status import as_service_error, status_of
from service.pb.grpc_service_pb2 import InferParameter, ModelInferRequest, ModelInferResponse

# Requests of one stream that are queued, running or not yet read by the client. Twice the largest batch that is usual;
# a client with more to send waits for its own answers.
MAX_IN_FLIGHT = 1024
# Field numbers of ModelStreamInferResponse, and of the id in ModelInferResponse.
_ERROR_MESSAGE = 1
_INFER_RESPONSE = 2
_ID = 3
GRPC_ERROR = "triton_grpc_error"
# A serialized parameter, to be put behind a serialized ModelInferResponse: fields may come in any order.
_FINAL = ModelInferResponse(parameters={"triton_final_response": InferParameter(bool_param=True)}).SerializeToString()
# Deadlines further away than this are none: gRPC reports a missing one as infinity or as hundreds of years.
_FAR_FUTURE_S = 10 * 365 * 86400.0


class StreamCall:
    """A `Call` for one message of a stream: its answer waits here for its turn."""

    __slots__ = (
        "_message",
        "_stream",
        "arrival_ns",
        "caller",
        "counted",
        "deadline_ns",
        "error",
        "on_cancel",
        "response",
        "size",
        "traceparent",
        "tracestate",
    )

    def __init__(self, stream: InferStream, message: bytes, deadline_ns: int, caller: int) -> None:
        self._stream = stream
        self._message = message
        self.size = len(message)
        # Whether its bytes are among those held by all streams.
        self.counted = False
        self.arrival_ns = now_ns()
        self.deadline_ns = deadline_ns
        self.caller = caller
        self.on_cancel: Callable[[], object] | None = None
        self.traceparent, self.tracestate = stream.trace
        self.response: bytes | None = None
        self.error: ServiceError | None = None

    def reply(self, parts: Sequence[bytes | memoryview], /) -> None:
        size = sum(map(len, parts)) + len(_FINAL)
        self._done(b"".join((delimiter(_INFER_RESPONSE, size), *parts, _FINAL)))

    def fail(self, error: ServiceError, /) -> None:
        details = status_of(error)[1]
        request_id = _id_of(self._message)
        inner = (delimited(_ID, request_id) if request_id else b"") + _FINAL
        self.error = error
        self._done(delimited(_ERROR_MESSAGE, details.encode()) + delimited(_INFER_RESPONSE, inner))

    def _done(self, response: bytes) -> None:
        self._stream.answered(self, response)
        self.on_cancel = None  # it refers back to the call
        self._message = b""


class Held:
    """Bytes of all streams: requests that are not answered and answers that have not left. Any thread."""

    def __init__(self, limit: int) -> None:
        self.bytes = 0
        self.full = f"Exceeds maximum queue size: requests on streams hold more than {limit} bytes"
        self._limit = limit
        self._lock = threading.Lock()

    def add(self, size: int) -> bool:
        """Count a request's bytes; False, and nothing is counted, when they are too many."""
        with self._lock:
            if self.bytes + size > self._limit:
                return False
            self.bytes += size
        return True

    def force(self, size: int) -> None:
        """Count bytes that are there in any case."""
        with self._lock:
            self.bytes += size

    def remove(self, size: int) -> None:
        """They are gone."""
        with self._lock:
            self.bytes -= size


class InferStream:
    """One stream. `read` runs on one thread, `responses` on another; answers come from any."""

    def __init__(
        self,
        handler: UnaryHandler,
        deadline_ns: int,
        max_bytes: int,
        end_on_error: bool,
        held: Held | None = None,
        caller: int = 0,
        trace: tuple[str | None, str | None] = (None, None),
    ) -> None:
        """`max_bytes`: requests and unread answers beyond which no more is read. `held`: bytes of all streams. `trace`:
        what the stream's metadata says of traces, for each request that says nothing itself."""
        self.trace = trace
        self._caller = caller
        self._handler = handler
        self._held = held or Held(max_bytes)
        self._deadline_ns = deadline_ns
        self._max_bytes = max_bytes
        self._end_on_error = end_on_error
        self._changed = threading.Condition(threading.Lock())
        # In the order of the requests; an answer waits for those before it.
        self._calls: deque[StreamCall] = deque()
        self._bytes = 0
        self._no_more = False
        self._over: ServiceError | None = None
        self._cancelled = False

    @property
    def in_flight(self) -> int:
        """Requests without an answer, or whose answer has not left."""
        return len(self._calls)

    def read(self, messages: Iterator[bytes]) -> None:
        """Handle every message until there are no more, or the stream is over."""
        try:
            for message in messages:
                call = StreamCall(self, message, self._deadline_ns, self._caller)
                if not self._admit(call):
                    return
                try:
                    if not call.counted:
                        raise QueueFull(self._held.full, NS_PER_MS)
                    self._handler(message, call)
                except Exception as error:  # noqa: BLE001 - the boundary: the status table answers it, the stream lives on
                    call.fail(as_service_error(error, "serving a message of a stream"))
                if self._cancelled and (on_cancel := call.on_cancel) is not None:
                    on_cancel()  # cancelled before the handler could be told
        except grpc.RpcError:
            # The transport's word for a stream that was cancelled or broken off.
            self.cancel()
        except Exception as error:  # noqa: BLE001 - the boundary: the stream ends by the status table, and it is logged
            self.end(as_service_error(error, "reading a stream"))
        finally:
            with self._changed:
                self._no_more = True
                self._changed.notify_all()

    def _admit(self, call: StreamCall) -> bool:
        """Wait for room and take the call in; False when the stream is over."""
        with self._changed:
            while (
                self._calls
                and not self._ended
                and (len(self._calls) >= MAX_IN_FLIGHT or self._bytes + call.size > self._max_bytes)
            ):
                self._changed.wait()
            if self._ended:
                return False
            # Together with taking it in: a cancel in between would give back what is counted afterwards.
            call.counted = self._held.add(call.size)
            self._calls.append(call)
            self._bytes += call.size
            # What waited for room arrived only now: it could not be queued sooner.
            call.arrival_ns = now_ns()
        return True

    @property
    def _ended(self) -> bool:
        return self._cancelled or self._over is not None

    def answered(self, call: StreamCall, response: bytes) -> None:
        """An answer is there; what comes after the first, or after the end, is dropped."""
        with self._changed:
            if call.response is not None:
                return
            call.response = response
            if self._cancelled:
                return
            # Until the client reads it, it is memory that the client holds.
            self._held.force(len(response))
            self._bytes += len(response)
            if self._calls and self._calls[0] is call:
                self._changed.notify_all()

    def responses(self) -> Iterator[bytes]:
        """The answers in order, until all are there and no request follows. Raises the `ServiceError` that ends it."""
        while True:
            with self._changed:
                while not self._ended and not self._ready and not (self._no_more and not self._calls):
                    self._changed.wait()
                if self._cancelled:
                    return
                ready = list(itertools.takewhile(lambda call: call.response is not None, self._calls))
                if not ready:
                    if self._over is not None:
                        raise self._over
                    return
            for call in ready:
                if call.error is not None and self._end_on_error:
                    self.cancel()
                    raise call.error
                assert call.response is not None
                yield call.response
                with self._changed:
                    # Now it has been handed to the transport, which takes the next only when this one has left.
                    if self._calls and self._calls[0] is call:
                        self._calls.popleft()
                        self._release(call)
                    self._changed.notify_all()

    @property
    def _ready(self) -> bool:
        return bool(self._calls) and self._calls[0].response is not None

    def cancel(self) -> None:
        """The client is gone: what is queued is not run."""
        with self._changed:
            if self._cancelled:
                return
            self._cancelled = True
            waiting = [call.on_cancel for call in self._calls if call.response is None]
            for call in self._calls:
                self._release(call)
            self._calls.clear()
            self._changed.notify_all()
        for on_cancel in waiting:
            if on_cancel is not None:
                on_cancel()

    def _release(self, call: StreamCall) -> None:
        answer = len(call.response) if call.response is not None else 0
        self._bytes -= call.size + answer
        self._held.remove((call.size if call.counted else 0) + answer)

    def end(self, error: ServiceError) -> None:
        """End the stream with a status, after the answers that are there."""
        with self._changed:
            self._over = error
            self._changed.notify_all()


class StreamService:
    """Serves `ModelStreamInfer` on a `grpc.Server`. Two threads a stream: one reads, one sends."""

    def __init__(
        self,
        handler: UnaryHandler,
        max_streams: int,
        max_bytes: int,
        spare: int,
        access: Access | None = None,
        traced: bool = False,
    ) -> None:
        """At most `max_streams` streams, which hold `max_bytes` of requests between them. `spare`: calls that the
        server may hand over beyond that number, to be refused. `access` knows whose stream it is.
        `traced`: requests are told what the stream's metadata says of traces."""
        self._access = access
        self._traced = traced
        self._handler = handler
        self._handling = threading.Lock()
        self._max_streams = max_streams
        # A stream that is at its share goes on reading when it has sent something; one message always fits.
        self._share = max(1, max_bytes // max_streams)
        self.held = Held(max_bytes)
        self._open: set[InferStream] = set()
        self._lock = threading.Lock()
        self.pool = ThreadPoolExecutor(max_streams + spare, thread_name_prefix="stream-send")
        self._readers = ThreadPoolExecutor(max_streams, thread_name_prefix="stream-read")

    @property
    def calls(self) -> int:
        """Requests of all streams that are not answered yet."""
        return sum(stream.in_flight for stream in list(self._open))

    @property
    def streams(self) -> int:
        return len(self._open)

    def handler(self) -> grpc.RpcMethodHandler:
        """The method's handler, with threads of its own."""

        def serve(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            return self._serve(messages, context)

        serve.experimental_thread_pool = self.pool  # type: ignore[attr-defined]
        return grpc.stream_stream_rpc_method_handler(serve)

    def close(self) -> None:
        """End every stream: the server stops."""
        for stream in list(self._open):
            stream.end(Draining("Server is stopping: the stream is closed"))

    def shut_down(self) -> None:
        """Let go of the threads."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _handle(self, message: bytes | memoryview, call: Any) -> None:
        # The decoder and its plans are one thread's at a time.
        with self._handling:
            self._handler(message, call)

    def _serve(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        sent = context.invocation_metadata()
        metadata = dict(sent)
        try:
            caller = 0 if self._access is None else self._access.identify(sent)
        except ServiceError as error:
            _abort(context, error)
        end_on_error = metadata.get(GRPC_ERROR) == "true"
        trace = trace_headers(sent) if self._traced else (None, None)
        stream = InferStream(self._handle, _deadline_ns(context), self._share, end_on_error, self.held, caller, trace)
        with self._lock:
            admitted = len(self._open) < self._max_streams
            if admitted:
                self._open.add(stream)
        if not admitted:
            _abort(context, QueueFull(f"Exceeds maximum queue size: {self._max_streams} streams are open", NS_PER_S))
        try:
            if context.add_callback(stream.cancel):
                self._readers.submit(stream.read, messages)
                yield from stream.responses()
        except ServiceError as error:
            _abort(context, error)
        finally:
            # However it ended, nothing of it stays queued.
            stream.cancel()
            with self._lock:
                self._open.discard(stream)


def _abort(context: grpc.ServicerContext, error: ServiceError) -> None:
    code, details, trailers = status_of(error)
    if trailers:
        context.set_trailing_metadata(trailers)
    context.abort(code, details)


def _deadline_ns(context: grpc.ServicerContext) -> int:
    left = context.time_remaining()
    return NEVER_NS if left is None or left > _FAR_FUTURE_S else now_ns() + int(left * NS_PER_S)


def _id_of(message: bytes) -> bytes:
    """The request's id, as far as the message can be read."""
    parts = split(message)
    if parts is not None:
        return parts.request_id
    try:
        request_id: bytes = ModelInferRequest.FromString(message).id.encode()
    except DecodeError:
        return b""
    return request_id
