"""Who is refused, when and why; bounds, best effort, probes, cancellation and removal."""

from __future__ import annotations

import pytest

from service.scheduler import Idle, PriorityPolicy, RefusalReason, RequestState, Slot
from tests.unit.scheduler.support import World, ms, reasons, taken


def test_unreachable_on_arrival() -> None:
    """A deadline that an idle device could not make is refused at once, with no hint to try again."""
    world = World()
    queue = world.model()
    world.fill(queue, [0])
    world.done(world.run(0), 5)

    request, refused = world.put(queue, 6, budget=4)

    assert [(r.request, r.reason, r.retry_after_ns) for r in refused] == [(request, RefusalReason.UNREACHABLE, 0)]
    assert queue.pending_requests == 0


def test_expired_on_arrival() -> None:
    """A deadline that has passed already is called expired."""
    world = World()
    _, refused = world.put(world.model(), 6, budget=-1)

    assert reasons(refused) == [RefusalReason.EXPIRED]


def test_doomed_behind_the_running_batch() -> None:
    """While the device is busy, an arrival that dooms older requests makes them be refused at once."""
    world = World()
    queue = world.model(rows=32, slo=22.0)
    world.fill(queue, [0] * 13)
    world.run(0)  # ends at 17
    (old,) = world.fill(queue, [0.5])  # deadline 22.5: one row, at 17
    world.fill(queue, [10])  # as good alone as the old one, so nobody is refused
    _, refused = world.put(queue, 10)  # deadline 32

    assert [refusal.request for refusal in refused] == [old]
    assert refused[0].reason is RefusalReason.OVERLOADED
    assert refused[0].predicted_wait_ns == pytest.approx(ms(7 + 5), abs=3)
    assert ms(12) <= refused[0].retry_after_ns + 3 <= ms(12 * 1.5) + 3


def test_nobody_is_refused_while_nobody_would_gain() -> None:
    """When nobody queued would make it, they stay until the next decision: the batch may end early."""
    world = World()
    queue = world.model(slo=10.0)
    world.fill(queue, [0] * 6)
    first = world.run(0)  # ends at 10
    (kept,) = world.fill(queue, [4])  # deadline 14, one row takes 5

    world.done(first, 8.9)

    assert taken(world.run(8.9)) == [kept]


def test_retry_hints_are_spread() -> None:
    """Hints differ, so that refused clients do not come back together."""
    world = World()
    queue = world.model(max_queue_rows=1)
    world.fill(queue, [0])
    hints = {world.put(queue, 0)[1][0].retry_after_ns for _ in range(20)}

    assert len(hints) == 20
    assert max(hints) <= 1.5 * min(hints) * 1.05


def test_absolute_bound() -> None:
    """The queue never holds more rows than its absolute bound."""
    world = World()
    queue = world.model(max_queue_rows=3, slo=500.0)
    world.fill(queue, [0] * 3)

    _, refused = world.put(queue, 0)

    assert reasons(refused) == [RefusalReason.QUEUE_FULL]


def test_bound_of_a_priority_level() -> None:
    """`max_queue_size` of a level counts its own requests only."""
    world = World()
    queue = world.model(slo=500.0, priorities={2: PriorityPolicy(max_queue_size=2)})
    world.fill(queue, [0] * 2, priority=2)

    assert reasons(world.put(queue, 0, priority=2)[1]) == [RefusalReason.QUEUE_FULL]
    world.fill(queue, [0] * 3, priority=1)


def test_bound_by_predicted_wait() -> None:
    """Without deadlines a request is refused when those before it are predicted to take longer than `max_queue_ms`."""
    world = World()
    queue = world.model(slo=None, rows=4, setup=0.0, per_row=10.0, max_queue_ns=ms(100))
    accepted = 0
    while not world.put(queue, 0)[1]:
        accepted += 1

    assert accepted == 11  # ten before it take exactly 100 ms
    assert queue.refused[RefusalReason.QUEUE_FULL] == 1


