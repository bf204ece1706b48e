"""The EfficientNet-Lite0 builder: its arithmetic against NumPy, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from models.zoo import efficientnet_lite
from models.zoo.efficientnet_lite import BATCH_NORM_EPSILON, LITE0_STAGES, NetworkBuilder
from models.zoo.errors import ConversionError

Array = npt.NDArray[Any]

# Output channels and kernel of each stage: Table 1 of the EfficientNet paper.
CHANNELS = (16, 24, 40, 80, 112, 192, 320)
KERNELS = (3, 3, 5, 3, 5, 5, 3)


def random_layer(rng: np.random.Generator, layer: str, norm: str, shape: tuple[int, ...]) -> dict[str, Array]:
    """A convolution's weight and its normalisation."""
    channels = shape[0]
    return {
        f"{layer}.weight": (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32),
        f"{norm}.weight": rng.uniform(0.5, 1.5, channels).astype(np.float32),
        f"{norm}.bias": rng.standard_normal(channels).astype(np.float32),
        f"{norm}.running_mean": rng.standard_normal(channels).astype(np.float32),
        f"{norm}.running_var": rng.uniform(0.1, 2.0, channels).astype(np.float32),
        f"{norm}.num_batches_tracked": np.array(1, np.int64),
    }


def random_block(
    rng: np.random.Generator, name: str, inputs: int, outputs: int, kernel: int, expand: int
) -> dict[str, Array]:
    """The tensors of one inverted-residual block."""
    wide = inputs * expand
    tensors: dict[str, Array] = {}
    if expand != 1:
        tensors |= random_layer(rng, f"{name}._expand_conv", f"{name}._bn0", (wide, inputs, 1, 1))
    tensors |= random_layer(rng, f"{name}._depthwise_conv", f"{name}._bn1", (wide, 1, kernel, kernel))
    return tensors | random_layer(rng, f"{name}._project_conv", f"{name}._bn2", (outputs, wide, 1, 1))


def random_network() -> dict[str, Array]:
    """Random tensors of the whole network, named and shaped as in the checkpoint."""
    rng = np.random.default_rng(0)
    tensors = random_layer(rng, "_conv_stem", "_bn0", (32, 3, 3, 3))
    inputs, block = 32, 0
    for stage, outputs, kernel in zip(LITE0_STAGES, CHANNELS, KERNELS, strict=True):
        for _ in range(stage.repeats):
            tensors |= random_block(rng, f"_blocks.{block}", inputs, outputs, kernel, stage.expansion)
            inputs, block = outputs, block + 1
    tensors |= random_layer(rng, "_conv_head", "_bn1", (1280, inputs, 1, 1))
    tensors["_fc.weight"] = rng.standard_normal((1000, 1280)).astype(np.float32)
    tensors["_fc.bias"] = rng.standard_normal(1000).astype(np.float32)
    return tensors


