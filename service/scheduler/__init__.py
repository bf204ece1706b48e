"""Decides what runs when: which requests share a batch, on which slot, and who is refused.

A value machine that is told the time: no threads, no clock, no I/O, no logging, standard library only. The same object
runs in the server, in the simulator and in the property tests. The contract in words: docs/batching.md.
"""

from service.batch import CloseReason
from service.scheduler.latency import LatencyModel
from service.scheduler.policy import PriorityPolicy, QueuePolicy, bucket_ladder
from service.scheduler.queue import ModelQueue
from service.scheduler.scheduler import Scheduler
from service.scheduler.sequences import LiveSequence, Next, SequenceTable, Step, Verdict
from service.scheduler.types import (
    Dispatch,
    Idle,
    QueuedRequest,
    Refusal,
    RefusalReason,
    RequestState,
    Segment,
    Slot,
    WaitUntil,
)

__all__ = [
    "CloseReason",
    "Dispatch",
    "Idle",
    "LatencyModel",
    "LiveSequence",
    "ModelQueue",
    "Next",
    "PriorityPolicy",
    "QueuePolicy",
    "QueuedRequest",
    "Refusal",
    "RefusalReason",
    "RequestState",
    "Scheduler",
    "Segment",
    "SequenceTable",
    "Slot",
    "Step",
    "Verdict",
    "WaitUntil",
    "bucket_ladder",
]
