"""Several slots, several models and several devices; slots that are overdue."""

from __future__ import annotations

import pytest

from service.scheduler import Idle, RefusalReason, Slot, WaitUntil
from tests.unit.scheduler.support import World, ms, reasons, taken


def test_least_laxity_across_models() -> None:
    """Of several models the one whose oldest request must start soonest gets the slot."""
    world = World()
    slow = world.model("slow", setup=30.0, slo=40.0)
    quick = world.model("quick", slo=25.0)
    world.fill(quick, [0])
    world.fill(slow, [0])

    assert world.run(0).queue is slow  # must start by 9, the other by 20


def test_no_objective_comes_after_objectives() -> None:
    """A model without an objective runs when it takes nothing from those with one, and does not starve."""
    world = World()
    eager = world.model("eager", setup=20.0, slo=None, max_queue_ns=ms(100))
    tight = world.model("tight", slo=20.0)
    world.fill(eager, [0])
    ran = []
    for at in range(0, 400, 10):
        world.fill(tight, [at])
        batch = world.run(at)
        ran.append(batch.queue)
        world.done(batch, at + 5)
        world.fill(eager, [at])

    share = ran.count(eager) / len(ran)
    assert ran[0] is tight
    assert 0.02 < share < 0.2


def test_no_objective_runs_in_the_slack() -> None:
    """A short batch without deadline that has waited long goes before one that has time."""
    world = World()
    eager = world.model("eager", setup=1.0, slo=None, max_queue_ns=ms(50))
    calm = world.model("calm", slo=200.0)
    world.fill(eager, [0])
    world.fill(calm, [60])

    assert world.run(60).queue is eager


def test_a_higher_priority_without_deadline_is_not_overtaken() -> None:
    """Nothing says how long a request without a deadline may wait for a lower priority, so it does not."""
    world = World()
    high = world.model("high", slo=None)
    low = world.model("low", slo=20.0)
    world.fill(high, [0], priority=1)
    world.fill(low, [0], priority=2)

    assert world.run(0).queue is high


def test_instance_count_bounds_what_runs_at_once() -> None:
    """A model runs at most `max_concurrent` batches per device; other models may use the other slots."""
    world = World(slots=2)
    one, two = world.model("one"), world.model("two")
    first, second = world.slots
    world.fill(one, [0])
    batch = world.run(0, first)
    world.fill(one, [1])

    assert isinstance(world.scheduler.next_step(second, ms(1)), Idle)
    assert world.scheduler.idle_slot(one) is None
    world.fill(two, [1])
    assert world.scheduler.idle_slot(two) == second
    assert world.run(1, second).queue is two
    world.done(batch, 5)
    assert world.run(5, first).queue is one


def test_refusals_of_a_limited_model_look_at_its_own_batch() -> None:
    """A model at its instance count is predicted free when its own batch ends, not when another slot is."""
    world = World(slots=2)
    queue = world.model(setup=10.0, slo=19.0)
    world.fill(queue, [0])
    world.run(0, world.slots[0])  # ends at 11
    world.fill(queue, [0.5])  # deadline 19.5, at 11: 8.5 ms, less than one row takes
    _, refused = world.put(queue, 6)  # deadline 25: 14 ms, two rows would take 12

    assert reasons(refused) == [RefusalReason.OVERLOADED]


def test_a_spare_slot_is_woken_for_what_is_left() -> None:
    """After a dispatch that left requests behind, a sleeping slot is named; otherwise none."""
    world = World(slots=2)
    queue = world.model(rows=2, max_concurrent=2, slo=100.0)
    for slot in world.slots:
        world.scheduler.next_step(slot, 0)
    world.fill(queue, [0] * 3)
    assert world.scheduler.idle_slot(queue) == world.slots[0]

    world.run(0, world.slots[0])
    assert world.scheduler.spare_slot("d") == world.slots[1]
    world.run(0, world.slots[1])
    assert world.scheduler.spare_slot("d") is None


def test_no_spare_slot_for_a_model_at_its_instance_count() -> None:
    """A sleeping slot is not woken for a model that may not run more."""
    world = World(slots=2)
    queue = world.model(rows=2, slo=100.0)
    for slot in world.slots:
        world.scheduler.next_step(slot, 0)
    world.fill(queue, [0] * 3)
    world.run(0, world.slots[0])

    assert world.scheduler.spare_slot("d") is None


