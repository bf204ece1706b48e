"""Small pictures of digits become what MNIST's network was trained on."""

from __future__ import annotations

import numpy as np
import pytest

from models.zoo import mnist

pytest.importorskip("PIL.Image", reason="install onclock[models]")


def test_the_mass_of_a_digit_comes_to_the_middle() -> None:
    """Wherever it was drawn, and as white as MNIST's digits; the border stays black."""
    image = np.zeros((8, 8))
    image[2:5, 3:5] = 16
    enlarged = mnist.enlarged(image)
    assert enlarged.shape == (1, 1, 28, 28)
    assert enlarged.dtype == np.float32
    assert enlarged.max() == 255
    rows, columns = np.indices((28, 28))
    for place in (rows, columns):
        assert abs(float((place * enlarged[0, 0]).sum() / enlarged.sum()) - 14) <= 0.5


def test_a_digit_at_the_edge_stays_in_the_picture() -> None:
    """The 20x20 pixels are moved at most as far as there is room."""
    image = np.zeros((8, 8))
    image[7, 7] = 1
    enlarged = mnist.enlarged(image)
    assert enlarged[0, 0, 19, 19] > 200
