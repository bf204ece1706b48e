"""The instances of a model on a device, made the same way for the server, `onclock profile` and the benchmarks.

On the CPU the weights exist once: sessions may run in parallel there, and each instance has its own buffers. On a GPU
each instance is a session with a stream of its own, and gathers its batches in page-locked memory.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from service.config.model import ModelConfig
from service.engine.buffers import Memory
from service.engine.devices import Device
from service.engine.options import plan_session
from service.engine.pinned import PageLocked
from service.engine.pool import Instance
from service.engine.session import OnnxSession


def make_instances(path: Path, config: ModelConfig, device: Device, count: int) -> list[Instance]:
    """`count` instances of the model file `path` on `device`. Raises `ModelLoadError` (or its `ConfigError`)."""
    plan = plan_session(config, device)
    max_rows = max(1, config.max_batch_size)
    if device.kind == "cpu":
        session = OnnxSession(path, plan)
        return [Instance(session, config.inputs, config.outputs, max_rows) for _ in range(count)]
    sessions = [OnnxSession(path, plan) for _ in range(count)]
    # Only now: the CUDA provider, once loaded, has loaded the CUDA runtime.
    locked = PageLocked(device.index)
    memory = Memory(
        inputs=locked.zeros if config.optimization.input_pinned_memory else np.zeros,
        outputs=locked.zeros if config.optimization.output_pinned_memory else np.zeros,
    )
    return [Instance(session, config.inputs, config.outputs, max_rows, memory) for session in sessions]
