"""What one thread has recorded about one model version.

Promise: a shard has one writer at a time (one thread, or several that write under one lock), takes no lock of its own
and never waits; any thread may read it at any time. Recording a batch costs a microsecond per request and a few per
batch.

Consistency: everything that must agree (counts with their sums) sits in immutable tuples that the writer replaces
whole. Storing a reference is atomic in Python, so a reader sees all of a batch or nothing of it, without a lock, a
retry or a version counter. The histogram cells are separate lists that are changed in place; a reader copies each in
one step and takes its count from the cells themselves, so a histogram agrees with itself but may be one batch ahead
of the totals.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from service.batch import BatchRecord
from service.clock import NEVER_NS, NS_PER_S
from service.metrics.buckets import DURATION_BOUNDS_NS, RATIO_BOUNDS, ROWS_BOUNDS, SLACK_BOUNDS_NS
from service.trace_context import RequestTrace

# The attainment gauge looks back one minute (a Prometheus scrape or two), in steps of five seconds.
WINDOW_STEP_NS = 5 * NS_PER_S
WINDOW_STEPS = 12
# One cell more than the window, so that the writer never overwrites a cell a reader still counts.
_RING_CELLS = WINDOW_STEPS + 1

# The histograms of durations, which have exemplars.
DURATION_HISTOGRAMS = ("request", "queue", "input", "infer", "output")

# A slack beyond this is that of a batch without any deadline (NEVER_NS minus the present time).
_NO_DEADLINE_NS = NEVER_NS // 2

# The client's own fault: no promise was made to these requests, so none was broken.
CLIENT_FAULTS = frozenset({"invalid", "unsupported", "unknown_model", "unknown_version"})


class CompletedRequest(Protocol):
    """What a shard reads of an answered request. Nanoseconds, monotonic; `deadline_ns` is NEVER_NS when none."""

    @property
    def arrival_ns(self) -> int: ...
    @property
    def deadline_ns(self) -> int: ...
    @property
    def rows(self) -> int: ...


class TracedRequest(Protocol):
    """What a shard reads of an answered request that was traced."""

    @property
    def arrival_ns(self) -> int: ...
    @property
    def trace(self) -> RequestTrace: ...


class Exemplar(NamedTuple):
    """A trace in which a histogram's value can be seen. Nanoseconds; `at_ns` monotonic."""

    trace_id: bytes
    value_ns: int
    at_ns: int


class Totals(NamedTuple):
    """Everything about answered requests that only adds up. Times are nanoseconds, summed over requests, except the
    last group, which is summed over batches. `last_ns` is the latest answer's time, monotonic."""

    requests: int = 0
    rows: int = 0
    late: int = 0
    request_ns: int = 0
    queue_ns: int = 0
    compute_input_ns: int = 0
    compute_infer_ns: int = 0
    compute_output_ns: int = 0
    last_ns: int = 0
    batches: int = 0
    batch_rows: int = 0
    slack_ns: int = 0
    expected_ns: int = 0
    actual_ns: int = 0
    ratio: float = 0.0


class Tally(NamedTuple):
    """How many requests, and how long they took in all (nanoseconds)."""

    requests: int = 0
    ns: int = 0


class BatchTally(NamedTuple):
    """Executions with one number of rows: how many, and their compute times (nanoseconds)."""

    executions: int = 0
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0


class WindowCell(NamedTuple):
    """Requests that ended in one step of the attainment window: all that were offered, and those kept in time."""

    step: int = -1
    offered: int = 0
    in_time: int = 0


_NO_TALLY = Tally()
_NO_BATCH_TALLY = BatchTally()