def test_the_newest_is_refused_behind_full_batches() -> None:
    """With two full batches ahead that make it, an arrival they leave no time for is refused itself, and at once."""
    world = World()
    queue = world.model(rows=8, setup=4.0, per_row=1.0, slo=30.0)
    world.fill(queue, [0])
    world.run(0)  # ends at 5; full batches end at 17 and 29
    world.fill(queue, [0] * 16)

    newest, refused = world.put(queue, 0.5)

    assert [refusal.request for refusal in refused] == [newest]
    assert refused[0].reason is RefusalReason.OVERLOADED
    assert queue.pending_rows == 16


def test_shedding_on_a_forecast() -> None:
    """With `shed_eagerness` requests are refused for the arrivals expected to join, sooner than without."""

    def refused_while_busy(eagerness: float) -> int:
        world = World()
        queue = world.model(rows=64, setup=4.0, per_row=0.5, slo=30.0, shed_eagerness=eagerness)
        world.fill(queue, [at / 10 for at in range(10)])
        world.run(1)
        count = 0
        for at in range(40):
            count += len(world.put(queue, 1 + at / 5)[1])
        return count

    assert refused_while_busy(1.0) > refused_while_busy(0.0)


def test_best_effort_is_kept_and_runs_last() -> None:
    """With `late_policy` best_effort a doomed request is kept, and runs when nothing else is there."""
    world = World()
    queue = world.model(late_policy="best_effort")
    (late,) = world.fill(queue, [0])
    on_time = world.fill(queue, [18] * 10)

    first = world.run(18)
    world.done(first, 33)
    second = world.run(33)

    assert taken(first) == on_time
    assert taken(second) == [late]
    assert late.demoted
    assert second.late_rows(ms(40)) == 0
    assert sum(queue.refused.values()) == 0


def test_best_effort_fills_padding() -> None:
    """A best-effort request rides in the padding of a batch that is on time."""
    world = World()
    queue = world.model(rows=8, buckets=(4, 8), late_policy="best_effort")
    (late,) = world.fill(queue, [0])
    world.fill(queue, [19] * 3)

    batch = world.run(19)

    assert late in taken(batch)
    assert (batch.rows, batch.bucket) == (4, 4)
    assert batch.slack_ns > 0


def test_best_effort_does_not_wait_for_ever() -> None:
    """A best-effort request that found no idle slot within `max_queue_ms` is refused."""
    world = World()
    queue = world.model(late_policy="best_effort", max_queue_ns=ms(50))
    (late,) = world.fill(queue, [0])

    step = world.scheduler.next_step(world.slot, ms(100))

    assert isinstance(step, Idle)
    assert [(refusal.request, refusal.reason) for refusal in step.refused] == [(late, RefusalReason.EXPIRED)]
    assert queue.pending_requests == 0


def test_unreachable_is_kept_as_best_effort() -> None:
    """With `late_policy` best_effort even a hopeless deadline is tried."""
    world = World()
    queue = world.model(late_policy="best_effort")
    world.fill(queue, [0])
    world.done(world.run(0), 1)
    request, refused = world.put(queue, 2, budget=1)

    assert refused == []
    assert taken(world.run(2)) == [request]


def test_delay_instead_of_refusal() -> None:
    """Triton's timeout action DELAY keeps requests of that level only."""
    world = World()
    queue = world.model(priorities={2: PriorityPolicy(timeout_action="DELAY")}, rows=1)
    (delayed,) = world.fill(queue, [0], priority=2)
    (refused,) = world.fill(queue, [0], priority=1)

    first = world.run(30)

    assert taken(first) == [delayed]
    assert [refusal.request for refusal in first.refused] == [refused]


def test_a_wrong_belief_is_probed() -> None:
    """When the estimate lets nothing run any more, one request a second runs all the same and replaces it."""
    world = World()
    queue = world.model()
    queue.latency.scale = 50.0
    queue.latency.factor = 50.0
    probe, refused = world.put(queue, 0)
    assert refused == []
    assert reasons(world.put(queue, 1)[1]) == [RefusalReason.UNREACHABLE]

    batch = world.run(1)
    world.scheduler.completed(batch, ms(6), ms(5))

    assert taken(batch) == [probe]
    assert batch.probe
    assert queue.probes == 1
    world.fill(queue, [7])


