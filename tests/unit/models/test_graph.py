"""Building blocks of the converted networks, against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from models.zoo import mobilenet_v2
from models.zoo.errors import ConversionError
from models.zoo.graph import floats, fold_batch_norm
from models.zoo.session import open_session

Array = npt.NDArray[Any]


def layer(rng: np.random.Generator, name: str, norm: str, shape: tuple[int, ...]) -> dict[str, Array]:
    """A convolution's weight and its normalisation."""
    channels = shape[0]
    return {
        f"{name}.weight": (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32),
        f"{norm}.weight": rng.uniform(0.5, 1.5, channels).astype(np.float32),
        f"{norm}.bias": rng.standard_normal(channels).astype(np.float32),
        f"{norm}.running_mean": rng.standard_normal(channels).astype(np.float32),
        f"{norm}.running_var": rng.uniform(0.1, 2.0, channels).astype(np.float32),
        f"{norm}.num_batches_tracked": np.array(1, np.int64),
    }


def block(rng: np.random.Generator, name: str, inputs: int, outputs: int, expand: int) -> dict[str, Array]:
    """The tensors of one inverted-residual block, numbered as torchvision does."""
    wide = inputs * expand
    tensors = layer(rng, f"{name}.0.0", f"{name}.0.1", (wide, inputs, 1, 1)) if expand != 1 else {}
    number = 1 if expand != 1 else 0
    tensors |= layer(rng, f"{name}.{number}.0", f"{name}.{number}.1", (wide, 1, 3, 3))
    return tensors | layer(rng, f"{name}.{number + 1}", f"{name}.{number + 2}", (outputs, wide, 1, 1))


def network() -> dict[str, Array]:
    """Random tensors of the whole MobileNetV2, channels as in Table 2 of the paper."""
    rng = np.random.default_rng(0)
    tensors = layer(rng, "features.0.0", "features.0.1", (32, 3, 3, 3))
    inputs, number = 32, 1
    for stage, outputs in zip(mobilenet_v2.STAGES, (16, 24, 32, 64, 96, 160, 320), strict=True):
        for _ in range(stage.repeats):
            tensors |= block(rng, f"features.{number}.conv", inputs, outputs, 6 if stage.expands else 1)
            inputs, number = outputs, number + 1
    tensors |= layer(rng, "features.18.0", "features.18.1", (1280, inputs, 1, 1))
    tensors["classifier.1.weight"] = rng.standard_normal((1000, 1280)).astype(np.float32)
    tensors["classifier.1.bias"] = rng.standard_normal(1000).astype(np.float32)
    return tensors


def convolution(x: Array, tensors: dict[str, Array], name: str, norm: str, stride: int = 1, groups: int = 1) -> Array:
    """Convolution with the same padding on all sides, then normalisation, by their definitions in double precision."""
    weight = tensors[f"{name}.weight"].astype(np.float64)
    outputs, per_group, kernel, _ = weight.shape
    pad = kernel // 2
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), axis=(2, 3))[:, :, ::stride, ::stride]
    y = np.stack(
        [
            np.einsum("nchwij,cij->nhw", windows[:, first : first + per_group], weight[output])
            for output in range(outputs)
            for first in [(output // (outputs // groups)) * per_group]
        ],
        axis=1,
    )
    scale, offset, mean, variance = (
        tensors[f"{norm}.{part}"].astype(np.float64)[:, None, None]
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    return (y - mean) / np.sqrt(variance + mobilenet_v2.BATCH_NORM_EPSILON) * scale + offset


@pytest.mark.parametrize(
    ("expand", "stride", "size", "residual"), [(6, 1, 7, True), (6, 2, 8, False), (1, 2, 7, False)]
)
def test_a_block_of_mobilenet_equals_numpy(expand: int, stride: int, size: int, residual: bool) -> None:
    """Expand, depthwise, project, skip: folded and run by ONNX Runtime = the textbook formula."""
    rng = np.random.default_rng(1)
    channels = 4
    tensors = block(rng, "b", channels, channels, expand)
    graph = mobilenet_v2.Network(tensors)
    last = graph.inverted_residual("x", "b", stride, expand != 1, residual)
    graph.node("Identity", [last], "y")
    model = graph.model("block", [floats("x", "N", channels, size, size)], [floats("y", "N", channels, "H", "W")])
    x = rng.standard_normal((2, channels, size, size)).astype(np.float32)
    (y,) = open_session(model.SerializeToString()).run(["y"], {"x": x})

    expected: Array = x
    if expand != 1:
        expected = np.clip(convolution(expected, tensors, "b.0.0", "b.0.1"), 0, 6)
    number = 1 if expand != 1 else 0
    wide = channels * expand
    depthwise = convolution(expected, tensors, f"b.{number}.0", f"b.{number}.1", stride, wide)
    expected = convolution(np.clip(depthwise, 0, 6), tensors, f"b.{number + 1}", f"b.{number + 2}")
    if residual:
        expected = expected + x
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_mobilenet_has_a_dynamic_batch_and_three_outputs() -> None:
    """Any number of rows and other sizes of pictures; rows do not influence each other."""
    run = open_session(mobilenet_v2.build(network()).SerializeToString())
    images = np.random.default_rng(2).uniform(-1, 1, (2, 3, 64, 96)).astype(np.float32)
    probabilities, logits, features = run.run(["probabilities", "logits", "features"], {"image": images})
    assert (probabilities.shape, logits.shape, features.shape) == ((2, 1000), (2, 1000), (2, 1280))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    (alone,) = run.run(["logits"], {"image": images[1:]})
    np.testing.assert_allclose(alone, logits[1:], atol=1e-4 * float(np.abs(logits).max()))


def test_another_network_is_refused() -> None:
    """A tensor that is missing, or left over, or of another shape is named."""
    tensors = network()
    with pytest.raises(ConversionError, match=r"tensors a MobileNetV2 has not: \['features\.19\.0\.weight'\]"):
        mobilenet_v2.build(tensors | {"features.19.0.weight": np.zeros((1, 1, 1, 1), np.float32)})
    with pytest.raises(ConversionError, match=r"'features\.0\.0\.weight' has shape \(32,\), expected 4 dimensions"):
        mobilenet_v2.build(tensors | {"features.0.0.weight": np.zeros(32, np.float32)})
    del tensors["features.5.conv.1.1.bias"]
    with pytest.raises(ConversionError, match=r"no tensor 'features\.5\.conv\.1\.1\.bias'; is it a MobileNetV2"):
        mobilenet_v2.build(tensors)


def test_folding_keeps_the_layer() -> None:
    """A convolution of one pixel and its normalisation are one line; the fold is that line."""
    one = np.ones(1, np.float32)
    weight, bias = fold_batch_norm(np.full((1, 1, 1, 1), 3.0), 2 * one, one, 4 * one, 8 * one, epsilon=1.0)
    assert weight.item() == pytest.approx(3 * 2 / 3)
    assert bias.item() == pytest.approx(1 - 4 * 2 / 3)
    assert weight.dtype == bias.dtype == np.float32


def test_a_model_is_checked_as_it_is_made() -> None:
    """A node whose input nobody makes."""
    graph = mobilenet_v2.Network({})
    graph.node("Add", ["x", "nothing"], "y")
    with pytest.raises(onnx.checker.ValidationError):
        graph.model("broken", [floats("x", "N")], [floats("y", "N")])
