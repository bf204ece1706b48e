"""How good a classifier is on examples it has not seen: the figures of a report."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Labels = npt.NDArray[np.int64]

# Bins of a reliability curve.
BINS = 10


@dataclass(slots=True)
class Scores:
    """What came of one classifier on the test data. `probabilities` None: it only names a class (-1: none of them)."""

    name: str
    predicted: Labels
    truth: Labels
    classes: int
    probabilities: Floats | None = None

    @property
    def accuracy(self) -> float:
        return float((self.predicted == self.truth).mean())

    @property
    def interval(self) -> float:
        """Half of the 95 % interval of the accuracy (normal approximation)."""
        return 1.96 * float(np.sqrt(self.accuracy * (1 - self.accuracy) / len(self.truth)))

    @property
    def confusion(self) -> npt.NDArray[np.int64]:
        """Rows are the truth, columns what was said; the last column is "none of them"."""
        matrix = np.zeros((self.classes, self.classes + 1), np.int64)
        np.add.at(matrix, (self.truth, np.where(self.predicted < 0, self.classes, self.predicted)), 1)
        return matrix

    def per_class(self) -> list[tuple[float, float, float, int]]:
        """(precision, recall, F1, examples) of each class; 0 where nothing was said."""
        matrix = self.confusion[:, : self.classes]
        right = np.diag(matrix).astype(float)
        said, there = matrix.sum(axis=0), self.confusion.sum(axis=1)
        precision = right / np.maximum(said, 1)
        recall = right / np.maximum(there, 1)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        return list(zip(precision.tolist(), recall.tolist(), f1.tolist(), there.tolist(), strict=True))

    @property
    def macro_f1(self) -> float:
        """The mean over classes that are in the test data."""
        return float(np.mean([f1 for _, _, f1, count in self.per_class() if count]))

    @property
    def log_loss(self) -> float | None:
        """Nats an example; None without probabilities."""
        if self.probabilities is None:
            return None
        given = self.probabilities[np.arange(len(self.truth)), self.truth]
        return float(-np.log(np.clip(given, 1e-15, 1)).mean())

    def reliability(self) -> list[tuple[float, float, int]]:
        """(mean probability of what was said, how often it was right, examples) by probability."""
        if self.probabilities is None:
            return []
        sure = self.probabilities.max(axis=1)
        right = self.predicted == self.truth
        bins = np.minimum((sure * BINS).astype(int), BINS - 1)
        return [
            (float(sure[bins == b].mean()), float(right[bins == b].mean()), int((bins == b).sum()))
            for b in range(BINS)
            if (bins == b).any()
        ]

    @property
    def calibration_error(self) -> float | None:
        """Expected calibration error: the mean distance of the reliability curve from the diagonal."""
        curve = self.reliability()
        if not curve:
            return None
        return sum(count * abs(sure - right) for sure, right, count in curve) / len(self.truth)
