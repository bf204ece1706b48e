"""The instances of a model on a device, made the same way for the server, `onclock profile` and the benchmarks.

On the CPU the weights exist once: sessions may run in parallel there, and each instance has its own buffers. On a GPU
each instance is a session with a stream of its own, and gathers its batches in page-locked memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from service.config.model import ModelConfig
from service.engine.buffers import Memory
from service.engine.devices import Device
from service.engine.gate import GPUS
from service.engine.graphs import GraphInstance
from service.engine.options import plan_session
from service.engine.pinned import PageLocked
from service.engine.pool import Instance
from service.engine.session import OnnxSession
from service.engine.warmup import Sample, largest_run, requests
from service.errors import DeviceFailed, ModelLoadError, ServiceError
from service.scheduler import bucket_ladder


def make_instances(path: Path, config: ModelConfig, device: Device, count: int) -> list[Instance]:
    """`count` instances of the model file `path` on `device`. Raises `ModelLoadError` (or its `ConfigError`)."""
    plan = plan_session(config, device)
    max_rows = max(1, config.max_batch_size)
    if device.kind == "cpu":
        session = OnnxSession(path, plan)
        return [Instance(session, config.session_inputs, config.session_outputs, max_rows) for _ in range(count)]
    why_not = ""
    try:
        sessions = [OnnxSession(path, plan)]
    except ModelLoadError as error:
        # ONNX Runtime looks for nodes that it cannot capture (control flow, other providers') when making a session.
        if not plan.graphs:
            raise
        why_not, plan = str(error), plan.without_graphs()
        sessions = [OnnxSession(path, plan)]
    sessions += [OnnxSession(path, plan) for _ in range(count - 1)]
    # Only now: the CUDA provider, once loaded, has loaded the CUDA runtime.
    locked = PageLocked(device.index)
    memory = Memory(
        inputs=locked.zeros if config.optimization.input_pinned_memory else np.zeros,
        outputs=locked.zeros if config.optimization.output_pinned_memory else np.zeros,
    )
    specs = (config.session_inputs, config.session_outputs)
    if plan.graphs:
        where, gate = ("cuda", device.index), GPUS
        remake = partial(OnnxSession, path, plan.without_graphs())
        return [GraphInstance(session, *specs, max_rows, gate, where, remake, memory) for session in sessions]
    instances = [Instance(session, *specs, max_rows, memory) for session in sessions]
    for instance in instances:
        instance.why_not = why_not
    return instances


def finish_graphs(
    instances: Sequence[Instance], config: ModelConfig, sample: Sample | None, sizes: Sequence[int] | None = None
) -> list[str]:
    """Capture what of `sizes` (unset: of the ladder of batch sizes) is not captured yet, and nothing after that; how it
    went.

    Raises `DeviceFailed`.
    """
    on_gpu = any(isinstance(instance, GraphInstance) or instance.why_not for instance in instances)
    if not config.captures_graphs or (config.optimization.cuda_graphs is None and not on_gpu):
        return []
    if sizes is None:
        sizes = bucket_ladder(largest_run(config))
    for instance in instances:
        if sample is not None and isinstance(instance, GraphInstance):
            _capture_all(instance, config, sample, sizes)
        instance.seal()
    captured = min(instance.graphs for instance in instances)
    reasons = {_why_not(instance) for instance in instances if instance.why_not or not captured}
    notes = [f"CUDA graphs: {captured} batch sizes captured"] if captured else []
    return notes + [f"CUDA graphs: {'no more' if captured else 'none'}: {reason}" for reason in sorted(reasons)]


def _why_not(instance: Instance) -> str:
    if instance.why_not or not isinstance(instance, GraphInstance):
        return instance.why_not or "there is no GPU"
    if instance.undeclared_shapes:
        return "the model's answers have other shapes or types than its file declares"
    return "no run of a size that has a fixed place on the device"


def captured_sizes(instances: Sequence[Instance], sample: Sample) -> tuple[int, ...]:
    """The batch sizes of `sample`'s shape that every instance replays."""
    each = [i.captured(sample.shape) if isinstance(i, GraphInstance) else frozenset[int]() for i in instances]
    return tuple(sorted(frozenset.intersection(*each)))


def _capture_all(instance: GraphInstance, config: ModelConfig, sample: Sample, sizes: Sequence[int]) -> None:
    for rows in sizes:
        if instance.why_not:
            return
        try:
            instance.run(requests(sample, config, rows), rows, rows)
        except DeviceFailed:
            raise
        except ServiceError as error:
            instance.why_not = f"{rows} rows cannot be run: {error}"
