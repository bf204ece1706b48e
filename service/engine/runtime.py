"""The threads that run batches: one per run slot of a device, shared by all models on it.

A worker asks the scheduler for the next step, executes it, and asks again. Decisions are made under one lock,
everything else (merging, running, answering, logging) outside it. An arrival that may change what a sleeping worker is
waiting for wakes it. Thousands of models need no more threads than their devices have slots.

A device that has failed runs nothing more: its workers end, and whoever owns the runtime is told once. A batch that
hangs counts as a failed device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from service.clock import NS_PER_S, now_ns
from service.engine.devices import Device
from service.engine.watchdog import Running, Watchdog
from service.errors import DeviceFailed
from service.scheduler import (
    Dispatch,
    LatencyModel,
    ModelQueue,
    QueuedRequest,
    QueuePolicy,
    Refusal,
    Scheduler,
    Slot,
    WaitUntil,
)

# A worker that finds nothing to wait for looks again after this long: no wait is without a bound.
MAX_SLEEP_S = 60.0
# How long a batch may run before it counts as hanging, where nothing else is said.
HUNG_NS = 120 * NS_PER_S

# Told once per device: its name and what is wrong with it. Called on the thread that found out.
OnFailure = Callable[[str, str], None]


class Executor(Protocol):
    """Runs the batches of one model. None of its methods raises: what goes wrong is answered to the requests."""

    def execute(self, dispatch: Dispatch) -> tuple[int | None, int]:
        """Run a batch and answer its requests; (duration in ns, None if it failed; rows answered late)."""

    def abandon(self, dispatch: Dispatch, error: DeviceFailed) -> None:
        """Answer the requests of a batch that hangs with `error`; whatever comes of it later is dropped."""

    def refuse_all(self, refusals: Sequence[Refusal]) -> None:
        """Answer requests, its own and those of others, that will not be run."""


class _Worker:
    """A slot's thread and how to wake it. `sleeping` is read and written under the runtime's lock only."""

    __slots__ = ("running", "sleeping", "slot", "thread", "wake")

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        # The batch it executes. Replaced whole, read by the watchdog without a lock.
        self.running: Running | None = None
        self.sleeping = False
        # A lock as a binary semaphore: cheaper than a condition, which makes a new lock for every wait.
        self.wake = threading.Lock()
        self.wake.acquire()
        self.thread: threading.Thread | None = None


class Runtime:
    """The scheduler of this process, its lock and its workers."""

    def __init__(self, devices: Sequence[Device], on_failure: OnFailure | None = None, hung_ns: int = HUNG_NS) -> None:
        slots = [Slot(device.name, index) for device in devices for index in range(device.slots)]
        self._scheduler = Scheduler(slots)
        self._workers = {slot: _Worker(slot) for slot in slots}
        self._devices = tuple(device.name for device in devices)
        self._lock = threading.Lock()
        self._stopping = False
        self._on_failure = on_failure
        self._failed: set[str] = set()
        self._watchdog = Watchdog(self._running, self._report_hung, hung_ns)

    def start(self) -> None:
        """Start the workers and their watchdog."""
        self._watchdog.start()
        for worker in self._workers.values():
            worker.thread = threading.Thread(
                target=self._work, args=(worker,), name=f"run-{worker.slot.device}-{worker.slot.index}", daemon=True
            )
            worker.thread.start()

    def stop(self, timeout_s: float) -> bool:
        """End the workers after the batches they are running; False when one still runs after `timeout_s`."""
        with self._lock:
            self._stopping = True
            for worker in self._workers.values():
                self._wake(worker)
        self._watchdog.stop()
        end_ns = now_ns() + int(timeout_s * NS_PER_S)
        threads = [worker.thread for worker in self._workers.values() if worker.thread is not None]
        for thread in threads:
            thread.join(max(0, end_ns - now_ns()) / NS_PER_S)
        return not any(thread.is_alive() for thread in threads)

    def add(self, policy: QueuePolicy, latency: LatencyModel) -> ModelQueue:
        """Begin to schedule a model. The `payload` of every request queued for it is its `Executor`."""
        with self._lock:
            return self._scheduler.add_queue(policy, latency)

    def remove(self, queue: ModelQueue) -> list[QueuedRequest]:
        """Stop scheduling a model; the requests that were still queued are handed back."""
        with self._lock:
            return self._scheduler.remove_queue(queue)

    def idle(self, queue: ModelQueue) -> bool:
        """Whether nothing of a model waits or runs."""
        with self._lock:
            return queue.pending_requests == 0 and not any(queue.running.values())

    def enqueue(self, queue: ModelQueue, request: QueuedRequest, now: int) -> Sequence[Refusal] | None:
        """Queue a request. The refusals it causes, perhaps its own, are the caller's to answer.

        None: the queue was removed, and the request is not queued.
        """
        with self._lock:
            if queue.closed:
                return None
            refused = self._scheduler.enqueue(queue, request, now)
            slot = self._scheduler.idle_slot(queue)
            if slot is not None:
                self._wake(self._workers[slot])
        return refused

    def busy_ns(self, devices: Sequence[str], now: int) -> int:
        """Predicted time until a slot of one of `devices` is free, ns; 0 when one is."""
        with self._lock:
            return max(0, min(self._scheduler.free_ns(device, now) for device in devices) - now)

    def cancel(self, request: QueuedRequest) -> bool:
        """Remove a request that is still queued; False when it is running or done."""
        with self._lock:
            return self._scheduler.cancel(request)

    def withdraw(self, queue: ModelQueue, payload: object) -> list[QueuedRequest]:
        """Take the requests of one `payload` that are still queued out of a queue that it shares with others."""
        with self._lock:
            mine = [r for lane in list(queue.active) for r in lane.items() if r.payload is payload]
            return [request for request in mine if self._scheduler.cancel(request)]

    def lower_cap(self, queue: ModelQueue, request: QueuedRequest, rows: int) -> None:
        """The device ran out of memory: never batch requests of this shape above `rows` again."""
        with self._lock:
            self._scheduler.lower_cap(queue, request.shape, rows)

    def device_failed(self, device: str, reason: str) -> None:
        """Nothing more can run on `device`: its workers end, and the owner is told, once."""
        with self._lock:
            if device in self._failed:
                return
            self._failed.add(device)
            for worker in self._workers.values():
                if worker.slot.device == device:
                    self._wake(worker)
        if self._on_failure is not None:
            self._on_failure(device, reason)

    def _running(self) -> list[Running]:
        return [running for worker in self._workers.values() if (running := worker.running) is not None]

    def _report_hung(self, running: Running) -> None:
        dispatch, device = running.dispatch, running.dispatch.slot.device
        seconds = (now_ns() - running.since_ns) / NS_PER_S
        reason = f"a batch of {dispatch.rows} rows of model '{dispatch.queue.policy.name}' has run for {seconds:.1f} s"
        executor_of(dispatch.segments[0].request).abandon(dispatch, DeviceFailed(f"device {device} hangs: {reason}"))
        self.device_failed(device, f"it hangs: {reason}")

    def _wake_spares(self) -> None:
        """After a dispatch: an arrival wakes one worker, which may have left work behind that others can do."""
        for device in self._devices:
            slot = self._scheduler.spare_slot(device)
            if slot is not None:
                self._wake(self._workers[slot])

    def _wake(self, worker: _Worker) -> None:
        if worker.sleeping:
            worker.sleeping = False
            worker.wake.release()

    def _sleep(self, worker: _Worker, timeout_s: float) -> None:
        if worker.wake.acquire(timeout=timeout_s):
            return
        with self._lock:
            woken = not worker.sleeping
            worker.sleeping = False
        if woken:
            # Woken between the timeout and the lock: the permit is there and must not be left for the next sleep.
            worker.wake.acquire()

    def _work(self, worker: _Worker) -> None:
        scheduler, slot, lock = self._scheduler, worker.slot, self._lock
        done: tuple[Dispatch, int | None, int] | None = None
        while True:
            now = now_ns()
            with lock:
                if done is not None:
                    dispatch, actual_ns, late_rows = done
                    scheduler.completed(dispatch, now, actual_ns, late_rows)
                    done = None
                if self._stopping or slot.device in self._failed:
                    return
                step = scheduler.next_step(slot, now)
                if isinstance(step, Dispatch):
                    self._wake_spares()
                elif not step.refused:
                    worker.sleeping = True
            if step.refused:
                executor_of(step.refused[0].request).refuse_all(step.refused)
            if isinstance(step, Dispatch):
                worker.running = Running(step, now)
                done = (step, *executor_of(step.segments[0].request).execute(step))
                worker.running = None
            elif not step.refused:
                timeout_s = MAX_SLEEP_S
                if isinstance(step, WaitUntil):
                    timeout_s = min(timeout_s, max(0.0, (step.at_ns - now) / NS_PER_S))
                self._sleep(worker, timeout_s)


def executor_of(request: QueuedRequest) -> Executor:
    """Who runs and answers a request: its payload."""
    executor: Executor = request.payload
    return executor
