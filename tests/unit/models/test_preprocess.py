"""Photographs to tensors: crop, size, scale and order of the axes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image", reason="install onclock[models]")
preprocess = pytest.importorskip("models.zoo.preprocess")


def test_values_are_scaled_and_channels_come_first() -> None:
    """A one-coloured photograph gives `(x - 127) / 128` in each of the three planes."""
    tensor = preprocess.image_tensor(Image.new("RGB", (300, 260), (255, 127, 0)))
    assert tensor.shape == (1, 3, 224, 224)
    assert tensor.dtype == np.float32
    assert tensor.flags.c_contiguous
    for plane, value in zip(tensor[0], (1.0, 0.0, -127 / 128), strict=True):
        np.testing.assert_array_equal(plane, np.float32(value))


@pytest.mark.parametrize(("width", "height"), [(400, 200), (200, 400), (224, 224)])
def test_the_middle_is_kept(width: int, height: int) -> None:
    """Only the centre square of 87.5 % of the shorter side is seen: what lies outside does not matter."""
    side = round(min(width, height) * 0.875)
    photo = np.zeros((height, width, 3), np.uint8)
    top, left = (height - side) // 2, (width - side) // 2
    photo[top : top + side, left : left + side] = 255
    np.testing.assert_array_equal(preprocess.image_tensor(Image.fromarray(photo)), np.float32(1.0))


def test_rows_stay_rows() -> None:
    """The upper half of the photograph is the upper half of the tensor."""
    photo = np.zeros((256, 256, 3), np.uint8)
    photo[:128] = 255
    tensor = preprocess.image_tensor(Image.fromarray(photo))
    assert tensor[0, :, :100].min() > 0.9
    assert tensor[0, :, 124:].max() < -0.9


def test_other_colour_modes_become_rgb(tmp_path: Path) -> None:
    """A grey picture with transparency loads as RGB."""
    Image.new("LA", (20, 20), (255, 10)).save(tmp_path / "grey.png")
    assert preprocess.load_photo(tmp_path / "grey.png").getpixel((3, 3)) == (255, 255, 255)


def test_a_file_that_is_no_image_is_an_error(tmp_path: Path) -> None:
    """The error is an OSError that names the file."""
    (tmp_path / "note.jpg").write_text("not a photograph")
    with pytest.raises(OSError, match=r"note\.jpg"):
        preprocess.load_photo(tmp_path / "note.jpg")
