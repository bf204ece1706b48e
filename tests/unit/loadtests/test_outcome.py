"""One outcome for each request."""

from __future__ import annotations

import numpy as np
import pytest

from loadtests.outcome import (
    CANCELLED_BY_PLAN,
    CLIENT_DEADLINE,
    CONNECTION_LOST,
    NOT_SENT,
    UNFINISHED,
    Outcome,
    classify,
    status_name,
)
from tests.unit.loadtests.runs import MS, records

SLO = 50 * MS


@pytest.mark.parametrize(
    ("status", "latency_ms", "outcome"),
    [
        (0, 10, Outcome.IN_SLO),
        (0, 50, Outcome.IN_SLO),
        (0, 50.001, Outcome.LATE),
        (14, 1, Outcome.REFUSED_ON_ARRIVAL),
        (8, 10, Outcome.REFUSED_ON_ARRIVAL),
        (14, 10.1, Outcome.REFUSED_IN_QUEUE),
        (4, 30, Outcome.EXPIRED),
        (CLIENT_DEADLINE, 30, Outcome.EXPIRED),
        (CANCELLED_BY_PLAN, 5, Outcome.CANCELLED),
        (1, 5, Outcome.ERROR),
        (13, 5, Outcome.ERROR),
        (CONNECTION_LOST, 5, Outcome.ERROR),
        (UNFINISHED, -1, Outcome.ERROR),
        (NOT_SENT, -1, Outcome.ERROR),
        (99, 5, Outcome.ERROR),
    ],
)
def test_each_ending(status: int, latency_ms: float, outcome: Outcome) -> None:
    """By status and by when it came."""
    made = records([(1.0, status, latency_ms)])
    assert classify(made, np.array([SLO])).tolist() == [outcome]


def test_latency_counts_from_the_intended_time() -> None:
    """A request that the client sent 45 ms late and that took 10 ms is late, not in time."""
    made = records([(1.0, 0, 55.0)])
    made["sent_ns"] += 45 * MS
    assert classify(made, np.array([SLO])).tolist() == [Outcome.LATE]


def test_a_refusal_counts_from_when_it_was_sent() -> None:
    """The client's own lag does not make a refusal a late one."""
    made = records([(1.0, 14, 46.0)])
    made["sent_ns"] += 45 * MS
    assert classify(made, np.array([SLO])).tolist() == [Outcome.REFUSED_ON_ARRIVAL]


def test_without_an_objective_every_answer_is_in_time() -> None:
    """However long it took."""
    assert classify(records([(1.0, 0, 1e6)]), np.array([0])).tolist() == [Outcome.IN_SLO]


def test_names() -> None:
    """Of gRPC, of the client, and of what does not exist."""
    assert [status_name(s) for s in (0, 14, -1, 42, -42)] == [
        "OK",
        "UNAVAILABLE",
        "connection_lost",
        "status_42",
        "client_-42",
    ]
    assert Outcome.IN_SLO.title == "in SLO"
    assert Outcome.REFUSED_IN_QUEUE.title == "refused in queue"
