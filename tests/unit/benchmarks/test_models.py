"""The benchmark models and the repositories made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from benchmarks.models import MODELS, config_text, make_repository, model_file


def answer(path: Path, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    return np.asarray(y)


def test_the_dense_stack_is_what_it_says(tmp_path: Path) -> None:
    """Layers with ReLU between them and none after the last; weights are read back from the file."""
    path = model_file("tiny", tmp_path)
    w0, b0, w1, b1 = (numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer)
    x = np.random.default_rng(0).standard_normal((5, 16), dtype=np.float32)
    assert answer(path, x) == pytest.approx(np.maximum(x @ w0 + b0, 0) @ w1 + b1, abs=1e-5)


def test_image_models_answer_the_input_or_its_means(tmp_path: Path) -> None:
    """Identity answers the same bytes, average one mean per channel."""
    x = np.random.default_rng(0).random((2, 3, 224, 224), dtype=np.float32)
    assert np.array_equal(answer(model_file("identity", tmp_path), x), x)
    assert answer(model_file("average", tmp_path), x)[:, :, 0, 0] == pytest.approx(x.mean((2, 3)), rel=1e-4)


def test_the_residual_net_neither_dies_nor_overflows(tmp_path: Path) -> None:
    """Its answers are finite, differ between inputs and do not depend on the batch they ride in."""
    path = model_file("resnet", tmp_path)
    x = np.random.default_rng(0).random((2, 3, 224, 224), dtype=np.float32)
    y = answer(path, x)
    assert y.shape == (2, 1000)
    assert np.isfinite(y).all()
    assert np.abs(y[0] - y[1]).max() > 1e-3
    assert answer(path, x[:1]) == pytest.approx(y[:1], rel=1e-3, abs=1e-4)


def test_the_bottleneck_net_is_as_large_as_resnet50_and_holds_in_half_precision(tmp_path: Path) -> None:
    """25.5 million weights; finite answers that differ between inputs, in half precision nearly the same ones."""
    path, half = model_file("resnet50", tmp_path), model_file("resnet50_fp16", tmp_path)
    weights = sum(int(np.prod(tensor.dims)) for tensor in onnx.load(path).graph.initializer)
    assert weights == pytest.approx(25.5e6, rel=0.01)
    x = np.random.default_rng(0).random((2, 3, 224, 224), dtype=np.float32)
    y, y_half = answer(path, x), answer(half, x)
    assert y.shape == y_half.shape == (2, 1000)
    scale = np.abs(y).max()
    assert 1e-2 < scale < 1e3
    assert np.abs(y[0] - y[1]).max() > 1e-3 * scale
    assert np.abs(y - y_half).max() < 0.02 * scale


def test_files_are_the_same_every_time(tmp_path: Path) -> None:
    """Seeded weights: two builds are byte for byte equal."""
    one, other = model_file("tiny", tmp_path / "a"), model_file("tiny", tmp_path / "b")
    assert one.read_bytes() == other.read_bytes()


def test_a_repository_replaces_the_one_before(tmp_path: Path) -> None:
    """Only the models asked for are in it; an objective appears in the configuration, none does not."""
    make_repository(tmp_path / "r", tmp_path / "m", {"tiny": 12.5})
    assert 'key: "latency_slo_ms" value { string_value: "12.5" }' in (tmp_path / "r/tiny/config.pbtxt").read_text()
    root = make_repository(tmp_path / "r", tmp_path / "m", {"average": None})
    assert sorted(path.name for path in root.iterdir()) == ["average"]
    assert (root / "average/1/model.onnx").stat().st_nlink == 2
    assert "latency_slo_ms" not in config_text(MODELS["average"], None)