def test_probes_are_rare() -> None:
    """A deadline that really is unreachable costs one run in a second at most."""
    world = World()
    queue = world.model(setup=30.0, slo=20.0)
    runs = 0
    for at in range(0, 3000, 10):
        world.put(queue, at)
        step = world.scheduler.next_step(world.slot, ms(at))
        if not isinstance(step, Idle):
            runs += 1
            world.scheduler.completed(step, ms(at) + 1, ms(31))  # type: ignore[arg-type]

    assert runs == 3


def test_cancel_takes_a_request_out() -> None:
    """A cancelled request is gone at once, wherever it stands; a running one is not the scheduler's any more."""
    world = World()
    queue = world.model()
    first, second, third = world.fill(queue, [0, 1, 2])

    assert world.scheduler.cancel(second)
    assert not world.scheduler.cancel(second)
    batch = world.run(3)

    assert taken(batch) == [first, third]
    assert not world.scheduler.cancel(first)
    assert (queue.cancelled, queue.pending_requests, queue.pending_rows) == (1, 0, 0)


def test_cancelling_the_last_request_leaves_nothing_to_do() -> None:
    """A queue emptied by cancellation is idle, and works again afterwards."""
    world = World()
    queue = world.model()
    (request,) = world.fill(queue, [0])
    world.scheduler.cancel(request)

    assert isinstance(world.scheduler.next_step(world.slot, ms(1)), Idle)
    again = world.fill(queue, [2])
    assert taken(world.run(2)) == again


def test_a_cancelled_probe_makes_room_for_another() -> None:
    """Cancelling a probe does not end probing."""
    world = World()
    queue = world.model(setup=30.0, slo=20.0)
    probe, _ = world.put(queue, 0)
    world.scheduler.cancel(probe)

    assert world.put(queue, 2000)[1] == []


def test_removal_hands_back_what_waits() -> None:
    """Removing a queue returns its requests; it takes no more, and its running batch ends as usual."""
    world = World()
    queue = world.model(max_concurrent=1)
    world.fill(queue, [0])
    batch = world.run(0)
    waiting = world.fill(queue, [1, 2]) + world.fill(queue, [2], budget=90)

    assert set(world.scheduler.remove_queue(queue)) == set(waiting)
    assert {request.state for request in waiting} == {RequestState.GONE}
    with pytest.raises(ValueError, match="removed"):
        world.put(queue, 3)
    world.done(batch, 5)
    assert isinstance(world.scheduler.next_step(world.slot, ms(5)), Idle)
    assert world.scheduler.idle_slot(queue) is None


def test_a_lowered_cap_is_kept() -> None:
    """After the device ran out of memory the shape is never batched above that size, queued requests included; those
    larger than it are cut into segments."""
    world = World()
    queue = world.model(rows=16, slo=200.0)
    world.fill(queue, [0] * 3)
    (wide,) = world.fill(queue, [0], rows=10)

    world.scheduler.lower_cap(queue, (), 4)

    rows = []
    at = 0.0
    while queue.pending_rows:
        batch = world.run(at)
        rows.append(batch.rows)
        at += 10
        world.done(batch, at)
    assert max(rows) <= 4
    assert sum(rows) == 13
    assert wide.state is RequestState.RUNNING
    assert queue.cap_rows(()) == 4


def test_a_lowered_cap_keeps_best_effort_and_probes() -> None:
    """Lowering the cap keeps demoted requests and the probe where they are."""
    world = World()
    queue = world.model(setup=30.0, slo=20.0, late_policy="best_effort")
    probe, _ = world.put(queue, 0)
    other, _ = world.put(queue, 0)

    world.scheduler.lower_cap(queue, (), 0)

    assert queue.cap_rows(()) == 1
    assert queue.probe is probe
    batch = world.run(1)
    assert taken(batch) == [probe]
    world.done(batch, 20)
    assert taken(world.run(20)) == [other]


def test_devices_must_have_slots() -> None:
    """A model on a device without slots is refused when it is added."""
    with pytest.raises(ValueError, match="'gpu7' has no slots"):
        World().model(devices=("gpu7",))


def test_reprs_help_in_an_incident() -> None:
    """Queue and request say what is in them."""
    world = World()
    queue = world.model()
    (request,) = world.fill(queue, [0])

    assert repr(queue) == "ModelQueue(m: 1 requests, 1 rows waiting, 0 batches running)"
    assert "QUEUED" in repr(request)
    assert Slot("d", 0) == world.slot
