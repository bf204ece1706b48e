"""Which devices there are, and which are taken: found out once at start, said in one log line and one metric.

A device has a name (`cpu`, `cuda:0`), a number of run slots (batches that may execute at once) and the execution
provider its sessions are created with. `auto` takes the GPUs when the CUDA provider is built in, its libraries load and
a driver answers; the reason is kept either way, so that nobody has to guess why a server runs on the CPU.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import onnxruntime as ort

from service.errors import ModelLoadError

CUDA_PROVIDER = "CUDAExecutionProvider"
TENSORRT_PROVIDER = "TensorrtExecutionProvider"
CPU_PROVIDER = "CPUExecutionProvider"


@dataclass(frozen=True, slots=True)
class Device:
    """A place where batches run. `index` is the CUDA device number (0 for the CPU); `threads` the intra-op threads of
    what a batch computes on the CPU. `uuid` is a GPU's, as NVIDIA's tools write it; empty where it is not known."""

    name: str
    kind: Literal["cpu", "gpu"]
    index: int
    slots: int
    threads: int = 1
    uuid: str = ""

    @property
    def provider(self) -> str:
        return CPU_PROVIDER if self.kind == "cpu" else CUDA_PROVIDER


@dataclass(frozen=True, slots=True)
class Devices:
    """The devices of this process. `taken` is where models run that do not say; `why` says how that came about."""

    cpu: Device
    gpus: tuple[Device, ...]
    taken: tuple[Device, ...]
    why: str

    @property
    def all(self) -> tuple[Device, ...]:
        return (self.cpu, *self.gpus)


def find_devices(wanted: Literal["auto", "cpu", "cuda"], cpu_slots: int, gpu_slots: int, cpu_threads: int) -> Devices:
    """Look for devices. Raises `ModelLoadError` when `cuda` is wanted and there is none."""
    cpu = Device("cpu", "cpu", 0, cpu_slots, cpu_threads)
    if wanted == "cpu":
        return Devices(cpu, (), (cpu,), "the CPU was asked for")
    uuids, why_not = _cuda_devices()
    count = len(uuids)
    if count == 0:
        if wanted == "cuda":
            raise ModelLoadError(f"device cuda was asked for, but {why_not}")
        return Devices(cpu, (), (cpu,), f"no GPU: {why_not}")
    gpus = tuple(Device(f"cuda:{i}", "gpu", i, gpu_slots, cpu_threads, known) for i, known in enumerate(uuids))
    return Devices(cpu, gpus, gpus, f"{count} NVIDIA GPU{'s' if count > 1 else ''}")


def _cuda_devices() -> tuple[list[str], str]:
    """The UUIDs of the GPUs that the driver offers, and the reason when there are none."""
    if CUDA_PROVIDER not in ort.get_available_providers():
        return (
            [],
            f"{ort.get_build_info().split(',')[0] or 'this onnxruntime'} has no CUDA provider; install onnxruntime-gpu",
        )
    library = ctypes.util.find_library("cuda") or "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return [], "there is no NVIDIA driver (libcuda.so.1)"
    status = driver.cuInit(0)
    count = ctypes.c_int(0)
    if status != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return [], f"the NVIDIA driver does not start (cuInit: error {status})"
    if count.value == 0:
        return [], "the NVIDIA driver shows no GPU"
    # CUDA and cuDNN from the nvidia-* wheels, when they are installed; the system's otherwise.
    ort.preload_dlls()
    return [_uuid(driver, index) for index in range(count.value)], ""


def _uuid(driver: ctypes.CDLL, index: int) -> str:
    """The UUID of a GPU as NVIDIA's tools write it; empty when the driver does not tell."""
    device = ctypes.c_int(0)
    raw = (ctypes.c_ubyte * 16)()
    if driver.cuDeviceGet(ctypes.byref(device), index) != 0 or driver.cuDeviceGetUuid(raw, device) != 0:
        return ""
    return f"GPU-{uuid.UUID(bytes=bytes(raw))}"


def names(devices: Sequence[Device]) -> str:
    """The devices' names, for messages."""
    return ", ".join(device.name for device in devices)
