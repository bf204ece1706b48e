"""Publishing into a model repository: whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.zoo.publish import Entry, PublishError, check_publishable, publish, publish_version


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


CONFIG = """\
name: "m"
max_batch_size: 32
input { name: "x" data_type: TYPE_FP32 dims: [4] }
output { name: "probabilities" data_type: TYPE_FP32 dims: [2] label_filename: "labels.txt" }
parameters { key: "latency_slo_ms" value { string_value: "20" } }
"""


def learned(content: bytes, config: str = CONFIG, preparation: str = "in centimetres", labels: str = "a\nb\n") -> Entry:
    """A version as transfer learning makes it."""
    provenance = f'{{"preparation": "{preparation}"}}'.encode()
    return Entry("m", config, {"labels.txt": labels}, {"model.onnx": content, "provenance.json": provenance})


def test_versions_are_added_beside_each_other(tmp_path: Path) -> None:
    """The objective may change, and the way the configuration is written."""
    assert publish_version(learned(b"1"), tmp_path).name == "1"
    sooner = "# Another one.\n" + CONFIG.replace('"20"', '"10"')
    check_publishable(learned(b"2", sooner), tmp_path)
    assert publish_version(learned(b"2", sooner), tmp_path).name == "2"
    assert (tmp_path / "m" / "1" / "model.onnx").read_bytes() == b"1"
    assert (tmp_path / "m" / "config.pbtxt").read_text() == sooner
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["1", "2", "config.pbtxt", "labels.txt"]


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (learned(b"2", labels="a\nc\n"), "is a model of other classes"),
        (learned(b"2", CONFIG.replace("[4]", "[5]")), "says otherwise about input; publish under another name"),
        (learned(b"2", CONFIG.replace('"x"', '"y"').replace("[2]", "[3]")), "says otherwise about input, output"),
        (
            learned(b"2", CONFIG + 'parameters { key: "backbone" value { string_value: "b" } }'),
            "says otherwise about backbone",
        ),
        (learned(b"2", preparation="in inches"), "its clients send other data (in centimetres)"),
        (learned(b"2", "no configuration"), "config.pbtxt:1:"),
    ],
)
def test_what_does_not_go_with_the_other_versions_is_refused(second: Entry, said: str, tmp_path: Path) -> None:
    """They would be served with its configuration, labels and card."""
    publish_version(learned(b"1"), tmp_path)
    before = files(tmp_path)
    for attempt in (check_publishable, publish_version):
        with pytest.raises(PublishError) as caught:
            attempt(second, tmp_path)
        assert said in str(caught.value)
    assert files(tmp_path) == before


def test_no_version_is_added_to_a_model_of_another_origin(tmp_path: Path) -> None:
    """The zoo's, one's own, something that is no model."""
    publish(entry(b"1"), tmp_path)
    with pytest.raises(PublishError, match="was not made by transfer learning"):
        publish_version(learned(b"2"), tmp_path)
    assert [p.name for p in (tmp_path / "m").iterdir() if p.is_dir()] == ["1"]
    (tmp_path / "other" / "m").mkdir(parents=True)
    with pytest.raises(PublishError, match="was not made by transfer learning"):
        publish_version(learned(b"2"), tmp_path / "other")
