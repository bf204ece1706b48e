"""The metrics of one model version: its shards, what they add up to, and its present state.

`ModelMetrics` is made by whoever loads the version and registered with a `MetricsRegistry`. Threads that record take a
shard each and keep it; the sum over shards is made by the reader.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from service.clock import NS_PER_MS, NS_PER_S, now_ns
from service.metrics.buckets import DURATION_BOUNDS_NS, RATIO_BOUNDS, ROWS_BOUNDS, SLACK_BOUNDS_NS
from service.metrics.saturation import Demand
from service.metrics.shard import WINDOW_STEP_NS, WINDOW_STEPS, BatchTally, Exemplar, ModelShard, Tally, Totals
from service.metrics.statistics import BatchStatistics, ModelStatistics, StatisticDuration

# What is asked for is looked at over the last fifteen seconds, in whole steps: as often as Kubernetes looks.
DEMAND_STEPS = 3


@dataclass(frozen=True, slots=True)
class ModelState:
    """What a model version is like right now. `None` = does not apply: not exported.

    `scale`, `quantile` and `prediction_cv` are the latency model's: the online factor on the measured table, the
    safety factor (a quantile of recent actual over predicted times) and the spread of those. `batch_rows_limit`: the
    largest batch at present, of whatever shape has the least. `staging_bytes`: host memory that batches are gathered in
    and answered from. `cuda_graphs`: captured batch sizes, where graphs were asked for. Of a stateful model,
    `sequences` are live, `sequence_bytes` of host memory hold their states, and `sequences_expired` were forgotten
    because they were silent.
    """

    ready: bool = True
    pending_requests: int = 0
    pending_rows: int = 0
    slo_ns: int | None = None
    load_ns: int | None = None
    scale: float | None = None
    quantile: float | None = None
    prediction_cv: float | None = None
    batch_rows_limit: int | None = None
    staging_bytes: int | None = None
    cuda_graphs: int | None = None
    sequences: int | None = None
    sequence_bytes: int | None = None
    sequences_expired: int | None = None


@dataclass(slots=True)
class ShardSum:
    """What several shards add up to. The cell lists have one cell per bound and one beyond the last."""

    totals: Totals
    request_cells: list[int]
    queue_cells: list[int]
    input_cells: list[int]
    infer_cells: list[int]
    output_cells: list[int]
    batch_rows_cells: list[int]
    slack_cells: list[int]
    ratio_cells: list[int]
    close_reasons: Counter[str] = field(default_factory=Counter)
    batch_tallies: dict[int, BatchTally] = field(default_factory=dict)
    failures: dict[str, Tally] = field(default_factory=dict)
    refusals: dict[str, Tally] = field(default_factory=dict)
    exemplars: dict[str, list[Exemplar | None]] = field(default_factory=dict)


class ModelMetrics:
    """Metrics of one model version. `state` is asked for the present state at each scrape; it must be cheap."""

    def __init__(self, name: str, version: str, state: Callable[[], ModelState] = ModelState) -> None:
        self.name = name
        self.version = version
        self.state = state
        # For the pod's saturation: where it runs, and the predicted time of a row in ns (0: not known).
        self.devices: tuple[str, ...] = ()
        self.row_ns: Callable[[], float] = float
        self._shards: list[ModelShard] = []
        self._lock = threading.Lock()

    def shard(self) -> ModelShard:
        """A new shard for one writer. It counts for as long as the model version lives, even when its thread ends."""
        shard = ModelShard()
        with self._lock:
            self._shards.append(shard)
        return shard

    def sum(self) -> ShardSum:
        """The sum of all shards."""
        return add_up(self._shards.copy() or (ModelShard(),))

    def statistics(self, epoch_offset_ns: int | None = None) -> ModelStatistics:
        """Statistics as the ModelStatistics RPC tells them.

        `epoch_offset_ns` is wall-clock time minus monotonic time; by default what it is now.
        """
        offset_ns = time.time_ns() - now_ns() if epoch_offset_ns is None else epoch_offset_ns
        shards = self.sum()
        totals = shards.totals
        failed = [*shards.failures.values(), *shards.refusals.values()]
        answered = totals.requests
        return ModelStatistics(
            name=self.name,
            version=self.version,
            last_inference_ms=(totals.last_ns + offset_ns) // NS_PER_MS if answered else 0,
            inference_count=totals.rows,
            execution_count=totals.batches,
            success=StatisticDuration(answered, totals.request_ns),
            fail=StatisticDuration(sum(t.requests for t in failed), sum(t.ns for t in failed)),
            queue=StatisticDuration(answered, totals.queue_ns),
            compute_input=StatisticDuration(answered, totals.compute_input_ns),
            compute_infer=StatisticDuration(answered, totals.compute_infer_ns),
            compute_output=StatisticDuration(answered, totals.compute_output_ns),
            batch_stats=tuple(
                _batch_statistics(rows, shards.batch_tallies[rows]) for rows in sorted(shards.batch_tallies)
            ),
        )

    def attainment(self, at_ns: int) -> float | None:
        """Share of the requests offered in the last minute that were answered in time; None when there were none."""
        newest = at_ns // WINDOW_STEP_NS
        offered = in_time = 0
        for shard in self._shards.copy():
            for cell in shard.window.copy():
                if newest - WINDOW_STEPS < cell.step <= newest:
                    offered += cell.offered
                    in_time += cell.in_time
        return in_time / offered if offered else None

    def ended(self, step: int) -> tuple[int, int]:
        """Requests that ended in one step of the window (`WINDOW_STEP_NS`): those offered, and those kept in time."""
        offered = in_time = 0
        for shard in self._shards.copy():
            for cell in shard.window.copy():
                if cell.step == step:
                    offered += cell.offered
                    in_time += cell.in_time
        return offered, in_time

    def events(self) -> int:
        """Grows with everything that is recorded. Costs a fraction of `sum`, which need not be made while it stands."""
        return sum(
            shard.totals.batches
            + sum(tally.requests for tally in shard.refusals.copy().values())
            + sum(tally.requests for tally in shard.failures.copy().values())
            for shard in self._shards.copy()
        )

    def demand(self, at_ns: int) -> Demand | None:
        """What was asked of the model in the last whole steps; None when nothing was."""
        newest = at_ns // WINDOW_STEP_NS
        offered = sum(
            cell.offered
            for shard in self._shards.copy()
            for cell in shard.window.copy()
            if newest - DEMAND_STEPS <= cell.step < newest
        )
        if not offered:
            return None
        totals = [shard.totals for shard in self._shards.copy()]
        answered = sum(part.requests for part in totals)
        rows = sum(part.rows for part in totals) / answered if answered else 1.0
        seconds = DEMAND_STEPS * WINDOW_STEP_NS / NS_PER_S
        return Demand(offered * rows / seconds, self.row_ns(), self.devices)


def add_up(shards: Sequence[ModelShard]) -> ShardSum:
    """What `shards` (one or more) say together."""
    parts = [shard.totals for shard in shards]
    summed = [sum(column) for column in zip(*parts, strict=True)]
    totals = Totals(*summed)._replace(last_ns=max(part.last_ns for part in parts))

    def cells(name: str, bounds: Sequence[float]) -> list[int]:
        """The sum of one histogram; shards that never saw a batch have none of its cells."""
        parts = [part for shard in shards if (part := getattr(shard, name).copy())]
        return [sum(column) for column in zip([0] * (len(bounds) + 1), *parts, strict=True)]

    result = ShardSum(
        totals=totals,
        request_cells=cells("request_cells", DURATION_BOUNDS_NS),
        queue_cells=cells("queue_cells", DURATION_BOUNDS_NS),
        input_cells=cells("input_cells", DURATION_BOUNDS_NS),
        infer_cells=cells("infer_cells", DURATION_BOUNDS_NS),
        output_cells=cells("output_cells", DURATION_BOUNDS_NS),
        batch_rows_cells=cells("batch_rows_cells", ROWS_BOUNDS),
        slack_cells=cells("slack_cells", SLACK_BOUNDS_NS),
        ratio_cells=cells("ratio_cells", RATIO_BOUNDS),
    )
    for shard in shards:
        result.close_reasons.update(shard.close_reasons.copy())
        for rows, tally in shard.batch_tallies.copy().items():
            before = result.batch_tallies.get(rows, BatchTally())
            result.batch_tallies[rows] = BatchTally(*(a + b for a, b in zip(before, tally, strict=True)))
        _add_tallies(result.failures, shard.failures.copy())
        _add_tallies(result.refusals, shard.refusals.copy())
        _add_exemplars(result.exemplars, shard.exemplars)
    return result


def _add_exemplars(into: dict[str, list[Exemplar | None]], more: dict[str, list[Exemplar | None]]) -> None:
    for histogram, cells in more.items():
        known = into.get(histogram) or [None] * len(cells)
        into[histogram] = [_newer(a, b) for a, b in zip(known, cells.copy(), strict=True)]


def _newer(a: Exemplar | None, b: Exemplar | None) -> Exemplar | None:
    if a is None or b is None:
        return a or b
    return a if a.at_ns > b.at_ns else b


def _add_tallies(into: dict[str, Tally], more: dict[str, Tally]) -> None:
    for reason, tally in more.items():
        before = into.get(reason, Tally())
        into[reason] = Tally(before.requests + tally.requests, before.ns + tally.ns)


def _batch_statistics(rows: int, tally: BatchTally) -> BatchStatistics:
    return BatchStatistics(
        batch_size=rows,
        compute_input=StatisticDuration(tally.executions, tally.input_ns),
        compute_infer=StatisticDuration(tally.executions, tally.infer_ns),
        compute_output=StatisticDuration(tally.executions, tally.output_ns),
    )
