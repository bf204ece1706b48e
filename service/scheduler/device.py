"""A device and its run slots: what runs, and when the next slot is predicted to be free.

A slot executes one batch and may have one more staged behind it. A batch that has not ended when it was predicted to
moves the prediction: by as much as it is overdue already, at most a quarter of its expected time. Something late by a
hair will most likely end the next moment; something late by much will take long. After three times the expected time
the slot is stalled, and no longer counted on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.clock import NS_PER_MS, NS_PER_S
from service.scheduler.latency import FIRST_QUANTILE
from service.scheduler.types import Dispatch, Slot

if TYPE_CHECKING:
    from service.scheduler.lane import Lane
    from service.scheduler.queue import ModelQueue

# One batch executing, one staged: more would be closed earlier than necessary.
MAX_BATCHES_PER_SLOT = 2
OVERDUE_SHARE = 0.25
STALL_FACTOR = 3
# Shorter excesses are the host's hiccups, not a hanging device; a first run (no expectation) may compile kernels.
MIN_STALL_NS = 100 * NS_PER_MS
FIRST_RUN_STALL_NS = 60 * NS_PER_S


class SlotState:
    """One run slot: the batches handed to it and when it is predicted to be free."""

    __slots__ = ("device", "free_ns", "running", "slot")

    def __init__(self, slot: Slot, device: DeviceState) -> None:
        self.slot = slot
        self.device = device
        self.running: list[Dispatch] = []
        self.free_ns = 0

    def free_at(self, now_ns: int) -> int:
        """When it is predicted to be free; `now_ns` when it is."""
        if not self.running:
            return now_ns
        if self.free_ns <= now_ns:
            oldest = self.running[0]
            overdue_ns = now_ns - oldest.start_ns - _likely_ns(oldest)
            self.free_ns = now_ns + max(1, min(overdue_ns, int(OVERDUE_SHARE * oldest.expected_ns)))
        return self.free_ns

    def due_at(self, now_ns: int) -> int:
        """When it can be promised to be free: what a batch staged behind the running one is planned with."""
        if not self.running:
            return now_ns
        last = self.running[-1]
        return max(self.free_at(now_ns), last.start_ns + last.expected_ns)

    def stalled(self, now_ns: int) -> bool:
        """Whether its batch has taken so long that it is not to be counted on."""
        if not self.running:
            return False
        oldest = self.running[0]
        limit_ns = max(STALL_FACTOR * oldest.expected_ns, MIN_STALL_NS) if oldest.expected_ns else FIRST_RUN_STALL_NS
        return now_ns - oldest.start_ns > limit_ns

    def begin(self, dispatch: Dispatch) -> None:
        """Take a batch that is to start at its `start_ns`."""
        self.running.append(dispatch)
        self.free_ns = dispatch.start_ns + _likely_ns(dispatch)
        self.device.refresh()

    def end(self, dispatch: Dispatch, now_ns: int) -> None:
        """A batch has ended; one staged behind it starts now."""
        self.running.remove(dispatch)
        if self.running:
            self.running[0].start_ns = now_ns
            self.free_ns = now_ns + _likely_ns(self.running[0])
        self.device.refresh()


def _likely_ns(dispatch: Dispatch) -> int:
    """How long a batch likely takes: its average and the margin of a quiet device, at most what was promised.

    When a slot will be free is not a promise. On a noisy device the quantile that promises are made with is far above
    the average, and would give up requests that the next batch can still take.
    """
    average_ns = dispatch.expected_ns / dispatch.queue.latency.quantile
    return min(dispatch.expected_ns, int(average_ns * FIRST_QUANTILE))


class DeviceState:
    """A device: its slots, the lanes that have work for it, and the slots whose workers are waiting to be woken."""

    __slots__ = ("active", "earliest_ns", "guard_ns", "idle", "name", "parked", "slots")

    def __init__(self, name: str) -> None:
        self.name = name
        self.slots: list[SlotState] = []
        self.active: dict[Lane, None] = {}
        self.parked: dict[Slot, None] = {}
        self.idle = 0  # slots with nothing to run
        self.earliest_ns = 0  # least predicted free time of the busy slots
        self.guard_ns = 0  # when a lane without deadlines may next go before one with them

    def refresh(self) -> None:
        """Recompute what `free_at` answers from; there are a handful of slots."""
        busy = [slot.free_ns for slot in self.slots if slot.running]
        self.idle = len(self.slots) - len(busy)
        self.earliest_ns = min(busy) if busy else 0

    def free_at(self, now_ns: int) -> int:
        """When the earliest slot is predicted to be free; `now_ns` when one is."""
        if self.idle:
            return now_ns
        if self.earliest_ns <= now_ns:
            usable = [slot for slot in self.slots if not slot.stalled(now_ns)] or self.slots
            self.earliest_ns = min(slot.free_at(now_ns) for slot in usable)
        return self.earliest_ns

    def free_for(self, queue: ModelQueue, now_ns: int) -> int:
        """When the earliest batch of `queue` on this device ends: for a model at its instance count."""
        ends = [slot.free_at(now_ns) for slot in self.slots if any(batch.queue is queue for batch in slot.running)]
        return min(ends, default=now_ns)
