"""Photographs to tensors, as EfficientNet-Lite and MobileNetV2 were trained to see them.

EfficientNet-Lite: crop the middle 87.5 % of the shorter side to a square, resize to 224x224 (bicubic), scale to about
[-1, 1] by `(x - 127) / 128`, channels first. The figures are those of the TensorFlow TPU repository: MEAN_RGB 127 and
STDDEV_RGB 128 in `efficientnet_lite_builder.py`, CROP_PADDING 32 in `preprocessing.py` (224 / (224 + 32) = 0.875).

MobileNetV2: the same part of the photograph, `(x / 255 - mean) / deviation` with ImageNet's figures for each colour, as
the models of torchvision are evaluated (resize to 256, crop 224: 0.875 again).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Floats = npt.NDArray[np.float32]

IMAGE_SIZE = 224
CROP = 0.875
MEAN = 127.0
SCALE = 128.0
# Of ImageNet's pixels by colour, from 0 to 1 (torchvision, and the many networks that were trained with its figures).
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)
WHITE = np.float32(255)


def load_photo(path: Path) -> Image.Image:
    """A photograph in RGB. Raises `OSError` naming the file when it is not a readable image."""
    with Image.open(path) as photo:
        return photo.convert("RGB")


def image_tensor(photo: Image.Image) -> Floats:
    """FP32 [1, 3, 224, 224] of an RGB photograph, for EfficientNet-Lite."""
    return channels_first((_centre(photo) - np.float32(MEAN)) / np.float32(SCALE))


def imagenet_tensor(photo: Image.Image) -> Floats:
    """FP32 [1, 3, 224, 224] of an RGB photograph, for MobileNetV2."""
    return channels_first((_centre(photo) / WHITE - IMAGENET_MEAN) / IMAGENET_DEVIATION)


def channels_first(pixels: npt.NDArray[Any]) -> Floats:
    """FP32 [1, C, H, W] of a picture [H, W, C]."""
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[np.newaxis], np.float32)


def _centre(photo: Image.Image) -> Floats:
    """FP32 [224, 224, 3], 0 to 255, of the middle of a photograph."""
    width, height = photo.size
    side = max(1, round(min(width, height) * CROP))
    left, top = (width - side) // 2, (height - side) // 2
    square = photo.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC), dtype=np.float32)
