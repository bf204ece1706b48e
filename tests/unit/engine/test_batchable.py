"""Whether joining requests is safe, found out by running the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from service.config.model import DynamicBatching, ModelConfig
from service.engine.batchable import check_batching
from service.engine.warmup import first_run, samples
from service.errors import ModelLoadError
from tests.support import onnx_models
from tests.unit.engine.support import instance_of


def check(
    directory: Path, model: onnx.ModelProto, text: str = "", explicit: bool = False, join: bool = False
) -> tuple[ModelConfig, list[str]]:
    instance, config = instance_of(directory, model, text)
    if join:
        config = replace(config, dynamic_batching=DynamicBatching())
    sample, reason = first_run(instance, config, samples(config, directory))
    assert sample is not None, reason
    return check_batching(instance, config, sample, explicit)


@pytest.mark.parametrize(
    "build",
    [
        onnx_models.mlp,
        onnx_models.text_encoder,
        onnx_models.string_labels,
        onnx_models.linear_classifier,
        onnx_models.tree_classifier,
        onnx_models.growing_cache,
        onnx_models.empty_rows,
        lambda: onnx_models.identity("BF16"),
        lambda: onnx_models.identity("BOOL"),
        lambda: onnx_models.conv_net(size=32, channels=8, blocks=1),
    ],
)
def test_rows_that_mind_their_own_business_are_joined(tmp_path: Path, build: object) -> None:
    """Text, numbers, open and empty shapes, wrongly declared outputs: nothing to say."""
    config, notes = check(tmp_path, build())  # type: ignore[operator]
    assert config.joins_requests
    assert notes == []


def test_a_row_that_depends_on_its_neighbours_is_run_alone(tmp_path: Path) -> None:
    """Dynamic quantisation scales over the batch; the file's operators are not needed to see it."""
    config, notes = check(tmp_path, onnx_models.dynamic_quantised(), join=True)
    assert not config.joins_requests
    assert config.batched
    assert "depends on the other rows of its batch" in notes[0]
    assert notes[0].endswith("requests are therefore not joined")


def test_dynamic_quantisation_is_not_joined_by_default(tmp_path: Path) -> None:
    """Seen in the file already."""
    _, config = instance_of(tmp_path, onnx_models.dynamic_quantised())
    assert not config.joins_requests
    assert config.max_batch_size > 1


@pytest.mark.parametrize(
    ("text", "explicit"),
    [
        ('parameters { key: "batching" value { string_value: "on" } }', False),
        ("max_batch_size: 8 dynamic_batching { }", True),
    ],
)
def test_asked_for_it_is_joined_with_a_note(tmp_path: Path, text: str, explicit: bool) -> None:
    """The operator knows better, and is told what it means."""
    config, notes = check(tmp_path, onnx_models.dynamic_quantised(), text, explicit)
    assert config.joins_requests
    assert "batching stays on because the configuration asks for it" in notes[0]


def total_model() -> onnx.ModelProto:
    """`x` [N, 4] -> `total` [M, 4] with M = 1: an output that does not follow the batch, declared as if it did."""
    node = helper.make_node("ReduceSum", ["x", "axis"], ["total"], keepdims=1)
    return onnx_models.make_model(
        "total",
        [node],
        [onnx_models.value("x", "FP32", ["N", 4])],
        [onnx_models.value("total", "FP32", ["N", 4])],
        {"axis": np.array([0], np.int64)},
    )


def test_an_output_without_a_row_per_row_is_not_joined(tmp_path: Path) -> None:
    """Derived: a note. Demanded: the load fails and says what to change."""
    config, notes = check(tmp_path, total_model())
    assert not config.joins_requests
    assert notes == ["requests are not joined: output 'total' has shape [1, 4] for a batch of two rows"]
    with pytest.raises(ModelLoadError, match=r"max_batch_size: 8 was asked for, but output 'total'.*set it to 0"):
        check(tmp_path / "explicit", total_model(), "max_batch_size: 8", explicit=True)


def test_a_model_that_fails_on_two_rows_is_not_joined(tmp_path: Path) -> None:
    """It reshapes to one row, whatever the file declares."""
    node = helper.make_node("Reshape", ["x", "shape"], ["y"])
    ends = [onnx_models.value("x", "FP32", ["N", 4])], [onnx_models.value("y", "FP32", ["N", 4])]
    model = onnx_models.make_model("one_row", [node], *ends, {"shape": np.array([1, 4], np.int64)})
    config, notes = check(tmp_path, model)
    assert not config.joins_requests
    assert notes[0].startswith("requests are not joined: it fails on a batch of two rows: ")
    with pytest.raises(ModelLoadError, match="it fails on a batch of two rows"):
        check(tmp_path / "explicit", model, "max_batch_size: 8", explicit=True)


def test_a_change_of_trailing_shape_in_a_batch_is_noticed(tmp_path: Path) -> None:
    """Declared [N, 4], answered [N, rows]: what is declared cannot be bound."""
    nodes = [
        helper.make_node("Transpose", ["x"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "turned"], ["y"]),
    ]
    model = onnx_models.make_model(
        "gram", nodes, [onnx_models.value("x", "FP32", ["N", 4])], [onnx_models.value("y", "FP32", ["N", "M"])]
    )
    config, notes = check(tmp_path, model)
    assert not config.joins_requests
    assert "depends on the other rows" in notes[0]
