"""Which devices are taken, and the reason that is given."""

from __future__ import annotations

import ctypes
from typing import Any

import onnxruntime as ort
import pytest

from service.engine import devices
from service.engine.devices import CPU_PROVIDER, CUDA_PROVIDER, Device, find_devices, names
from service.errors import ModelLoadError


class Driver:
    """A CUDA driver that shows `count` GPUs, or does not start (`status`)."""

    def __init__(self, count: int, status: int = 0) -> None:
        self.count = count
        self.status = status
        self.uuid_status = 0

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.status

    def cuDeviceGetCount(self, pointer: Any) -> int:  # noqa: N802
        pointer._obj.value = self.count
        return 0

    def cuDeviceGet(self, pointer: Any, index: int) -> int:  # noqa: N802
        pointer._obj.value = index
        return 0

    def cuDeviceGetUuid(self, raw: Any, device: ctypes.c_int) -> int:  # noqa: N802
        raw[15] = device.value
        return self.uuid_status


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes this process see a driver, or None for none."""

    def put(found: Driver | None, providers: tuple[str, ...] = (CUDA_PROVIDER, CPU_PROVIDER)) -> None:
        def load(name: str) -> Driver:
            if found is None:
                raise OSError(f"{name}: cannot open shared object file")
            return found

        monkeypatch.setattr(ctypes, "CDLL", load)
        monkeypatch.setattr(ort, "get_available_providers", lambda: list(providers))
        monkeypatch.setattr(ort, "preload_dlls", lambda: None)

    return put


def test_the_cpu_when_asked_for(driver: Any) -> None:
    """GPUs are not even looked for."""
    driver(Driver(2))
    found = find_devices("cpu", cpu_slots=2, gpu_slots=1, cpu_threads=3)
    assert found.taken == found.all == (Device("cpu", "cpu", 0, 2, 3),)
    assert found.why == "the CPU was asked for"


def test_auto_takes_every_gpu(driver: Any) -> None:
    """With the run slots of GPUs; the CPU stays there for models that ask for it."""
    driver(Driver(2))
    found = find_devices("auto", cpu_slots=2, gpu_slots=3, cpu_threads=4)
    first, second = (f"GPU-00000000-0000-0000-0000-00000000000{index}" for index in range(2))
    assert found.taken == found.gpus
    assert found.gpus == (Device("cuda:0", "gpu", 0, 3, 4, first), Device("cuda:1", "gpu", 1, 3, 4, second))
    assert names(found.all) == "cpu, cuda:0, cuda:1"
    assert found.why == "2 NVIDIA GPUs"
    assert [device.provider for device in found.all] == [CPU_PROVIDER, CUDA_PROVIDER, CUDA_PROVIDER]


@pytest.mark.parametrize(
    ("found", "providers", "reason"),
    [
        (None, (CUDA_PROVIDER,), "no NVIDIA driver"),
        (Driver(0), (CUDA_PROVIDER,), "shows no GPU"),
        (Driver(1, status=999), (CUDA_PROVIDER,), "does not start (cuInit: error 999)"),
        (Driver(1), (CPU_PROVIDER,), "install onnxruntime-gpu"),
    ],
)
def test_without_a_gpu_the_reason_is_kept(
    driver: Any, found: Driver | None, providers: tuple[str, ...], reason: str
) -> None:
    """auto takes the CPU and says why; cuda refuses to start with the same reason."""
    driver(found, providers)
    taken = find_devices("auto", 1, 1, 1)
    assert [device.name for device in taken.taken] == ["cpu"]
    assert reason in taken.why
    with pytest.raises(ModelLoadError, match="device cuda was asked for") as error:
        find_devices("cuda", 1, 1, 1)
    assert reason in str(error.value)


def test_cuda_when_it_is_there(driver: Any) -> None:
    """Asked for and found."""
    driver(Driver(1))
    assert [device.name for device in find_devices("cuda", 1, 1, 1).taken] == ["cuda:0"]


def test_this_machine_can_be_looked_at() -> None:
    """The real look finds something on any machine, with a reason."""
    uuids, why_not = devices._cuda_devices()
    assert (not uuids) == bool(why_not)


def test_a_driver_that_tells_no_uuid(driver: Any) -> None:
    """The device is used all the same; it only has no metrics of its own."""
    old = Driver(1)
    old.uuid_status = 1
    driver(old)
    (gpu,) = find_devices("cuda", cpu_slots=1, gpu_slots=1, cpu_threads=1).gpus
    assert gpu.uuid == ""
