"""The scheduler under arbitrary use: every promise of docs/batching.md that holds whatever happens."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from service.clock import NEVER_NS
from service.scheduler import (
    Dispatch,
    Idle,
    LatencyModel,
    ModelQueue,
    PriorityPolicy,
    QueuedRequest,
    QueuePolicy,
    Refusal,
    RequestState,
    Scheduler,
    Slot,
    WaitUntil,
    bucket_ladder,
)

MS = 1_000_000
SHAPES = ((), (3,))


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals, cancellations, dispatches and completions on random models and slots."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.waiting: dict[QueuedRequest, ModelQueue] = {}
        self.running: dict[Slot, list[Dispatch]] = {}
        self.rows_run: dict[QueuedRequest, int] = {}
        self.answers: dict[QueuedRequest, str] = {}

    @initialize(
        slots=st.integers(1, 3),
        models=st.lists(
            st.tuples(
                st.sampled_from([None, 15, 60]),
                st.sampled_from([1, 4, 16]),
                st.sampled_from(["shed", "best_effort"]),
                st.booleans(),
                st.integers(1, 2),
                st.sampled_from([0.0, 1.0]),
            ),
            min_size=1,
            max_size=3,
        ),
    )
    def build(self, slots: int, models: list[tuple[int | None, int, str, bool, int, float]]) -> None:
        """A scheduler with these slots and models."""
        self.slots = [Slot("d", index) for index in range(slots)]
        self.running = {slot: [] for slot in self.slots}
        self.scheduler = Scheduler(self.slots)
        self.queues: list[ModelQueue] = []
        for number, (slo, rows, late, known, concurrent, eagerness) in enumerate(models):
            policy = QueuePolicy(
                f"m{number}",
                ("d",),
                rows,
                None if slo is None else slo * MS,
                bucket_ladder(rows),
                max_concurrent=concurrent,
                shed_eagerness=eagerness,
                late_policy=late,  # type: ignore[arg-type]
                max_queue_delay_ns=2 * MS if number else 0,
                preferred_rows=(2, 4) if number == 2 else (),
                max_queue_rows=60,
                max_queue_ns=100 * MS,
                priorities={2: PriorityPolicy(max_queue_size=5, timeout_action="DELAY")},
            )
            table = {(): {size: (3 + size) * MS for size in policy.buckets}} if known else {}
            self.queues.append(self.scheduler.add_queue(policy, LatencyModel(table, policy.buckets)))

    def settle(self, refused: Iterable[Refusal]) -> None:
        """Every refusal is of a request that was waiting, and is its only answer."""
        for refusal in refused:
            request = refusal.request
            assert self.waiting.pop(request) is not None
            assert request not in self.answers
            assert request.state is RequestState.GONE
            assert refusal.predicted_wait_ns >= 0 <= refusal.retry_after_ns
            self.answers[request] = refusal.reason.value

    @rule(
        model=st.integers(0, 2),
        rows=st.integers(1, 20),
        budget=st.sampled_from([-1, 2, 10, 20, 50, None, "slo"]),
        priority=st.integers(1, 2),
        shape=st.sampled_from(SHAPES),
        burst=st.integers(1, 6),
    )
    def arrive(self, model: int, rows: int, budget: int | str | None, priority: int, shape: object, burst: int) -> None:
        """A burst of equal requests arrives."""
        queue = self.queues[model % len(self.queues)]
        slo_ns = queue.policy.slo_ns if budget == "slo" else None if budget is None else int(budget) * MS
        for _ in range(burst):
            deadline_ns = NEVER_NS if slo_ns is None else self.now + slo_ns
            request = QueuedRequest(rows, self.now, deadline_ns, priority, shape)  # type: ignore[arg-type]
            self.waiting[request] = queue
            self.settle(self.scheduler.enqueue(queue, request, self.now))

    @rule(by=st.integers(0, 30 * MS))
    def advance(self, by: int) -> None:
        """Time passes."""
        self.now += by

    @rule(slot=st.integers(0, 2))
    def ask(self, slot: int) -> None:
        """A slot asks for work."""
        chosen = self.slots[slot % len(self.slots)]
        if len(self.running[chosen]) == 2:
            return
        step = self.scheduler.next_step(chosen, self.now)
        if isinstance(step, Dispatch):
            self.check(step, chosen)
        self.settle(step.refused)
        if isinstance(step, WaitUntil):
            assert step.at_ns > self.now
        if isinstance(step, Idle):
            again = self.scheduler.next_step(chosen, self.now)
            assert isinstance(again, Idle)
            assert not again.refused

    def check(self, batch: Dispatch, slot: Slot) -> None:
        """A batch is within its size, of one shape, whole requests or segments in order, and predicted in time."""
        policy = batch.queue.policy
        assert batch.slot == slot
        assert 0 < batch.rows == sum(segment.rows for segment in batch.segments) <= batch.bucket
        assert batch.bucket <= policy.max_batch_rows
        assert batch.bucket in policy.buckets
        assert len({segment.request.shape for segment in batch.segments}) == 1
        for segment in batch.segments:
            request = segment.request
            assert self.waiting[request] is batch.queue
            assert segment.first_row == self.rows_run.get(request, 0)
            self.rows_run[request] = segment.first_row + segment.rows
            whole = self.rows_run[request] == request.rows
            assert whole or request.rows > batch.queue.cap_rows(request.shape)
            assert (request.state is RequestState.RUNNING) == whole
            if request.deadline_ns < NEVER_NS and not request.demoted:
                assert batch.start_ns + batch.expected_ns <= request.deadline_ns + 1
            if whole:
                del self.waiting[request]
                self.answers[request] = "run"
        assert batch.slack_ns >= -1
        self.running[slot].append(batch)

    @precondition(lambda self: any(self.running.values()))
    @rule(speed=st.sampled_from([0.5, 1.0, 1.1, 3.0]), fails=st.booleans())
    def complete(self, speed: float, fails: bool) -> None:
        """The oldest batch ends, sooner or later than expected, or fails."""
        slot = min((s for s in self.slots if self.running[s]), key=lambda s: self.running[s][0].start_ns)
        batch = self.running[slot].pop(0)
        actual = int((3 + batch.bucket) * MS * speed)
        self.now = max(self.now, batch.start_ns + actual)
        self.scheduler.completed(batch, self.now, None if fails else actual, batch.late_rows(self.now))

    @precondition(lambda self: self.waiting)
    @rule(number=st.integers(0, 1000))
    def cancel(self, number: int) -> None:
        """A client goes away."""
        request = list(self.waiting)[number % len(self.waiting)]
        assert self.scheduler.cancel(request)
        assert not self.scheduler.cancel(request)
        del self.waiting[request]
        self.answers[request] = "cancelled"

    @rule(model=st.integers(0, 2), rows=st.integers(0, 16))
    def lower(self, model: int, rows: int) -> None:
        """The device runs out of memory at one of the shapes, rarely below four rows."""
        queue = self.queues[model % len(self.queues)]
        self.scheduler.lower_cap(queue, (3,), max(rows, 4) if rows else queue.policy.max_batch_rows)

    @invariant()
    def counts_agree(self) -> None:
        """Counters equal what is waiting; bounds hold; who sleeps is not needed."""
        if not hasattr(self, "queues"):
            return
        for queue in self.queues:
            mine = [request for request, owner in self.waiting.items() if owner is queue]
            rows = sum(request.rows - self.rows_run.get(request, 0) for request in mine)
            assert queue.pending_requests == len(mine)
            assert queue.pending_rows == rows <= queue.policy.max_queue_rows
            assert sum(queue.pending_by_priority.values()) == len(mine)
            assert queue.pending_by_priority[2] <= 5
            assert bool(queue.active) == bool(mine)
            assert sum(lane.count for lane in queue.active) == len(mine)
            running = sum(batch.queue is queue for batches in self.running.values() for batch in batches)
            assert sum(queue.running.values()) == running <= queue.policy.max_concurrent

    def teardown(self) -> None:
        """Served to the end, everybody has exactly one answer."""
        if not hasattr(self, "queues"):
            return
        for _ in range(400):
            if not self.waiting and not any(self.running.values()):
                break
            if any(self.running.values()):
                self.complete(1.0, False)
            for slot in self.slots:
                if not self.running[slot]:
                    step = self.scheduler.next_step(slot, self.now)
                    if isinstance(step, Dispatch):
                        self.check(step, slot)
                    self.settle(step.refused)
                    if isinstance(step, WaitUntil):
                        self.now = max(self.now, step.at_ns)
        assert not self.waiting


SchedulerMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate)
)
TestSchedulerMachine = SchedulerMachine.TestCase
