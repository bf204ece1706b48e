"""The checkpoint reader: both layouts, and nothing but tensors ever comes out of a file."""

from __future__ import annotations

import contextlib
import io
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from models.zoo.torch_checkpoint import CheckpointError, load_state_dict
from tests.unit.models import checkpoints as ck

Writer = Callable[[Mapping[str, npt.NDArray[Any]]], bytes]
LAYOUTS = pytest.mark.parametrize("write", [ck.legacy_checkpoint, ck.zip_checkpoint], ids=["legacy", "zip"])

arrays = st.sampled_from(sorted(ck.STORAGE_OF)).flatmap(
    lambda name: hnp.arrays(np.dtype(name), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
)


def load(content: bytes, directory: Path) -> dict[str, npt.NDArray[Any]]:
    path = directory / "model.pth"
    path.write_bytes(content)
    return load_state_dict(path)


@LAYOUTS
@given(tensors=st.dictionaries(st.text(min_size=1, max_size=8), arrays, max_size=4))
@settings(max_examples=60, deadline=None)
def test_what_was_saved_is_read(
    write: Writer, tensors: dict[str, npt.NDArray[Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Names, types, shapes and every bit survive, in both layouts."""
    read = load(write(tensors), tmp_path_factory.mktemp("checkpoint"))
    assert list(read) == list(tensors)
    for name, array in tensors.items():
        assert read[name].dtype == array.dtype
        assert read[name].shape == array.shape
        assert read[name].tobytes() == array.tobytes()


@LAYOUTS
def test_a_torn_file_is_an_error_wherever_it_ends(write: Writer, tmp_path: Path) -> None:
    """No prefix of a checkpoint loads, and each fails with a CheckpointError that names the file."""
    whole = write(ck.example())
    for end in range(len(whole)):
        with pytest.raises(CheckpointError, match=r"model\.pth"):
            load(whole[:end], tmp_path)


@LAYOUTS
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_damaged_file_never_raises_anything_else(
    write: Writer, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One changed byte gives tensors or a CheckpointError."""
    content = bytearray(write(ck.example()))
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CheckpointError):
        load(bytes(content), tmp_path_factory.mktemp("damaged"))


@pytest.mark.parametrize(
    "name", [("posix", "system"), ("os", "system"), ("builtins", "eval"), ("torch", "load"), ("subprocess", "Popen")]
)
def test_a_call_to_anything_unsafe_is_refused(name: tuple[str, str], tmp_path: Path) -> None:
    """A pickle that names a function outside a state dictionary's needs is refused before it is called."""
    marker = tmp_path / "called"
    attack = ck.global_name(*name) + ck.group(ck.text(f"touch {marker}")) + b"R"
    for content in (ck.archive(ck.pickled(attack), {}), ck.pickled(attack)):
        with pytest.raises(CheckpointError, match=rf"{name[0]}\.{name[1]}.*refused"):
            load(content, tmp_path)
    assert not marker.exists()


def test_an_attack_hidden_in_a_legacy_file_is_refused(tmp_path: Path) -> None:
    """Every pickle of the older layout is restricted, not the first only."""
    head = ck.pickled(ck.integer(ck.LEGACY_MAGIC)) + ck.pickled(ck.integer(ck.LEGACY_PROTOCOL))
    attack = ck.pickled(ck.global_name("posix", "system") + ck.group(ck.text("true")) + b"R")
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        load(head + attack, tmp_path)


def test_a_transposed_view_with_offset_is_read(tmp_path: Path) -> None:
    """Offset and strides select the elements, not their order in the storage."""
    shape = np.zeros((2, 3), np.float32)
    storage = np.arange(8, dtype=np.float32)
    content = ck.pickled(ck.ordered({"w": ck.tensor("0", shape, legacy=False, offset=2, stride=(1, 2))}))
    read = load(ck.archive(content, {"0": storage.tobytes()}), tmp_path)
    np.testing.assert_array_equal(read["w"], storage[2:].reshape(3, 2).T)


def test_bfloat16_is_widened(tmp_path: Path) -> None:
    """A bfloat16 storage becomes float32 of the same values."""
    values = np.array([1.5, -2.0, 0.25], np.float32)
    content = ck.tensor("0", np.zeros(3, np.int16), legacy=False).replace(b"ShortStorage", b"BFloat16Storage")
    raw = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    read = load(ck.archive(ck.pickled(ck.ordered({"w": content})), {"0": raw}), tmp_path)
    assert read["w"].dtype == np.float32
    np.testing.assert_array_equal(read["w"], values)


@pytest.mark.parametrize(
    ("stride", "offset", "message"),
    [((3, 2), 0, "reaches element 7"), ((0, 1), 0, None), ((-1, 1), 0, "stride"), ((3,), 0, "stride")],
)
def test_a_view_outside_its_storage_is_an_error(
    stride: tuple[int, ...], offset: int, message: str | None, tmp_path: Path
) -> None:
    """A view never reads memory that is not the storage's; one that repeats elements within it is fine."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    content = ck.pickled(ck.ordered({"w": ck.tensor("0", array, legacy=False, offset=offset, stride=stride)}))
    file = ck.archive(content, {"0": array.tobytes()})
    if message is None:
        np.testing.assert_array_equal(load(file, tmp_path)["w"], array[[0, 0]])
    else:
        with pytest.raises(CheckpointError, match=message):
            load(file, tmp_path)


def test_a_storage_of_another_size_is_an_error(tmp_path: Path) -> None:
    """A storage shorter than its tensors state is named."""
    content = ck.pickled(ck.ordered({"w": ck.tensor("5", np.zeros(4, np.float32), legacy=False)}))
    with pytest.raises(CheckpointError, match="storage 5 has 12 bytes, expected 4 elements"):
        load(ck.archive(content, {"5": bytes(12)}), tmp_path)


def test_a_nested_checkpoint_is_explained(tmp_path: Path) -> None:
    """A training checkpoint (state_dict, epoch, ...) is refused with what to save instead."""
    content = ck.pickled(ck.ordered({"state_dict": ck.ordered({}), "epoch": ck.integer(3)}))
    with pytest.raises(CheckpointError, match=r"'state_dict' is OrderedDict.*model\.state_dict\(\)"):
        load(ck.archive(content, {}), tmp_path)


def test_a_big_endian_file_is_refused(tmp_path: Path) -> None:
    """The byte order is checked, not assumed."""
    with pytest.raises(CheckpointError, match="little-endian"):
        load(ck.archive(ck.pickled(ck.ordered({})), {}, byteorder="big"), tmp_path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    """A zip file or text that is no checkpoint is an error; a missing file stays an OSError."""
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as target:
        target.writestr("readme.txt", "hello")
    for content in (other.getvalue(), b"hello", b"", ck.pickled(ck.integer(1))):
        with pytest.raises(CheckpointError):
            load(content, tmp_path)
    with pytest.raises(FileNotFoundError):
        load_state_dict(tmp_path / "absent.pth")
