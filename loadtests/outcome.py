"""What became of a request: exactly one outcome each, decided from its record alone.

A record's `status` is the gRPC status of the answer (0 to 16), or one of the client's own below zero. An answer's
latency counts from the *intended* send time, so a client or a server that falls behind hides nothing (coordinated
omission).

Refusals (UNAVAILABLE, RESOURCE_EXHAUSTED) are told apart by when they came, since the protocol has no word for it:
within `ARRIVAL_SHARE` of the objective of being sent the request was refused on arrival, later it had been queued
first.
"""

from __future__ import annotations

import enum

import numpy as np
import numpy.typing as npt

OK, CANCELLED, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNAVAILABLE = 0, 1, 4, 8, 14
STATUS_NAMES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
    "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip

# The client's own: the connection broke; no answer within the drain time; the deadline passed and the client gave up;
# cancelled because the scenario says so; never sent, since the client was too far behind.
CONNECTION_LOST, UNFINISHED, CLIENT_DEADLINE, CANCELLED_BY_PLAN, NOT_SENT = -1, -2, -3, -4, -5
CLIENT_NAMES = {
    CONNECTION_LOST: "connection_lost",
    UNFINISHED: "unfinished",
    CLIENT_DEADLINE: "client_deadline",
    CANCELLED_BY_PLAN: "cancelled_by_plan",
    NOT_SENT: "not_sent",
}

ARRIVAL_SHARE = 0.2


class Outcome(enum.IntEnum):
    """The ways a request can end. The numbers are stored in files: never reuse one."""

    IN_SLO = 0
    LATE = 1
    REFUSED_ON_ARRIVAL = 2
    REFUSED_IN_QUEUE = 3
    EXPIRED = 4
    CANCELLED = 5
    ERROR = 6

    @property
    def title(self) -> str:
        """For people: `in SLO`, `refused on arrival`."""
        return "in SLO" if self is Outcome.IN_SLO else self.name.lower().replace("_", " ")


def status_name(status: int) -> str:
    """`UNAVAILABLE` for 14, `connection_lost` for -1, `status_99` for what does not exist."""
    if status < 0:
        return CLIENT_NAMES.get(status, f"client_{status}")
    return STATUS_NAMES[status] if status < len(STATUS_NAMES) else f"status_{status}"


# One row per request. Times are nanoseconds from the start of the run; -1 = it never happened.
RECORD = np.dtype(
    [
        ("index", np.uint32),  # position in the plan, by intended time
        ("worker", np.uint8),
        ("entry", np.uint16),  # which entry of the scenario's load
        ("variant", np.uint16),  # which of its payloads
        ("rows", np.uint16),
        ("priority", np.uint8),  # 0 = none sent
        ("status", np.int16),
        ("deadline_ns", np.int64),  # sent as grpc-timeout; 0 = none
        ("intended_ns", np.int64),
        ("sent_ns", np.int64),
        ("done_ns", np.int64),
        ("sent_bytes", np.uint32),
        ("received_bytes", np.uint32),
    ]
)
Records = npt.NDArray[np.void]
Ints = npt.NDArray[np.int64]


def latency_ns(records: Records) -> Ints:
    """From the intended time to the end; -1 where there was no end."""
    done: Ints = records["done_ns"]
    return np.where(done < 0, -1, done - records["intended_ns"])


def lag_ns(records: Records) -> Ints:
    """How late the client itself was, for what it sent; -1 for what it did not."""
    sent: Ints = records["sent_ns"]
    return np.where(sent < 0, -1, sent - records["intended_ns"])


def classify(records: Records, slo_ns: Ints) -> npt.NDArray[np.int8]:
    """The `Outcome` of each record; `slo_ns` is the objective of each (0 = none: every answer is in time)."""
    status, latency = records["status"], latency_ns(records)
    waited = np.where(records["sent_ns"] < 0, 0, records["done_ns"] - records["sent_ns"])
    refused = (status == UNAVAILABLE) | (status == RESOURCE_EXHAUSTED)
    at_once = waited <= np.where(slo_ns > 0, slo_ns, 50_000_000) * ARRIVAL_SHARE
    result = np.full(len(records), Outcome.ERROR, np.int8)
    result[(status == OK) & ((slo_ns == 0) | (latency <= slo_ns))] = Outcome.IN_SLO
    result[(status == OK) & (slo_ns > 0) & (latency > slo_ns)] = Outcome.LATE
    result[refused & at_once] = Outcome.REFUSED_ON_ARRIVAL
    result[refused & ~at_once] = Outcome.REFUSED_IN_QUEUE
    result[(status == DEADLINE_EXCEEDED) | (status == CLIENT_DEADLINE)] = Outcome.EXPIRED
    result[(status == CANCELLED_BY_PLAN)] = Outcome.CANCELLED
    return result
