"""Boxes and scores of a detector to objects: the likely ones, each once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.zoo.preprocess import WHITE, channels_first

Floats = npt.NDArray[np.float32]

SIZE = 416
# What is less likely is left out, and of boxes of one class that overlap by more than this (intersection over union)
# only the likeliest is kept.
LEAST_SCORE = 0.35
MOST_OVERLAP = 0.45


@dataclass(frozen=True, slots=True)
class Detection:
    """An object: left, top, right and bottom in pixels of the photograph."""

    label: str
    score: float
    box: tuple[float, float, float, float]


def image_tensor(photo: Image.Image) -> Floats:
    """FP32 [1, 3, 416, 416] of an RGB photograph, stretched to a square, 0 to 1."""
    return channels_first(np.asarray(photo.resize((SIZE, SIZE), Image.Resampling.BILINEAR), np.float32) / WHITE)


def detections(
    boxes: npt.NDArray[Any], scores: npt.NDArray[Any], labels: Sequence[str], width: int, height: int
) -> list[Detection]:
    """The objects of one photograph, the likeliest first, from a row of `boxes` [M, 4] and `scores` [M, classes]."""
    found = []
    for number, label in enumerate(labels):
        likely = np.flatnonzero(scores[:, number] >= LEAST_SCORE)
        order = likely[np.argsort(-scores[likely, number], kind="stable")]
        kept: list[int] = []
        for index in order:
            if all(overlap(boxes[index], boxes[other]) <= MOST_OVERLAP for other in kept):
                kept.append(int(index))
        for index in kept:
            left, top, right, bottom = (float(edge) for edge in boxes[index])
            box = (left * width, top * height, right * width, bottom * height)
            found.append(Detection(label, float(scores[index, number]), box))
    return sorted(found, key=lambda detection: -detection.score)


def overlap(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    """Intersection over union of two boxes."""
    left, top = np.maximum(one[:2], other[:2])
    right, bottom = np.minimum(one[2:], other[2:])
    both = max(0.0, float(right - left)) * max(0.0, float(bottom - top))
    union = sum(float((box[2] - box[0]) * (box[3] - box[1])) for box in (one, other)) - both
    return both / union if union > 0 else 0.0
