"""Photographs to what U2NetP takes, and its answer to how much of each pixel is foreground.

As the package `rembg` prepares them: 320x320 pixels whatever the shape of the photograph, divided by the brightest
value in it, then ImageNet's mean and deviation. The first of the network's seven outputs counts, stretched to 0..1.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.zoo.preprocess import IMAGENET_DEVIATION, IMAGENET_MEAN, channels_first
from models.zoo.session import Session

Floats = npt.NDArray[np.float32]

SIZE = 320
INPUT = "input.1"
# The fused answer; the other six are those of the network's stages.
OUTPUT = "1959"


def image_tensor(photo: Image.Image) -> Floats:
    """FP32 [1, 3, 320, 320] of an RGB photograph."""
    pixels = np.asarray(photo.resize((SIZE, SIZE), Image.Resampling.LANCZOS), np.float32)
    # A black picture stays black.
    brightest = max(float(pixels.max()), 1.0)
    return channels_first((pixels / brightest - IMAGENET_MEAN) / IMAGENET_DEVIATION)


def alpha(output: Floats) -> Floats:
    """FP32 [320, 320] from 0 (background) to 1 (foreground): the least likely pixel is 0, the likeliest 1."""
    found = output[0, 0]
    lowest, highest = found.min(), found.max()
    stretched: Floats = (found - lowest) / max(highest - lowest, np.float32(1e-6))
    return stretched


def foreground(session: Session, photo: Image.Image) -> Floats:
    """`alpha` of a photograph."""
    return alpha(session.run([OUTPUT], {INPUT: image_tensor(photo)})[0])


def cut_out(photo: Image.Image, foreground: Floats) -> Image.Image:
    """The photograph with its background transparent."""
    mask = Image.fromarray((foreground * 255).astype(np.uint8)).resize(photo.size, Image.Resampling.LANCZOS)
    cut = photo.convert("RGB")
    cut.putalpha(mask)
    return cut