def numpy_convolution(x: Array, weight: Array, stride: int, groups: int) -> Array:
    """A convolution with TensorFlow's `SAME` padding, by its definition: the extra row and column lie at the end."""
    count, channels, height, width = x.shape
    outputs, per_group, kernel, _ = weight.shape
    out_h, out_w = -(-height // stride), -(-width // stride)
    pad_h = max((out_h - 1) * stride + kernel - height, 0)
    pad_w = max((out_w - 1) * stride + kernel - width, 0)
    padded = np.pad(x, ((0, 0), (0, 0), (pad_h // 2, pad_h - pad_h // 2), (pad_w // 2, pad_w - pad_w // 2)))
    result = np.zeros((count, outputs, out_h, out_w))
    for o in range(outputs):
        first = (o // (outputs // groups)) * per_group
        for i in range(out_h):
            for j in range(out_w):
                rows, columns = slice(i * stride, i * stride + kernel), slice(j * stride, j * stride + kernel)
                window = padded[:, first : first + per_group, rows, columns]
                result[:, o, i, j] = (window * weight[o]).sum(axis=(1, 2, 3))
    assert channels == per_group * groups
    return result


def numpy_layer(x: Array, tensors: dict[str, Array], layer: str, norm: str, stride: int, groups: int) -> Array:
    """Convolution, then normalisation, unfolded and in double precision."""
    y = numpy_convolution(x.astype(np.float64), tensors[f"{layer}.weight"].astype(np.float64), stride, groups)
    parts = [tensors[f"{norm}.{part}"].astype(np.float64)[:, None, None] for part in ("weight", "bias")]
    mean, variance = (tensors[f"{norm}.running_{part}"].astype(np.float64)[:, None, None] for part in ("mean", "var"))
    return (y - mean) / np.sqrt(variance + BATCH_NORM_EPSILON) * parts[0] + parts[1]


@pytest.mark.parametrize(
    ("expand", "stride", "size", "kernel", "residual"),
    [(6, 1, 7, 3, True), (6, 2, 8, 3, False), (6, 2, 7, 5, False), (1, 1, 6, 3, False), (1, 2, 8, 5, False)],
)
def test_a_block_equals_numpy(expand: int, stride: int, size: int, kernel: int, residual: bool) -> None:
    """Expand, depthwise, project, skip: folded and run by ONNX Runtime = the textbook formula in NumPy.

    Even sizes with stride 2 pad asymmetrically, which is where PyTorch's and TensorFlow's conventions differ.
    """
    rng = np.random.default_rng(1)
    channels = 4
    tensors = random_block(rng, "b", channels, channels, kernel, expand)
    builder = NetworkBuilder(tensors)
    last = builder.inverted_residual("x", "b", stride, expand, residual)
    builder.node("Identity", [last], "y")
    model = builder.model(
        "block",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", channels, size, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", channels, "H", "W"])],
    )
    x = rng.standard_normal((2, channels, size, size)).astype(np.float32)
    (y,) = session(model).run(["y"], {"x": x})

    expected: Array = x
    if expand != 1:
        expected = np.clip(numpy_layer(expected, tensors, "b._expand_conv", "b._bn0", 1, 1), 0, 6)
    wide = channels * expand
    expected = np.clip(numpy_layer(expected, tensors, "b._depthwise_conv", "b._bn1", stride, wide), 0, 6)
    expected = numpy_layer(expected, tensors, "b._project_conv", "b._bn2", 1, 1)
    if residual:
        expected = expected + x
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_the_network_has_a_dynamic_batch_and_three_outputs() -> None:
    """Any number of rows; rows do not influence each other; probabilities are the softmax of the logits."""
    run = session(efficientnet_lite.build(random_network()))
    images = np.random.default_rng(2).uniform(-1, 1, (2, 3, 224, 224)).astype(np.float32)
    probabilities, logits, features = run.run(["probabilities", "logits", "features"], {"image": images})
    assert (probabilities.shape, logits.shape, features.shape) == ((2, 1000), (2, 1000), (2, 1280))
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(probabilities, exponents / exponents.sum(axis=1, keepdims=True), atol=1e-5)
    (alone,) = run.run(["logits"], {"image": images[1:]})
    np.testing.assert_allclose(alone, logits[1:], atol=1e-4 * float(np.abs(logits).max()))


def test_a_missing_tensor_is_named() -> None:
    """A checkpoint of another network fails with the first tensor it lacks."""
    tensors = random_network()
    del tensors["_blocks.3._bn1.running_var"]
    with pytest.raises(ConversionError, match=r"no tensor '_blocks\.3\._bn1\.running_var'"):
        efficientnet_lite.build(tensors)


def test_a_tensor_of_another_shape_is_named() -> None:
    """Shapes are checked, not broadcast."""
    tensors = random_network()
    tensors["_fc.weight"] = tensors["_fc.weight"][:10]
    with pytest.raises(ConversionError, match=r"'_fc\.weight' has shape \(10, 1280\), expected \(1000, 1280\)"):
        efficientnet_lite.build(tensors)


def test_tensors_left_over_are_an_error() -> None:
    """A deeper network is not silently cut down to Lite0."""
    tensors = random_network() | {"_blocks.16._project_conv.weight": np.zeros((1, 1, 1, 1), np.float32)}
    with pytest.raises(ConversionError, match=r"_blocks\.16\._project_conv\.weight"):
        efficientnet_lite.build(tensors)


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    """A single-threaded session on the CPU."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
