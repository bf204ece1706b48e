"""What a model version has done so far, as the ModelStatistics RPC tells it.

The meaning is Triton's (`ModelStatistics` in its grpc_service.proto): durations are cumulative, per request. Each
request of a batch adds the whole batch's compute times, so that `ns / count` is what a request met on average.
The three compute counts are one number by construction: perf_analyzer refuses statistics in which they differ.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class StatisticDuration:
    """How often something happened and the time it took in all, nanoseconds."""

    count: int = 0
    ns: int = 0


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """Executions with one number of rows. The counts are executions, not requests."""

    batch_size: int
    compute_input: StatisticDuration
    compute_infer: StatisticDuration
    compute_output: StatisticDuration


@dataclass(frozen=True, slots=True)
class ModelStatistics:
    """Statistics of one model version since it was loaded.

    `success`: answered requests, from arrival to answer. `fail`: requests that were refused, failed or cancelled, from
    arrival to that answer. `last_inference_ms`: wall-clock milliseconds since the epoch, 0 when there was none.
    `inference_count`: rows answered. `execution_count`: batches run. There is no response cache: its counts stay 0.
    """

    name: str
    version: str
    last_inference_ms: int = 0
    inference_count: int = 0
    execution_count: int = 0
    success: StatisticDuration = StatisticDuration()
    fail: StatisticDuration = StatisticDuration()
    queue: StatisticDuration = StatisticDuration()
    compute_input: StatisticDuration = StatisticDuration()
    compute_infer: StatisticDuration = StatisticDuration()
    compute_output: StatisticDuration = StatisticDuration()
    cache_hit: StatisticDuration = StatisticDuration()
    cache_miss: StatisticDuration = StatisticDuration()
    batch_stats: tuple[BatchStatistics, ...] = field(default=())
