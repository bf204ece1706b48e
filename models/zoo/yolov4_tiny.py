"""YOLOv4-tiny as an ONNX graph, from Darknet's files.

The network is that of C.-Y. Wang et al., "Scaled-YOLOv4" (2021). Layers are those that its description has:
convolutions (normalisation folded in), routes (concatenation, or half of a layer's channels), maximum pooling,
upsampling, and the two heads, which are decoded into boxes and scores in the graph.

A head has for each cell of a grid some anchors (a typical width and height), and for each anchor: the box's centre
within the cell, its size relative to the anchor, how sure it is that there is an object, and of which class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from models.zoo.darknet import Section, Weights, read_sections
from models.zoo.errors import ConversionError
from models.zoo.graph import GraphBuilder, floats, fold_batch_norm

Array = npt.NDArray[Any]

# Constants of Darknet's code: within the root of its normalisation, and the slope of its leaky activation below 0.
BATCH_NORM_EPSILON = 1e-6
LEAKY_SLOPE = 0.1
# The centre and size of a box, and whether there is an object: before the classes of an anchor.
BOX_NUMBERS = 5


@dataclass(frozen=True, slots=True)
class Layer:
    """What a layer gives: the tensor's name, its channels, and its width (heights are the same)."""

    name: str
    channels: int
    size: int


def build(description: str, weights: bytes) -> onnx.ModelProto:
    """The network: `image` FP32 [N, 3, 416, 416] -> `boxes` FP32 [N, 2535, 4], `scores` FP32 [N, 2535, 80].

    Boxes are left, top, right, bottom, from 0 to 1 of width and height. A score is how likely there is an object of
    that class. Sizes and the number of classes are those of the description. Raises `ConversionError`.
    """
    network, *sections = read_sections(description)
    size = network.integer("width")
    if network.integer("height") != size:
        raise ConversionError("only square networks are converted")
    graph = DarknetGraph(Weights(weights), size)
    layers: list[Layer] = []
    for index, section in enumerate(sections):
        layers.append(graph.layer(section, index, layers))
    graph.weights.refuse_rest()
    boxes, classes = graph.outputs()
    return graph.model(
        "yolov4_tiny",
        [floats("image", "N", 3, size, size)],
        [floats("boxes", "N", boxes, 4), floats("scores", "N", boxes, classes)],
    )


