"""Scanning repositories: everything found is a model, an error or a warning."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.config.model import Specific
from service.errors import ConfigError, ModelLoadError
from service.repository.layout import scan, scan_model


def put(repository: Path, name: str, *versions: str, config: str | None = None, file: str = "model.onnx") -> Path:
    directory = repository / name
    directory.mkdir(parents=True)
    for version in versions:
        (directory / version).mkdir()
        (directory / version / file).write_bytes(b"never read")
    if config is not None:
        (directory / "config.pbtxt").write_text(config)
    return directory


def test_models_and_versions_are_found_in_order(tmp_path: Path) -> None:
    """By name, versions as numbers: 10 comes after 9."""
    put(tmp_path, "b", "10", "9", "1")
    put(tmp_path, "a", "1", config="version_policy { specific { versions: [1, 3] } }")
    found = scan([tmp_path])
    assert [model.name for model in found.models] == ["a", "b"]
    assert [files.version for files in found.models[1].versions] == [1, 9, 10]
    assert found.models[0].version_policy == Specific((1, 3))
    assert found.models[1].config is None
    assert found.warnings == ()
    model = found.model("b")
    assert model is not None
    files = model.version(9)
    assert files is not None
    assert files.model_path == tmp_path / "b" / "9" / "model.onnx"
    assert model.version(2) is None
    assert found.model("c") is None


def test_what_is_not_a_version_is_reported(tmp_path: Path) -> None:
    """Names that are no numbers, leading zeros, and versions without a model; dotfiles and known folders are not."""
    directory = put(tmp_path, "m", "1", "v2", "007", "0")
    (directory / "3").mkdir()
    (directory / "warmup").mkdir()
    (directory / ".git").mkdir()
    (directory / "labels.txt").write_text("cat")
    found = scan([tmp_path])
    assert [files.version for files in found.models[0].versions] == [1]
    assert sorted(warning.path.name for warning in found.warnings) == ["0", "007", "3", "v2"]
    assert "version has no model.onnx" in str(next(w for w in found.warnings if w.path.name == "3"))


def test_bad_names_are_reported(tmp_path: Path) -> None:
    """A name that could break a label, a path or a log line is no model; files beside models are nobody's business."""
    for name in ("-x", "a b", "größe", "a,b", "x" * 255):
        put(tmp_path, name, "1")
    (tmp_path / "README.md").write_text("hello")
    (tmp_path / ".cache").mkdir()
    found = scan([tmp_path])
    assert [model.name for model in found.models] == ["x" * 255]
    assert len(found.warnings) == 4
    assert all("rename" in warning.message for warning in found.warnings)


def test_a_name_in_two_repositories_is_an_error_of_that_model(tmp_path: Path) -> None:
    """The others are served; both places are named."""
    put(tmp_path / "one", "m", "1")
    put(tmp_path / "two", "m", "1")
    put(tmp_path / "two", "n", "1")
    found = scan([tmp_path / "one", tmp_path / "two"])
    clash, fine = found.models
    assert clash.versions == ()
    assert str(tmp_path / "one" / "m") in str(clash.error)
    assert str(tmp_path / "two" / "m") in str(clash.error)
    assert fine.error is None


def test_a_bad_configuration_is_an_error_of_that_model(tmp_path: Path) -> None:
    """Syntax, refused keys, a version policy that makes no sense, a file name that leaves the directory."""
    put(tmp_path, "a", "1", config="nonsense")
    put(tmp_path, "b", "1", config="ensemble_scheduling {}")
    put(tmp_path, "c", "1", config="version_policy { latest {} }")
    put(tmp_path, "d", "1", config='default_model_filename: "../../x"')
    put(tmp_path, "e", "1")
    found = scan([tmp_path])
    assert [isinstance(model.error, ConfigError) for model in found.models] == [True, True, True, True, False]


def test_a_model_without_versions_says_what_is_expected(tmp_path: Path) -> None:
    """Under the file name that its configuration gives."""
    put(tmp_path, "m", config='default_model_filename: "net.onnx"')
    (model,) = scan([tmp_path]).models
    assert model.error is not None
    assert str(tmp_path / "m" / "1" / "net.onnx") in str(model.error)


def test_another_file_name_is_honoured(tmp_path: Path) -> None:
    """`default_model_filename` decides what a version needs."""
    put(tmp_path, "m", "1", config='default_model_filename: "net.onnx"', file="net.onnx")
    model, warnings = scan_model(tmp_path / "m")
    assert model.versions[0].model_path.name == "net.onnx"
    assert warnings == ()


def test_a_model_in_a_directory_is_found(tmp_path: Path) -> None:
    """`model.onnx/model.onnx`, as Triton allows."""
    inner = tmp_path / "m" / "1" / "model.onnx"
    inner.mkdir(parents=True)
    (inner / "model.onnx").write_bytes(b"never read")
    assert len(scan([tmp_path]).models[0].versions) == 1


def test_a_repository_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """Of the whole scan: a server without its repository must not start empty."""
    with pytest.raises(ModelLoadError, match="cannot be read as a directory"):
        scan([tmp_path / "gone"])
