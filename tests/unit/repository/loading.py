"""A loader on the CPU of this process, and what it is asked to load."""

from __future__ import annotations

from pathlib import Path

from service.engine.devices import Device, Devices
from service.engine.runtime import Runtime
from service.metrics import MetricsRegistry
from service.repository.layout import scan
from service.repository.loader import Loaded, Loader, LoadOptions
from service.repository.repository import ModelRepository

CPU = Device("cpu", "cpu", 0, 2, 1)
DEVICES = Devices(CPU, (), (CPU,), "the CPU was asked for")
# Enough to measure a few rungs of a tiny model; a test that looks at the table says more.
BUDGET_NS = 5_000_000


def loader_of(
    budget_ns: int = BUDGET_NS, cache: Path | None = None, default_max_batch_size: int = 8, devices: Devices = DEVICES
) -> Loader:
    return Loader(Runtime(devices.all), devices, LoadOptions(default_max_batch_size, budget_ns, cache))


def load(repository: Path, name: str, loader: Loader | None = None, version: int = 1) -> Loaded:
    """Load one model of a repository directory. Raises `ModelLoadError`."""
    found = scan([repository]).model(name)
    assert found is not None
    if found.error is not None:
        raise found.error
    files = found.version(version)
    assert files is not None
    return (loader or loader_of()).load(found, files)


class Progress:
    """Keeps what it is told of loading."""

    def __init__(self) -> None:
        self.total = -1
        self.loads: list[tuple[str, str]] = []
        self.failures: dict[tuple[str, str], str] = {}
        self.over = False

    def started(self, total: int) -> None:
        self.total = total

    def loaded(self, name: str, version: str, seconds: float) -> None:
        assert seconds > 0
        self.loads.append((name, version))

    def failed(self, name: str, version: str, reason: str) -> None:
        self.failures[name, version] = reason

    def finished(self) -> None:
        self.over = True


def repository_of(*directories: Path, loader: Loader | None = None) -> ModelRepository:
    return ModelRepository(directories, loader or loader_of(), MetricsRegistry())


def load_all(repository: ModelRepository, parallelism: int = 1) -> Progress:
    progress = Progress()
    repository.load_all(progress, parallelism, stopping=lambda: False)
    return progress
