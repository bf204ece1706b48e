"""What NVML tells of a GPU, in the units that are promised; what it does not tell is left out.

NVML is there only where there is a driver (tests/gpu). The library here has its names and units, and fails as it does.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from service.engine.nvml import GpuMeter, GpuReading
from service.metrics import MetricsRegistry
from service.metrics.gpu import gpu_lines

UUID = "GPU-7c1a0d6e-0000-0000-0000-000000000001"
# What perf_analyzer looks for (src/metrics_manager of its repository): one label, and no exponent in the number.
PERF_ANALYZER = r'\n{name}\{{gpu_uuid="([^"]+)"\}} (\d+\.?\d*)'


class NvmlError(Exception):
    """As `pynvml.NVMLError`."""


class Library:
    """`pynvml` with one GPU. What is in `silent` is not supported by it."""

    NVMLError = NvmlError

    def __init__(self, silent: tuple[str, ...] = (), broken: bool = False) -> None:
        self.silent = silent
        self.broken = broken
        self.energy_mj = 5_000_000

    def nvmlInit(self) -> None:  # noqa: N802
        if self.broken:
            raise NvmlError("Driver Not Loaded")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid != UUID:
            raise NvmlError("Not Found")
        return "handle"

    def _told(self, what: str, value: Any) -> Any:
        if what in self.silent:
            raise NvmlError("Not Supported")
        return value

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:  # noqa: N802
        return self._told("utilization", SimpleNamespace(gpu=37, memory=12))

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:  # noqa: N802
        return self._told("memory", SimpleNamespace(used=2**30, total=150754824192, free=149681082368))

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802
        return int(self._told("power", 123_456))

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:  # noqa: N802
        return int(self._told("limit", 700_000))

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        return int(self._told("energy", self.energy_mj))


def test_units() -> None:
    """Percent become a share, milliwatts watts, millijoules joules since the start."""
    library = Library()
    meter = GpuMeter([UUID], library)
    library.energy_mj += 2_500
    assert meter.read() == [GpuReading(UUID, 0.37, 2**30, 150754824192, 123.456, 700.0, 2.5)]
    assert meter.why_not == ""
    assert meter.free_bytes(UUID) == 149681082368
    assert meter.free_bytes("GPU-another") is None
    assert GpuMeter([UUID], Library(silent=("memory",))).free_bytes(UUID) is None


def test_what_a_device_does_not_tell_is_left_out() -> None:
    """A slice of a GPU has no power meter and no utilization."""
    meter = GpuMeter([UUID], Library(silent=("utilization", "power", "limit", "energy")))
    (reading,) = meter.read()
    assert reading == GpuReading(UUID, memory_used=2**30, memory_total=150754824192)
    text = "\n".join(gpu_lines([reading]))
    assert 'nv_gpu_memory_total_bytes{gpu_uuid="' + UUID + '"} 150754824192' in text
    assert "nv_gpu_power_usage{" not in text


@pytest.mark.parametrize(
    ("uuids", "library", "why"),
    [
        ([], None, "no model runs on a GPU"),
        ([UUID], Library(broken=True), "NVML: Driver Not Loaded"),
        (["GPU-unknown"], Library(), "NVML: Not Found"),
    ],
)
def test_without_readings_there_is_a_reason(uuids: list[str], library: Any, why: str) -> None:
    """The server goes on without."""
    meter = GpuMeter(uuids, library)
    assert meter.read() == []
    assert meter.why_not == why


def test_the_real_library_without_a_driver() -> None:
    """On a machine without one, as this may be, it says so and reads nothing."""
    meter = GpuMeter(["GPU-00000000-0000-0000-0000-000000000000"])
    assert meter.read() == []
    assert meter.why_not.startswith("NVML: ")


def test_perf_analyzer_reads_them() -> None:
    """Its own pattern finds the whole number, however large."""
    registry = MetricsRegistry()
    registry.gpus = GpuMeter([UUID], Library()).read
    text = registry.render().decode()
    for name, number in {
        "nv_gpu_utilization": "0.37",
        "nv_gpu_power_usage": "123.456",
        "nv_gpu_memory_used_bytes": "1073741824",
        "nv_gpu_memory_total_bytes": "150754824192",
    }.items():
        (found,) = re.findall(PERF_ANALYZER.format(name=name), text)
        assert found == (UUID, number)


def test_without_gpus_there_are_no_such_metrics() -> None:
    """Not even their headers."""
    assert "nv_gpu" not in MetricsRegistry().render().decode()
