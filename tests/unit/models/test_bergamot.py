"""The builder of Bergamot's networks: its arithmetic against NumPy, stepping, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest

from models.zoo import bergamot
from models.zoo.bergamot import END, LAYER_NORM_EPSILON, Architecture, translate
from models.zoo.errors import ConversionError
from models.zoo.marian import EMBEDDING, MarianFile, Quantised
from tests.unit.models.marian_files import random_network

Array = npt.NDArray[Any]

SIZES = Architecture(width=8, heads=2, vocabulary=23, encoder_layers=3, decoder_layers=2)


class Reference:
    """The network by its textbook formulas, in double precision."""

    def __init__(self, source: MarianFile) -> None:
        self.matrices = {name: found.values * found.scale for name, found in source.quantised.items()}
        self.vectors = {name: found[0].astype(np.float64) for name, found in source.floats.items()}

    def linear(self, x: Array, layer: str, part: str) -> Array:
        y: Array = x @ self.matrices[f"{layer}_W{part}"] + self.vectors[f"{layer}_b{part}"]
        return y

    def normalise(self, x: Array, layer: str) -> Array:
        deviation = np.sqrt(x.var(axis=-1, keepdims=True) + LAYER_NORM_EPSILON)
        centred = (x - x.mean(axis=-1, keepdims=True)) / deviation
        y: Array = centred * self.vectors[f"{layer}_ln_scale"] + self.vectors[f"{layer}_ln_bias"]
        return y

    def embed(self, ids: list[int], first: int = 0) -> Array:
        """[S, width]; the start token is all zeros."""
        table = np.vstack([self.matrices[EMBEDDING], np.zeros(SIZES.width)])
        waves = SIZES.width // 2
        rows = []
        for position, token in enumerate(ids, first):
            angles = [position / 10000 ** (index / (waves - 1)) for index in range(waves)]
            wave = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            rows.append(table[token] * math.sqrt(SIZES.width) + np.array(wave))
        return np.array(rows)

    def attention(self, x: Array, memory: Array, layer: str) -> Array:
        query, key, value = (
            self.linear(origin, layer, part) for origin, part in ((x, "q"), (memory, "k"), (memory, "v"))
        )
        size = SIZES.width // SIZES.heads
        mixed = np.zeros_like(query)
        for head in range(SIZES.heads):
            part = slice(head * size, (head + 1) * size)
            scores = np.exp(query[:, part] @ key[:, part].T / math.sqrt(size))
            mixed[:, part] = scores / scores.sum(axis=1, keepdims=True) @ value[:, part]
        return self.normalise(self.linear(mixed, layer, "o") + x, f"{layer}_Wo")

    def feed_forward(self, x: Array, layer: str) -> Array:
        inner = np.maximum(self.linear(x, layer, "1"), 0)
        return self.normalise(self.linear(inner, layer, "2") + x, f"{layer}_ffn")

    def encode(self, ids: list[int]) -> Array:
        x = self.embed(ids)
        for layer in range(1, SIZES.encoder_layers + 1):
            x = self.attention(x, x, f"encoder_l{layer}_self")
            x = self.feed_forward(x, f"encoder_l{layer}_ffn")
        return x

    def decode(self, memory: Array, prefix: list[int]) -> Array:
        """The logits behind `prefix`, which does not have the start token."""
        states = [np.zeros(SIZES.width)] * SIZES.decoder_layers
        logits = np.zeros(0)
        for position, token in enumerate([SIZES.start, *prefix]):
            x = self.embed([token], position)
            for index in range(SIZES.decoder_layers):
                layer = f"decoder_l{index + 1}"
                forget = 1 / (1 + np.exp(-self.linear(x, f"{layer}_rnn", "f")))
                states[index] = forget * states[index] + (1 - forget) * (x @ self.matrices[f"{layer}_rnn_W"])
                x = self.normalise(np.maximum(states[index], 0) + x, f"{layer}_rnn_ffn")
                x = self.attention(x, memory, f"{layer}_context")
                x = self.feed_forward(x, f"{layer}_ffn")
            logits = x[0] @ self.matrices[EMBEDDING].T + self.vectors["decoder_ff_logit_out_b"]
        return logits


@pytest.fixture(scope="module")
def source() -> MarianFile:
    return random_network(SIZES)


@pytest.fixture(scope="module")
def reference(source: MarianFile) -> Reference:
    return Reference(source)


@pytest.fixture(scope="module")
def sessions(source: MarianFile) -> tuple[ort.InferenceSession, ort.InferenceSession]:
    encoder, decoder = bergamot.build(source, SIZES)
    return session(encoder), session(decoder)


def test_the_encoder_equals_numpy(sessions: tuple[Any, Any], reference: Reference) -> None:
    """Two sentences in one batch, the shorter filled up: each as the textbook has it alone."""
    short, long = [4, 9, 0], [7, 22, 1, 3, 0]
    ids = np.array([[*short, 5, 5], long], np.int64)
    mask = np.array([[1, 1, 1, 0, 0], [1] * 5], np.int64)
    (hidden,) = sessions[0].run(["encoder_hidden"], {"input_ids": ids, "attention_mask": mask})
    np.testing.assert_allclose(hidden[0, :3], reference.encode(short), atol=1e-4)
    np.testing.assert_allclose(hidden[1], reference.encode(long), atol=1e-4)


def test_the_decoder_equals_numpy_step_by_step(sessions: tuple[Any, Any], reference: Reference) -> None:
    """Two sentences and any words before, from the start token on; what a step hands on is all the next one needs."""
    rng = np.random.default_rng(1)
    memory = rng.standard_normal((2, 4, SIZES.width)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], np.int64)
    prefixes = rng.integers(0, SIZES.vocabulary, (2, 5))
    previous = np.full((2, 1), SIZES.start, np.int64)
    state = {"ssru1": np.zeros((2, 1, 8), np.float32), "ssru2": np.zeros((2, 1, 8), np.float32)}
    state["pos"] = np.zeros((2, 1), np.float32)
    names = ["logits", "next_id", *(f"{name}_out" for name in state)]
    for step in range(5):
        feeds = {"prev_id": previous, "encoder_hidden": memory, "attention_mask": mask}
        logits, next_id, *kept = sessions[1].run(names, feeds | {f"{name}_in": state[name] for name in state})
        for row, length in ((0, 4), (1, 2)):
            expected = reference.decode(memory[row, :length], prefixes[row, :step].tolist())
            np.testing.assert_allclose(logits[row], expected, atol=1e-4)
        np.testing.assert_array_equal(next_id[:, 0], logits.argmax(axis=1))
        state = dict(zip(state, kept, strict=True))
        np.testing.assert_array_equal(state["pos"], np.full((2, 1), step + 1, np.float32))
        previous = prefixes[:, step : step + 1]


def test_weights_stay_eight_bit_in_the_file(source: MarianFile) -> None:
    """No quantised matrix is widened on the way, and none of the graphs quantises activations."""
    for model in bergamot.build(source, SIZES):
        types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        shared = [types[name] for name in source.quantised if name in types]
        assert shared
        assert set(shared) == {onnx.TensorProto.INT8}
        assert not [node.op_type for node in model.graph.node if "Quantize" in node.op_type]


def test_a_translation_is_the_likeliest_token_each_time(reference: Reference, sessions: tuple[Any, Any]) -> None:
    """Stepping the graphs gives what the textbook does; a source that does not end stops at the bound."""
    ids = [3, 17, 8, 0]
    memory = reference.encode(ids)
    expected: list[int] = []
    for _ in range(10):
        token = int(reference.decode(memory, expected).argmax())
        if token == END:
            break
        expected.append(token)
    assert translate(*sessions, ids, SIZES) == expected


def test_a_translation_ends(source: MarianFile) -> None:
    """At the end token, which is not returned; or at two and a half times the source's length."""
    for bias, expected in ((1000.0, []), (-1000.0, None)):
        ending = source.floats["decoder_ff_logit_out_b"].copy()
        ending[0, END] = bias
        changed = replace(source, floats=source.floats | {"decoder_ff_logit_out_b": ending})
        encoder, decoder = (session(model) for model in bergamot.build(changed, SIZES))
        translated = translate(encoder, decoder, [3, 17, 0], SIZES)
        assert translated == expected if expected is not None else len(translated) == math.ceil(2.5 * 3)


