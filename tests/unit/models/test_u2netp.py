"""What goes into U2NetP and what is made of its answer."""

from __future__ import annotations

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image", reason="install onclock[models]")
u2netp = pytest.importorskip("models.zoo.u2netp")


def test_the_brightest_value_becomes_one() -> None:
    """In all colours together; then mean and deviation of each."""
    tensor = u2netp.image_tensor(Image.new("RGB", (50, 20), (200, 100, 0)))
    assert tensor.shape == (1, 3, 320, 320)
    assert tensor.dtype == np.float32
    expected = [(1 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, (0 - 0.406) / 0.225]
    np.testing.assert_allclose(tensor[0, :, 160, 160], expected, rtol=1e-5)


def test_a_black_photograph_is_no_division_by_zero() -> None:
    """It stays black."""
    assert np.isfinite(u2netp.image_tensor(Image.new("RGB", (10, 10)))).all()


def test_alpha_goes_from_nothing_to_all() -> None:
    """The least likely pixel is background, the likeliest foreground; the same everywhere is no division by zero."""
    output = np.array([[[[0.2, 0.3], [0.4, 0.6]]]], np.float32)
    np.testing.assert_allclose(u2netp.alpha(output), [[0, 0.25], [0.5, 1]], atol=1e-6)
    assert np.isfinite(u2netp.alpha(np.ones((1, 1, 2, 2), np.float32))).all()


def test_the_background_becomes_transparent() -> None:
    """At the size of the photograph, whose colours stay."""
    foreground = np.zeros((320, 320), np.float32)
    foreground[:, :160] = 1
    cut = u2netp.cut_out(Image.new("RGB", (64, 48), (10, 20, 30)), foreground)
    assert cut.size == (64, 48)
    assert cut.getpixel((5, 20)) == (10, 20, 30, 255)
    assert cut.getpixel((60, 20)) == (10, 20, 30, 0)
