"""Heads: small classifiers on features, chosen by cross-validation on the training data and calibrated.

Every head scales its features first. Where a head has no probabilities of its own, they are made by a sigmoid per class
that is fitted to cross-validated scores (J. Platt, 1999).

Weighted, every class counts as much as any other, however many examples it has: in fitting, in calibration and in the
choice. Probabilities are then those of a world in which all classes are equally frequent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

# Of networks FP32; of tables whatever the first step of the pipeline takes.
Features = npt.NDArray[Any]
Labels = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float64]
Make = Callable[[int, int], Any]
# Of each part of a cross-validation: the rows to learn from, the other rows.
Folds = Sequence[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]

FOLDS = 4
# Of many examples each half says enough about a head.
MANY = 20_000
FOLDS_OF_MANY = 2
CALIBRATION_FOLDS = 3
# Neighbours keep every training row: beyond this a head is no longer small.
MOST_NEIGHBOUR_ROWS = 20_000


# Of a perceptron: steps in a round, if its batches are not to be smaller or larger than that.
STEPS = 50
SMALLEST_BATCH = 16
LARGEST_BATCH = 300


class HeadError(Exception):
    """No such head, or none that can be fitted to this data. The message says why."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A head that may be chosen: `make` builds it unfitted, of a seed and a number of examples. To learn from it needs
    `least` of them, `each` of each class."""

    kind: str
    setting: str
    make: Make
    least: int = 2
    each: int = 1
    weighs: bool = True

    @property
    def name(self) -> str:
        return f"{self.kind} ({self.setting})"

    def unfit(self, rows: int, least: int, each: int, weighted: bool) -> str:
        """Why it cannot learn from `rows` examples, of which cross-validation leaves at least `least`, and `each` of
        every class; empty if it can."""
        if weighted and not self.weighs:
            return "it cannot weigh its examples (--weighted)"
        if self.kind == "neighbours" and rows > MOST_NEIGHBOUR_ROWS:
            return f"it keeps every example, {MOST_NEIGHBOUR_ROWS} at most, and there are {rows}"
        if each < self.each:
            return f"it needs {self.each} examples of each class at a time in cross-validation, and has {each}"
        if least < self.least:
            return f"it needs {self.least} examples at a time in cross-validation, and has {least}"
        return ""


@dataclass(slots=True)
class Fitted:
    """The chosen head, fitted to all training data. `scores`: cross-validated log loss of each candidate. `notes` say
    which could not be."""

    candidate: Candidate
    pipeline: Any
    scores: Mapping[str, float]
    notes: tuple[str, ...] = ()


def _logistic(strength: float) -> Make:
    def make(seed: int, _rows: int) -> Any:
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(C=strength, max_iter=2000, random_state=seed)

    return make


def _svm(strength: float) -> Make:
    def make(seed: int, _rows: int) -> Any:
        from sklearn.calibration import CalibratedClassifierCV
        from sklearn.svm import LinearSVC

        machine = LinearSVC(C=strength, random_state=seed, max_iter=5000)
        return CalibratedClassifierCV(machine, method="sigmoid", cv=CALIBRATION_FOLDS, ensemble=False)

    return make


def _neighbours(count: int) -> Make:
    def make(_seed: int, _rows: int) -> Any:
        from sklearn.neighbors import KNeighborsClassifier

        return KNeighborsClassifier(count)

    return make


def _perceptron(width: int) -> Make:
    def make(seed: int, rows: int) -> Any:
        from sklearn.neural_network import MLPClassifier

        # It stops when a dozen rounds did not help, which is too soon where a round has but a few steps.
        batch = min(max(rows // STEPS, SMALLEST_BATCH), LARGEST_BATCH)
        return MLPClassifier(
            (width,), alpha=1e-2, batch_size=batch, early_stopping=True, max_iter=100, random_state=seed
        )

    return make


CANDIDATES: tuple[Candidate, ...] = (
    *(Candidate("logistic", f"C {c:g}", _logistic(c)) for c in (0.001, 0.01, 0.1)),
    *(Candidate("svm", f"C {c:g}", _svm(c), each=CALIBRATION_FOLDS) for c in (1e-5, 1e-4)),
    Candidate("neighbours", "5", _neighbours(5), least=5, weighs=False),
    # A tenth of the examples says when to stop, and must be two at least; one of each class does not divide.
    Candidate("perceptron", "128 wide", _perceptron(128), least=20, each=2),
)
KINDS = tuple(dict.fromkeys(candidate.kind for candidate in CANDIDATES))


def fit(
    features: Features,
    labels: Labels,
    kind: str,
    seed: int,
    weighted: bool,
    scale: Any = None,
    groups: Labels | None = None,
) -> Fitted:
    """Choose among the heads of a kind ("auto": of all that the data suffices for) and fit the best. `scale` makes the
    first step of the pipeline (unset: a standard scaler). No head is asked about an example of a group (one number for
    each example) of which it has learned from another. Raises `HeadError`."""
    chosen = [c for c in CANDIDATES if kind in ("auto", c.kind)]
    if not chosen:
        raise HeadError(f"there is no head '{kind}'; expected auto, {', '.join(KINDS)}")
    folds = _folds(labels, groups, seed)
    chosen, unfit = _suitable(chosen, labels, folds, weighted)
    if not chosen:
        raise HeadError(f"{'; '.join(unfit)}; choose another head")
    weights = _weights(labels) if weighted else None
    pipelines = {c: _pipeline(c, seed, len(labels), scale) for c in chosen}
    with one_thread():
        scores = {c.name: _log_loss(p, features, labels, weights, folds) for c, p in pipelines.items()}
        best = min(chosen, key=lambda c: scores[c.name])
        pipeline = pipelines[best].fit(features, labels, **_weighing(pipelines[best], weights))
    return Fitted(best, pipeline, scores, tuple(f"{reason}: left out" for reason in unfit))


def one_thread() -> AbstractContextManager[Any]:
    """For products of small matrices: several threads gain nothing there, and beside other work each waits for one that
    does not run (a perceptron took five times as long)."""
    from threadpoolctl import threadpool_limits

    limits: AbstractContextManager[Any] = threadpool_limits(1, user_api="blas")
    return limits


def _folds(labels: Labels, groups: Labels | None, seed: int) -> Folds:
    """The parts of a cross-validation: of every class about as many groups in each, by the rarest class that a group is
    of. Raises `HeadError` where a class cannot be learned in all of them."""
    from sklearn.model_selection import StratifiedKFold

    counts = np.bincount(labels)
    rarity = np.argsort(np.argsort(counts, kind="stable"))[labels]
    _, group = np.unique(np.arange(len(labels)) if groups is None else groups, return_inverse=True)
    rarest = np.full(int(group.max()) + 1, len(counts))
    np.minimum.at(rarest, group, rarity)
    least = int(np.unique(rarest, return_counts=True)[1].min())
    different = "" if groups is None else " that differ"
    if least < 2:
        raise HeadError(f"a class has {least} training examples{different}; two are the least to choose a head by")
    most = FOLDS if len(labels) <= MANY else FOLDS_OF_MANY
    parts = StratifiedKFold(min(most, least), shuffle=True, random_state=seed)
    folds = [
        (np.flatnonzero(np.isin(group, learned)), np.flatnonzero(np.isin(group, asked)))
        for learned, asked in parts.split(rarest, rarest)
    ]
    if any(len(np.unique(labels[rows])) < len(counts) for rows, _ in folds):
        raise HeadError(f"a class has too few training examples{different} to choose a head by; add some")
    return folds


def _suitable(
    chosen: Sequence[Candidate], labels: Labels, folds: Folds, weighted: bool
) -> tuple[list[Candidate], list[str]]:
    """Those that there is enough data for, and why the others are none."""
    counts = [np.bincount(labels[rows], minlength=int(labels.max()) + 1) for rows, _ in folds]
    least, each = min(int(count.sum()) for count in counts), min(int(count.min()) for count in counts)
    reasons = {c: c.unfit(len(labels), least, each, weighted) for c in chosen}
    said = dict.fromkeys(f"the head '{c.kind}' does not suit: {reason}" for c, reason in reasons.items() if reason)
    return [c for c, reason in reasons.items() if not reason], list(said)


def _weights(labels: Labels) -> Weights:
    """With which all classes weigh the same, and all examples together as much as without."""
    counts = np.bincount(labels)
    return (len(labels) / (len(counts) * counts))[labels]


def _weighing(pipeline: Any, weights: Weights | None) -> dict[str, Weights]:
    """How the last step of a pipeline is told weights."""
    return {} if weights is None else {f"{pipeline.steps[-1][0]}__sample_weight": weights}


def _pipeline(candidate: Candidate, seed: int, rows: int, scale: Any) -> Any:
    from sklearn.base import clone
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    first = StandardScaler() if scale is None else clone(scale)
    return make_pipeline(first, candidate.make(seed, rows))


def _log_loss(pipeline: Any, features: Features, labels: Labels, weights: Weights | None, folds: Folds) -> float:
    """Cross-validated: it asks for probabilities that are right, not only for the right class."""
    from sklearn.metrics import log_loss
    from sklearn.model_selection import cross_val_predict

    told = _weighing(pipeline, weights)
    predicted = cross_val_predict(pipeline, features, labels, cv=folds, method="predict_proba", params=told)
    return float(log_loss(labels, predicted, labels=np.arange(predicted.shape[1]), sample_weight=weights))
