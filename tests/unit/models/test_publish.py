"""Publishing into a model repository: whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.zoo.publish import Entry, publish


def entry(content: bytes) -> Entry:
    return Entry("m", 'name: "m"\n', {"labels.txt": "a\nb\n"}, {"model.onnx": content, "weights.bin": b"w"})


def files(repository: Path) -> dict[str, bytes]:
    return {str(f.relative_to(repository)): f.read_bytes() for f in sorted(repository.rglob("*")) if f.is_file()}


def test_an_entry_lies_as_servers_expect_it(tmp_path: Path) -> None:
    """`<name>/config.pbtxt`, the files beside it, the model and its data under the version; nothing else is left."""
    assert publish(entry(b"1"), tmp_path / "new" / "repository") == tmp_path / "new" / "repository" / "m"
    assert files(tmp_path / "new" / "repository") == {
        "m/1/model.onnx": b"1",
        "m/1/weights.bin": b"w",
        "m/config.pbtxt": b'name: "m"\n',
        "m/labels.txt": b"a\nb\n",
    }
    assert [d.name for d in (tmp_path / "new" / "repository").iterdir()] == ["m"]


def test_publishing_again_replaces_the_entry(tmp_path: Path) -> None:
    """The former entry goes as a whole, with files the new one does not have."""
    publish(entry(b"1"), tmp_path)
    (tmp_path / "m" / "stale.txt").write_text("old")
    publish(entry(b"2"), tmp_path)
    assert files(tmp_path)["m/1/model.onnx"] == b"2"
    assert "m/stale.txt" not in files(tmp_path)


def test_a_failed_publication_leaves_the_former_entry(tmp_path: Path) -> None:
    """A file that cannot be written stops before the swap."""
    publish(entry(b"1"), tmp_path)
    broken = Entry("m", "", {"1/model.onnx/within-a-file.txt": ""}, {"model.onnx": b"2"})
    with pytest.raises(OSError, match=r"within-a-file|File exists|Not a directory"):
        publish(broken, tmp_path)
    assert files(tmp_path)["m/1/model.onnx"] == b"1"
    assert [d.name for d in tmp_path.iterdir()] == ["m"]


def test_files_may_lie_in_directories_and_be_no_text(tmp_path: Path) -> None:
    publish(Entry("m", "", {"initial_state/zero.bin": b"\xff\x00"}, {"model.onnx": b"1"}), tmp_path)
    assert files(tmp_path)["m/initial_state/zero.bin"] == b"\xff\x00"


def test_a_configuration_may_be_left_out(tmp_path: Path) -> None:
    """Without a configuration there is no file for it: an empty one would not mean the same."""
    publish(Entry("m", None, {}, {"model.onnx": b"1"}), tmp_path)
    assert files(tmp_path) == {"m/1/model.onnx": b"1"}
