"""EfficientNet-Lite0 as an ONNX graph, from the tensors of its PyTorch checkpoint.

The network is that of M. Tan and Q. Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks"
(2019), in the Lite form of TensorFlow's TPU repository: no squeeze-and-excitation, ReLU6, and stem and head not scaled.
Tensor names are those of the `efficientnet_lite_pytorch` implementation, whose convolutions pad as TensorFlow's `SAME`.
Batch normalisation is folded into the convolution before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from models.zoo.graph import Checkpoint, GraphBuilder, floats

Array = npt.NDArray[Any]

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
    graph.constant("classifier.weight", graph.checkpoint.tensor("_fc.weight", (CLASSES, FEATURES)))
    graph.constant("classifier.bias", graph.checkpoint.tensor("_fc.bias", (CLASSES,)))
    graph.node("Gemm", ["features", "classifier.weight", "classifier.bias"], "logits", transB=1)
    graph.node("Softmax", ["logits"], "probabilities", axis=-1)
    graph.checkpoint.refuse_unused()
    outputs = {"probabilities": CLASSES, "logits": CLASSES, "features": FEATURES}
    return graph.model(
        "efficientnet_lite0",
        [floats("image", "N", 3, IMAGE_SIZE, IMAGE_SIZE)],
        [floats(name, "N", width) for name, width in outputs.items()],
    )


class NetworkBuilder(GraphBuilder):
    """Layers by the names of their tensors."""

    def __init__(self, tensors: Mapping[str, Array]) -> None:
        super().__init__()
        self.checkpoint = Checkpoint(tensors, "an EfficientNet-Lite0")
        self.constant("zero", np.array(0, np.float32))
        self.constant("six", np.array(ACTIVATION_MAX, np.float32))

    def convolution(
        self, source: str, layer: str, norm: str, stride: int = 1, depthwise: bool = False, activate: bool = True
    ) -> str:
        """Convolution, normalisation and, unless told otherwise, ReLU6."""
        weight, bias = self.checkpoint.folded(layer, norm, BATCH_NORM_EPSILON)
        name = f"{layer}.conv"
        kernel = weight.shape[2]
        self.node(
            "Conv",
            [source, self.constant(f"{name}.weight", weight), self.constant(f"{name}.bias", bias)],
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
