"""What `onclock check --run` does with each version: load it and run it once, as the server would."""

from __future__ import annotations

from typing import Literal

from service.cli.profile import open_model
from service.config.complete import Completed
from service.config.graph import model_file
from service.config.pbtxt import CONFIG_FILENAME, read_config
from service.engine.devices import find_devices
from service.engine.options import share_threads
from service.repository.layout import VersionFiles


class Probe:
    """Called with each version; returns what else there is to say. Raises `ModelLoadError` when it cannot be served."""

    def __init__(self, device: Literal["auto", "cpu", "cuda"], threads: int) -> None:
        self._devices = find_devices(device, cpu_slots=1, gpu_slots=1, cpu_threads=threads)
        share_threads(threads)

    @property
    def gpus(self) -> list[int]:
        """The CUDA devices that instance groups may ask for."""
        return [gpu.index for gpu in self._devices.gpus]

    def __call__(self, version: VersionFiles, completed: Completed) -> list[str]:
        directory = version.directory.parent
        asked = read_config(directory / CONFIG_FILENAME)
        explicit = asked is not None and asked.max_batch_size > 1
        path = model_file(version.model_path)
        _, _, _, notes = open_model(path, directory, completed.config, self._devices.taken[0], explicit)
        return notes
