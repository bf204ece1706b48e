"""The fast road for `ModelInfer`: calls taken from gRPC's core by one thread, answered from any thread.

`grpc.server` hands every call to a pool thread, which waits there for its message and again for its answer: three
thread switches and, measured, 60 % of the CPU of a bare echo (docs/adr/0001-ingress.md). Here one thread polls a
completion queue of its own on the same server; a message is handed to the handler on that thread, and the answer leaves
from whatever thread completes the request. No thread waits for a call, so nothing but memory grows with the calls in
flight.

Everything else (control plane, health, reflection) stays on the ordinary `grpc.server`, which owns the ports.

This uses `grpc._cython.cygrpc`, the layer `grpc.server` itself stands on. It is not a public interface: the version of
grpcio is pinned, and `check_core` refuses to start on one that lacks what is used here.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc
from grpc._cython import cygrpc

from service.clock import NEVER_NS, NS_PER_MS, NS_PER_S, now_ns
from service.errors import InvalidRequest, QueueFull, ServiceError
from service.frontend.access import Access
from service.frontend.call import NO_LULL, Lull, UnaryHandler, trace_headers
from service.frontend.certificates import Certificates
from service.frontend.status import as_service_error, status_of

_NO_FLAGS = 0
# Deadlines further away than this are "no deadline": gRPC reports a missing one as infinity or the year 292277026596.
_FAR_FUTURE_S = 10 * 365 * 86400.0

# Operations own C memory from the start of their batch to its completion: one object must never be in two batches.
_SEND_INITIAL_METADATA = cygrpc.SendInitialMetadataOperation
_SEND_MESSAGE = cygrpc.SendMessageOperation
_SEND_STATUS = cygrpc.SendStatusFromServerOperation
_RECEIVE_MESSAGE = cygrpc.ReceiveMessageOperation
_RECEIVE_CLOSE = cygrpc.ReceiveCloseOnServerOperation

_CODES: dict[grpc.StatusCode, Any] = {code: code.value[0] for code in grpc.StatusCode}
_OK = _CODES[grpc.StatusCode.OK]


def idle_options(idle_s: float) -> tuple[tuple[str, int], ...]:
    """Options of a `grpc.server` that ends connections without a call for so long; 0: never."""
    return (("grpc.max_connection_idle_ms", int(idle_s * 1e3)),) if idle_s else ()


def age_options(age_s: float, grace_s: float) -> tuple[tuple[str, int], ...]:
    """Options of a `grpc.server` that ends connections that are so old, 0: never; calls may then take `grace_s`."""
    if not age_s:
        return ()
    return (("grpc.max_connection_age_ms", int(age_s * 1e3)), ("grpc.max_connection_age_grace_ms", int(grace_s * 1e3)))


def check_core(server: grpc.Server) -> Any:
    """The core server under `server`; raises `RuntimeError` when this grpcio does not have what the ingress needs."""
    core = getattr(getattr(server, "_state", None), "server", None)
    needed = ("register_completion_queue", "register_method", "request_registered_call")
    if core is None or not all(hasattr(core, name) for name in needed):
        raise RuntimeError(f"grpcio {grpc.__version__} is not supported; install the version pinned by onclock")
    return core


class CoreCall:
    """A `Call` on gRPC's core. The ingress' lock decides who takes it: one answer, or the end of the call.

    `answered` is told, on the ingress thread, when the transport has done with an answer.
    """

    __slots__ = (
        "_answered",
        "_call",
        "_lock",
        "arrival_ns",
        "caller",
        "deadline_ns",
        "on_cancel",
        "size",
        "traceparent",
        "tracestate",
    )

    def __init__(
        self, lock: threading.Lock, call: Any, deadline_ns: int, answered: Callable[[Any], None], caller: int = 0
    ) -> None:
        self._lock = lock
        self._call = call
        self._answered = answered
        self.size = 0
        self.arrival_ns = 0
        self.deadline_ns = deadline_ns
        self.caller = caller
        self.on_cancel: Callable[[], object] | None = None
        self.traceparent: str | None = None
        self.tracestate: str | None = None

    def _take(self) -> Any:
        """The core call if it is still to be answered, else None. Whoever takes it answers it."""
        with self._lock:
            call, self._call = self._call, None
        return call

    def reply(self, parts: Sequence[bytes | memoryview], /) -> None:
        call = self._take()
        if call is not None:
            operations = (
                _SEND_INITIAL_METADATA(None, _NO_FLAGS),
                _SEND_MESSAGE(b"".join(parts), _NO_FLAGS),
                _SEND_STATUS(None, _OK, b"", _NO_FLAGS),
            )
            call.start_server_batch(operations, self._answered)

    def fail(self, error: ServiceError, /) -> None:
        call = self._take()
        if call is not None:
            call.start_server_batch((_SEND_INITIAL_METADATA(None, _NO_FLAGS), _error_status(error)), self._answered)

    def closed(self, cancelled: bool) -> bool:
        """The call ended on the wire; True when nobody had answered it, and now nobody can. The handler is told if it
        was cancelled."""
        abandoned = self._take() is not None
        if abandoned and cancelled and self.on_cancel is not None:
            try:
                self.on_cancel()
            except Exception as error:  # noqa: BLE001 - the boundary: nobody is left to answer, the thread lives on
                as_service_error(error, "cancelling a call")
        self.on_cancel = None  # it refers back to the call: without the cycle, no garbage collection is needed
        return abandoned


def _error_status(error: ServiceError) -> Any:
    code, details, trailers = status_of(error)
    return _SEND_STATUS(trailers, _CODES[code], details.encode(), _NO_FLAGS)


class Ingress:
    """Serves one unary method of a `grpc.Server` with `handler`, which runs on the ingress thread and must not block.

    Construct before the server starts, `start` after, `stop` once the server has shut down. The queue ends only when no
    call can be answered any more: answering on a queue that has ended aborts the process. Calls beyond `max_calls` in
    progress, and those for which `gate` has a reason, are refused before their message is read; a message that would
    bring those held beyond `max_bytes` is refused when it has been read. When nothing is left to do, `lull` says
    whether anything that comes could start: if not, what comes meanwhile is handled in one go.
    """

    def __init__(
        self,
        server: grpc.Server,
        method: str,
        handler: UnaryHandler,
        max_calls: int,
        max_bytes: int,
        gate: Callable[[], ServiceError | None] = lambda: None,
        lull: Callable[[], Lull] = lambda: NO_LULL,
        access: Access | None = None,
        traced: bool = False,
    ) -> None:
        """`traced`: calls are told what their metadata says of traces."""
        self._access = access
        self._traced = traced
        self._server = server
        self._core = check_core(server)
        self._method = method
        self._handler = handler
        self._gate = gate
        self._lull = lull
        self._max_calls = max_calls
        self._max_bytes = max_bytes
        # Changed by the ingress thread only.
        self.calls = 0
        self.bytes = 0
        self._refused: Counter[str] = Counter()
        # Calls that somebody may still answer, or whose answer is on its way; whether no more of them will come.
        self._unfinished = 0
        self._closing = False
        self._queue = cygrpc.CompletionQueue()
        self._core.register_completion_queue(self._queue)
        self._core.register_method(method)
        # One lock for all calls: it is held for a few instructions, and a lock a call costs more than it saves.
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="ingress", daemon=True)

    kind = "core"

    def count_connections(self) -> tuple[int, int] | None:
        """Not known: gRPC's core does not tell."""
        return None

    def count_refused(self) -> Mapping[str, int]:
        """Calls that were refused before `handler` was asked, by reason; those of `gate` are not among them."""
        return self._refused.copy()

    def open(self, host: str, port: int, certificates: Certificates | None = None) -> int:
        """Listen on a port of `host` (0: any free one), with TLS if there are certificates; which port it is. Raises
        `OSError`."""
        address = f"[{host}]" if ":" in host and not host.startswith("[") else host
        try:
            bound: int = (
                self._server.add_insecure_port(f"{address}:{port}")
                if certificates is None
                else self._server.add_secure_port(f"{address}:{port}", certificates.credentials())
            )
        except RuntimeError as error:
            raise OSError(str(error)) from error
        return bound

    def start(self) -> None:
        """Begin to accept calls."""
        self._request_call()
        self._thread.start()

    def hold(self) -> None:
        """Nothing: gRPC's core sends by itself."""

    def flush(self) -> None:
        """Nothing, as above."""

    def stop(self, _grace_s: float, timeout_s: float) -> bool:
        """Wait for the end of the thread; False when it does not end in time. The server must have been stopped."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _request_call(self) -> None:
        self._core.request_registered_call(self._queue, self._queue, self._method, self._on_call)

    def _serve(self) -> None:
        poll = self._queue.poll
        shutdown = cygrpc.CompletionType.queue_shutdown
        nothing = cygrpc.CompletionType.queue_timeout
        while True:
            # The event keeps its call alive; holding it while polling would delay the call's destruction.
            event = None
            event = poll()
            if event.completion_type == shutdown:
                return
            event.tag(event)
            lull = self._lull()
            pause_ns = min(lull.look_ns, lull.busy_ns)
            if not pause_ns:
                continue
            while True:
                event = None
                event = poll(time.time())
                if event.completion_type == shutdown:
                    return
                if event.completion_type == nothing:
                    break
                event.tag(event)
            time.sleep(pause_ns / NS_PER_S)

    def _end_when_done(self) -> None:
        if self._closing and self._unfinished == 0:
            self._queue.shutdown()

    def _on_answered(self, _event: Any) -> None:
        self._unfinished -= 1
        self._end_when_done()

    def _on_call(self, event: Any) -> None:
        if not event.success:
            # The server shuts down: no call came of the request, and as only one is made at a time, none will.
            self._closing = True
            self._end_when_done()
            return
        self._request_call()
        core_call = event.call
        caller, refusal = self._identify(event)
        refusal = refusal or self._full()
        if refusal is not None:
            self._refused[refusal.reason] += 1
        refusal = refusal or self._refusal()
        if refusal is not None:
            operations = (_SEND_INITIAL_METADATA(None, _NO_FLAGS), _RECEIVE_CLOSE(_NO_FLAGS), _error_status(refusal))
            core_call.start_server_batch(operations, self._on_answered)
            self._unfinished += 1
            return
        self.calls += 1
        remaining_s = event.call_details.deadline - time.time()
        deadline_ns = now_ns() + int(remaining_s * NS_PER_S) if remaining_s < _FAR_FUTURE_S else NEVER_NS
        call = CoreCall(self._lock, core_call, deadline_ns, self._on_answered, caller)
        if self._traced:
            call.traceparent, call.tracestate = trace_headers(event.invocation_metadata or ())
        self._unfinished += 1

        def on_message(message_event: Any) -> None:
            message = message_event.batch_operations[0].message()
            if message is None:
                # Closed without a message, or with one larger than allowed (the core has answered that one).
                refusal = InvalidRequest(f"{self._method} needs exactly one request message")
                self._refused[refusal.reason] += 1
                call.fail(refusal)
            else:
                self._dispatch(message, call)

        def on_close(close_event: Any) -> None:
            self.calls -= 1
            self.bytes -= call.size
            if call.closed(close_event.batch_operations[0].cancelled()):
                self._unfinished -= 1
                self._end_when_done()

        core_call.start_server_batch((_RECEIVE_MESSAGE(_NO_FLAGS),), on_message)
        core_call.start_server_batch((_RECEIVE_CLOSE(_NO_FLAGS),), on_close)

    def _dispatch(self, message: bytes, call: CoreCall) -> None:
        call.arrival_ns = now_ns()
        call.size = len(message)
        self.bytes += call.size
        try:
            if self.bytes > self._max_bytes:
                raise QueueFull(
                    f"Exceeds maximum queue size: requests in progress hold more than {self._max_bytes} bytes",
                    NS_PER_MS,
                )
            self._handler(message, call)
        except Exception as error:  # noqa: BLE001 - the boundary: the status table answers it, the thread lives on
            refusal = as_service_error(error, f"serving {self._method}")
            self._refused[refusal.reason] += 1
            call.fail(refusal)

    def _identify(self, event: Any) -> tuple[int, ServiceError | None]:
        """Who calls, and why they may not."""
        if self._access is None:
            return 0, None
        try:
            number = self._access.identify(event.invocation_metadata or ())
            self._access.check(number, self._method)
        except ServiceError as error:
            return 0, error
        return number, None

    def _full(self) -> ServiceError | None:
        """That there are too many calls, if there are."""
        if self.calls < self._max_calls:
            return None
        return QueueFull(f"Exceeds maximum queue size: {self._max_calls} calls are in progress", NS_PER_MS)

    def _refusal(self) -> ServiceError | None:
        """Why to refuse a call before its message is read, if the gate has a reason."""
        try:
            return self._gate()
        except Exception as error:  # noqa: BLE001 - the boundary: the status table answers it, the thread lives on
            return as_service_error(error, f"admitting a call of {self._method}")
