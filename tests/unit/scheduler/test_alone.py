"""Models whose requests must not share a batch: each is one execution with all of its rows."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.batch import CloseReason
from service.clock import NEVER_NS
from service.scheduler import Dispatch, LatencyModel, QueuedRequest, QueuePolicy, Scheduler, Slot

SLOT = Slot("d", 0)


def drain(scheduler: Scheduler, now_ns: int) -> list[Dispatch]:
    """Run everything there is, each batch in a microsecond."""
    done = []
    while isinstance(step := scheduler.next_step(SLOT, now_ns), Dispatch):
        assert step.segments
        done.append(step)
        now_ns += 1000
        scheduler.completed(step, now_ns, 1000)
    return done


@pytest.mark.parametrize("options", [{}, {"slo_ns": 10**9}, {"late_policy": "best_effort"}])
def test_each_request_is_a_batch_with_all_its_rows(options: dict[str, Any]) -> None:
    """Whatever waits beside it."""
    scheduler = Scheduler([SLOT])
    policy = QueuePolicy("m", ("d",), 8, joins=False, **options)
    queue = scheduler.add_queue(policy, LatencyModel({}, policy.buckets))
    sent = [
        QueuedRequest(rows, index, 10**9 if "slo_ns" in options else NEVER_NS)
        for index, rows in enumerate((3, 1, 1, 8, 3, 2, 1))
    ]
    for request in sent:
        assert scheduler.enqueue(queue, request, request.arrival_ns) == ()
    dispatches = drain(scheduler, 10)
    assert [len(d.segments) for d in dispatches] == [1] * 7
    assert {id(d.segments[0].request) for d in dispatches} == {id(request) for request in sent}
    assert all(d.rows == d.segments[0].request.rows == d.bucket for d in dispatches)
    assert {d.reason for d in dispatches} == {CloseReason.UNBATCHED}


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 6), st.sampled_from([2, 50, 2000, None]), st.integers(1, 2), st.integers(0, 1)),
        min_size=1,
        max_size=20,
    ),
    known=st.booleans(),
    best_effort=st.booleans(),
)
def test_no_two_requests_ever_share_a_batch(
    requests: list[tuple[int, int | None, int, int]], known: bool, best_effort: bool
) -> None:
    """Any rows, budgets (microseconds), priorities and shapes, known latencies or not, kept when late or not."""
    scheduler = Scheduler([SLOT])
    policy = QueuePolicy(
        "m",
        ("d",),
        6,
        joins=False,
        slo_ns=2_000_000,
        priority_levels=2,
        late_policy="best_effort" if best_effort else "shed",
    )
    table = {shape: {rows: 1000.0 * rows for rows in policy.buckets} for shape in range(2)} if known else {}
    queue = scheduler.add_queue(policy, LatencyModel(table, policy.buckets))
    for index, (rows, budget_us, priority, shape) in enumerate(requests):
        deadline_ns = NEVER_NS if budget_us is None else index + 1000 * budget_us
        scheduler.enqueue(queue, QueuedRequest(rows, index, deadline_ns, priority, shape), index)
    for dispatch in drain(scheduler, len(requests)):
        (segment,) = dispatch.segments
        assert (segment.first_row, segment.rows) == (0, segment.request.rows)
    assert (queue.pending_requests, queue.pending_rows) == (0, 0)
