"""From a settled lane to a batch: take its window, trim it to a bucket, fill it up from other lanes.

Decided here: what is in the batch and why it ends there. Not decided here: whether it is the turn of this lane.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from service.batch import CloseReason
from service.clock import NEVER_NS
from service.scheduler.hold import preferred_rows
from service.scheduler.lane import OVERSIZE, Lane
from service.scheduler.queue import ModelQueue
from service.scheduler.types import RUNNING, Segment


@dataclass(slots=True)
class Batch:
    """Requests taken out of their lanes to run together. `deadline_ns` is the earliest that must be met."""

    segments: list[Segment]
    rows: int
    bucket: int
    expected_ns: int
    deadline_ns: int
    reason: CloseReason


def assemble(lane: Lane, start_ns: int) -> Batch:
    """Form the batch led by `lane`, which has been settled for a start at `start_ns` and is not empty."""
    queue = lane.queue
    others: list[Lane] = []
    if len(queue.active) > 1:
        others = [other for other in queue.active if other is not lane and other.shape == lane.shape]
    batch = _segment(lane) if lane.kind is OVERSIZE else _window(lane, others, start_ns)
    if others and batch.rows < lane.cap_rows:
        _fill(batch, lane, [other for other in others if other.count], start_ns)
    index = lane.curve.index(batch.rows)
    batch.bucket = lane.curve.rows[index]
    batch.expected_ns = int(lane.curve.ns[index] * lane.latency.factor)
    if queue.policy.max_batch_rows == 1 or not queue.policy.joins:
        batch.reason = CloseReason.UNBATCHED
    elif batch.reason is CloseReason.DRAINED and len(queue.active) > 1:
        if batch.rows >= lane.cap_rows:
            batch.reason = CloseReason.FULL
        elif any(other.count for other in others):
            batch.reason = CloseReason.DEADLINE
        elif any(other.count for other in queue.active if other is not lane):
            batch.reason = CloseReason.SHAPE
    return batch


def _segment(lane: Lane) -> Batch:
    """The next rows of a request larger than a batch."""
    request = lane.head
    rows = lane.window_rows
    segment = Segment(request, request.dispatched_rows, rows)
    request.dispatched_rows += rows
    lane.dirty = True
    done = request.dispatched_rows == request.rows
    if done:
        lane.pop(1)
        request.state = RUNNING
        request.lane = None
    _leave(lane.queue, request.priority, int(done), rows)
    reason = CloseReason.DRAINED if request.state is RUNNING else CloseReason.FULL
    return Batch([segment], rows, rows, 0, request.deadline_ns, reason)


def _window(lane: Lane, others: list[Lane], start_ns: int) -> Batch:
    """The lane's largest feasible window, or less of it where a smaller bucket is cheaper per row."""
    window_rows = preferred_rows(lane, lane.window_rows)
    count, rows = lane.prefix(window_rows)
    reason = CloseReason.DRAINED
    if count < lane.count:
        next_rows = lane.rows_after(count)
        full = lane.soft or rows + next_rows > lane.cap_rows
        reason = CloseReason.FULL if full else CloseReason.DEADLINE
    if lane.held:
        reason = CloseReason.QUIET
    trimmed = _trim(lane, rows, others, start_ns)
    if trimmed:
        count, rows = trimmed
        reason = CloseReason.TRIMMED
    taken = lane.pop(count)
    deadline_ns = NEVER_NS if lane.soft else taken[0].deadline_ns
    segments: list[Segment] = []
    for request in taken:
        size = request.dispatched_rows = request.rows
        request.state = RUNNING
        request.lane = None
        segments.append(Segment(request, 0, size))
    _leave(lane.queue, lane.priority, count, rows)
    lane.held = False
    return Batch(segments, rows, rows, 0, deadline_ns, reason)


def _trim(lane: Lane, rows: int, others: list[Lane], start_ns: int) -> tuple[int, int] | None:
    """(requests, rows) that fill the bucket below `rows`, when that takes less time per row than padding up, the rest
    can still be served next, and others cannot fill the padding."""
    buckets, ns, factor = lane.curve.rows, lane.curve.ns, lane.latency.factor
    below = bisect_right(buckets, rows) - 1
    if below < 0 or buckets[below] == rows or below + 1 == len(buckets):
        return None
    if others and sum(other.rows for other in others) >= buckets[below + 1] - rows:
        return None
    count, fewer = lane.prefix(buckets[below])
    if not count or count >= lane.count:
        return None
    fewer_ns = ns[lane.curve.index(fewer)]
    if not fewer_ns or fewer / fewer_ns <= rows / ns[below + 1]:
        return None
    rest_ns = ns[lane.curve.index(min(lane.rows - fewer, lane.cap_rows))]
    if start_ns + (fewer_ns + rest_ns) * factor > lane.deadline_after(count):
        return None
    return count, fewer


def _fill(batch: Batch, lane: Lane, others: list[Lane], start_ns: int) -> None:
    """Let requests of other lanes ride along: from other deadline classes while every deadline in the batch is met,
    from lower priorities and best effort inside the padding."""
    curve, factor, cap = lane.curve, lane.latency.factor, lane.cap_rows
    whole = [other for other in others if other.kind is not OVERSIZE]
    peers = [other for other in whole if other.rank <= lane.rank | 1]
    while peers and batch.rows < cap:
        peer = min(peers, key=_head_deadline_ns)
        head = peer.head
        rows = batch.rows + head.rows
        limit_ns = batch.deadline_ns if head.demoted else min(batch.deadline_ns, head.deadline_ns)
        if rows > cap or start_ns + curve.ns[curve.index(rows)] * factor > limit_ns:
            peers.remove(peer)
            continue
        _ride(batch, peer)
        batch.deadline_ns = limit_ns
        if not peer.count:
            peers.remove(peer)
    index = curve.index(batch.rows)
    bucket, end_ns = curve.rows[index], start_ns + curve.ns[index] * factor
    for lower in sorted((other for other in whole if other.rank > lane.rank | 1), key=_rank):
        while lower.count and batch.rows + lower.head.rows <= bucket:
            if not lower.head.demoted:
                if lower.head.deadline_ns < end_ns:
                    break
                batch.deadline_ns = min(batch.deadline_ns, lower.head.deadline_ns)
            _ride(batch, lower)


def _ride(batch: Batch, lane: Lane) -> None:
    (request,) = lane.pop(1)
    request.dispatched_rows = request.rows
    request.state = RUNNING
    request.lane = None
    _leave(lane.queue, request.priority, 1, request.rows)
    batch.segments.append(Segment(request, 0, request.rows))
    batch.rows += request.rows


def _leave(queue: ModelQueue, priority: int, requests: int, rows: int) -> None:
    """Account for requests all of whose rows are dispatched."""
    queue.pending_requests -= requests
    queue.pending_rows -= rows
    queue.pending_by_priority[priority] -= requests
    queue.dispatched_requests += requests


def _head_deadline_ns(lane: Lane) -> int:
    return lane.head.deadline_ns


def _rank(lane: Lane) -> int:
    return lane.rank
