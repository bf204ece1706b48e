"""One real question for each model of the zoo, and its answer in words: the same asked here and over the wire.

A question is asked of something that runs like a local session, so it does not know who answers. What a served model
keeps between steps (`Served.sequence`) is left out of what is sent.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from models.clients.inference import InferenceClient
from models.zoo import bergamot, detection, fraud, mnist, moonshine, ocr, photos, sentences, silero_vad, u2netp
from models.zoo.fetch import fetch, read_member
from models.zoo.preprocess import image_tensor, imagenet_tensor
from models.zoo.recipes import fraud as fraud_recipe
from models.zoo.recipes import minilm as minilm_recipe
from models.zoo.recipes import moonshine as moonshine_recipe
from models.zoo.recipes import ppocr, yolov4_tiny
from models.zoo.recipes.bergamot import RECORDED_TRANSLATIONS
from models.zoo.session import Feeds, Session, open_session
from models.zoo.wordpiece import WordPiece

# Every first request of a stateful model begins another sequence.
_SEQUENCES = itertools.count(1)


class Local:
    """The models of a repository, run here."""

    def __init__(self, repository: Path) -> None:
        self._repository = repository

    def open(self, model: str, _states: Mapping[str, str] | None = None) -> Session:
        """A session of the model's file. States do not matter here: whoever runs it passes them on."""
        session: Session = open_session(self._repository / model / "1" / "model.onnx")
        return session


class Remote:
    """The models of a server."""

    def __init__(self, client: InferenceClient, timeout_s: float) -> None:
        self._client = client
        self._timeout_s = timeout_s

    def open(self, model: str, states: Mapping[str, str] | None = None) -> Session:
        """The model, run like a session. `states`: inputs that the server fills, and the outputs they come from."""
        return _Served(self._client, model, self._timeout_s, dict(states or {}))


@dataclass
class _Served:
    client: InferenceClient
    model: str
    timeout_s: float
    states: dict[str, str]
    sequence: int = field(default_factory=lambda: next(_SEQUENCES))
    started: bool = False

    def run(self, output_names: Sequence[str] | None, input_feed: Feeds) -> list[Any]:
        names = list(output_names or ())
        kept = {output: input_feed[name] for name, output in self.states.items() if name in input_feed}
        parameters: dict[str, bool | int | str] = {}
        if self.states:
            parameters = {"sequence_id": self.sequence, "sequence_start": not self.started}
            self.started = True
        feeds = {name: array for name, array in input_feed.items() if name not in self.states}
        # An output that is a state and is given to clients as well (a token) is asked for.
        asked = [name for name in names if name not in kept or name in _GIVEN]
        answers = self.client.infer(self.model, feeds, asked, self.timeout_s, parameters)
        return [answers[name] if name in answers else kept[name] for name in names or answers]


# Stateful models of the zoo: their states, and which of those clients get as well.
SILERO_STATES = {"state": "stateN"}
BERGAMOT_STATES = {"prev_id": "next_id", "ssru1_in": "ssru1_out", "ssru2_in": "ssru2_out", "pos_in": "pos_out"}
_GIVEN = frozenset({"next_id"})

Place = Local | Remote


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of a recipe's models (`entries`, by name), and who asks it: the answer in words."""

    recipe: str
    entries: tuple[str, ...]
    asked: str
    ask: Callable[[Place, Path], str]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def _named(model: str, tensor: Callable[[Any], Any], photo: str) -> Callable[[Place, Path], str]:
    def ask(place: Place, repository: Path) -> str:
        (probabilities,) = place.open(model).run(["probabilities"], {"image": tensor(photos.photo(photo))})
        best = int(probabilities[0].argmax())
        return f"{_lines(repository / model / 'labels.txt')[best]} {probabilities[0, best]:.3f}"

    return ask


def _objects(place: Place, repository: Path) -> str:
    picture = photos.packaged_photo(yolov4_tiny.YOLOV4_DETECTOR, ppocr.PHOTO)
    boxes, scores = place.open("yolov4-tiny").run(["boxes", "scores"], {"image": detection.image_tensor(picture)})
    labels = _lines(repository / "yolov4-tiny" / "labels.txt")
    found = detection.detections(boxes[0], scores[0], labels, *picture.size)
    return ", ".join(f"{one.label} {one.score:.2f}" for one in found)


def _text(place: Place, repository: Path) -> str:
    picture = photos.packaged_photo(yolov4_tiny.YOLOV4_DETECTOR, ppocr.PHOTO)
    alphabet = _lines(repository / "ppocr-rec" / "alphabet.txt")
    lines = ocr.read(place.open("ppocr-det"), place.open("ppocr-rec"), alphabet, picture)
    return " / ".join(line.text for line in lines)


