"""What a batch was and how it went: one record per execution, expected beside actual.

The record feeds the latency model, the metrics and the log of incidents. All times are monotonic nanoseconds.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class CloseReason(enum.Enum):
    """Why a batch was closed at its size: the `reason` label of the batch-size metric."""

    DRAINED = "drained"  # it holds everything that was queued
    FULL = "full"  # the largest batch the model runs
    DEADLINE = "deadline"  # one row more would have made its oldest request late
    TRIMMED = "trimmed"  # cut down to a bucket because that costs less per row
    SHAPE = "shape"  # what else was queued has another shape
    QUIET = "quiet"  # waited for company in the blackout regime until a quiet gap or the last moment
    UNBATCHED = "unbatched"  # the model is not batched


@dataclass(slots=True)
class BatchRecord:
    """One execution of a model.

    `rows` were run, padded up to `bucket`; `requests` requests had rows in it. `expected_ns` is what the latency model
    said the time from `dispatched_ns` to `done_ns` would be; `slack_ns` what the earliest deadline had left beyond it.
    Compute input = dispatched to started, infer = started to finished, output = finished to done.
    """

    device: str
    rows: int
    bucket: int
    requests: int
    reason: CloseReason
    dispatched_ns: int
    started_ns: int
    finished_ns: int
    done_ns: int
    expected_ns: int
    slack_ns: int
