"""Boxes and scores become objects."""

from __future__ import annotations

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image", reason="install onclock[models]")
detection = pytest.importorskip("models.zoo.detection")

LABELS = ("cat", "cup")


def test_a_photograph_is_stretched() -> None:
    """To a square, whatever its shape; 0 to 1, channels first."""
    tensor = detection.image_tensor(Image.new("RGB", (100, 30), (255, 51, 0)))
    assert tensor.shape == (1, 3, 416, 416)
    np.testing.assert_allclose(tensor[0, :, 200, 200], [1, 0.2, 0])


def test_of_boxes_that_overlap_the_likeliest_is_kept() -> None:
    """Within a class; the same box may be two things. What is unlikely is left out; the likeliest comes first."""
    boxes = np.array([[0, 0, 0.5, 1], [0, 0, 0.5, 0.9], [0.5, 0, 1, 1], [0, 0, 1, 1]], np.float32)
    scores = np.array([[0.6, 0.8], [0.7, 0.1], [0.9, 0.3], [0.3, 0.34]], np.float32)
    found = detection.detections(boxes, scores, LABELS, width=200, height=100)
    assert [(one.label, round(one.score, 2)) for one in found] == [("cat", 0.9), ("cup", 0.8), ("cat", 0.7)]
    assert found[0].box == (100, 0, 200, 100)
    assert found[2].box == pytest.approx((0, 0, 100, 90))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7),
        ((0, 0, 1, 1), (1, 0, 2, 1), 0),
        ((0, 0, 1, 1), (0, 0, 1, 1), 1),
        ((0, 0, 0, 0), (0, 0, 0, 0), 0),
    ],
    ids=["a quarter", "beside each other", "the same", "nothing"],
)
def test_overlap(one: tuple[float, ...], other: tuple[float, ...], expected: float) -> None:
    """Intersection over union."""
    assert detection.overlap(np.array(one), np.array(other)) == pytest.approx(expected)
