"""Photographs to tensors, as EfficientNet-Lite was trained to see them.

Crop the middle 87.5 % of the shorter side to a square, resize to 224x224 (bicubic), scale to about [-1, 1] by
`(x - 127) / 128`, channels first. The figures are those of the TensorFlow TPU repository: MEAN_RGB 127 and STDDEV_RGB
128 in `efficientnet_lite_builder.py`, CROP_PADDING 32 in `preprocessing.py` (224 / (224 + 32) = 0.875).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

Floats = npt.NDArray[np.float32]

IMAGE_SIZE = 224
CROP = 0.875
MEAN = 127.0
SCALE = 128.0


def load_photo(path: Path) -> Image.Image:
    """A photograph in RGB. Raises `OSError` naming the file when it is not a readable image."""
    with Image.open(path) as photo:
        return photo.convert("RGB")


def image_tensor(photo: Image.Image) -> Floats:
    """FP32 [1, 3, 224, 224] of an RGB photograph."""
    width, height = photo.size
    side = max(1, round(min(width, height) * CROP))
    left, top = (width - side) // 2, (height - side) // 2
    square = photo.crop((left, top, left + side, top + side))
    resized = square.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized, dtype=np.float32)
    scaled = (pixels - np.float32(MEAN)) / np.float32(SCALE)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)[np.newaxis])
