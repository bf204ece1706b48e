"""The only waiting there is: for company in the blackout regime, and the queue delay of models without an objective."""

from __future__ import annotations

from service.scheduler.gaps import GAP_SHARE
from service.scheduler.lane import DEADLINE, EAGER, Lane


def hold_until_ns(lane: Lane) -> int:
    """Until when a settled lane waits for company before it is run; 0 = it does not."""
    if lane.kind is DEADLINE:
        return _until_quiet_ns(lane) if lane.arrivals.clumpy else 0
    policy, rows = lane.queue.policy, lane.window_rows
    if lane.kind is not EAGER or policy.slo_ns is not None or not policy.max_queue_delay_ns:
        return 0
    if rows >= lane.cap_rows or rows < lane.rows or preferred_rows(lane, rows) < rows or rows in policy.preferred_rows:
        return 0
    return lane.head.arrival_ns + policy.max_queue_delay_ns


def preferred_rows(lane: Lane, rows: int) -> int:
    """The largest stated preferred size within `rows`, when the model has no objective and states any that holds the
    oldest request; else `rows`."""
    policy = lane.queue.policy
    if policy.slo_ns is not None or not policy.preferred_rows:
        return rows
    least = lane.head.rows
    return max((size for size in policy.preferred_rows if least <= size <= rows), default=rows)


def _until_quiet_ns(lane: Lane) -> int:
    """The blackout regime: running now would doom what arrives during the first moments of the run, so a quiet gap is
    awaited, or the last moment at which one row more could still join."""
    rows = lane.window_rows
    if rows >= lane.cap_rows or rows < lane.rows:
        return 0
    curve, factor = lane.curve, lane.latency.factor
    head = lane.head
    budget_ns = head.deadline_ns - head.arrival_ns
    if (curve.ns[curve.index(rows)] + curve.ns[0]) * factor <= budget_ns:
        return 0
    last_moment_ns = head.deadline_ns - int(curve.ns[curve.index(rows + 1)] * factor)
    return min(last_moment_ns, lane.arrivals.last_ns + int(GAP_SHARE * budget_ns))
