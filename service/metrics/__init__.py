"""Metrics: what threads record, what the scrape and the statistics RPC read."""

from service.metrics.model import ModelMetrics, ModelState
from service.metrics.shard import CompletedRequest, ModelShard
from service.metrics.statistics import BatchStatistics, ModelStatistics, StatisticDuration

__all__ = [
    "BatchStatistics",
    "CompletedRequest",
    "ModelMetrics",
    "ModelShard",
    "ModelState",
    "ModelStatistics",
    "StatisticDuration",
]