class ModelShard:
    """The records of one writer about one model version. Made by `ModelMetrics.shard()`."""

    __slots__ = (
        "batch_rows_cells",
        "batch_tallies",
        "close_reasons",
        "exemplars",
        "failures",
        "infer_cells",
        "input_cells",
        "output_cells",
        "queue_cells",
        "ratio_cells",
        "refusals",
        "request_cells",
        "slack_cells",
        "totals",
        "window",
    )

    def __init__(self) -> None:
        self.totals = Totals()
        # Cells are made with the first batch: a thread that only ever refuses needs none, and with many front-end
        # threads and many models such shards are most of all.
        self.request_cells: list[int] = []
        self.queue_cells: list[int] = []
        self.input_cells: list[int] = []
        self.infer_cells: list[int] = []
        self.output_cells: list[int] = []
        self.batch_rows_cells: list[int] = []
        self.slack_cells: list[int] = []
        self.ratio_cells: list[int] = []
        self.close_reasons: dict[str, int] = {}
        self.batch_tallies: dict[int, BatchTally] = {}
        self.failures: dict[str, Tally] = {}
        self.refusals: dict[str, Tally] = {}
        self.window: list[WindowCell] = []
        # Histogram -> the newest exemplar of each cell; made with the first traced request. Cells are replaced whole.
        self.exemplars: dict[str, list[Exemplar | None]] = {}

    def _make_cells(self) -> None:
        durations = len(DURATION_BOUNDS_NS) + 1
        self.request_cells = [0] * durations
        self.queue_cells = [0] * durations
        self.input_cells = [0] * durations
        self.infer_cells = [0] * durations
        self.output_cells = [0] * durations
        self.batch_rows_cells = [0] * (len(ROWS_BOUNDS) + 1)
        self.slack_cells = [0] * (len(SLACK_BOUNDS_NS) + 1)
        self.ratio_cells = [0] * (len(RATIO_BOUNDS) + 1)

    def record_batch(self, record: BatchRecord, requests: Sequence[CompletedRequest]) -> None:
        """Record one execution and the `requests` that it answered, all successfully.

        A request larger than a batch is passed with the execution that answers it; earlier ones of its executions are
        recorded with the other requests they answered, if any. Requests of the batch that failed or were cancelled are
        left out here and recorded on their own.
        """
        if not self.request_cells:
            self._make_cells()
        dispatched_ns = record.dispatched_ns
        done_ns = record.done_ns
        count = len(requests)
        rows = late = arrivals_ns = 0
        queue_cells = self.queue_cells
        request_cells = self.request_cells
        for request in requests:
            arrival_ns = request.arrival_ns
            queue_cells[bisect_left(DURATION_BOUNDS_NS, dispatched_ns - arrival_ns)] += 1
            request_cells[bisect_left(DURATION_BOUNDS_NS, done_ns - arrival_ns)] += 1
            arrivals_ns += arrival_ns
            rows += request.rows
            if done_ns > request.deadline_ns:
                late += 1

        input_ns = record.started_ns - dispatched_ns
        infer_ns = record.finished_ns - record.started_ns
        output_ns = done_ns - record.finished_ns
        self.input_cells[bisect_left(DURATION_BOUNDS_NS, input_ns)] += count
        self.infer_cells[bisect_left(DURATION_BOUNDS_NS, infer_ns)] += count
        self.output_cells[bisect_left(DURATION_BOUNDS_NS, output_ns)] += count

        batch_rows = record.rows
        self.batch_rows_cells[bisect_left(ROWS_BOUNDS, batch_rows)] += 1
        reason = record.reason.value
        self.close_reasons[reason] = self.close_reasons.get(reason, 0) + 1
        tally = self.batch_tallies.get(batch_rows, _NO_BATCH_TALLY)
        self.batch_tallies[batch_rows] = BatchTally(
            tally[0] + 1, tally[1] + input_ns, tally[2] + infer_ns, tally[3] + output_ns
        )

        slack_ns = record.slack_ns
        if slack_ns < _NO_DEADLINE_NS:
            self.slack_cells[bisect_left(SLACK_BOUNDS_NS, slack_ns)] += 1
        else:
            slack_ns = 0
        expected_ns = record.expected_ns
        actual_ns = 0
        ratio = 0.0
        if expected_ns > 0:  # 0 before the model's first measurement: nothing was predicted
            actual_ns = done_ns - dispatched_ns
            ratio = actual_ns / expected_ns
            self.ratio_cells[bisect_left(RATIO_BOUNDS, ratio)] += 1

        before = self.totals
        self.totals = Totals(
            before.requests + count,
            before.rows + rows,
            before.late + late,
            before.request_ns + count * done_ns - arrivals_ns,
            before.queue_ns + count * dispatched_ns - arrivals_ns,
            before.compute_input_ns + count * input_ns,
            before.compute_infer_ns + count * infer_ns,
            before.compute_output_ns + count * output_ns,
            done_ns if count else before.last_ns,
            before.batches + 1,
            before.batch_rows + batch_rows,
            before.slack_ns + slack_ns,
            before.expected_ns + expected_ns,
            before.actual_ns + actual_ns,
            before.ratio + ratio,
        )
        self._count_offered(done_ns, count, count - late)

    def record_exemplars(self, record: BatchRecord, traced: Sequence[TracedRequest]) -> None:
        """Keep those of a batch's answered requests that are traced as exemplars: one for each cell of the histograms
        of durations, the newest."""
        if not self.exemplars:
            self.exemplars = {name: [None] * (len(DURATION_BOUNDS_NS) + 1) for name in DURATION_HISTOGRAMS}
        done_ns = record.done_ns
        for request in traced:
            trace_id = request.trace.trace_id
            self._keep("request", Exemplar(trace_id, done_ns - request.arrival_ns, done_ns))
            self._keep("queue", Exemplar(trace_id, record.dispatched_ns - request.arrival_ns, done_ns))
        trace_id = traced[-1].trace.trace_id
        self._keep("input", Exemplar(trace_id, record.started_ns - record.dispatched_ns, done_ns))
        self._keep("infer", Exemplar(trace_id, record.finished_ns - record.started_ns, done_ns))
        self._keep("output", Exemplar(trace_id, done_ns - record.finished_ns, done_ns))

    def _keep(self, histogram: str, exemplar: Exemplar) -> None:
        self.exemplars[histogram][bisect_left(DURATION_BOUNDS_NS, exemplar.value_ns)] = exemplar

    def record_failure(self, reason: str, arrival_ns: int, now_ns: int) -> None:
        """Record a request that failed; `reason` is the error class's word (`service.errors`)."""
        before = self.failures.get(reason, _NO_TALLY)
        self.failures[reason] = Tally(before.requests + 1, before.ns + now_ns - arrival_ns)
        if reason not in CLIENT_FAULTS:
            self._count_offered(now_ns, 1, 0)

    def record_refusal(self, reason: str, arrival_ns: int, now_ns: int) -> None:
        """Record a request that was refused, on arrival or later, `expired` ones included."""
        before = self.refusals.get(reason, _NO_TALLY)
        self.refusals[reason] = Tally(before.requests + 1, before.ns + now_ns - arrival_ns)
        self._count_offered(now_ns, 1, 0)

    def record_cancelled(self, arrival_ns: int, now_ns: int, deadline_ns: int = NEVER_NS) -> None:
        """Record a request that its client gave up. Past its deadline that is a broken promise, before it is not."""
        before = self.failures.get("cancelled", _NO_TALLY)
        self.failures["cancelled"] = Tally(before.requests + 1, before.ns + now_ns - arrival_ns)
        if now_ns >= deadline_ns:
            self._count_offered(now_ns, 1, 0)

    def _count_offered(self, now_ns: int, offered: int, in_time: int) -> None:
        step = now_ns // WINDOW_STEP_NS
        index = step % _RING_CELLS
        if not self.window:
            self.window = [WindowCell()] * _RING_CELLS
        cell = self.window[index]
        if cell[0] == step:
            offered += cell[1]
            in_time += cell[2]
        self.window[index] = WindowCell(step, offered, in_time)
