"""The example repository: what lies in it is what its cards and configurations say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format

from models.training import digits, wine
from service.pb import model_config_pb2
from service.tensor import BY_ONNX_TYPE
from tests.support.corpus import open_session

EXAMPLES = Path(__file__).parents[3] / "models" / "examples"
NAMES = sorted(path.name for path in EXAMPLES.iterdir())


def config(name: str) -> Any:
    return text_format.Parse((EXAMPLES / name / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def test_the_repository_holds_models_only() -> None:
    """Every entry of the repository is a model directory with a version, a configuration and a card."""
    assert NAMES
    for name in NAMES:
        assert (EXAMPLES / name / "1" / "model.onnx").stat().st_size < 300_000
        assert (EXAMPLES / name / "README.md").read_text().startswith(f"# {name}\n")
        assert config(name).name == name


@pytest.mark.parametrize("name", NAMES)
def test_an_objective_is_stated(name: str) -> None:
    """Each example promises a latency."""
    assert float(config(name).parameters["latency_slo_ms"].string_value) > 0


@pytest.mark.parametrize("name", NAMES)
def test_the_configuration_fits_the_graph(name: str) -> None:
    """Tensors that the configuration names exist in the graph, with the stated type and dimensions."""
    graph = onnx.load(EXAMPLES / name / "1" / "model.onnx").graph
    stated = config(name)
    for tensors, values in ((stated.input, graph.input), (stated.output, graph.output)):
        found = {value.name: value.type.tensor_type for value in values}
        for tensor in tensors:
            actual = found[tensor.name]
            wire_name = model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_")
            assert BY_ONNX_TYPE[actual.elem_type].wire_name == wire_name
            dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in actual.shape.dim]
            assert dims == [-1, *tensor.dims]
    for output in stated.output:
        if output.label_filename:
            assert len((EXAMPLES / name / output.label_filename).read_text().splitlines()) == output.dims[0]


@pytest.mark.parametrize(
    ("name", "load", "truth", "source"),
    [
        ("digits", digits.load_split, "test_digits", "test_pixels"),
        ("digits_svm", digits.load_split, "test_digits", "test_pixels"),
        ("wine", wine.load_split, "test_cultivars", "test_measurements"),
    ],
)
def test_the_card_states_the_measured_accuracy(name: str, load: Callable[[], Any], truth: str, source: str) -> None:
    """The committed model names as many held-out rows right as its card says."""
    pytest.importorskip("sklearn", reason="install onclock[models]")
    split = load()
    session = open_session(EXAMPLES / name / "1" / "model.onnx")
    (labels,) = session.run(["label"], {session.get_inputs()[0].name: getattr(split, source)})
    accuracy = float(np.mean(labels.ravel() == getattr(split, truth)))
    assert f"| Accuracy | {accuracy:.3f} on {len(labels)} held-out" in (EXAMPLES / name / "README.md").read_text()


def test_training_again_gives_the_same_answers() -> None:
    """The script makes a model that answers as the committed one does (bytes may differ with the BLAS in use)."""
    pytest.importorskip("sklearn", reason="install onclock[models]")
    split = digits.load_split()
    again = digits.build(digits.train(split))
    assert digits.accuracy(again, split) == pytest.approx(
        digits.accuracy(onnx.load(EXAMPLES / "digits" / "1" / "model.onnx"), split), abs=0.01
    )
