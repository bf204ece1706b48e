"""Text on pictures with PP-OCR: a detector finds the lines, a recogniser reads each.

Detector: blue, green, red (in this order), ImageNet's figures in it, sides that are multiples of 32. It answers with
how likely each pixel lies in the core of a line; cores are grown into lines, as in M. Liao et al., "Real-time Scene
Text Detection with Differentiable Binarization" (2020). Lines are taken as upright here; PaddleOCR also turns them.

Recogniser: a line 48 pixels high, in the same order of colours, -1 to 1. It answers, for every 8 pixels of width, with
how likely each character is; repeated ones are one, and class 0 stands for "none" (connectionist temporal
classification).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.zoo.preprocess import IMAGENET_DEVIATION, IMAGENET_MEAN, WHITE, channels_first
from models.zoo.session import Session

Floats = npt.NDArray[np.float32]

INPUT = "x"
OUTPUT = "fetch_name_0"
# Sides are multiples of this, which the detector halves five times.
MULTIPLE = 32
# Pictures are not made larger than this for the detector, nor lines wider for the recogniser.
LONGEST_SIDE = 960
WIDEST_LINE = 3200
LINE_HEIGHT = 48
# As PaddleOCR sets them: pixels from which a core is made, the mean of a core that is a line, how far cores are grown,
# and cores that are too small for text.
PIXEL_SCORE = 0.3
LINE_SCORE = 0.5
GROWTH = 1.6
LEAST_SIDE = 3


@dataclass(frozen=True, slots=True)
class Line:
    """A line of text: left, top, right and bottom in pixels, and what it says."""

    box: tuple[int, int, int, int]
    text: str


def page_tensor(picture: Image.Image) -> Floats:
    """FP32 [1, 3, H, W] of an RGB picture, for the detector."""
    width, height = picture.size
    scale = min(1.0, LONGEST_SIDE / max(width, height))
    across, down = (max(1, round(side * scale / MULTIPLE)) * MULTIPLE for side in (width, height))
    pixels = np.asarray(picture.resize((across, down), Image.Resampling.BILINEAR), np.float32)[:, :, ::-1]
    return channels_first((pixels / WHITE - IMAGENET_MEAN) / IMAGENET_DEVIATION)


def text_boxes(probabilities: npt.NDArray[Any], width: int, height: int) -> list[tuple[int, int, int, int]]:
    """The lines of a picture of this size, from the top, from the detector's answer [H, W]. Needs SciPy."""
    from scipy import ndimage

    rows, columns = probabilities.shape
    cores, _ = ndimage.label(probabilities > PIXEL_SCORE, structure=np.ones((3, 3)))
    boxes = []
    for place in ndimage.find_objects(cores):
        (top, bottom), (left, right) = ((part.start, part.stop) for part in place)
        across, down = right - left, bottom - top
        if min(across, down) < LEAST_SIDE or probabilities[place].mean() < LINE_SCORE:
            continue
        # By as much as cores are smaller than their lines in training: a part of area over circumference.
        growth = GROWTH * across * down / (2 * (across + down))
        edges = ((left - growth) / columns, (top - growth) / rows, (right + growth) / columns, (bottom + growth) / rows)
        scaled = [round(min(1.0, max(0.0, edge)) * side) for edge, side in zip(edges, (width, height) * 2, strict=True)]
        boxes.append((scaled[0], scaled[1], scaled[2], scaled[3]))
    return sorted(boxes, key=lambda box: (box[1], box[0]))


def line_tensor(line: Image.Image) -> Floats:
    """FP32 [1, 3, 48, W] of a picture of one line, in RGB, for the recogniser."""
    width = min(WIDEST_LINE, max(1, round(line.width * LINE_HEIGHT / line.height)))
    pixels = np.asarray(line.resize((width, LINE_HEIGHT), Image.Resampling.BILINEAR), np.float32)[:, :, ::-1]
    return channels_first(pixels / WHITE * 2 - 1)


def spelt(probabilities: npt.NDArray[Any], alphabet: Sequence[str]) -> str:
    """The text of a line, from the recogniser's answer [T, classes]; class i + 1 is `alphabet[i]`.

    Raises `ValueError` if the alphabet is another's.
    """
    if probabilities.shape[1] != len(alphabet) + 1:
        raise ValueError(f"{probabilities.shape[1]} classes for {len(alphabet)} characters and none")
    classes = probabilities.argmax(axis=1)
    changed = np.append(True, classes[1:] != classes[:-1])
    return "".join(alphabet[number - 1] for number in classes[changed & (classes != 0)])


def read(detector: Session, recogniser: Session, alphabet: Sequence[str], picture: Image.Image) -> list[Line]:
    """The lines on an RGB picture, from the top."""
    (probabilities,) = detector.run([OUTPUT], {INPUT: page_tensor(picture)})
    lines = []
    for box in text_boxes(probabilities[0, 0], *picture.size):
        (likely,) = recogniser.run([OUTPUT], {INPUT: line_tensor(picture.crop(box))})
        lines.append(Line(box, spelt(likely[0], alphabet)))
    return lines
