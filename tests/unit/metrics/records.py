"""Hand-made batch records and requests for the tests of metrics."""

from __future__ import annotations

from dataclasses import dataclass

from service.batch import BatchRecord, CloseReason
from service.clock import NEVER_NS, NS_PER_MS


@dataclass(slots=True)
class Request:
    """What a shard reads of an answered request."""

    arrival_ns: int
    deadline_ns: int = NEVER_NS
    rows: int = 1


def batch(
    dispatched_ms: float = 0,
    *,
    input_ms: float = 1,
    infer_ms: float = 10,
    output_ms: float = 2,
    rows: int = 1,
    requests: int = 1,
    reason: CloseReason = CloseReason.DRAINED,
    expected_ms: float = 13,
    slack_ms: float = 5,
) -> BatchRecord:
    """A record of a batch that was dispatched at `dispatched_ms` and took the stated times."""
    dispatched_ns = round(dispatched_ms * NS_PER_MS)
    started_ns = dispatched_ns + round(input_ms * NS_PER_MS)
    finished_ns = started_ns + round(infer_ms * NS_PER_MS)
    return BatchRecord(
        device="cpu",
        rows=rows,
        bucket=rows,
        requests=requests,
        reason=reason,
        dispatched_ns=dispatched_ns,
        started_ns=started_ns,
        finished_ns=finished_ns,
        done_ns=finished_ns + round(output_ms * NS_PER_MS),
        expected_ns=round(expected_ms * NS_PER_MS),
        slack_ns=round(slack_ms * NS_PER_MS),
    )
