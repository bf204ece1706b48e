"""Darknet's files, and the network that is built of them: against NumPy, and what is refused."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from models.zoo import yolov4_tiny
from models.zoo.darknet import Weights, read_sections
from models.zoo.errors import ConversionError
from models.zoo.session import open_session

Array = npt.NDArray[Any]

SIZE = 8
# Two classes and one anchor: 7 numbers for a cell.
HEAD = """
[convolutional]
size=1
stride=1
pad=1
filters=7
activation=linear
[yolo]
mask = 1
anchors = 3,5, 6,2
classes=2
scale_x_y = 1.1
"""
DESCRIPTION = f"[net]\nwidth={SIZE}\nheight={SIZE}\n# a comment\n{HEAD}"


def weights(*layers: Array, version: tuple[int, int, int] = (0, 2, 5)) -> bytes:
    """A `.weights` file of these numbers."""
    seen = struct.pack("<q" if version[:2] >= (0, 2) else "<i", 1000)
    return struct.pack("<iii", *version) + seen + b"".join(layer.astype("<f4").tobytes() for layer in layers)


def head_weights(rng: np.random.Generator, inputs: int = 3) -> list[Array]:
    return [rng.standard_normal(7), rng.standard_normal((7, inputs)) / 2]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def numpy_head(features: Array, bias: Array, weight: Array) -> tuple[Array, Array]:
    """Boxes and scores cell by cell, as the format's description says."""
    boxes, scores = [], []
    size = features.shape[1]
    for row in range(size):
        for column in range(size):
            numbers = weight @ features[:, row, column] + bias
            x, y = ((1.1 * sigmoid(numbers[:2]) - 0.05) + (column, row)) / size
            w, h = np.exp(numbers[2:4]) * (6, 2) / SIZE
            boxes.append((x - w / 2, y - h / 2, x + w / 2, y + h / 2))
            scores.append(sigmoid(numbers[4]) * sigmoid(numbers[5:]))
    return np.array(boxes), np.array(scores)


def run(description: str, content: bytes, image: Array) -> tuple[Array, Array]:
    model = yolov4_tiny.build(description, content)
    boxes, scores = open_session(model.SerializeToString()).run(["boxes", "scores"], {"image": image})
    return boxes, scores


def test_a_head_equals_numpy() -> None:
    """Centres, sizes and scores of each cell; any number of pictures."""
    rng = np.random.default_rng(1)
    bias, weight = head_weights(rng)
    images = rng.standard_normal((2, 3, SIZE, SIZE)).astype(np.float32)
    boxes, scores = run(DESCRIPTION, weights(bias, weight), images)
    assert boxes.shape == (2, 64, 4)
    assert scores.shape == (2, 64, 2)
    for row, image in enumerate(images):
        expected = numpy_head(image, bias, weight)
        np.testing.assert_allclose(boxes[row], expected[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(scores[row], expected[1], rtol=1e-4, atol=1e-6)


def test_routes_pooling_and_upsampling_equal_numpy() -> None:
    """Half of the channels, halved and doubled again, joined with the whole."""
    description = DESCRIPTION.replace(
        "# a comment",
        """
[convolutional]
batch_normalize=1
size=1
stride=1
pad=1
filters=4
activation=leaky
[route]
layers=-1
groups=2
group_id=1
[maxpool]
size=2
stride=2
[upsample]
stride=2
[route]
layers=-1,0
""",
    )
    rng = np.random.default_rng(2)
    offset, scale, mean = rng.standard_normal((3, 4))
    variance = rng.uniform(0.5, 2, 4)
    first = rng.standard_normal((4, 3))
    bias, weight = head_weights(rng, inputs=6)
    image = rng.standard_normal((1, 3, SIZE, SIZE)).astype(np.float32)
    content = weights(offset, scale, mean, variance, first, bias, weight, version=(0, 1, 0))
    boxes, scores = run(description, content, image)

    convolved = np.einsum("oc,chw->ohw", first, image[0])
    column = (slice(None), None, None)
    normalised = (convolved - mean[column]) / np.sqrt(variance[column] + 1e-6) * scale[column] + offset[column]
    leaky = np.where(normalised > 0, normalised, 0.1 * normalised)
    pooled = leaky[2:].reshape(2, SIZE // 2, 2, SIZE // 2, 2).max(axis=(2, 4))
    joined = np.concatenate([pooled.repeat(2, axis=1).repeat(2, axis=2), leaky])
    expected = numpy_head(joined, bias, weight)
    np.testing.assert_allclose(boxes[0], expected[0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(scores[0], expected[1], rtol=1e-3, atol=1e-5)


def test_weights_of_another_description_are_refused() -> None:
    """Too few, too many, torn in the middle of a number, or hardly any."""
    layers = head_weights(np.random.default_rng(3))
    whole = weights(*layers)
    for content, message in (
        (weights(layers[0]), "21 numbers needed, 0 left"),
        (weights(*layers, np.zeros(2)), "2 numbers follow the last layer's"),
        (whole[:-1], "the weights are torn"),
        (whole[:5], "shorter than their beginning"),
    ):
        with pytest.raises(ConversionError, match=message):
            yolov4_tiny.build(DESCRIPTION, content)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("[net]", "[network]", "does not begin with"),
        ("width=8", "width 8", "not a Darknet description: 'width 8'"),
        ("width=8", "", "section \\[net\\] has no 'width'"),
        ("width=8", "width=wide", "'width=wide' is not a number"),
        ("width=8", "width=16", "only square networks"),
        ("[yolo]", "[dropout]", "is \\[dropout\\], which is not known here"),
        ("activation=linear", "activation=mish", "activation 'mish' is not known"),
        ("pad=1", "pad=0", "only plain convolutions"),
        ("classes=2", "classes=3", "7 channels for 1 anchors, 3 classes"),
        ("[yolo]", "[route]\nlayers=-3\n[yolo]", "no layers \\[-2\\] before it"),
        ("[yolo]", "[maxpool]\nsize=3\nstride=1\n[yolo]", "only pooling that halves"),
    ],
)
def test_what_is_not_known_is_refused(before: str, after: str, message: str) -> None:
    """With the section or layer it is about."""
    content = weights(*head_weights(np.random.default_rng(4)))
    with pytest.raises(ConversionError, match=message):
        yolov4_tiny.build(DESCRIPTION.replace(before, after), content)


def test_sections_keep_their_settings() -> None:
    """In the order of the description, without comments and spaces."""
    net, layer = read_sections("[net]\na = 1, 2 # twice\n\n[layer]\nb=x\n")
    assert (net.kind, net.integers("a"), layer.kind, layer.text("b")) == ("net", [1, 2], "layer", "x")
    assert layer.integer("c", 5) == 5
    assert layer.number("c", 0.5) == 0.5


def test_weights_are_taken_in_order() -> None:
    """Behind the longer head of newer files."""
    taken = Weights(weights(np.arange(6), version=(0, 2, 0)))
    assert taken.take(2).tolist() == [0, 1]
    assert taken.take(2, 2).tolist() == [[2, 3], [4, 5]]
    taken.refuse_rest()