def test_settings_of_another_network_are_refused(source: MarianFile) -> None:
    """A deeper network has the same names and more; its settings say so first."""
    with pytest.raises(ConversionError, match="lack 'enc-depth: 4'"):
        bergamot.build(source, replace(SIZES, encoder_layers=4))


def test_a_missing_tensor_is_named(source: MarianFile) -> None:
    """Vectors and matrices alike."""
    floats = {name: value for name, value in source.floats.items() if name != "encoder_l2_self_bk"}
    with pytest.raises(ConversionError, match="no tensor 'encoder_l2_self_bk'"):
        bergamot.build(replace(source, floats=floats), SIZES)
    quantised = {name: value for name, value in source.quantised.items() if name != "decoder_l1_rnn_Wf"}
    with pytest.raises(ConversionError, match="no quantised matrix 'decoder_l1_rnn_Wf'"):
        bergamot.build(replace(source, quantised=quantised), SIZES)


def test_a_tensor_of_another_shape_is_named(source: MarianFile) -> None:
    """Shapes are checked, not broadcast."""
    narrow = Quantised(source.quantised[EMBEDDING].values[:, :4], 1.0)
    with pytest.raises(ConversionError, match=r"'Wemb' has shape \(23, 4\), expected \(23, 8\)"):
        bergamot.build(replace(source, quantised=source.quantised | {EMBEDDING: narrow}), SIZES)
    one = np.zeros((1, 1), np.float32)
    with pytest.raises(ConversionError, match=r"'encoder_l1_self_bq' has shape \(1, 1\), expected \(1, 8\)"):
        bergamot.build(replace(source, floats=source.floats | {"encoder_l1_self_bq": one}), SIZES)


def test_tensors_left_over_are_an_error(source: MarianFile) -> None:
    """Nothing of the file is left out in silence."""
    more = source.floats | {"decoder_l1_rnn_b": np.zeros((1, 8), np.float32)}
    with pytest.raises(ConversionError, match="decoder_l1_rnn_b"):
        bergamot.build(replace(source, floats=more), SIZES)


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    """A single-threaded session on the CPU."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
