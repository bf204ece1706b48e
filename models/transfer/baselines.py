"""What would have been there without transfer learning: the unchanged network, and the plain inputs.

A head is worth its name only beside these. The unchanged network is asked as it is: a picture's class by the name of
the network's own best class (all words of ours must be in it), a text's by the class whose name is closest to it in
meaning. Plain inputs get a linear classifier as well: pixels (32 x 32), words (TF-IDF), numbers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from models.transfer.backbones import Backbone
from models.transfer.data import Dataset, Example, decoded
from models.transfer.evaluate import Scores
from models.transfer.features import extract
from models.transfer.heads import one_thread

Labels = npt.NDArray[np.int64]

PIXELS = 32
WORDS = 20_000


def labels_of(examples: Sequence[Example]) -> Labels:
    return np.array([example.label for example in examples], np.int64)


def majority(train: Dataset, test: Dataset) -> Scores:
    """Always the most frequent class."""
    most = Counter(example.label for example in train.examples).most_common(1)[0][0]
    truth = labels_of(test.examples)
    return Scores("the most frequent class, always", np.full_like(truth, most), truth, len(train.classes))


def unchanged(backbone: Backbone, train: Dataset, test: Dataset, pooled: bytes) -> Scores | None:
    """The network as it is, where it has something to say about the classes."""
    truth = labels_of(test.examples)
    if backbone.kind == "text":
        named = [Example(name, _words(name), 0, f"name:{name}") for name in train.classes]
        names, texts = (extract(pooled, backbone.prepare, backbone.prepared_by, e) for e in (named, test.examples))
        predicted = (texts @ names.T).argmax(axis=1)
        return Scores("unchanged network: the class whose name is closest", predicted, truth, len(train.classes))
    if not backbone.labels:
        return None
    own = _own_classes(backbone, test.examples)
    mapped = np.array([_named_alike(label, train.classes) for label in backbone.labels], np.int64)
    matching = [train.classes[number] for number in sorted({int(number) for number in mapped if number >= 0})]
    said = f"of our classes it knows {', '.join(matching)}" if matching else "it knows none of our classes by name"
    return Scores(f"unchanged network: its own best class, by name ({said})", mapped[own], truth, len(train.classes))


def _named_alike(label: str, classes: Sequence[str]) -> int:
    """The class whose words are all in a network's own label (of several the one with the most words); -1 if none."""
    words = set(_words(label).split())
    fitting = [number for number, name in enumerate(classes) if set(_words(name).split()) <= words]
    return max(fitting, key=lambda number: len(_words(classes[number]).split()), default=-1)


def _words(name: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", name.lower()))


def _own_classes(backbone: Backbone, examples: Sequence[Example]) -> Labels:
    import onnxruntime as ort

    session = ort.InferenceSession(backbone.model, providers=["CPUExecutionProvider"])
    best = []
    for first in range(0, len(examples), 16):
        scores = session.run([backbone.scores], backbone.prepare(examples[first : first + 16]))[0]
        best.append(scores.argmax(axis=1))
    return np.concatenate(best)


def plain(train: Dataset, test: Dataset, seed: int) -> Scores:
    """A linear classifier on the inputs as they are."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    linear = LogisticRegression(max_iter=500, random_state=seed)
    if train.kind == "text":
        words = TfidfVectorizer(max_features=WORDS)
        name, pipeline = "words (TF-IDF) alone", make_pipeline(words, linear)
        given: list[Any] = [[str(e.content) for e in part.examples] for part in (train, test)]
        if not any(map(words.build_analyzer(), given[0])):
            return majority(train, test)  # no text has a word of two letters
    elif train.kind == "images":
        name, pipeline = (
            f"pixels ({PIXELS} x {PIXELS}) alone",
            make_pipeline(StandardScaler(), linear.set_params(C=0.001)),
        )
        given = [np.stack([_pixels(e) for e in part.examples]) for part in (train, test)]
    else:
        at = [number for number, column in enumerate(train.columns) if column.kind == "number"]
        if not at:
            return majority(train, test)
        name, pipeline = "the numbers alone", make_pipeline(SimpleImputer(), StandardScaler(), linear)
        given = [_numbers(part.examples, at) for part in (train, test)]
    with one_thread():
        pipeline.fit(given[0], labels_of(train.examples))
    probabilities = _full(pipeline.predict_proba(given[1]), pipeline[-1].classes_, len(train.classes))
    return Scores(name, probabilities.argmax(axis=1), labels_of(test.examples), len(train.classes), probabilities)


def _full(probabilities: Any, classes: Any, count: int) -> npt.NDArray[np.float64]:
    whole = np.zeros((len(probabilities), count))
    whole[:, np.asarray(classes)] = probabilities
    return whole


def _pixels(example: Example) -> npt.NDArray[np.float32]:
    assert isinstance(example.content, bytes)
    picture = decoded(example.content)
    assert picture is not None
    return np.asarray(picture.resize((PIXELS, PIXELS)), np.float32).ravel()


def _numbers(examples: Sequence[Example], columns: Sequence[int]) -> npt.NDArray[np.float64]:
    return np.array(
        [[np.nan if e.content[at] is None else float(e.content[at]) for at in columns] for e in examples]  # type: ignore[arg-type]
    )
