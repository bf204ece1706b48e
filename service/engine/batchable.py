"""Is joining requests safe for this model? Found out by running it, since files state it wrongly or not at all.

Two rows are run alone and together. If an output does not have a row per row, rows cannot be told apart; if a row's
answer depends on its neighbours (dynamic quantisation scales over the whole batch), answers would change with the load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from service.config.model import ModelConfig
from service.engine.pool import Instance, undeclared
from service.engine.warmup import Sample, batch_arrays, vary
from service.errors import DeviceFailed, ModelLoadError, ServiceError
from service.tensor import Array, DataType, TensorSpec

# Floating-point sums in another order differ by parts in 10^6; quantisation over a batch by parts in 10^2.
TOLERANCE = 1e-3


def check_batching(
    instance: Instance, config: ModelConfig, sample: Sample, explicit: bool
) -> tuple[ModelConfig, list[str]]:
    """The configuration to serve with, and notes on what was decided.

    Raises `ModelLoadError` when batching was asked for (`explicit`) and the model cannot be batched.
    """
    rows = [sample, vary(sample, config)]
    try:
        together = _run(instance, config, rows)
        alone = [_run(instance, config, [row]) for row in rows]
    except DeviceFailed:
        raise
    except ServiceError as error:
        return _refuse(config, explicit, f"it fails on a batch of two rows: {error}")
    outputs = config.session_outputs
    instance.undeclared_shapes |= undeclared(outputs, together)
    for index, spec in enumerate(outputs):
        if together[index].ndim <= spec.axis or together[index].shape[spec.axis] != len(rows):
            return _refuse(
                config,
                explicit,
                f"output '{spec.name}' has shape {list(together[index].shape)} for a batch of two rows",
            )
    for index, spec in enumerate(outputs):
        for position, answers in enumerate(alone):
            if not same(spec.rows(together[index], position, position + 1), answers[index], spec):
                note = (
                    f"output '{spec.name}' of a row depends on the other rows of its batch (as with dynamic "
                    "quantisation): answers can change with the load"
                )
                if "batching" in config.parameters or explicit:
                    return config, [note + "; batching stays on because the configuration asks for it"]
                return replace(config, dynamic_batching=None), [note + "; requests are therefore not joined"]
    return config, []


def _run(instance: Instance, config: ModelConfig, rows: Sequence[Sample]) -> list[Array]:
    return instance.session.run(batch_arrays(rows, config), config.session_outputs)


def _refuse(config: ModelConfig, explicit: bool, why: str) -> tuple[ModelConfig, list[str]]:
    if explicit:
        raise ModelLoadError(f"max_batch_size: {config.max_batch_size} was asked for, but {why}; set it to 0")
    return replace(config, dynamic_batching=None), [f"requests are not joined: {why}"]


def same(one: Array, other: Array, spec: TensorSpec) -> bool:
    """Whether two answers of a model are one, but for rounding."""
    if one.shape != other.shape:
        return False
    if one.dtype.kind != "f" and spec.datatype is not DataType.BF16:
        return bool(np.array_equal(one, other))
    if spec.datatype is DataType.BF16:
        one, other = _widened(one), _widened(other)
    scale = max(1e-30, float(np.nanmax(np.abs(one.astype(np.float64)), initial=0.0)))
    return bool(np.allclose(one, other, rtol=0.0, atol=TOLERANCE * scale, equal_nan=True))


def _widened(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)
