"""The nouns of scheduling: what is queued, and what the scheduler may answer.

A `QueuedRequest` knows its rows, its times and its shape, never its tensors. The answers to "what now?" are values:
`Dispatch` (run this), `WaitUntil` (ask again then) or `Idle` (ask again when something arrives). Each carries the
requests refused in the same step, so that nothing is lost between two questions.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from service.batch import CloseReason

if TYPE_CHECKING:
    from service.scheduler.lane import Lane
    from service.scheduler.queue import ModelQueue


@dataclass(frozen=True, slots=True)
class Slot:
    """One run slot of a device: at most one batch executes in it, and one more may be staged behind it."""

    device: str
    index: int


class RequestState(enum.IntEnum):
    """Where a request is in its life. A request is in exactly one of them and never goes back."""

    NEW = 0  # not yet given to a scheduler
    QUEUED = 1  # waiting; can be cancelled
    RUNNING = 2  # all of its rows have been dispatched
    GONE = 3  # refused, cancelled, or handed back by `remove_queue`


# Reading a member through its class costs as much as a small function call in Python 3.11; these are read per request.
NEW, QUEUED, RUNNING, GONE = RequestState


class QueuedRequest:
    """A request as the scheduler sees it. Created by the front end for each call, so it is a plain slotted class.

    `rows` >= 1 (first dimension); `arrival_ns` and `deadline_ns` on the monotonic clock (`NEVER_NS` = no deadline);
    `priority` 1 is the highest; requests share a batch only when their `shape` is equal (trailing dimensions and side
    inputs); `cost` is the number of elements per row, from which the latency of a shape never profiled is guessed;
    `payload` is the caller's and never looked at.

    Read-only for callers: `state`, `demoted` (past its deadline, kept as best effort) and `dispatched_rows` (rows
    already handed out, when the request is larger than a batch).
    """

    __slots__ = (
        "arrival_ns",
        "cost",
        "deadline_ns",
        "demoted",
        "dispatched_rows",
        "lane",
        "payload",
        "priority",
        "rows",
        "shape",
        "state",
    )

    def __init__(
        self,
        rows: int,
        arrival_ns: int,
        deadline_ns: int,
        priority: int = 1,
        shape: Hashable = (),
        cost: int = 1,
        payload: Any = None,
    ) -> None:
        self.rows = rows
        self.arrival_ns = arrival_ns
        self.deadline_ns = deadline_ns
        self.priority = priority
        self.shape = shape
        self.cost = cost
        self.payload = payload
        self.state: RequestState = NEW
        self.demoted = False
        self.dispatched_rows = 0
        self.lane: Lane | None = None

    def __repr__(self) -> str:
        return (
            f"QueuedRequest(rows={self.rows}, arrival_ns={self.arrival_ns}, deadline_ns={self.deadline_ns}, "
            f"priority={self.priority}, shape={self.shape!r}, state={self.state.name})"
        )


class RefusalReason(enum.Enum):
    """Why a request was refused. The front end maps UNREACHABLE and EXPIRED to DEADLINE_EXCEEDED, the others to
    UNAVAILABLE with a pushback."""

    UNREACHABLE = "unreachable"  # could not be met by an idle device either: trying again is useless
    OVERLOADED = "overloaded"  # doomed behind what is queued and running: another replica may answer
    QUEUE_FULL = "queue_full"  # a bound of the queue is reached
    EXPIRED = "expired"  # its deadline passed while it was queued


@dataclass(slots=True)
class Refusal:
    """A request that will not be run (any further). `predicted_wait_ns` is the time until its answer could have been
    ready, had it been kept; `retry_after_ns` when another try may succeed (0 = do not try again)."""

    request: QueuedRequest
    reason: RefusalReason
    predicted_wait_ns: int
    retry_after_ns: int


@dataclass(slots=True)
class Segment:
    """Rows `first_row` .. `first_row + rows` of a request. The whole request, unless it is larger than a batch."""

    request: QueuedRequest
    first_row: int
    rows: int


@dataclass(slots=True, eq=False)
class Dispatch:
    """Run these rows on `slot`, padded up to `bucket`, now (or right behind the batch the slot is running).

    `expected_ns` is the predicted duration, `slack_ns` what the earliest deadline in the batch has left beyond it
    (`NEVER_NS` when there is none). Whoever executes it calls `Scheduler.completed` exactly once, whatever happens.
    """

    queue: ModelQueue
    slot: Slot
    segments: list[Segment]
    rows: int
    bucket: int
    expected_ns: int
    reason: CloseReason
    slack_ns: int
    dispatched_ns: int
    refused: Sequence[Refusal]
    start_ns: int = 0  # when the slot is predicted to start it
    probe: bool = False  # run to find out whether the model is still as slow as believed
    # Who answers: whoever runs the batch, or whoever gave it up because it hangs. Set under a lock of theirs.
    answering: bool = False
    abandoned: bool = False

    def late_rows(self, done_ns: int) -> int:
        """Rows answered after their deadline at `done_ns`; best-effort rows, which were late already, do not count."""
        return sum(
            segment.rows
            for segment in self.segments
            if segment.request.deadline_ns < done_ns and not segment.request.demoted
        )


@dataclass(slots=True)
class WaitUntil:
    """Nothing to run before `at_ns`; an arrival may change that sooner."""

    at_ns: int
    refused: Sequence[Refusal] = field(default=())


@dataclass(slots=True)
class Idle:
    """Nothing to run until something arrives or completes."""

    refused: Sequence[Refusal] = field(default=())
