"""What the GPUs are doing, as NVIDIA's management library (NVML) tells it.

Promise: only the devices that models run on, told apart by their UUID, since CUDA and NVML number them differently.
What a device cannot tell (a slice of a GPU has no power meter) is None, and a library that is missing or fails costs
the figures, never the server. Read once per scrape.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

MILLI = 1000


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One GPU now. `utilization` 0 to 1: share of the last sampling period in which it computed. Memory in bytes, power
    in watts, energy in joules since the server started."""

    uuid: str
    utilization: float | None = None
    memory_used: int | None = None
    memory_total: int | None = None
    power: float | None = None
    power_limit: float | None = None
    energy: float | None = None


class GpuMeter:
    """Reads the GPUs with these UUIDs. `library` is the `pynvml` module; `why_not` says why there are no readings."""

    def __init__(self, uuids: Sequence[str], library: Any = None) -> None:
        self.why_not = ""
        self._handles: list[tuple[str, Any]] = []
        self._energy_before: dict[str, float] = {}
        if not uuids:
            self.why_not = "no model runs on a GPU"
            return
        try:
            self._nvml = importlib.import_module("pynvml") if library is None else library
        except ImportError:
            self.why_not = "nvidia-ml-py is not installed"
            return
        try:
            self._nvml.nvmlInit()
            self._handles = [(uuid, self._nvml.nvmlDeviceGetHandleByUUID(uuid)) for uuid in uuids]
        except self._nvml.NVMLError as error:
            self.why_not = f"NVML: {error}"
            return
        for uuid, handle in self._handles:
            self._energy_before[uuid] = self._ask(self._nvml.nvmlDeviceGetTotalEnergyConsumption, handle) or 0.0

    def read(self) -> list[GpuReading]:
        """All of them now."""
        return [self._reading(uuid, handle) for uuid, handle in self._handles]

    def free_bytes(self, uuid: str) -> int | None:
        """Memory of the GPU with this UUID that nobody uses, bytes; None where that cannot be told."""
        for known, handle in self._handles:
            if known == uuid:
                memory = self._ask(self._nvml.nvmlDeviceGetMemoryInfo, handle)
                return None if memory is None else int(memory.free)
        return None

    def _reading(self, uuid: str, handle: Any) -> GpuReading:
        nvml = self._nvml
        rates = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        power = self._ask(nvml.nvmlDeviceGetPowerUsage, handle)
        limit = self._ask(nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
        energy = self._ask(nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
        return GpuReading(
            uuid,
            utilization=None if rates is None else rates.gpu / 100,
            memory_used=None if memory is None else int(memory.used),
            memory_total=None if memory is None else int(memory.total),
            power=None if power is None else power / MILLI,
            power_limit=None if limit is None else limit / MILLI,
            energy=None if energy is None else (energy - self._energy_before[uuid]) / MILLI,
        )

    def _ask(self, question: Callable[[Any], Any], handle: Any) -> Any:
        try:
            return question(handle)
        except self._nvml.NVMLError:
            return None
