"""Pictures to what PP-OCR takes, and its answers to lines and letters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

Image = pytest.importorskip("PIL.Image", reason="install onclock[models]")
pytest.importorskip("scipy.ndimage", reason="install onclock[models]")
ocr = pytest.importorskip("models.zoo.ocr")


@pytest.mark.parametrize(
    ("size", "expected"),
    [((640, 480), (480, 640)), ((1920, 1080), (544, 960)), ((50, 40), (32, 64)), ((10, 5), (32, 32))],
    ids=["fits", "larger", "rounded", "tiny"],
)
def test_pages_have_sides_that_the_detector_can_halve(size: tuple[int, int], expected: tuple[int, int]) -> None:
    """Multiples of 32, at most 960, nearly in proportion."""
    tensor = ocr.page_tensor(Image.new("RGB", size))
    assert tensor.shape == (1, 3, *expected)
    assert tensor.dtype == np.float32


def test_colours_are_blue_first() -> None:
    """In both tensors; ImageNet's figures stay in their places, as PaddleOCR has it."""
    picture = Image.new("RGB", (64, 48), (255, 0, 0))
    page = ocr.page_tensor(picture)[0, :, 0, 0]
    np.testing.assert_allclose(page, [-0.485 / 0.229, -0.456 / 0.224, (1 - 0.406) / 0.225], rtol=1e-5)
    np.testing.assert_allclose(ocr.line_tensor(picture)[0, :, 0, 0], [-1, -1, 1])


def test_lines_keep_their_proportion() -> None:
    """48 pixels high; not wider than there is room for."""
    assert ocr.line_tensor(Image.new("RGB", (200, 24))).shape == (1, 3, 48, 400)
    assert ocr.line_tensor(Image.new("RGB", (9000, 48))).shape == (1, 3, 48, 3200)
    assert ocr.line_tensor(Image.new("RGB", (1, 500))).shape == (1, 3, 48, 1)


def test_cores_are_grown_into_lines() -> None:
    """From the top, in pixels of the picture, within it; specks and faint spots are no text."""
    probabilities = np.zeros((100, 200), np.float32)
    probabilities[50:60, 20:60] = 0.9
    probabilities[10:20, 150:200] = 0.8
    probabilities[80:82, 80:120] = 0.9
    probabilities[70:90, 10:40] = 0.4
    # 10 x 40: grown by 1.6 * 400 / 100; twice that in a picture twice the size.
    first, second = ocr.text_boxes(probabilities, 400, 200)
    assert second == (round(2 * (20 - 6.4)), round(2 * (50 - 6.4)), round(2 * (60 + 6.4)), round(2 * (60 + 6.4)))
    assert first[1] < second[1]
    assert first[2] == 400


def test_repeated_characters_are_one_unless_there_is_none_between() -> None:
    """Class 0 is none."""
    likely = np.eye(4, dtype=np.float32)[[0, 1, 1, 0, 1, 2, 3, 3, 0]]
    assert ocr.spelt(likely, ["a", "b", " "]) == "aab "
    assert ocr.spelt(likely[:1], ["a", "b", " "]) == ""
    with pytest.raises(ValueError, match="4 classes for 2 characters"):
        ocr.spelt(likely, ["a", "b"])


def test_a_page_is_read_line_by_line() -> None:
    """What the detector finds is cut out and given to the recogniser."""

    class Detector:
        def run(self, names: Sequence[str] | None, feeds: Mapping[str, npt.NDArray[Any]]) -> list[Any]:
            answer = np.zeros((1, 1, *feeds["x"].shape[2:]), np.float32)
            answer[0, 0, 10:20, 10:50] = answer[0, 0, 60:70, 10:90] = 0.9
            return [answer]

    class Recogniser:
        def run(self, names: Sequence[str] | None, feeds: Mapping[str, npt.NDArray[Any]]) -> list[Any]:
            # Says how wide the line is: the longer one is "b".
            return [np.eye(3, dtype=np.float32)[[[1 if feeds["x"].shape[3] < 150 else 2]]]]

    lines = ocr.read(Detector(), Recogniser(), ["a", "b"], Image.new("RGB", (128, 96)))
    assert [line.text for line in lines] == ["a", "b"]