class DarknetGraph(GraphBuilder):
    """The layers of a description one by one; knows the heads there were."""

    def __init__(self, weights: Weights, size: int) -> None:
        super().__init__()
        self.weights = weights
        self._input = Layer("image", 3, size)
        self._boxes: list[str] = []
        self._scores: list[str] = []
        self._counts: list[int] = []
        self._classes: set[int] = set()

    def layer(self, section: Section, index: int, before: list[Layer]) -> Layer:
        """The layer that a section describes, behind those `before`. Raises `ConversionError`."""
        name = f"{index}.{section.kind}"
        source = before[-1] if before else self._input
        if section.kind == "convolutional":
            return self._convolution(section, name, source)
        if section.kind == "route":
            return self._route(section, name, before)
        if section.kind == "maxpool":
            if (section.integer("size"), section.integer("stride")) != (2, 2):
                raise ConversionError(f"layer {index}: only pooling that halves is converted")
            pooled = self.node("MaxPool", [source.name], name, kernel_shape=[2, 2], strides=[2, 2])
            return Layer(pooled, source.channels, source.size // 2)
        if section.kind == "upsample":
            return self._upsample(section, name, source)
        if section.kind == "yolo":
            return self._head(section, name, source)
        raise ConversionError(f"layer {index} is [{section.kind}], which is not known here")

    def outputs(self) -> tuple[int, int]:
        """Join the heads; returns the number of boxes and of classes. Raises `ConversionError`."""
        if len(self._classes) != 1:
            raise ConversionError(f"the heads have {sorted(self._classes)} classes, expected one number")
        self.node("Concat", self._boxes, "boxes", axis=1)
        self.node("Concat", self._scores, "scores", axis=1)
        return sum(self._counts), next(iter(self._classes))

    def _convolution(self, section: Section, name: str, source: Layer) -> Layer:
        filters, kernel, stride = (section.integer(key) for key in ("filters", "size", "stride"))
        if section.integer("groups", 1) != 1 or section.integer("pad", 0) != 1:
            raise ConversionError(f"layer {name}: only plain convolutions with padding are converted")
        bias = self.weights.take(filters)
        normalised = section.integer("batch_normalize", 0) == 1
        scale, mean, variance = (self.weights.take(filters) for _ in range(3)) if normalised else (None, None, None)
        weight = self.weights.take(filters, source.channels, kernel, kernel)
        if scale is not None and mean is not None and variance is not None:
            weight, bias = fold_batch_norm(weight, scale, bias, mean, variance, BATCH_NORM_EPSILON)
        current = self.node(
            "Conv",
            [source.name, self.constant(f"{name}.weight", weight), self.constant(f"{name}.bias", bias)],
            name,
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[kernel // 2] * 4,
        )
        activation = section.text("activation")
        if activation == "leaky":
            current = self.node("LeakyRelu", [current], f"{name}.leaky", alpha=LEAKY_SLOPE)
        elif activation != "linear":
            raise ConversionError(f"layer {name}: activation '{activation}' is not known here")
        return Layer(current, filters, source.size // stride)

    def _route(self, section: Section, name: str, before: list[Layer]) -> Layer:
        """Several layers joined, or a part of the channels of one; below 0 they are counted from here."""
        numbers = [number + len(before) if number < 0 else number for number in section.integers("layers")]
        if any(not 0 <= number < len(before) for number in numbers):
            raise ConversionError(f"layer {name}: no layers {numbers} before it")
        sources = [before[number] for number in numbers]
        if len(sources) > 1:
            joined = self.node("Concat", [source.name for source in sources], name, axis=1)
            return Layer(joined, sum(source.channels for source in sources), sources[0].size)
        groups, group = section.integer("groups", 1), section.integer("group_id", 0)
        if groups == 1:
            return sources[0]
        channels = sources[0].channels // groups
        first = self.integers(f"{name}.first", group * channels)
        behind = self.integers(f"{name}.behind", (group + 1) * channels)
        part = self.node("Slice", [sources[0].name, first, behind, self.integers("axis.1", 1)], name)
        return Layer(part, channels, sources[0].size)

    def _upsample(self, section: Section, name: str, source: Layer) -> Layer:
        factor = section.integer("stride")
        factors = self.constant(f"{name}.factors", np.array([1, 1, factor, factor], np.float32))
        repeated = self.node(
            "Resize",
            [source.name, "", factors],
            name,
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
        return Layer(repeated, source.channels, source.size * factor)

    def _head(self, section: Section, name: str, source: Layer) -> Layer:
        """Decode a head. Its numbers per anchor are laid out as channels, its cells row by row."""
        classes, cells = section.integer("classes"), source.size**2
        sizes = np.array(section.numbers("anchors"), np.float32).reshape(-1, 2)[section.integers("mask")]
        anchors = len(sizes)
        if source.channels != anchors * (BOX_NUMBERS + classes):
            raise ConversionError(f"layer {name}: {source.channels} channels for {anchors} anchors, {classes} classes")
        shape = self.integers(f"{name}.shape", 0, anchors, BOX_NUMBERS + classes, cells)
        laid_out = self.node("Reshape", [source.name, shape], f"{name}.laid_out")
        by_cell = self.node("Transpose", [laid_out], f"{name}.by_cell", perm=[0, 1, 3, 2])
        parts = [f"{name}.{part}" for part in ("centre", "size", "object", "class")]
        self.nodes("Split", [by_cell, self.integers(f"{name}.parts", 2, 2, 1, classes)], parts, axis=-1)
        boxes = self._decoded_boxes(name, section.number("scale_x_y", 1.0), sizes, source.size)
        sure = self.node("Sigmoid", [f"{name}.object"], f"{name}.sure")
        which = self.node("Sigmoid", [f"{name}.class"], f"{name}.which")
        scores = self.node("Mul", [sure, which], f"{name}.scores")
        flat = [self.integers(f"{name}.flat.{width}", 0, anchors * cells, width) for width in (4, classes)]
        self._boxes.append(self.node("Reshape", [boxes, flat[0]], f"{name}.all_boxes"))
        self._scores.append(self.node("Reshape", [scores, flat[1]], f"{name}.all_scores"))
        self._counts.append(anchors * cells)
        self._classes.add(classes)
        return source

    def _decoded_boxes(self, name: str, stretch: float, sizes: Array, cells: int) -> str:
        """Corners from 0 to 1. A centre is `stretch * sigmoid` within its cell, about the middle; a size the anchor's
        times an exponential."""
        rows, columns = np.mgrid[:cells, :cells]
        corners = np.stack([columns, rows], axis=-1).reshape(1, 1, cells**2, 2).astype(np.float32)
        within = self.node("Sigmoid", [f"{name}.centre"], f"{name}.within")
        stretched = self.node("Mul", [within, self.number(f"{name}.stretch", stretch)], f"{name}.stretched")
        offsets = self.constant(f"{name}.corners", corners - np.float32((stretch - 1) / 2))
        in_cells = self.node("Add", [stretched, offsets], f"{name}.in_cells")
        centre = self.node("Mul", [in_cells, self.number(f"{name}.cell", 1 / cells)], f"{name}.centres")
        halves = (sizes / self._input.size / 2).reshape(1, -1, 1, 2)
        grown = self.node("Exp", [f"{name}.size"], f"{name}.grown")
        half = self.node("Mul", [grown, self.constant(f"{name}.halves", halves)], f"{name}.half")
        ends = [self.node(kind, [centre, half], f"{name}.{kind.lower()}") for kind in ("Sub", "Add")]
        return self.node("Concat", ends, f"{name}.boxes", axis=-1)
