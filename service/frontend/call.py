"""What a handler knows of a call, and how it answers: the seam between the protocol's logic and its transport.

A handler is given the request's bytes (which it must not change) and a `Call`. It answers exactly once, now or later, from any thread, by `reply`
or `fail`; what comes after that, or after the client went away, is dropped silently. Handlers never see a transport
object, so another ingress (another HTTP/2 stack, another process) can stand under the same handlers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from service.errors import ServiceError


class Call(Protocol):
    """One unary call."""

    deadline_ns: int
    """The client's deadline on the monotonic clock; `clock.NEVER_NS` when it stated none."""

    on_cancel: Callable[[], object] | None
    """Called once if the client cancels, goes away or its deadline passes before the answer. Set by the handler."""

    def reply(self, parts: Sequence[bytes | memoryview], /) -> None:
        """Answer with a serialized message, given in parts, and status OK. The parts are copied before this returns."""

    def fail(self, error: ServiceError, /) -> None:
        """Answer with the status code and the message of `error`."""


UnaryHandler = Callable[[bytes | memoryview, Call], None]


class Outbox(Protocol):
    """Sends several answers in one go: those given between `hold` and `flush`, which must follow, may wait for it."""

    def hold(self) -> None:
        """More answers will follow shortly."""

    def flush(self) -> None:
        """Send what was held."""

