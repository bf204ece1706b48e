"""An ONNX graph written operator by operator, and convolutions with the normalisation behind them folded in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from models.zoo.errors import ConversionError

Array = npt.NDArray[Any]

OPSET = 17
IR_VERSION = 8
PRODUCER = "onclock models.zoo"


def fold_batch_norm(
    weight: Array, scale: Array, offset: Array, mean: Array, variance: Array, epsilon: float
) -> tuple[Array, Array]:
    """The weight [out, in, k, k] and bias [out] of the one convolution that equals convolution + normalisation.

    In double precision, as rounding twice would be felt in deep networks.
    """
    factor = scale.astype(np.float64) / np.sqrt(variance.astype(np.float64) + epsilon)
    folded = weight.astype(np.float64) * factor[:, None, None, None]
    bias = offset.astype(np.float64) - mean.astype(np.float64) * factor
    return folded.astype(np.float32), bias.astype(np.float32)


def floats(name: str, *shape: str | int) -> onnx.ValueInfoProto:
    """A float32 input or output."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


class GraphBuilder:
    """Nodes and constants as they are added."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, Array] = {}

    def constant(self, name: str, value: Array) -> str:
        """A constant; returns its name."""
        # Contiguous, as it is written; a scalar stays one.
        self._constants[name] = np.ascontiguousarray(value).reshape(value.shape)
        return name

    def integers(self, name: str, *values: int) -> str:
        """A constant vector of int64, as shapes and axes are given."""
        return self.constant(name, np.array(values, np.int64))

    def number(self, name: str, value: float) -> str:
        """A constant float32 number."""
        return self.constant(name, np.array(value, np.float32))

    def node(self, operator: str, inputs: Sequence[str], output: str, **attributes: object) -> str:
        """An operator with one output; returns its name."""
        return self.nodes(operator, inputs, [output], **attributes)[0]

    def nodes(self, operator: str, inputs: Sequence[str], outputs: list[str], **attributes: object) -> list[str]:
        """An operator with any number of outputs; returns their names."""
        self._nodes.append(helper.make_node(operator, inputs, outputs, **attributes))
        return outputs

    def model(
        self, name: str, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]
    ) -> onnx.ModelProto:
        """The checked model."""
        constants = [numpy_helper.from_array(value, key) for key, value in self._constants.items()]
        graph = helper.make_graph(self._nodes, name, inputs, outputs, constants)
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name=PRODUCER)
        onnx.checker.check_model(model, full_check=True)
        return model


class Checkpoint:
    """The tensors of a network; knows which were used. `network` names it in errors."""

    # Counters of training that no inference needs.
    IGNORED = "num_batches_tracked"

    def __init__(self, tensors: Mapping[str, Array], network: str) -> None:
        self._tensors = tensors
        self._network = network
        self._unused = {name for name in tensors if not name.endswith(self.IGNORED)}

    def tensor(self, name: str, shape: Iterable[int] | None = None) -> Array:
        """A tensor of the checkpoint. Raises `ConversionError` if it is missing or has another shape."""
        if name not in self._tensors:
            raise ConversionError(f"the checkpoint has no tensor '{name}'; is it {self._network}?")
        found = self._tensors[name]
        if shape is not None and found.shape != tuple(shape):
            raise ConversionError(f"tensor '{name}' has shape {found.shape}, expected {tuple(shape)}")
        self._unused.discard(name)
        return found

    def folded(self, layer: str, norm: str, epsilon: float) -> tuple[Array, Array]:
        """Weight and bias of a convolution with the normalisation behind it. Raises `ConversionError` likewise."""
        weight = self.tensor(f"{layer}.weight")
        if weight.ndim != 4:
            raise ConversionError(f"tensor '{layer}.weight' has shape {weight.shape}, expected 4 dimensions")
        scale, offset, mean, variance = (self.tensor(f"{norm}.{part}", weight.shape[:1]) for part in _NORM_PARTS)
        return fold_batch_norm(weight, scale, offset, mean, variance, epsilon)

    def refuse_unused(self) -> None:
        """A tensor nobody asked for means that another network was saved."""
        if self._unused:
            raise ConversionError(f"the checkpoint has tensors {self._network} has not: {sorted(self._unused)[:5]}")


# Scale, offset, mean and variance of a normalisation, as PyTorch names them.
_NORM_PARTS = ("weight", "bias", "running_mean", "running_var")
