"""MobileNetV2 as an ONNX graph, from the tensors of torchvision's checkpoint.

The network is that of M. Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (2018). Batch
normalisation is folded into the convolution before it.
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

CLASSES = 1000
FEATURES = 1280
# PyTorch's default.
BATCH_NORM_EPSILON = 1e-5
# ReLU6: activations are clipped to [0, 6].
ACTIVATION_MAX = 6.0


@dataclass(frozen=True, slots=True)
class Stage:
    """`repeats` inverted-residual blocks; the first has `stride`, without `expands` they leave the first layer out."""

    repeats: int
    stride: int
    expands: bool = True


# Table 2 of the paper; channels follow from the weights.
STAGES = (
    Stage(1, 1, expands=False),
    Stage(2, 2),
    Stage(3, 2),
    Stage(4, 2),
    Stage(3, 1),
    Stage(3, 2),
    Stage(1, 1),
)


def build(tensors: Mapping[str, Array]) -> onnx.ModelProto:
    """The network: `image` FP32 [N, 3, H, W] -> `probabilities`, `logits` FP32 [N, 1000], `features` FP32 [N, 1280].

    It was trained at 224x224; other sizes are taken, too. Raises `ConversionError`.
    """
    graph = Network(tensors)
    current = graph.convolution("image", "features.0.0", "features.0.1", stride=2)
    block = 1
    for stage in STAGES:
        for repeat in range(stage.repeats):
            stride = stage.stride if repeat == 0 else 1
            current = graph.inverted_residual(current, f"features.{block}.conv", stride, stage.expands, repeat > 0)
            block += 1
    current = graph.convolution(current, f"features.{block}.0", f"features.{block}.1")
    pooled = graph.node("GlobalAveragePool", [current], "pooled")
    graph.node("Flatten", [pooled], "features", axis=1)
    weight = graph.constant("classifier.weight", graph.checkpoint.tensor("classifier.1.weight", (CLASSES, FEATURES)))
    bias = graph.constant("classifier.bias", graph.checkpoint.tensor("classifier.1.bias", (CLASSES,)))
    graph.node("Gemm", ["features", weight, bias], "logits", transB=1)
    graph.node("Softmax", ["logits"], "probabilities", axis=-1)
    graph.checkpoint.refuse_unused()
    outputs = {"probabilities": CLASSES, "logits": CLASSES, "features": FEATURES}
    return graph.model(
        "mobilenet_v2",
        [floats("image", "N", 3, "H", "W")],
        [floats(name, "N", width) for name, width in outputs.items()],
    )


class Network(GraphBuilder):
    """Layers by the names of their tensors."""

    def __init__(self, tensors: Mapping[str, Array]) -> None:
        super().__init__()
        self.checkpoint = Checkpoint(tensors, "a MobileNetV2")
        self.constant("zero", np.array(0, np.float32))
        self.constant("six", np.array(ACTIVATION_MAX, np.float32))

    def convolution(
        self, source: str, layer: str, norm: str, stride: int = 1, depthwise: bool = False, activate: bool = True
    ) -> str:
        """Convolution, normalisation and, unless told otherwise, ReLU6."""
        weight, bias = self.checkpoint.folded(layer, norm, BATCH_NORM_EPSILON)
        kernel = weight.shape[2]
        name = f"{layer}.conv"
        self.node(
            "Conv",
            [source, self.constant(f"{name}.weight", weight), self.constant(f"{name}.bias", bias)],
            name,
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[kernel // 2] * 4,
            group=weight.shape[0] if depthwise else 1,
        )
        return self.node("Clip", [name, "zero", "six"], f"{layer}.relu6") if activate else name

    def inverted_residual(self, source: str, block: str, stride: int, expands: bool, residual: bool) -> str:
        """Expand (1x1), filter each channel (3x3), project (1x1); add the input where the shapes allow it.

        Layers are numbered: those with an activation are pairs, the last is a convolution and a normalisation.
        """
        current = source
        layer = 0
        if expands:
            current = self.convolution(current, f"{block}.0.0", f"{block}.0.1")
            layer = 1
        current = self.convolution(current, f"{block}.{layer}.0", f"{block}.{layer}.1", stride, depthwise=True)
        current = self.convolution(current, f"{block}.{layer + 1}", f"{block}.{layer + 2}", activate=False)
        return self.node("Add", [current, source], f"{block}.sum") if residual else current
