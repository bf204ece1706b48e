"""Metrics: what threads record, what the scrape and the statistics RPC read."""

from service.metrics.model import ModelMetrics, ModelState
from service.metrics.registry import MetricsRegistry
from service.metrics.server import MetricsPortError, MetricsServer
from service.metrics.shard import CompletedRequest, ModelShard
from service.metrics.statistics import BatchStatistics, ModelStatistics, StatisticDuration

__all__ = [
    "BatchStatistics",
    "CompletedRequest",
    "MetricsPortError",
    "MetricsRegistry",
    "MetricsServer",
    "ModelMetrics",
    "ModelShard",
    "ModelState",
    "ModelStatistics",
    "StatisticDuration",
]
