"""From a model's configuration and its measured latencies to the values that steer its queue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from service.clock import NS_PER_MS
from service.config.model import DynamicBatching, ModelConfig
from service.engine.devices import Device
from service.engine.warmup import Measured
from service.scheduler import LatencyModel, PriorityPolicy, QueuePolicy, bucket_ladder

# The client's clock runs from before a request is read until after its answer has travelled. Answers that leave at the
# last moment are then late where it counts: over one machine's loopback, with the server's core busy, the way takes 0.1
# to 0.5 ms. A percent of the objective at most, so that a short one keeps its time for computing.
DELIVERY_NS = NS_PER_MS // 2
DELIVERY_SHARE = 100
# One size for all batches: where a change costs more than this and than a row, of sizes that take at most this part of
# the objective, the smallest with this part of the throughput.
CHANGE_NS = 2 * NS_PER_MS
SIZE_SHARE_OF_SLO = 0.4
MOST_OF_THROUGHPUT = 0.8


def queue_policy(
    config: ModelConfig,
    devices: Sequence[Device],
    max_concurrent: int,
    measured: Measured | None,
    sizes: Sequence[int] = (),
) -> tuple[QueuePolicy, list[str]]:
    """The queue policy of a model on `devices`, and what should be said about it. `sizes`: the only batch sizes that
    are to be run, smallest first; empty for all."""
    notes: list[str] = []
    batching = config.dynamic_batching or DynamicBatching()
    objective = config.objective
    max_rows = max(1, config.max_batch_size)
    if measured is not None and config.joins_requests:
        max_rows, notes = _largest_batch(config, measured)
    # Padding to a ladder of sizes pays where sizes are captured or compiled; the CPU runs every size as it is.
    # Nor may rows be added to a request that must be alone: its answer may depend on them.
    padded = config.joins_requests and any(device.kind == "gpu" for device in devices)
    buckets = bucket_ladder(max_rows) if padded else ()
    if padded and sizes:
        buckets = tuple(rows for rows in sizes if rows <= max_rows) or (sizes[0],)
        max_rows = buckets[-1]
        if len(buckets) == 1:
            notes.append(
                f"every batch is padded to {max_rows} rows: on this GPU changing the size takes longer than computing"
            )
    policy = QueuePolicy(
        name=config.name,
        devices=tuple(device.name for device in devices),
        max_batch_rows=max_rows,
        joins=config.joins_requests,
        delivery_ns=delivery_ns(objective.slo_ns),
        slo_ns=objective.slo_ns,
        buckets=buckets,
        max_concurrent=max_concurrent,
        shed_eagerness=objective.shed_eagerness,
        late_policy=objective.late_policy.value,
        max_queue_delay_ns=batching.max_queue_delay_ns,
        preferred_rows=tuple(rows for rows in batching.preferred_batch_size if rows <= max_rows),
        max_queue_ns=objective.max_queue_ns,
        priority_levels=max(1, batching.priority_levels),
        default_priority=max(1, batching.default_priority_level),
        priorities=_priorities(batching),
    )
    return policy, notes


def one_size(table: Mapping[int, int], change_ns: int, slo_ns: int | None) -> tuple[int, ...]:
    """The size that every batch is padded to where a change of the size costs `change_ns`; empty where that is less
    than padding costs. `table`: ns of a batch by its rows.

    The smallest size with most of the throughput there is, so that little is padded when little comes; of those that
    fit twice into the objective with something to spare, since a request waits for one batch and is in the next.
    """
    if change_ns <= max(CHANGE_NS, min(table.values())):
        return ()
    limit_ns = slo_ns * SIZE_SHARE_OF_SLO if slo_ns is not None else max(table.values())
    fitting = [rows for rows in table if table[rows] <= limit_ns] or [min(table)]
    best = max(rows / table[rows] for rows in fitting)
    return (min(rows for rows in fitting if rows / table[rows] >= MOST_OF_THROUGHPUT * best),)


def delivery_ns(slo_ns: int | None) -> int:
    """What of an objective is left for the way to the client and back."""
    return 0 if slo_ns is None else min(DELIVERY_NS, slo_ns // DELIVERY_SHARE)


def latency_model(policy: QueuePolicy, measured: Measured | None) -> LatencyModel:
    """The latency model that starts from what was measured; empty when nothing could be."""
    if measured is None:
        return LatencyModel({}, policy.buckets)
    table = {rows: float(sample.p50_ns) for rows, sample in measured.table.items() if rows <= policy.max_batch_rows}
    return LatencyModel({measured.shape: table}, policy.buckets, {measured.shape: measured.shape.cost})


def _largest_batch(config: ModelConfig, measured: Measured) -> tuple[int, list[str]]:
    """The largest batch the scheduler may form, and what should be said about the objective.

    With an objective it is the configured one, whatever was measured: a batch that takes too long is never formed, and
    the measurement of a busy start must not bind the days after it. Without one, sizes never run are not tried on
    clients.
    """
    slo_ns = config.objective.slo_ns
    if measured.memory_rows is not None:
        most = max(measured.table)
        return most, [
            f"max_batch_size {config.max_batch_size} does not fit: {measured.memory_rows} rows ran out of memory at "
            f"load, so batches have at most {most}"
        ]
    if slo_ns is None:
        return (config.max_batch_size if measured.complete else max(measured.table)), []
    alone_ns = measured.table[min(measured.table)].p50_ns
    if alone_ns > slo_ns:
        return config.max_batch_size, [
            f"latency_slo_ms {slo_ns / NS_PER_MS:g} cannot be kept at present: one row alone takes "
            f"{alone_ns / NS_PER_MS:.1f} ms; nearly every request will be refused until the model is faster or the "
            "objective longer"
        ]
    return config.max_batch_size, []


def _priorities(batching: DynamicBatching) -> dict[int, PriorityPolicy]:
    levels = range(1, max(1, batching.priority_levels) + 1)
    policies = {level: batching.queue_policy(level) for level in levels}
    return {
        level: PriorityPolicy(
            max_queue_size=policy.max_queue_size,
            default_timeout_ns=policy.default_timeout_ns,
            allow_timeout_override=policy.allow_timeout_override or policy.default_timeout_ns == 0,
            timeout_action=policy.timeout_action.value,
        )
        for level, policy in policies.items()
    }
