"""Predicted saturation: what was asked for lately, as a share of what the devices could answer within the objectives.

    saturation of a device = sum over its models of (rows offered a second x predicted time of a row) / slots

A row's time is that of the batch size with the most rows per second among those that fit the objective twice: a request
that comes while such a batch runs waits for it and rides in the next. So the figure
grows with the load also while small batches keep a device busy anyway, which its utilization does not, and beyond 1
when more is asked for than can be answered: what is refused counts as asked for. It is made to scale by.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from service.clock import NS_PER_S


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked of one model: rows a second, the predicted time of each in ns, the devices that share them."""

    rows_per_s: float
    row_ns: float
    devices: tuple[str, ...]


def row_ns(latencies: Mapping[int, int], slo_ns: int | None) -> float:
    """The least time of a row, ns, of batch sizes (rows -> ns of the batch) that fit the objective twice; where none
    does, once; where none does, of all. 0 when nothing is known."""
    known = [(rows, ns) for rows, ns in latencies.items() if ns > 0]
    for times in (2, 1):
        fitting = [ns / rows for rows, ns in known if slo_ns is None or times * ns <= slo_ns]
        if fitting:
            return min(fitting)
    return min((ns / rows for rows, ns in known), default=0.0)


def device_loads(demands: Iterable[Demand], slots: Mapping[str, int]) -> dict[str, float]:
    """The saturation of each device that anything is asked of; `slots`: batches at once on each."""
    load: dict[str, float] = {}
    for demand in demands:
        for device in demand.devices:
            share = demand.rows_per_s * demand.row_ns / NS_PER_S / len(demand.devices)
            load[device] = load.get(device, 0.0) + share / max(1, slots.get(device, 1))
    return load


def saturation(demands: Iterable[Demand], slots: Mapping[str, int]) -> float:
    """Of the device that has the most to do; `slots`: batches at once on each. 0 without any demand."""
    return max(device_loads(demands, slots).values(), default=0.0)
