"""`onclock check`: what would be served, and why the rest would not."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from service.cli.check import check
from service.config.complete import Completed
from service.config.pbtxt import parse_text
from service.errors import ModelLoadError
from service.repository.layout import VersionFiles
from tests.support import onnx_models


def printed(*repositories: Path, width: int = 200, **options: object) -> tuple[int, str]:
    stream = io.StringIO()
    code = check(list(repositories), console=Console(file=stream, width=width), **options)  # type: ignore[arg-type]
    return code, stream.getvalue()


def test_a_good_repository_passes(tmp_path: Path) -> None:
    """Exit code 0; the table shows the batching, tensors and objective."""
    onnx_models.write_model(
        tmp_path, "mlp", onnx_models.mlp(), config='parameters { key: "latency_slo_ms" value: { string_value: "20" } }'
    )
    code, text = printed(tmp_path)
    assert code == 0
    assert all(word in text for word in ("mlp", "loads", "64 rows", "x FP32[?,8]", "20 ms"))


def test_every_failure_is_shown_with_its_reason(tmp_path: Path) -> None:
    """Exit code 1, and the models that load are still listed."""
    onnx_models.write_model(tmp_path, "good", onnx_models.dynamic_quantised())
    onnx_models.write_model(tmp_path, "typo", onnx_models.mlp(), config="dynamic_batchin {}")
    onnx_models.write_model(tmp_path, "fixed", onnx_models.fixed_batch_cnn(), config="max_batch_size: 8")
    onnx_models.write_model(
        tmp_path, "labels", onnx_models.mlp(), config='output { name: "y" label_filename: "no.txt" }'
    )
    onnx_models.write_model(
        tmp_path, "absent", onnx_models.mlp(), config="version_policy { specific { versions: [1, 7] } }"
    )
    (tmp_path / "broken" / "1").mkdir(parents=True)
    (tmp_path / "broken" / "1" / "model.onnx").write_bytes(b"not a model")
    (tmp_path / "-bad").mkdir()
    code, text = printed(tmp_path)
    assert code == 1
    assert "Did you mean 'dynamic_batching'" in text
    assert "max_batch_size: 8 asks for a batch dimension" in text
    assert "no.txt does not exist" in text
    assert "7 not found" in text
    assert "is not an ONNX model" in text
    assert "left out" in text
    assert "note  good/1: requests are not joined" in text


def test_the_completed_configuration_can_be_saved(tmp_path: Path) -> None:
    """What --verbose prints after its heading is a config.pbtxt; a model's own directory may be given, too."""
    onnx_models.write_model(tmp_path, "mlp", onnx_models.mlp())
    code, text = printed(tmp_path / "mlp", verbose=True, gpus=())
    assert code == 0
    assert parse_text(text[text.index("# mlp/1") :]).max_batch_size == 64


def test_a_probe_loads_for_real(tmp_path: Path) -> None:
    """Its words are notes, its error is a failure."""
    onnx_models.write_model(tmp_path, "a", onnx_models.mlp())
    onnx_models.write_model(tmp_path, "b", onnx_models.mlp())

    def probe(files: VersionFiles, completed: Completed) -> Sequence[str]:
        if completed.config.name == "b":
            raise ModelLoadError(f"{files.model_path}: no kernel")
        return ["ran on CPUExecutionProvider"]

    code, text = printed(tmp_path, probe=probe)
    assert code == 1
    assert "a/1: ran on CPUExecutionProvider" in text
    assert "no kernel" in text


def test_an_empty_repository_fails(tmp_path: Path) -> None:
    """Nothing to serve is not what anybody meant."""
    code, text = printed(tmp_path)
    assert code == 1
    assert "no model found" in text


def test_a_repository_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """Named, for the command line to print."""
    with pytest.raises(ModelLoadError, match="gone"):
        printed(tmp_path / "gone")
