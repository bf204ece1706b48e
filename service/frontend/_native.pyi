"""The native ingress: connections without Python (`service/frontend/native`)."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

# Within a class that has a property of that name.
Bytes: TypeAlias = bytes

class Call:
    """One unary call. Its buffer is the request's message, valid for as long as anything refers to it."""

    on_cancel: Callable[[], object] | None
    @property
    def arrival_ns(self) -> int: ...
    @property
    def deadline_ns(self) -> int: ...
    @property
    def caller(self) -> int:
        """Who asks: the number that `Endpoint.admit` was given with their key; 0: nobody known."""

    @property
    def traceparent(self) -> str | None:
        """The header of that name (several: joined by commas). None: there is none, or the endpoint is not `traced`."""

    @property
    def tracestate(self) -> str | None: ...
    @property
    def encoding(self) -> str | None: ...
    def reply(self, parts: Sequence[bytes | memoryview], /) -> None: ...
    def fail(self, error: Exception, /) -> None: ...
    def count(self, size: int, /) -> bool:
        """Count `size` more bytes as held by the call until it ends; False when that would be more than is allowed."""

    def __buffer__(self, flags: int, /) -> memoryview: ...

class Endpoint:
    """The listening sockets `listeners` (which it closes) and their connections.

    `method` is served; every other method is relayed to the gRPC server at the Unix socket `upstream`. `unseen` is the
    status, message and pushback of calls refused by the share; `explain` makes the same of an error.
    """

    def __init__(
        self,
        listeners: list[int],
        method: str,
        upstream: str,
        max_message: int,
        max_bytes: int,
        max_calls: int,
        max_streams: int,
        max_connections: int,
        idle_ns: int,
        age_ns: int,
        age_grace_ns: int,
        unseen: tuple[int, str, str],
        explain: Callable[[Exception], tuple[int, str, str]],
        traced: bool = False,
    ) -> None: ...
    @property
    def calls(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def poll(self, look_ns: int, hand_over_ns: int, share: float, /) -> tuple[list[Call], list[Call], int, bool]:
        """Wait for calls: those that arrived, those whose stream ended before they were answered, how many were refused
        by `share`, whether the endpoint has ended. One thread polls.

        With a `hand_over_ns`, sockets are looked at every `look_ns` only, and what arrived is handed over together
        after that time, or when another thread says `flush`.
        """

    @property
    def connections(self) -> int: ...
    @property
    def refused(self) -> dict[str, int]:
        """Calls that ended here before anybody was handed them, those of `share` apart: reason -> how many."""

    @property
    def turned_away(self) -> int:
        """Connections that were closed at once, since there were `max_connections`."""

    def secure(self, chain: Bytes, key: Bytes, client_authorities: Bytes, /) -> int:
        """Use TLS with this certificate chain and key on connections that are accepted from now on; with
        `client_authorities` (empty: none), clients need a certificate of one of them. All in PEM. When the
        certificate ends, seconds since 1970. Raises `ValueError`."""

    def admit(self, callers: list[tuple[Bytes, int, bool]], anonymous: tuple[int, bool], /) -> None:
        """From now on calls need a key: (its SHA-256, the number of whoever has it, whether they may infer) each;
        `anonymous` is whoever shows none."""

    def hold(self) -> None:
        """Answers given by other threads than the poller may wait for `flush`, which must follow."""

    def flush(self) -> None:
        """Send the answers that were held; then what has arrived is handed over."""

    def stop(self, grace_ns: int, /) -> None:
        """End: nothing new is accepted; connections close when idle, at the latest after `grace_ns`."""
