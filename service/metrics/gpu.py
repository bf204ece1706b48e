"""The GPUs' metrics, under Triton's names and units.

Each sample has the one label `gpu_uuid` and a number without exponent: perf_analyzer reads them with a pattern that
allows nothing else. What a device does not tell has no sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from service.metrics.exposition import header_lines, label_text, sample_line


class Reading(Protocol):
    """What is known of one GPU; None = it does not tell."""

    @property
    def uuid(self) -> str: ...
    @property
    def utilization(self) -> float | None: ...
    @property
    def memory_used(self) -> int | None: ...
    @property
    def memory_total(self) -> int | None: ...
    @property
    def power(self) -> float | None: ...
    @property
    def power_limit(self) -> float | None: ...
    @property
    def energy(self) -> float | None: ...


_FAMILIES = (
    ("nv_gpu_utilization", "gauge", "Share of time in which the GPU computed, 0 to 1", "utilization"),
    ("nv_gpu_memory_total_bytes", "gauge", "Memory of the GPU, bytes", "memory_total"),
    ("nv_gpu_memory_used_bytes", "gauge", "Memory of the GPU in use, by whomever, bytes", "memory_used"),
    ("nv_gpu_power_usage", "gauge", "Power the GPU draws, watts", "power"),
    ("nv_gpu_power_limit", "gauge", "Power the GPU may draw, watts", "power_limit"),
    ("nv_energy_consumption", "counter", "Energy the GPU has used since the server started, joules", "energy"),
)


def gpu_lines(readings: Iterable[Reading]) -> list[str]:
    """The samples of all GPUs; nothing at all where there are none."""
    known = list(readings)
    lines: list[str] = []
    for name, kind, documentation, field in _FAMILIES if known else ():
        lines += header_lines(name, kind, documentation)
        for reading in known:
            value = getattr(reading, field)
            if value is not None:
                lines.append(sample_line(name, label_text([("gpu_uuid", reading.uuid)]), value))
    return lines