def test_a_model_on_two_devices_uses_both() -> None:
    """Requests of a model loaded on two devices go to whichever has a free slot."""
    world = World(devices=("a", "b"))
    queue = world.model(devices=("a", "b"))
    for slot in world.slots:
        world.scheduler.next_step(slot, 0)
    assert world.scheduler.idle_slot(queue) == Slot("a", 0)
    world.fill(queue, [0])
    world.run(0, world.slots[0])
    world.fill(queue, [0])

    assert world.scheduler.idle_slot(queue) == Slot("b", 0)
    assert world.run(0, world.slots[1]).rows == 1
    assert sum(queue.running.values()) == 2


def test_a_waiting_model_lets_others_run() -> None:
    """While one model waits for company another runs, if it ends before the wait does."""
    world = World()
    waiting = world.model("waiting", slo=None, max_queue_delay_ns=ms(60))
    short, long = world.model("short", setup=2.0, slo=None), world.model("long", setup=30.0, slo=None)
    world.fill(waiting, [0])
    world.fill(short, [0])
    batch = world.run(0)
    assert batch.queue is short
    world.done(batch, 3)
    world.fill(long, [40])

    step = world.scheduler.next_step(world.slot, ms(40))

    assert step == WaitUntil(ms(60), [])


def test_an_overdue_slot_is_expected_a_little_later() -> None:
    """A batch past its predicted end is expected as much later as it is overdue, at most a quarter of its time."""
    world = World()
    queue = world.model()
    world.fill(queue, [0] * 4)
    world.run(0)  # expected at 8

    assert world.scheduler.free_ns("d", ms(4)) == pytest.approx(ms(8), abs=2)
    assert world.scheduler.free_ns("d", ms(8.5)) == pytest.approx(ms(9), abs=2)
    assert world.scheduler.free_ns("d", ms(30)) == pytest.approx(ms(32), abs=2)


def test_a_stalled_slot_is_named_and_not_counted_on() -> None:
    """After three times the expected time, and 100 ms at least, a slot is stalled."""
    world = World(slots=2)
    queue = world.model(setup=46.0, slo=500.0, max_concurrent=2)
    world.fill(queue, [0] * 4)
    world.run(0, world.slots[0])
    world.fill(queue, [140])
    world.run(140, world.slots[1])

    assert world.scheduler.stalled(ms(149)) == []
    assert world.scheduler.stalled(ms(151)) == [world.slots[0]]
    assert world.scheduler.free_ns("d", ms(151)) == pytest.approx(ms(187), abs=2)


def test_a_first_run_may_take_long() -> None:
    """Without an expectation a slot is not called stalled for a minute: the device may be compiling."""
    world = World()
    queue = world.model(known=False)
    world.fill(queue, [0])
    world.run(0)

    assert world.scheduler.stalled(ms(30_000)) == []
    assert world.scheduler.stalled(ms(61_000)) == [world.slot]
    assert World().scheduler.stalled(0) == []


def test_failed_batches_teach_nothing() -> None:
    """A failed batch frees its slot and leaves the latency model as it was."""
    world = World()
    queue = world.model()
    world.fill(queue, [0])
    batch = world.run(0)
    before = queue.latency.factor
    world.scheduler.completed(batch, ms(300), None)

    assert queue.latency.factor == before
    assert queue.failed_batches == 1
    assert world.scheduler.free_ns("d", ms(300)) == ms(300)


def test_late_rows_are_counted() -> None:
    """A batch says how many of its rows were late, and the queue adds them up."""
    world = World()
    queue = world.model()
    world.fill(queue, [0] * 3, rows=2)
    batch = world.run(0)

    assert batch.late_rows(ms(20)) == 0
    assert batch.late_rows(ms(21)) == 6
    world.scheduler.completed(batch, ms(21), ms(21), batch.late_rows(ms(21)))
    assert queue.late_rows == 6


def test_many_idle_models_cost_nothing() -> None:
    """With a thousand models on a device only those with work are looked at."""
    world = World()
    queues = [world.model(f"m{number}") for number in range(1000)]
    requests = world.fill(queues[500], [0])

    assert len(world.scheduler._devices["d"].active) == 1
    assert taken(world.run(0)) == requests
    assert not world.scheduler._devices["d"].active


def test_empty_lanes_are_bounded() -> None:
    """Clients choose shapes and deadlines: lanes without requests are forgotten beyond a small number."""
    world = World()
    queue = world.model(slo=500.0)
    for size in range(200):
        world.fill(queue, [0], shape=(size,))
        world.done(world.run(0), 1)

    assert len(queue._lanes) <= 17
