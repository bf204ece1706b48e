"""What is known of a traced request when it is over: plain values, cheap to make, free of its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from service.batch import BatchRecord
from service.trace_context import RequestTrace

# Longest text of an attribute or a status: clients choose some of them.
MAX_TEXT = 1024


class TracedRequest(NamedTuple):
    """A request that was answered. Times are monotonic nanoseconds; `deadline_ns` NEVER_NS: none."""

    trace: RequestTrace
    arrival_ns: int
    deadline_ns: int
    rows: int
    priority: int
    request_id: bytes


@dataclass(slots=True)
class TracedBatch:
    """The traced requests that a batch has answered."""

    model: str
    version: int
    record: BatchRecord
    requests: Sequence[TracedRequest]


@dataclass(slots=True)
class TracedFailure:
    """A request that was refused, failed or given up. `model` is empty where it is not known. `status` is the name of
    gRPC's status code, `reason` the error's word."""

    model: str
    version: int
    request: TracedRequest
    status: str
    reason: str
    message: str
    end_ns: int


Finished = TracedBatch | TracedFailure


def size_of(item: Finished) -> int:
    """How many requests it tells of."""
    return len(item.requests) if isinstance(item, TracedBatch) else 1
