"""The fastest road for `ModelInfer`: connections read and written by native code, calls handed over in lists.

gRPC's core costs 40 us of CPU for a call that is answered and 36 us for one that is refused unread, many times what the
bytes take, and more when the caches are cold. Here `service.frontend._native` (C++, nghttp2) owns the public port. It
reads messages straight into memory that tensors are views of, refuses what must be refused without Python, and hands
over everything that arrived meanwhile in one list; the answers of a batch leave in one write
(docs/adr/0006-native-ingress.md).

All other methods are relayed, frame by frame, to the ordinary `grpc.server` on a private Unix socket. So there is one
implementation of the control plane, health and reflection, whichever ingress serves `ModelInfer`.

Where the extension is not built, the ingress on gRPC's core (`ingress.py`) serves instead: same handler, same answers.
"""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import grpc

from service.clock import NS_PER_MS, NS_PER_S
from service.errors import InvalidRequest, MessageTooLarge, QueueFull, ServiceError
from service.frontend.access import Access
from service.frontend.call import NO_LULL, Lull, UnaryHandler
from service.frontend.certificates import Certificates
from service.frontend.status import as_service_error, status_of

if TYPE_CHECKING:
    from service.frontend._native import Call, Endpoint

# What a connection may have open besides calls of the served method: streams, watches, control calls.
_OTHER_STREAMS = 1024
# Connections that the kernel accepts before we do.
_BACKLOG = 4096
# Where the private socket is made: paths of sockets are limited to about 100 bytes, and $TMPDIR may be long.
_SOCKETS = "/tmp"  # noqa: S108 - the directory made in it has a random name and is ours alone
# zlib: detect a gzip or a zlib header, largest window.
_ANY_HEADER = 47


def missing() -> str:
    """Why the native ingress cannot be used, and what to do about it; empty when it can."""
    try:
        import service.frontend._native  # noqa: F401
    except ImportError as error:
        return (
            f"the native ingress was not built with this installation ({error}): install a C++ compiler, Python's "
            "headers, nghttp2 and OpenSSL (Debian: apt-get install g++ python3-dev libnghttp2-dev libssl-dev) and "
            "install onclock again"
        )
    return ""


def listen(host: str, port: int) -> list[socket.socket]:
    """Listening sockets on `port` (0: a free one) of every address that `host` stands for. Raises `OSError`."""
    found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    with contextlib.ExitStack() as undo:
        sockets: list[socket.socket] = []
        for family, _, _, _, address in dict.fromkeys(found):
            listener = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address[0] != "::"))
            bound = sockets[0].getsockname()[1] if sockets else port
            listener.bind((address[0], bound, *address[2:]))
            listener.listen(_BACKLOG)
            sockets.append(listener)
        undo.pop_all()
    return sockets