def _background(place: Place, _: Path) -> str:
    found = u2netp.foreground(place.open("u2netp"), photos.photo(photos.FLOWER))
    return f"{(found > 0.5).mean():.1%} of the picture is flower"


def _digits(place: Place, _: Path) -> str:
    from sklearn.datasets import load_digits

    model = place.open("mnist")
    return " ".join(str(mnist.digit(model, mnist.enlarged(image))) for image in load_digits().images[:12])


def _meaning(place: Place, repository: Path) -> str:
    tokenizer = WordPiece.from_json((repository / "minilm" / "tokenizer.json").read_text(encoding="utf-8"))
    vectors = sentences.embed(place.open("minilm"), tokenizer, minilm_recipe.SENTENCES)
    cosines = vectors @ vectors.T
    pairs = [(float(cosines[i, j]), i, j) for i in range(len(vectors)) for j in range(i)]
    return ", ".join(f"{j + 1}~{i + 1} {value:.3f}" for value, i, j in sorted(pairs, reverse=True)[:2])


def _payments(model: str) -> Callable[[Place, Path], str]:
    def ask(place: Place, _: Path) -> str:
        payments = fraud.read_payments(read_member(fetch(fraud_recipe.EVALML), fraud_recipe.DATA))
        last = payments.features[-1000:]
        # Without a batch larger than the server takes.
        parts = np.array_split(last, 25)
        session = place.open(model)
        scores = np.concatenate([session.run(["probabilities"], {"features": part})[0][:, 1] for part in parts])
        worst = int(scores.argmax())
        return f"{(scores > 0.5).sum()} of 1,000 suspicious, payment {worst} most: {scores[worst]:.4f}"

    return ask


def _voice(place: Place, _: Path) -> str:
    likely = silero_vad.probabilities(place.open("silero-vad", SILERO_STATES), _speech())
    spoken = sum(value > silero_vad.THRESHOLD for value in likely)
    return f"{spoken} of {len(likely)} chunks are speech, mean {np.mean(likely):.4f}"


def _speech() -> Any:
    return moonshine.read_wav(read_member(fetch(moonshine_recipe.USEFUL_MOONSHINE), moonshine_recipe.BECKETT))


def _transcript(place: Place, repository: Path) -> str:
    content = (repository / "moonshine-tiny-decoder" / "tokenizer.json").read_text(encoding="utf-8")
    encoder, decoder = (place.open(f"moonshine-tiny-{part}") for part in ("encoder", "decoder"))
    return moonshine.Pieces.from_json(content).text(moonshine.transcribe(encoder, decoder, _speech()))


def _translation(place: Place, _: Path) -> str:
    recorded = RECORDED_TRANSLATIONS[0]
    encoder = place.open("bergamot-enpt-encoder")
    decoder = place.open("bergamot-enpt-decoder", BERGAMOT_STATES)
    translated = tuple(bergamot.translate(encoder, decoder, recorded.ids))
    # Tokens become text by a library that is not needed here; what these tokens spell is recorded.
    return recorded.translated_text if translated == recorded.translated_ids else f"tokens {translated}"


QUESTIONS: tuple[Question, ...] = (
    Question(
        "efficientnet-lite0",
        ("efficientnet-lite0",),
        "what is on flower.jpg?",
        _named("efficientnet-lite0", image_tensor, photos.FLOWER),
    ),
    Question(
        "mobilenet-v2",
        ("mobilenet-v2",),
        "what is on china.jpg?",
        _named("mobilenet-v2", imagenet_tensor, photos.CHINA),
    ),
    Question("yolov4-tiny", ("yolov4-tiny",), "what is on bus.jpg, and where?", _objects),
    Question("ppocr-rec", ("ppocr-det", "ppocr-rec"), "what is written on bus.jpg?", _text),
    Question("u2netp", ("u2netp",), "where is the flower of flower.jpg?", _background),
    Question("mnist", ("mnist",), "which are scikit-learn's first 12 digits?", _digits),
    Question("minilm", ("minilm",), "which of four sentences mean the same?", _meaning),
    *(
        Question(f"fraud-{kind}", (f"fraud-{kind}",), "which payments are suspicious?", _payments(f"fraud-{kind}"))
        for kind in ("lightgbm", "xgboost", "logistic")
    ),
    Question("silero-vad", ("silero-vad",), "when does Beckett's reader speak?", _voice),
    Question("moonshine-tiny", ("moonshine-tiny-encoder", "moonshine-tiny-decoder"), "what does he say?", _transcript),
    Question(
        "bergamot-enpt",
        ("bergamot-enpt-encoder", "bergamot-enpt-decoder"),
        f"what is '{RECORDED_TRANSLATIONS[0].text}' in Portuguese?",
        _translation,
    ),
)
