"""The session of a head: what a backbone gives in, its answer out. On the CPU, wherever the backbone runs.

A head is a few kilobytes of weights, so it runs in microseconds; sending rows back to a GPU would cost more.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from service.config.model import ModelConfig
from service.engine.batchable import same
from service.engine.buffers import batch_output
from service.engine.devices import Device
from service.engine.options import plan_session
from service.engine.session import OnnxSession
from service.errors import ExecutionFailed, ModelLoadError, ServiceError
from service.request import BatchOutput
from service.tensor import Array, DataType, TensorSpec

# Open sizes of a backbone's output are tried with this.
_TRIED = 8


class Head:
    """A loaded head: `inputs` are outputs of its backbone. Any thread."""

    def __init__(self, path: Path, config: ModelConfig, inputs: tuple[TensorSpec, ...], cpu: Device) -> None:
        """Load the model file on `cpu` and try it. Raises `ModelLoadError`."""
        self.inputs = inputs
        self._outputs = config.outputs
        self._session = OnnxSession(path, plan_session(config, cpu))
        try:
            self._try()
        except ServiceError as error:
            raise ModelLoadError(f"the head fails on what its backbone may give: {error}") from error

    def run(self, features: Sequence[Array], rows: int) -> list[BatchOutput]:
        """The head's outputs for `rows` rows. Raises `ExecutionFailed` or `OutOfMemory`."""
        feeds = {spec.name: (spec, array) for spec, array in zip(self.inputs, features, strict=True)}
        answers = self._session.run(feeds, self._outputs)
        outputs = [batch_output(spec, array, rows) for spec, array in zip(self._outputs, answers, strict=True)]
        for spec, output in zip(self._outputs, outputs, strict=True):
            if not output.spec.batched:
                raise ExecutionFailed(
                    f"output '{spec.name}' has shape {list(output.shape)} for {rows} rows: they cannot be told apart"
                )
        return outputs

    def _try(self) -> None:
        """A row's answer must not depend on who rides in its batch. Raises `ExecutionFailed`."""
        rng = np.random.default_rng(0)
        both = [_drawn(rng, spec) for spec in self.inputs]
        together = [output.array.copy() for output in self.run(both, 2)]
        for row in range(2):
            alone = self.run([array[row : row + 1] for array in both], 1)
            for spec, one, other in zip(self._outputs, together, alone, strict=True):
                if not same(one[row : row + 1], other.array, spec):
                    raise ExecutionFailed(f"output '{spec.name}' of a row depends on the other rows of its batch")


def _drawn(rng: np.random.Generator, spec: TensorSpec) -> Array:
    shape = (2, *(_TRIED if size == -1 else size for size in spec.shape))
    if spec.datatype in (DataType.FP16, DataType.FP32, DataType.FP64):
        return rng.standard_normal(shape).astype(spec.datatype.dtype)
    return np.zeros(shape, spec.datatype.dtype)
