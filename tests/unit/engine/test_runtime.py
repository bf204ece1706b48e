"""The workers: what wakes them, how long they sleep, what they deliver, how they end. Real threads, puppet models."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from service.clock import NEVER_NS, NS_PER_MS, now_ns
from service.engine.devices import Device
from service.engine.runtime import Runtime
from service.errors import DeviceFailed
from service.scheduler import (
    Dispatch,
    LatencyModel,
    ModelQueue,
    QueuedRequest,
    QueuePolicy,
    Refusal,
    RefusalReason,
    Scheduler,
    Slot,
)
from tests.unit.engine.support import ANSWER_S


class Puppet:
    """An executor that takes what it is given, and runs when told (`gate`). `taken` is in the order of execution."""

    def __init__(self, hold: bool = False) -> None:
        self.gate = threading.Event()
        if not hold:
            self.gate.set()
        self.taken: list[Dispatch] = []
        self.ended: list[Dispatch] = []
        self.refused: list[Refusal] = []
        self.abandoned: list[tuple[Dispatch, DeviceFailed]] = []
        self._changed = threading.Condition()

    def execute(self, dispatch: Dispatch) -> tuple[int | None, int]:
        with self._changed:
            self.taken.append(dispatch)
            self._changed.notify_all()
        assert self.gate.wait(ANSWER_S)
        with self._changed:
            self.ended.append(dispatch)
            self._changed.notify_all()
        return now_ns() - dispatch.dispatched_ns, 0

    def abandon(self, dispatch: Dispatch, error: DeviceFailed) -> None:
        with self._changed:
            self.abandoned.append((dispatch, error))
            self._changed.notify_all()

    def refuse_all(self, refusals: Sequence[Refusal]) -> None:
        with self._changed:
            self.refused += refusals
            self._changed.notify_all()

    def wait(self, what: str, count: int, timeout_s: float = ANSWER_S) -> bool:
        """Until the list `what` is `count` long; False when it is not in time."""
        with self._changed:
            return self._changed.wait_for(lambda: len(getattr(self, what)) >= count, timeout_s)


class CountingScheduler(Scheduler):
    """Counts how often workers ask."""

    steps = 0

    def next_step(self, slot: Slot, now_ns: int) -> Any:
        self.steps += 1
        return super().next_step(slot, now_ns)


@pytest.fixture
def make() -> Iterator[Any]:
    """Makes runtimes that are stopped when the test is over."""
    made: list[Runtime] = []

    def build(slots: int = 1) -> Runtime:
        device = Device("cpu", "cpu", 0, slots)
        runtime = Runtime([device])
        runtime._scheduler = CountingScheduler([Slot("cpu", index) for index in range(slots)])
        made.append(runtime)
        return runtime

    yield build
    for runtime in made:
        runtime.stop(ANSWER_S)


def queue_of(runtime: Runtime, name: str = "m", max_batch_rows: int = 8, **policy: Any) -> ModelQueue:
    made = QueuePolicy(name, ("cpu",), max_batch_rows, max_concurrent=8, **policy)
    return runtime.add(made, LatencyModel({}, made.buckets))


def send(runtime: Runtime, queue: ModelQueue, puppet: Puppet, deadline_ns: int = NEVER_NS) -> QueuedRequest:
    now = now_ns()
    request = QueuedRequest(1, now, deadline_ns, payload=puppet)
    assert runtime.enqueue(queue, request, now) == ()
    return request


def until_asleep(runtime: Runtime) -> None:
    """Until every worker sleeps. Fails the test when that takes too long."""
    pause = threading.Event()
    for _ in range(int(ANSWER_S * 1000)):
        with runtime._lock:
            if all(worker.sleeping for worker in runtime._workers.values()):
                return
        pause.wait(0.001)
    raise AssertionError("the workers do not come to rest")


def test_an_arrival_wakes_a_sleeping_worker(make: Any) -> None:
    """Long before the worker would have looked again by itself."""
    runtime, puppet = make(), Puppet()
    queue = queue_of(runtime)
    runtime.start()
    for count in range(1, 6):
        until_asleep(runtime)
        send(runtime, queue, puppet)
        assert puppet.wait("ended", count)
    assert [dispatch.rows for dispatch in puppet.ended] == [1] * 5


def test_what_waited_before_the_start_is_run(make: Any) -> None:
    """Requests queued before there are workers ride together."""
    runtime, puppet = make(), Puppet()
    queue = queue_of(runtime)
    for _ in range(5):
        send(runtime, queue, puppet)
    runtime.start()
    assert puppet.wait("ended", 1)
    assert [dispatch.rows for dispatch in puppet.ended] == [5]
    assert runtime.idle(queue) or puppet.wait("ended", 1)


def test_a_worker_sleeps_until_it_was_told_real_clock(make: Any) -> None:
    """Waiting for company for 40 ms costs a handful of questions, and the batch leaves when the wait is over."""
    runtime, puppet = make(), Puppet()
    queue = queue_of(runtime, max_queue_delay_ns=40 * NS_PER_MS)
    runtime.start()
    until_asleep(runtime)
    asked = runtime._scheduler.steps
    first = send(runtime, queue, puppet)
    send(runtime, queue, puppet)
    assert puppet.wait("ended", 1)
    (dispatch,) = puppet.ended
    assert dispatch.rows == 2
    assert dispatch.dispatched_ns >= first.arrival_ns + 40 * NS_PER_MS
    assert runtime._scheduler.steps - asked <= 8


def test_an_idle_runtime_does_nothing_real_clock(make: Any) -> None:
    """No polling: workers that sleep ask nothing."""
    runtime, puppet = make(3), Puppet()
    queue = queue_of(runtime)
    runtime.start()
    send(runtime, queue, puppet)
    assert puppet.wait("ended", 1)
    until_asleep(runtime)
    asked = runtime._scheduler.steps
    threading.Event().wait(0.1)
    assert runtime._scheduler.steps == asked


def test_each_request_costs_a_few_questions(make: Any) -> None:
    """One to dispatch, one to find nothing more: not a loop."""
    runtime, puppet = make(), Puppet()
    queue = queue_of(runtime)
    runtime.start()
    until_asleep(runtime)
    asked = runtime._scheduler.steps
    for count in range(1, 21):
        send(runtime, queue, puppet)
        assert puppet.wait("ended", count)
        until_asleep(runtime)
    assert runtime._scheduler.steps - asked <= 2 * 20 + 5


def test_one_slot_serves_many_models(make: Any) -> None:
    """Thousands of models need no more threads than the device has slots."""
    runtime = make()
    puppets = [Puppet() for _ in range(50)]
    queues = [queue_of(runtime, f"m{index}") for index in range(50)]
    before = threading.active_count()
    runtime.start()
    assert threading.active_count() == before + 2  # the slot's worker, and the watchdog
    for queue, puppet in zip(queues, puppets, strict=True):
        send(runtime, queue, puppet)
    for puppet in puppets:
        assert puppet.wait("ended", 1)


def test_batches_run_side_by_side_on_several_slots(make: Any) -> None:
    """A second arrival does not wait for the batch of the first when another slot is free."""
    runtime = make(2)
    puppets = [Puppet(hold=True), Puppet(hold=True)]
    queues = [queue_of(runtime, "a"), queue_of(runtime, "b")]
    runtime.start()
    for queue, puppet in zip(queues, puppets, strict=True):
        until_one_sleeps(runtime)
        send(runtime, queue, puppet)
        assert puppet.wait("taken", 1)
    for puppet in puppets:
        puppet.gate.set()


def until_one_sleeps(runtime: Runtime) -> None:
    pause = threading.Event()
    for _ in range(int(ANSWER_S * 1000)):
        with runtime._lock:
            if any(worker.sleeping for worker in runtime._workers.values()):
                return
        pause.wait(0.001)
    raise AssertionError("no worker comes to rest")


def test_work_left_behind_wakes_another_worker(make: Any) -> None:
    """Two arrivals, one wake-up (the second came before the woken worker had asked): both run at once."""
    runtime = make(2)
    puppets = [Puppet(hold=True), Puppet(hold=True)]
    queues = [queue_of(runtime, "a"), queue_of(runtime, "b")]
    runtime.start()
    until_asleep(runtime)
    now = now_ns()
    with runtime._lock:
        for queue, puppet in zip(queues, puppets, strict=True):
            runtime._scheduler.enqueue(queue, QueuedRequest(1, now, NEVER_NS, payload=puppet), now)
        runtime._wake(runtime._workers[Slot("cpu", 0)])
    try:
        assert [puppet.wait("taken", 1, 5.0) for puppet in puppets] == [True, True]
    finally:
        for puppet in puppets:
            puppet.gate.set()


def test_refusals_of_a_step_are_delivered_real_clock(make: Any) -> None:
    """A request whose deadline passes behind a long batch is refused by the worker that finds it."""
    runtime, puppet = make(), Puppet(hold=True)
    queue = queue_of(runtime, max_batch_rows=1)
    runtime.start()
    send(runtime, queue, puppet)
    assert puppet.wait("taken", 1)
    deadline_ns = now_ns() + 20 * NS_PER_MS
    doomed = send(runtime, queue, puppet, deadline_ns)
    while now_ns() < deadline_ns:
        threading.Event().wait(0.005)
    kept = send(runtime, queue, puppet)
    puppet.gate.set()
    assert puppet.wait("refused", 1)
    assert [(r.request, r.reason) for r in puppet.refused] == [(doomed, RefusalReason.EXPIRED)]
    assert puppet.wait("ended", 2)
    assert [d.segments[0].request for d in puppet.ended][1] is kept


def test_refusals_on_arrival_are_the_callers(make: Any) -> None:
    """What an arrival brings about is returned to it, without a worker."""
    runtime, puppet = make(), Puppet()
    queue = queue_of(runtime, max_queue_rows=1)
    send(runtime, queue, puppet)
    now = now_ns()
    request = QueuedRequest(1, now, NEVER_NS, payload=puppet)
    refused = runtime.enqueue(queue, request, now)
    assert refused is not None
    assert [(r.request, r.reason) for r in refused] == [(request, RefusalReason.QUEUE_FULL)]


def test_stop_ends_the_workers_after_their_batches(make: Any) -> None:
    """Sleeping workers at once, a running one when its batch is done; a second stop changes nothing."""
    runtime, puppet = make(2), Puppet(hold=True)
    queue = queue_of(runtime)
    runtime.start()
    send(runtime, queue, puppet)
    assert puppet.wait("taken", 1)
    assert not runtime.stop(0.05)
    assert not puppet.ended
    puppet.gate.set()
    assert runtime.stop(ANSWER_S)
    assert len(puppet.ended) == 1
    assert not any(worker.thread.is_alive() for worker in runtime._workers.values())
    assert runtime.stop(ANSWER_S)


def test_a_removed_queue_takes_nothing(make: Any) -> None:
    """Whoever was waiting is handed back; whoever comes later is told that the queue is gone."""
    runtime, puppet = make(), Puppet()
    queue = queue_of(runtime)
    waiting = send(runtime, queue, puppet)
    assert runtime.remove(queue) == [waiting]
    now = now_ns()
    assert runtime.enqueue(queue, QueuedRequest(1, now, NEVER_NS, payload=puppet), now) is None
    runtime.start()
    until_asleep(runtime)
    assert not puppet.taken


def test_a_cancelled_request_is_not_run(make: Any) -> None:
    """Queued: it leaves. Running: too late."""
    runtime, puppet = make(), Puppet(hold=True)
    queue = queue_of(runtime, max_batch_rows=1)
    runtime.start()
    running = send(runtime, queue, puppet)
    assert puppet.wait("taken", 1)
    waiting = send(runtime, queue, puppet)
    assert runtime.cancel(waiting)
    assert not runtime.cancel(waiting)
    assert not runtime.cancel(running)
    assert not runtime.idle(queue)
    puppet.gate.set()
    assert puppet.wait("ended", 1)
    until_asleep(runtime)
    assert runtime.idle(queue)
    assert len(puppet.taken) == 1


def test_a_failed_batch_frees_its_slot(make: Any) -> None:
    """Duration None: nothing is learned, and the next batch runs."""
    runtime = make()

    class Failing(Puppet):
        def execute(self, dispatch: Dispatch) -> tuple[int | None, int]:
            super().execute(dispatch)
            return None, 0

    puppet = Failing()
    queue = queue_of(runtime, max_batch_rows=1)
    runtime.start()
    for count in (1, 2):
        send(runtime, queue, puppet)
        assert puppet.wait("ended", count)
    until_asleep(runtime)
    assert queue.failed_batches == 2


def test_a_batch_that_hangs_fails_its_device() -> None:
    """Its executor is told to give it up, the owner that the device has failed, each once; nothing more is run."""
    failed: list[tuple[str, str]] = []
    runtime = Runtime([Device("cpu", "cpu", 0, 1)], lambda *facts: failed.append(facts), hung_ns=50 * NS_PER_MS)
    queue, puppet = queue_of(runtime), Puppet(hold=True)
    runtime.start()
    try:
        send(runtime, queue, puppet)
        assert puppet.wait("abandoned", 1)
        waiting = send(runtime, queue, puppet)
        ((dispatch, error),) = puppet.abandoned
        assert dispatch is puppet.taken[0]
        assert "device cpu hangs" in str(error)
        puppet.gate.set()
        assert puppet.wait("ended", 1)
    finally:
        assert runtime.stop(ANSWER_S)
    ((device, reason),) = failed
    assert device == "cpu"
    assert "a batch of 1 rows of model 'm' has run for" in reason
    assert len(puppet.taken) == 1
    assert runtime.remove(queue) == [waiting]


def test_a_device_fails_once_however_often_it_is_said() -> None:
    """Two slots find out: the owner hears it once."""
    failed: list[tuple[str, str]] = []
    runtime = Runtime([Device("cpu", "cpu", 0, 2)], lambda *facts: failed.append(facts))
    runtime.start()
    for _ in range(3):
        runtime.device_failed("cpu", "broken")
    assert runtime.stop(ANSWER_S)
    assert failed == [("cpu", "broken")]
