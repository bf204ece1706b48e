"""What a handler knows of a call, and how it answers: the seam between the protocol's logic and its transport.

A handler is given the request's bytes (which it must not change) and a `Call`. It answers exactly once, now or later,
from any thread, by `reply` or `fail`; what comes after that, or after the client went away, is dropped silently.
Handlers never see a transport object, so different ingresses (`ingress.py`, `native_ingress.py`) stand under them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from service.clock import NS_PER_MS
from service.errors import ServiceError


class Call(Protocol):
    """One unary call."""

    @property
    def arrival_ns(self) -> int:
        """When its message came, on the monotonic clock."""

    @property
    def deadline_ns(self) -> int:
        """The client's deadline on the monotonic clock; `clock.NEVER_NS` when it stated none."""

    @property
    def caller(self) -> int:
        """Who asks, as `access.Access` numbers them; 0: whoever shows no key."""

    @property
    def traceparent(self) -> str | None:
        """The metadata of that name (several: joined by commas). None: there is none, or nothing is traced."""

    @property
    def tracestate(self) -> str | None:
        """As above."""

    on_cancel: Callable[[], object] | None
    """Called once if the client cancels, goes away or its deadline passes before the answer. Set by the handler."""

    def reply(self, parts: Sequence[bytes | memoryview], /) -> None:
        """Answer with a serialized message, given in parts, and status OK. The parts are copied before this returns."""

    def fail(self, error: ServiceError, /) -> None:
        """Answer with the status code and the message of `error`."""


def trace_headers(metadata: Iterable[tuple[str, str | bytes]]) -> tuple[str | None, str | None]:
    """`traceparent` and `tracestate` of a call's metadata; several of one name are joined by commas, as HTTP has it."""
    found: dict[str, str] = {}
    for name, value in metadata:
        if name in ("traceparent", "tracestate"):
            text = value.decode("latin-1") if isinstance(value, bytes) else value
            found[name] = f"{found[name]},{text}" if name in found else text
    return found.get("traceparent"), found.get("tracestate")


UnaryHandler = Callable[[bytes | memoryview, Call], None]


class Lull(NamedTuple):
    """For how long, in all likelihood, nothing that comes can start, since every device in demand is busy; and the
    tightest objective in demand. Handling what came meanwhile in one go costs half to a quarter of handling each as it
    comes, in caches that a batch keeps emptying."""

    busy_ns: int
    slo_ns: int

    @property
    def look_ns(self) -> int:
        """How long calls may go unread; 0: not at all."""
        return min(MAX_LOOK_NS, self.slo_ns // LOOK_PARTS) if self.busy_ns >= MIN_PAUSE_NS else 0

    @property
    def hand_over_ns(self) -> int:
        """How long calls that were read may wait until they are admitted or refused; 0: not at all."""
        return min(MAX_HAND_OVER_NS, self.slo_ns // HAND_OVER_PARTS) if self.busy_ns >= MIN_PAUSE_NS else 0


NO_LULL = Lull(0, 0)
# Arrivals are dated when they are read, so they must be read within a small part of the objective ...
LOOK_PARTS = 25
# ... and so often that a cancelled request does not stay queued for 10 ms.
MAX_LOOK_NS = 5 * NS_PER_MS
# They must be admitted, or refused, within a part that leaves a refused client the time to ask elsewhere.
HAND_OVER_PARTS = 5
MAX_HAND_OVER_NS = 50 * NS_PER_MS
# Shorter pauses are not worth their system call.
MIN_PAUSE_NS = NS_PER_MS // 5


class Outbox(Protocol):
    """Sends several answers in one go: those given between `hold` and `flush`, which must follow, may wait for it."""

    def hold(self) -> None:
        """More answers will follow shortly."""

    def flush(self) -> None:
        """Send what was held."""
