"""The queue policy and the bucket ladder."""

from __future__ import annotations

import pytest

from service.clock import NEVER_NS
from service.scheduler import PriorityPolicy, QueuePolicy, bucket_ladder


def test_ladder_to_64() -> None:
    """The x1.25 ladder up to 64 rows has 17 rungs."""
    assert bucket_ladder(64) == (1, 2, 3, 4, 5, 6, 7, 9, 12, 15, 18, 23, 28, 36, 44, 56, 64)


@pytest.mark.parametrize("most", [1, 2, 3, 10, 57, 1000])
def test_ladder_ends_exactly(most: int) -> None:
    """A ladder ascends from 1 and ends at the largest batch, whatever that is."""
    ladder = bucket_ladder(most)

    assert ladder[0] == 1
    assert ladder[-1] == most
    assert list(ladder) == sorted(set(ladder))


@pytest.mark.parametrize(("most", "factor"), [(0, 1.25), (8, 1.0)])
def test_ladder_refuses_nonsense(most: int, factor: float) -> None:
    """A ladder without rungs, or without end, is refused."""
    with pytest.raises(ValueError, match="expected"):
        bucket_ladder(most, factor)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"devices": ()}, "device"),
        ({"max_batch_rows": 0}, "max_batch_rows"),
        ({"buckets": (4, 2, 8)}, "ascend"),
        ({"buckets": (0, 8)}, "ascend"),
        ({"buckets": (1, 4)}, "last bucket"),
        ({"slo_ns": 0}, "slo_ns"),
        ({"max_concurrent": 0}, "max_concurrent"),
        ({"shed_eagerness": 1.5}, "shed_eagerness"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, object], message: str) -> None:
    """A policy that contradicts itself names the model and the field."""
    with pytest.raises(ValueError, match=rf"model 'm'.*{message}"):
        QueuePolicy(**({"name": "m", "devices": ("d",), "max_batch_rows": 8} | fields))


def test_defaults_are_filled_in() -> None:
    """Without buckets every size is one; the absolute bound is 64 batches, at least 4096 rows."""
    policy = QueuePolicy("m", ("d",), 3)

    assert policy.buckets == (1, 2, 3)
    assert policy.max_queue_rows == 4096
    assert QueuePolicy("m", ("d",), 100).max_queue_rows == 6400


@pytest.mark.parametrize(
    ("override", "timeout_ns", "client_ns", "expected"),
    [
        (True, 0, NEVER_NS, 150),  # the level's timeout
        (True, 20, NEVER_NS, 120),  # shortened by the request
        (True, 900, NEVER_NS, 150),  # which cannot lengthen it
        (False, 20, NEVER_NS, 150),  # or shorten it, where that is not allowed
        (True, 0, 130, 130),  # the client's own deadline is sooner
    ],
)
def test_one_deadline(override: bool, timeout_ns: int, client_ns: int, expected: int) -> None:
    """The soonest of objective, timeout of the level, timeout of the request and client's deadline counts."""
    level = PriorityPolicy(default_timeout_ns=50, allow_timeout_override=override)
    policy = QueuePolicy("m", ("d",), 8, slo_ns=60, priorities={1: level})

    assert policy.deadline_ns(100, None, timeout_ns, client_ns) == expected


def test_objective_is_the_deadline() -> None:
    """With nothing else stated the objective counts from the arrival; with nothing at all there is no deadline."""
    assert QueuePolicy("m", ("d",), 8, slo_ns=60).deadline_ns(100) == 160
    assert QueuePolicy("m", ("d",), 8).deadline_ns(100) == NEVER_NS
