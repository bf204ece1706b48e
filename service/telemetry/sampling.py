"""Which requests are traced: parent-based, in OpenTelemetry's words. Pure: chance and time are arguments.

A request whose caller is not traced is not traced. One whose caller is, is, up to so many a second. One without a
caller's context is traced by a ratio of trace ids, so that whoever decides by the same rule decides the same.
"""

from __future__ import annotations

from service.clock import NS_PER_S
from service.trace_context import Parent

_LOW = (1 << 64) - 1


def ratio_bound(ratio: float) -> int:
    """`ratio` as a bound for the lower 64 bits of a trace id: OpenTelemetry's TraceIdRatioBased."""
    return round(ratio * (_LOW + 1))


def by_ratio(trace_id: int, bound: int) -> bool:
    """Whether a trace that begins with this id (128 bits) is sampled."""
    return (trace_id & _LOW) < bound


class Allowance:
    """So many a second, with a second's worth at once. Told the time (ns, monotonic). Not thread-safe."""

    __slots__ = ("_at_ns", "_per_s", "_stock_ns")

    def __init__(self, per_s: int) -> None:
        self._per_s = per_s
        self._at_ns = 0
        # In units of one request's worth times nanoseconds: whole numbers never drift.
        self._stock_ns = per_s * NS_PER_S

    def take(self, at_ns: int) -> bool:
        """Whether there is one left; it is gone then. A time before the last one counts as that one."""
        if at_ns > self._at_ns:
            grown = self._stock_ns + (at_ns - self._at_ns) * self._per_s
            self._stock_ns = min(grown, self._per_s * NS_PER_S)
            self._at_ns = at_ns
        if self._stock_ns < NS_PER_S:
            return False
        self._stock_ns -= NS_PER_S
        return True


def follows(parent: Parent | None, trace_id: int, bound: int, allowance: Allowance, at_ns: int) -> bool | None:
    """Whether a request is traced; None: its caller is, but too many are already. `trace_id` is the one it would have
    without a parent."""
    if parent is None:
        return by_ratio(trace_id, bound)
    if not parent.sampled:
        return False
    return True if allowance.take(at_ns) else None