class NativeIngress:
    """Serves one unary method with `handler`, which runs on the ingress thread and must not block; all others are
    passed on to `server`. `open`, `start` and `stop` are called in this order; the server is started after `open` and
    stopped before `stop` by whoever made it.

    Calls beyond `max_calls` in progress, and a share of them as `share` says when told how many were refused so since
    it was last asked, are refused before their message is read; a message that would bring those held beyond
    `max_bytes` is refused while it is being read. After what has arrived was handled, `lull` says whether anything that
    comes could start: if not, arrivals are read now and then and handed over together, at the latest when `flush`
    says that a batch was answered. `unseen` is what the share is told. Connections beyond `max_connections` are closed
    at once. Those without a call for `idle_ns` (0: never) are ended, and so are those of `age_ns` (0: never); their
    calls in progress may then take `age_grace_ns`. With `access`, calls without a key for them are refused before their
    message is read. `traced`: calls are told what their metadata says of traces.
    """

    kind = "native"

    def __init__(
        self,
        server: grpc.Server,
        method: str,
        handler: UnaryHandler,
        max_calls: int,
        max_bytes: int,
        max_message_bytes: int,
        share: Callable[[int], float] = lambda _unseen: 0.0,
        lull: Callable[[], Lull] = lambda: NO_LULL,
        unseen: ServiceError | None = None,
        max_connections: int = 10_000,
        idle_ns: int = 0,
        access: Access | None = None,
        age_ns: int = 0,
        age_grace_ns: int = 0,
        traced: bool = False,
    ) -> None:
        self._server = server
        self._method = method
        self._handler = handler
        self._max_calls = max_calls
        self._max_bytes = max_bytes
        self._max_message_bytes = max_message_bytes
        self._share = share
        self._lull = lull
        self._max_connections = max_connections
        self._idle_ns = idle_ns
        self._access = access
        self._age_ns = age_ns
        self._age_grace_ns = age_grace_ns
        self._traced = traced
        self._unseen = unseen or QueueFull("the server is overloaded", NS_PER_MS)
        self._endpoint: Endpoint
        self._refused: Counter[str] = Counter()
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._thread = threading.Thread(target=self._serve, name="ingress", daemon=True)

    def open(self, host: str, port: int, certificates: Certificates | None = None) -> int:
        """Listen on a port of `host` (0: any free one), with TLS if there are certificates; which port it is. Raises
        `OSError`, and `ValueError` for certificates that cannot be used."""
        from service.frontend._native import Endpoint

        sockets = listen(host, port)
        bound: int = sockets[0].getsockname()[1]
        # Only this user may enter the directory, and with it connect.
        self._directory = tempfile.TemporaryDirectory(prefix="onclock-", dir=_SOCKETS)
        upstream = f"{self._directory.name}/control"
        try:
            self._server.add_insecure_port(f"unix:{upstream}")
        except RuntimeError as error:
            raise OSError(str(error)) from error
        self._endpoint = Endpoint(
            [listener.detach() for listener in sockets],
            self._method,
            upstream,
            self._max_message_bytes,
            self._max_bytes,
            self._max_calls,
            self._max_calls + _OTHER_STREAMS,
            self._max_connections,
            self._idle_ns,
            self._age_ns,
            self._age_grace_ns,
            explain(self._unseen),
            explain,
            self._traced,
        )
        if certificates is not None:
            certificates.use(self._endpoint.secure)
        if self._access is not None:
            self._admit()
            self._access.on_update = self._admit
        return bound

    def _admit(self) -> None:
        assert self._access is not None
        self._endpoint.admit(*self._access.table())

    def hold(self) -> None:
        """Answers of other threads than the ingress' may wait for `flush`, which must follow."""
        self._endpoint.hold()

    def flush(self) -> None:
        """Send what was held; then what has come meanwhile is handed over."""
        self._endpoint.flush()

    @property
    def calls(self) -> int:
        """Calls in progress."""
        return self._endpoint.calls

    def count_connections(self) -> tuple[int, int] | None:
        """Connections of clients, and those that were closed at once since there were `max_connections`."""
        return self._endpoint.connections, self._endpoint.turned_away

    def count_refused(self) -> Mapping[str, int]:
        """Calls that were refused before `handler` was asked, by reason; the share's are not among them."""
        return self._refused + Counter(self._endpoint.refused)

    @property
    def bytes(self) -> int:
        """Bytes of the messages of calls in progress."""
        return self._endpoint.bytes

    def start(self) -> None:
        """Begin to accept connections."""
        self._thread.start()

    def stop(self, grace_s: float, timeout_s: float) -> bool:
        """End: connections are closed when idle, at the latest after `grace_s`. False when the thread does not end in
        time."""
        self._endpoint.stop(int(grace_s * NS_PER_S))
        self._thread.join(timeout_s)
        if self._directory is not None:
            self._directory.cleanup()
        return not self._thread.is_alive()

    def _serve(self) -> None:
        poll, dispatch = self._endpoint.poll, self._dispatch
        look_ns, hand_over_ns, share = 0, 0, 0.0
        while True:
            arrived, cancelled, unseen, ended = poll(look_ns, hand_over_ns, share)
            for call in cancelled:
                self._cancelled(call)
            for call in arrived:
                dispatch(call)
            if ended:
                return
            # Nothing may keep a call alive while we wait.
            arrived = cancelled = call = None  # type: ignore[assignment]
            try:
                lull = self._lull()
                share = self._share(unseen)
                look_ns, hand_over_ns = lull.look_ns, lull.hand_over_ns
            except Exception as error:  # noqa: BLE001 - the boundary: it is logged, the thread lives on
                as_service_error(error, f"admitting calls of {self._method}")
                look_ns, hand_over_ns, share = 0, 0, 0.0

    def _dispatch(self, call: Call) -> None:
        try:
            message = memoryview(call)
            if call.encoding is not None:
                message = self._decompress(message)
                if not call.count(len(message)):
                    raise QueueFull(
                        f"Exceeds maximum queue size: requests in progress hold more than {self._max_bytes} bytes",
                        NS_PER_MS,
                    )
            self._handler(message, call)
        except Exception as error:  # noqa: BLE001 - the boundary: the status table answers it, the thread lives on
            refusal = as_service_error(error, f"serving {self._method}")
            self._refused[refusal.reason] += 1
            call.fail(refusal)

    def _cancelled(self, call: Call) -> None:
        on_cancel, call.on_cancel = call.on_cancel, None  # it refers back to the call
        if on_cancel is not None:
            try:
                on_cancel()
            except Exception as error:  # noqa: BLE001 - the boundary: nobody is left to answer, the thread lives on
                as_service_error(error, "cancelling a call")

    def _decompress(self, message: memoryview) -> memoryview:
        inflate = zlib.decompressobj(_ANY_HEADER)
        try:
            plain = inflate.decompress(message, self._max_message_bytes + 1)
        except zlib.error as error:
            raise InvalidRequest(f"{self._method}: the compressed message is damaged: {error}") from None
        if len(plain) > self._max_message_bytes:
            raise MessageTooLarge(f"Received message larger than max ({self._max_message_bytes}) after decompression")
        if not inflate.eof:
            raise InvalidRequest(f"{self._method}: the compressed message is incomplete")
        return memoryview(plain)


def explain(error: Exception) -> tuple[int, str, str]:
    """The status code, message and pushback (milliseconds, "" for none) that answer `error`."""
    code, details, trailers = status_of(as_service_error(error, "explaining an error"))
    return code.value[0], details, trailers[0][1] if trailers else ""
