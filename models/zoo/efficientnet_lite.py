"""EfficientNet-Lite0 as an ONNX graph, from the tensors of its PyTorch checkpoint.

The network is that of M. Tan and Q. Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks"
(2019), in the Lite form of TensorFlow's TPU repository: no squeeze-and-excitation, ReLU6, and stem and head not scaled.
Tensor names are those of the `efficientnet_lite_pytorch` implementation, whose convolutions pad as TensorFlow's `SAME`.
Batch normalisation is folded into the convolution before it, in double precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from models.zoo.errors import ConversionError

Array = npt.NDArray[Any]

OPSET = 17
IR_VERSION = 8
IMAGE_SIZE = 224
CLASSES = 1000
FEATURES = 1280
# TensorFlow's batch normalisation constant for this family; PyTorch's own default would be 1e-5.
BATCH_NORM_EPSILON = 1e-3
# ReLU6: activations are clipped to [0, 6].
ACTIVATION_MAX = 6.0


@dataclass(frozen=True, slots=True)
class Stage:
    """`repeats` inverted-residual blocks; the first has `stride`, `expansion` 1 leaves the expanding layer out."""

    repeats: int
    stride: int
    expansion: int


# Table 1 of the paper; kernel sizes and channels follow from the weights.
LITE0_STAGES = (
    Stage(1, 1, 1),
    Stage(2, 2, 6),
    Stage(2, 2, 6),
    Stage(3, 2, 6),
    Stage(3, 1, 6),
    Stage(4, 2, 6),
    Stage(1, 1, 6),
)


def fold_batch_norm(weight: Array, scale: Array, offset: Array, mean: Array, variance: Array) -> tuple[Array, Array]:
    """The weight [out, in, k, k] and bias [out] of the one convolution that equals convolution + normalisation."""
    factor = scale.astype(np.float64) / np.sqrt(variance.astype(np.float64) + BATCH_NORM_EPSILON)
    folded = weight.astype(np.float64) * factor[:, None, None, None]
    bias = offset.astype(np.float64) - mean.astype(np.float64) * factor
    return folded.astype(np.float32), bias.astype(np.float32)


def build(tensors: Mapping[str, Array]) -> onnx.ModelProto:
    """The network: `image` FP32 [N, 3, 224, 224] -> three views of one answer.

    `probabilities` and `logits` FP32 [N, 1000] over the ImageNet classes, `features` FP32 [N, 1280] for transfer
    learning. Ask for the outputs you need. Raises `ConversionError`.
    """
    graph = NetworkBuilder(tensors)
    current = graph.convolution("image", "_conv_stem", "_bn0", stride=2)
    block = 0
    for stage in LITE0_STAGES:
        for repeat in range(stage.repeats):
            stride = stage.stride if repeat == 0 else 1
            current = graph.inverted_residual(current, f"_blocks.{block}", stride, stage.expansion, repeat > 0)
            block += 1
    current = graph.convolution(current, "_conv_head", "_bn1")
    pooled = graph.node("GlobalAveragePool", [current], "pooled")
    graph.node("Flatten", [pooled], "features", axis=1)
    graph.constant("classifier.weight", graph.tensor("_fc.weight", (CLASSES, FEATURES)))
    graph.constant("classifier.bias", graph.tensor("_fc.bias", (CLASSES,)))
    graph.node("Gemm", ["features", "classifier.weight", "classifier.bias"], "logits", transB=1)
    graph.node("Softmax", ["logits"], "probabilities", axis=-1)
    graph.refuse_unused()
    outputs = {"probabilities": CLASSES, "logits": CLASSES, "features": FEATURES}
    return graph.model(
        "efficientnet_lite0",
        helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, IMAGE_SIZE, IMAGE_SIZE]),
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", width]) for name, width in outputs.items()],
    )


class NetworkBuilder:
    """Nodes and constants as they are added; knows which tensors of the checkpoint were used."""

    def __init__(self, tensors: Mapping[str, Array]) -> None:
        self._tensors = tensors
        self._unused = {name for name in tensors if not name.endswith("num_batches_tracked")}
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, Array] = {}
        self.constant("zero", np.array(0, np.float32))
        self.constant("six", np.array(ACTIVATION_MAX, np.float32))

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Array:
        """A tensor of the checkpoint. Raises `ConversionError` if it is missing or has another shape."""
        if name not in self._tensors:
            raise ConversionError(f"the checkpoint has no tensor '{name}'; is it an EfficientNet-Lite0?")
        found = self._tensors[name]
        if shape is not None and found.shape != shape:
            raise ConversionError(f"tensor '{name}' has shape {found.shape}, expected {shape}")
        self._unused.discard(name)
        return found

    def constant(self, name: str, value: Array) -> str:
        self._constants[name] = value
        return name

    def node(self, operator: str, inputs: list[str], output: str, **attributes: object) -> str:
        self._nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def convolution(
        self, source: str, layer: str, norm: str, stride: int = 1, depthwise: bool = False, activate: bool = True
    ) -> str:
        """Convolution, normalisation and, unless told otherwise, ReLU6."""
        weight = self.tensor(f"{layer}.weight")
        if weight.ndim != 4:
            raise ConversionError(f"tensor '{layer}.weight' has shape {weight.shape}, expected 4 dimensions")
        per_channel = [self.tensor(f"{norm}.{part}", weight.shape[:1]) for part in _NORM_PARTS]
        folded, bias = fold_batch_norm(weight, *per_channel)
        name = f"{layer}.conv"
        kernel = weight.shape[2]
        self.node(
            "Conv",
            [source, self.constant(f"{name}.weight", folded), self.constant(f"{name}.bias", bias)],
            name,
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            group=weight.shape[0] if depthwise else 1,
            auto_pad="SAME_UPPER",
        )
        return self.node("Clip", [name, "zero", "six"], f"{layer}.relu6") if activate else name

    def inverted_residual(self, source: str, block: str, stride: int, expansion: int, residual: bool) -> str:
        """Expand (1x1), filter each channel (k x k), project (1x1); add the input where the shapes allow it."""
        current = source
        if expansion != 1:
            current = self.convolution(current, f"{block}._expand_conv", f"{block}._bn0")
        current = self.convolution(current, f"{block}._depthwise_conv", f"{block}._bn1", stride, depthwise=True)
        current = self.convolution(current, f"{block}._project_conv", f"{block}._bn2", activate=False)
        return self.node("Add", [current, source], f"{block}.sum") if residual else current

    def refuse_unused(self) -> None:
        """A tensor nobody asked for means that another network was saved."""
        if self._unused:
            raise ConversionError(f"the checkpoint has tensors EfficientNet-Lite0 has not: {sorted(self._unused)[:5]}")

    def model(self, name: str, image: onnx.ValueInfoProto, outputs: list[onnx.ValueInfoProto]) -> onnx.ModelProto:
        """The checked model."""
        constants = [numpy_helper.from_array(value, key) for key, value in self._constants.items()]
        graph = helper.make_graph(self._nodes, name, [image], outputs, constants)
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="onclock models.zoo"
        )
        onnx.checker.check_model(model, full_check=True)
        return model


# Scale, offset, mean and variance of a normalisation, as PyTorch names them.
_NORM_PARTS = ("weight", "bias", "running_mean", "running_var")
