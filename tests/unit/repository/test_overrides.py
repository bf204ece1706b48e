"""What clients may give with a load, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.errors import InvalidRequest
from service.repository.overrides import NONE, OverrideFiles, parse

CONFIG = '{"max_batch_size": 4, "dynamic_batching": {}}'


def test_nothing() -> None:
    """The model's own files."""
    assert parse("m", {}, {}) is NONE


def test_a_configuration() -> None:
    """Another text is another model."""
    overrides = parse("m", {"config": CONFIG}, {})
    assert overrides.config is not None
    assert overrides.config.max_batch_size == 4
    assert overrides.config.HasField("dynamic_batching")
    assert overrides.digest
    assert overrides.digest == parse("m", {"config": CONFIG}, {}).digest
    assert overrides.digest != parse("m", {"config": "{}"}, {}).digest


def test_files() -> None:
    """With their contents in the digest."""
    overrides = parse("m", {"config": "{}"}, {"file:1/model.onnx": b"one", "file:2/model.onnx/w.bin": b"two"})
    assert overrides.files == {"1/model.onnx": b"one", "2/model.onnx/w.bin": b"two"}
    assert overrides.digest != parse("m", {"config": "{}"}, {"file:1/model.onnx": b"other"}).digest


@pytest.mark.parametrize(
    ("texts", "blobs", "words"),
    [
        ({"colour": "red"}, {}, "unrecognized load parameter 'colour'"),
        ({"config": "{"}, {}, "is no ModelConfig"),
        ({"config": '{"max_batch": 1}'}, {}, "is no ModelConfig"),
        ({"config": '{"name": "other"}'}, {}, "is for model 'other'"),
        ({}, {"file:1/model.onnx": b""}, "'config' must be given"),
        ({"config": "{}"}, {"model.onnx": b""}, "unrecognized load parameter 'model.onnx'"),
        ({"config": "{}"}, {"file:model.onnx": b""}, "expected file:VERSION/NAME"),
        ({"config": "{}"}, {"file:../1/model.onnx": b""}, "expected file:VERSION/NAME"),
        ({"config": "{}"}, {"file:1/../../x": b""}, "expected file:VERSION/NAME"),
        ({"config": "{}"}, {"file:1//etc/passwd": b""}, "expected file:VERSION/NAME"),
        ({"config": "{}"}, {"file:/1/x": b""}, "expected file:VERSION/NAME"),
        ({"config": "{}"}, {f"file:{i}/x": b"" for i in range(1, 1002)}, "at most 1000"),
    ],
)
def test_what_is_refused(texts: dict[str, str], blobs: dict[str, bytes], words: str) -> None:
    """Each with what was expected."""
    with pytest.raises(InvalidRequest, match=words):
        parse("m", texts, blobs)


def test_files_are_kept_until_others_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left behind."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    kept = OverrideFiles()
    first = kept.write("m", {"1/model.onnx": b"one"})
    assert (first / "1" / "model.onnx").read_bytes() == b"one"
    assert first.name == "m"
    kept.keep("m", first)
    second = kept.write("m", {"1/model.onnx": b"two"})
    kept.keep("m", second)
    assert not first.exists()
    kept.keep("m", None)
    assert not second.exists()
    kept.close()
    assert list(tmp_path.iterdir()) == []
