"""The zoo's models on a real server, asked about real photographs, texts and recordings as clients would ask.

What works with a local session of a model works with the server in its place: `Served` runs it there. Skipped where a
package cannot be had.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from models.zoo import detection, mnist, moonshine, ocr, photos, sentences, u2netp, verify
from models.zoo.fetch import FetchError, fetch, read_member
from models.zoo.preprocess import imagenet_tensor
from models.zoo.publish import publish
from models.zoo.recipes import RECIPES, ppocr, yolov4_tiny
from models.zoo.recipes import minilm as minilm_recipe
from models.zoo.recipes import mobilenet_v2 as mobilenet_recipe
from models.zoo.recipes import moonshine as moonshine_recipe
from models.zoo.wordpiece import WordPiece
from tests.support.client import Client, arrays, request
from tests.support.corpus import open_session
from tests.support.server import RunningServer, running_server

Array = npt.NDArray[Any]

RECIPE_NAMES = (
    "fraud-logistic",
    "minilm",
    "mnist",
    "mobilenet-v2",
    "moonshine-tiny",
    "ppocr-det",
    "ppocr-rec",
    "u2netp",
    "yolov4-tiny",
)

pytestmark = pytest.mark.slow


class Served:
    """A model on the server, run like a local session."""

    def __init__(self, server: RunningServer, model: str) -> None:
        self._client = Client(server.channel())
        self._model = model

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, Array]) -> list[Array]:
        """The named outputs, or all, for these inputs."""
        answers = arrays(self._client.infer(request(self._model, feeds, outputs=names or ()), timeout=120))
        return [answers[name] for name in names or answers]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zoo, without objectives: what is tested are answers, on a machine that may be busy."""
    directory = tmp_path_factory.mktemp("zoo")
    try:
        for name in RECIPE_NAMES:
            for entry in RECIPES[name].make():
                config = publish(entry, directory) / "config.pbtxt"
                config.write_text(re.sub(r'parameters { key: "latency_slo_ms".*\n', "", config.read_text()))
    except FetchError as error:
        pytest.skip(str(error))
    return directory


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[RunningServer]:
    with running_server(repository, "--metrics-port", "0") as running:
        yield running


def test_every_answer_is_that_of_onnx_runtime(repository: Path, tmp_path: Path) -> None:
    """The questions of `onclock models verify`, of all recipes that are published here."""
    questions = verify.published(repository)
    assert {question.recipe for question in questions} == set(RECIPE_NAMES) - {"ppocr-det"}
    found = list(verify.answers(repository, questions, tmp_path / "server.log"))
    assert [(one.question.recipe, one.served) for one in found] == [(one.question.recipe, one.here) for one in found]


def labels(repository: Path, model: str) -> list[str]:
    return (repository / model / "labels.txt").read_text(encoding="utf-8").splitlines()


def test_photographs_are_named(server: RunningServer, repository: Path) -> None:
    """MobileNetV2 sees a palace and a uniform."""
    model = Served(server, "mobilenet-v2")
    names = labels(repository, "mobilenet-v2")
    for photo, (label, _) in mobilenet_recipe.RECORDED.items():
        (probabilities,) = model.run(["probabilities"], {"image": imagenet_tensor(photos.photo(photo))})
        assert names[probabilities[0].argmax()] == label


def test_objects_are_found(server: RunningServer, repository: Path) -> None:
    """Both photographs in one request: each gets its own objects."""
    members = list(yolov4_tiny.RECORDED)
    pictures = [photos.packaged_photo(yolov4_tiny.YOLOV4_DETECTOR, member) for member in members]
    images = np.concatenate([detection.image_tensor(picture) for picture in pictures])
    boxes, scores = Served(server, "yolov4-tiny").run(["boxes", "scores"], {"image": images})
    for row, (member, picture) in enumerate(zip(members, pictures, strict=True)):
        found = detection.detections(boxes[row], scores[row], labels(repository, "yolov4-tiny"), *picture.size)
        assert [one.label for one in found] == [one.label for one in yolov4_tiny.RECORDED[member]]


def test_text_is_read(server: RunningServer, repository: Path) -> None:
    """What the detector finds on the bus, the recogniser reads."""
    alphabet = (repository / "ppocr-rec" / "alphabet.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    picture = photos.packaged_photo(yolov4_tiny.YOLOV4_DETECTOR, ppocr.PHOTO)
    lines = ocr.read(Served(server, "ppocr-det"), Served(server, "ppocr-rec"), alphabet, picture)
    assert {line.text for line in ppocr.RECORDED_LINES} <= {line.text for line in lines}


def test_the_background_is_told_from_the_foreground(server: RunningServer) -> None:
    """The flower in the middle, nothing at the border."""
    found = u2netp.foreground(Served(server, "u2netp"), photos.photo(photos.FLOWER))
    assert found[140:180, 140:180].min() > 0.9
    assert max(edge.max() for edge in (found[0], found[-1], found[:, 0], found[:, -1])) < 0.1


def test_texts_are_close_where_their_meaning_is(server: RunningServer, repository: Path) -> None:
    """The recorded cosines, with the tokenizer that lies beside the model."""
    tokenizer = WordPiece.from_json((repository / "minilm" / "tokenizer.json").read_text(encoding="utf-8"))
    vectors = sentences.embed(Served(server, "minilm"), tokenizer, minilm_recipe.SENTENCES)
    np.testing.assert_allclose(vectors @ vectors.T, minilm_recipe.RECORDED_COSINES, atol=1e-3)


def test_digits_are_read(server: RunningServer) -> None:
    """Eight of the first ten by scikit-learn's writers at least."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    model = Served(server, "mnist")
    read = [mnist.digit(model, mnist.enlarged(image)) for image in digits.images[:10]]
    assert sum(read == digits.target[:10]) >= 8


def test_speech_is_understood(server: RunningServer, repository: Path) -> None:
    """Beckett, token by token: tensors of no length at first, then such that grow."""
    content = (repository / "moonshine-tiny-decoder" / "tokenizer.json").read_text(encoding="utf-8")
    samples = moonshine.read_wav(read_member(fetch(moonshine_recipe.USEFUL_MOONSHINE), moonshine_recipe.BECKETT))
    encoder, decoder = (Served(server, f"moonshine-tiny-{part}") for part in ("encoder", "decoder"))
    text = moonshine.Pieces.from_json(content).text(moonshine.transcribe(encoder, decoder, samples))
    assert moonshine.word_errors(moonshine_recipe.RECORDED_WORDS, text) == 0


def test_payments_are_scored(server: RunningServer, repository: Path) -> None:
    """A thousand in one request, as by the model alone."""
    rng = np.random.default_rng(1)
    payments = (rng.random((1000, 17)) * 50000).astype(np.float32)
    (scored,) = Served(server, "fraud-logistic").run(["probabilities"], {"features": payments})
    session = open_session(repository / "fraud-logistic" / "1" / "model.onnx")
    np.testing.assert_allclose(scored, session.run(["probabilities"], {"features": payments})[0], atol=1e-6)
