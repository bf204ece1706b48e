"""Heads: small classifiers on features, chosen by cross-validation on the training data and calibrated.

Every head scales its features first. Where a head has no probabilities of its own, they are made by a sigmoid per class
that is fitted to cross-validated scores (J. Platt, 1999).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

FOLDS = 4
# Neighbours keep every training row: beyond this a head is no longer small.
MOST_NEIGHBOUR_ROWS = 20_000


class HeadError(Exception):
    """No such head, or none that can be fitted to this data. The message says why."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A head that may be chosen: `make` builds it unfitted."""

    kind: str
    setting: str
    make: Callable[[int, bool], Any]

    @property
    def name(self) -> str:
        return f"{self.kind} ({self.setting})"


@dataclass(slots=True)
class Fitted:
    """The chosen head, fitted to all training data. `scores`: cross-validated log loss of each candidate."""

    candidate: Candidate
    pipeline: Any
    scores: Mapping[str, float]


def _logistic(strength: float) -> Callable[[int, bool], Any]:
    def make(seed: int, weighted: bool) -> Any:
        from sklearn.linear_model import LogisticRegression

        weight = "balanced" if weighted else None
        return LogisticRegression(C=strength, max_iter=2000, class_weight=weight, random_state=seed)

    return make


def _svm(strength: float) -> Callable[[int, bool], Any]:
    def make(seed: int, weighted: bool) -> Any:
        from sklearn.calibration import CalibratedClassifierCV
        from sklearn.svm import LinearSVC

        weight = "balanced" if weighted else None
        machine = LinearSVC(C=strength, class_weight=weight, random_state=seed, max_iter=5000)
        return CalibratedClassifierCV(machine, method="sigmoid", cv=3, ensemble=False)

    return make


def _neighbours(count: int) -> Callable[[int, bool], Any]:
    def make(_seed: int, _weighted: bool) -> Any:
        from sklearn.neighbors import KNeighborsClassifier

        return KNeighborsClassifier(count)

    return make


def _perceptron(width: int) -> Callable[[int, bool], Any]:
    def make(seed: int, _weighted: bool) -> Any:
        from sklearn.neural_network import MLPClassifier

        return MLPClassifier((width,), alpha=1e-2, early_stopping=True, max_iter=300, random_state=seed)

    return make


CANDIDATES: tuple[Candidate, ...] = (
    *(Candidate("logistic", f"C {c:g}", _logistic(c)) for c in (0.001, 0.01, 0.1)),
    *(Candidate("svm", f"C {c:g}", _svm(c)) for c in (1e-5, 1e-4)),
    Candidate("neighbours", "5", _neighbours(5)),
    Candidate("perceptron", "128 wide", _perceptron(128)),
)
KINDS = tuple(dict.fromkeys(candidate.kind for candidate in CANDIDATES))


def fit(features: Floats, labels: Labels, kind: str, seed: int, weighted: bool, scale: Any = None) -> Fitted:
    """Choose among the heads of a kind ("auto": of all) and fit the best. `scale` makes the first step of the pipeline
    (unset: a standard scaler). Raises `HeadError`."""
    chosen = [c for c in CANDIDATES if kind in ("auto", c.kind)]
    if not chosen:
        raise HeadError(f"there is no head '{kind}'; expected auto, {', '.join(KINDS)}")
    if len(labels) > MOST_NEIGHBOUR_ROWS:
        chosen = [c for c in chosen if c.kind != "neighbours"]
    least = int(np.bincount(labels).min())
    folds = min(FOLDS, least)
    if folds < 2 or not chosen:
        raise HeadError(f"a class has {least} training examples; two are the least to choose a head by")
    scores = {c.name: _log_loss(_pipeline(c, seed, weighted, scale), features, labels, folds, seed) for c in chosen}
    best = min(chosen, key=lambda c: scores[c.name])
    return Fitted(best, _pipeline(best, seed, weighted, scale).fit(features, labels), scores)


def _pipeline(candidate: Candidate, seed: int, weighted: bool, scale: Any) -> Any:
    from sklearn.base import clone
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    first = StandardScaler() if scale is None else clone(scale)
    return make_pipeline(first, candidate.make(seed, weighted))


def _log_loss(pipeline: Any, features: Floats, labels: Labels, folds: int, seed: int) -> float:
    """Cross-validated: it asks for probabilities that are right, not only for the right class."""
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    parts = StratifiedKFold(folds, shuffle=True, random_state=seed)
    predicted = cross_val_predict(pipeline, features, labels, cv=parts, method="predict_proba")
    return float(log_loss(labels, predicted, labels=np.arange(predicted.shape[1])))
