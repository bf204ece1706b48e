"""Handwritten digits to what the MNIST network takes, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from models.zoo.session import Session

Floats = npt.NDArray[np.float32]

INPUT = "Input3"
OUTPUT = "Plus214_Output_0"
SIZE = 28
# In MNIST a digit is 20 pixels high and white on black.
DIGIT_SIZE = 20
WHITE = 255.0


def enlarged(image: npt.NDArray[Any]) -> Floats:
    """FP32 [1, 1, 28, 28] of a small picture with a digit in it, 0 (background) to the brightest value in it.

    The digit becomes 20 pixels high and its centre of mass comes to the middle. Needs Pillow.
    """
    from PIL import Image

    grey = Image.fromarray((image / image.max() * WHITE).astype(np.uint8))
    digit = np.asarray(grey.resize((DIGIT_SIZE, DIGIT_SIZE), Image.Resampling.BICUBIC), np.float32)
    rows, columns = np.indices(digit.shape)
    top, left = (
        int(np.clip(round(SIZE / 2 - float((place * digit).sum() / digit.sum())), 0, SIZE - DIGIT_SIZE))
        for place in (rows, columns)
    )
    canvas = np.zeros((1, 1, SIZE, SIZE), np.float32)
    canvas[0, 0, top : top + DIGIT_SIZE, left : left + DIGIT_SIZE] = digit
    return canvas


def digit(session: Session, image: Floats) -> int:
    """The digit that the network sees."""
    return int(np.argmax(session.run([OUTPUT], {INPUT: image})[0]))
