"""Bergamot's small translation networks as two ONNX graphs, from the tensors of their Marian file.

The network ("tiny11") is a transformer that normalises behind every layer (A. Vaswani et al., "Attention Is All You
Need", 2017), with a decoder whose self-attention is replaced by the simpler simple recurrent unit (Y. J. Kim et al.,
"From Research to Production and Back: Ludicrously Fast Neural Machine Translation", 2019). So all that a step of the
decoder has to remember of a sentence is one vector per layer. One embedding serves both languages and the output.

The weights stay eight-bit integers in the file. They become float32 by `Cast` and `Mul`, which ONNX Runtime computes
once, at load; `DequantizeLinear` it would run at every call, which doubles the time of a step. Activations are float32
throughout, so that an answer does not depend on the other rows of its batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from models.zoo.errors import ConversionError
from models.zoo.graph import GraphBuilder, floats
from models.zoo.marian import EMBEDDING, MarianFile, Quantised
from models.zoo.session import Session

Array = npt.NDArray[Any]

# Ends a sentence, in both languages.
END = 0
# Marian's constants of normalisation and masking, and the slowest wave of the position encoding.
LAYER_NORM_EPSILON = 1e-9
MASKED = 1e8
LONGEST_WAVE = 1e4
# Longer than this many times the source no translation grows: `max-length-factor` of the package's configuration.
MAX_LENGTH_FACTOR = 2.5


@dataclass(frozen=True, slots=True)
class Architecture:
    """Sizes of a network; the inner width of the feed-forward layers follows from the weights."""

    width: int
    heads: int
    vocabulary: int
    encoder_layers: int
    decoder_layers: int

    @property
    def start(self) -> int:
        """The token before the first: a row of zeros behind the vocabulary."""
        return self.vocabulary

    def settings(self) -> tuple[str, ...]:
        """The lines of Marian's settings that these graphs rely on."""
        return (
            "type: transformer",
            f"dim-emb: {self.width}",
            f"transformer-heads: {self.heads}",
            f"enc-depth: {self.encoder_layers}",
            f"dec-depth: {self.decoder_layers}",
            "transformer-decoder-autoreg: rnn",
            "dec-cell: ssru",
            "tied-embeddings-all: true",
            'transformer-preprocess: ""',
            "transformer-postprocess: dan",
            "transformer-ffn-depth: 2",
            "transformer-ffn-activation: relu",
            "transformer-train-position-embeddings: false",
        )


TINY11 = Architecture(width=256, heads=8, vocabulary=32000, encoder_layers=6, decoder_layers=2)


def build(source: MarianFile, architecture: Architecture = TINY11) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Encoder and one step of the decoder. N sentences, S tokens of source. Raises `ConversionError`.

    Encoder: `input_ids`, `attention_mask` INT64 [N, S] -> `encoder_hidden` FP32 [N, S, width].

    Decoder: `prev_id` INT64 [N, 1], `encoder_hidden`, `attention_mask`, per layer `ssru1_in`... FP32 [N, 1, width] and
    `pos_in` FP32 [N, 1] -> `logits` FP32 [N, vocabulary], `next_id` INT64 [N, 1], `ssru1_out`..., `pos_out`.
    """
    stated = source.settings.splitlines()
    for line in architecture.settings():
        if line not in stated:
            raise ConversionError(f"the model's settings lack '{line}'; is it a Bergamot 'tiny' model?")
    weights = Weights(source)
    models = _encoder(weights, architecture), _decoder(weights, architecture)
    weights.refuse_unused()
    return models


class Weights:
    """The tensors of a file; knows which were used."""

    def __init__(self, source: MarianFile) -> None:
        self._source = source
        self._unused = {*source.floats, *source.quantised}

    def matrix(self, name: str, rows: int | None = None, columns: int | None = None) -> Quantised:
        """A quantised matrix. Raises `ConversionError` if it is missing or has another shape."""
        if name not in self._source.quantised:
            raise ConversionError(f"the model has no quantised matrix '{name}'")
        found = self._source.quantised[name]
        expected = (rows, columns)
        if any(size not in (None, actual) for size, actual in zip(expected, found.values.shape, strict=True)):
            raise ConversionError(f"matrix '{name}' has shape {found.values.shape}, expected {expected}")
        self._unused.discard(name)
        return found

    def vector(self, name: str, size: int) -> Array:
        """A float32 vector, which Marian keeps as a row. Raises `ConversionError` likewise."""
        if name not in self._source.floats:
            raise ConversionError(f"the model has no tensor '{name}'")
        found = self._source.floats[name]
        if found.shape != (1, size):
            raise ConversionError(f"tensor '{name}' has shape {found.shape}, expected {(1, size)}")
        self._unused.discard(name)
        return found.reshape(size)

    def refuse_unused(self) -> None:
        """A tensor nobody asked for means that another network was saved."""
        if self._unused:
            raise ConversionError(f"the model has tensors this network has not: {sorted(self._unused)[:5]}")


class TranslationGraph(GraphBuilder):
    """Layers by the names of their weights. A node's output is named after the layer that makes it."""

    def __init__(self, weights: Weights, architecture: Architecture) -> None:
        super().__init__()
        self.weights = weights
        self.sizes = architecture

    def floats(self, integers: str, scale: float, output: str) -> str:
        """Quantised weights as float32."""
        cast = self.node("Cast", [integers], f"{output}.cast", to=TensorProto.FLOAT)
        return self.node("Mul", [cast, self.number(f"{output}.scale", scale)], output)

    def linear(self, source: str, layer: str, weight: str, bias: str | None, outputs: int | None = None) -> str:
        """`source` times the matrix `<layer>_<weight>`, plus `<layer>_<bias>`."""
        name = f"{layer}_{weight}"
        matrix = self.weights.matrix(name, columns=outputs)
        weights = self.floats(self.constant(name, matrix.values), matrix.scale, f"{name}.float")
        product = self.node("MatMul", [source, weights], f"{name}.product")
        if bias is None:
            return product
        offset = self.constant(f"{layer}_{bias}", self.weights.vector(f"{layer}_{bias}", matrix.values.shape[1]))
        return self.node("Add", [product, offset], f"{name}.sum")

    def add_and_normalise(self, change: str, source: str, layer: str) -> str:
        """The end of every layer: its input added, then layer normalisation."""
        total = self.node("Add", [change, source], f"{layer}.residual")
        parts = [f"{layer}_ln_{part}" for part in ("scale", "bias")]
        inputs = [self.constant(part, self.weights.vector(part, self.sizes.width)) for part in parts]
        return self.node(
            "LayerNormalization", [total, *inputs], f"{layer}.normalised", axis=-1, epsilon=LAYER_NORM_EPSILON
        )

    def embedding(self, ids: str, positions: str) -> str:
        """The rows of the embedding for `ids` [N, S], and waves for `positions` FP32 [N or 1, S], added up."""
        width = self.sizes.width
        matrix = self.weights.matrix(EMBEDDING, self.sizes.vocabulary, width)
        with_start = np.concatenate([matrix.values, np.zeros((1, width), np.int8)])
        rows = self.node("Gather", [self.constant(EMBEDDING, with_start), ids], "embedding.rows", axis=0)
        # Marian scales embeddings by the root of their width, so that the waves do not drown them.
        tokens = self.floats(rows, matrix.scale * math.sqrt(width), "embedding.tokens")
        waves = width // 2
        rates = np.exp(-math.log(LONGEST_WAVE) * np.arange(waves) / (waves - 1)).astype(np.float32)
        column = self.node("Unsqueeze", [positions, self.integers("axis.2", 2)], "positions.column")
        angles = self.node("Mul", [column, self.constant("positions.rates", rates)], "positions.angles")
        sines = [self.node(operator, [angles], f"positions.{operator}") for operator in ("Sin", "Cos")]
        encoding = self.node("Concat", sines, "positions.encoding", axis=-1)
        return self.node("Add", [tokens, encoding], "embedding.sum")

    def mask(self, attention_mask: str) -> str:
        """What is added to attention's scores: 0 where the mask is 1, so much that nothing is left where it is 0."""
        present = self.node("Cast", [attention_mask], "mask.present", to=TensorProto.FLOAT)
        negative = self.node("Sub", [present, self.number("one", 1.0)], "mask.negative")
        scaled = self.node("Mul", [negative, self.number("mask.weight", MASKED)], "mask.scaled")
        return self.node("Unsqueeze", [scaled, self.integers("mask.axes", 1, 2)], "mask")

    def attention(self, source: str, memory: str, mask: str, layer: str) -> str:
        """Attention of `source` to `memory`, which is `source` itself in the encoder."""
        width, heads = self.sizes.width, self.sizes.heads
        query, key, value = (
            self._heads(self.linear(origin, layer, f"W{part}", f"b{part}", width), f"{layer}.{part}")
            for origin, part in ((source, "q"), (memory, "k"), (memory, "v"))
        )
        turned = self.node("Transpose", [key], f"{layer}.turned", perm=[0, 1, 3, 2])
        products = self.node("MatMul", [query, turned], f"{layer}.products")
        factor = self.number("attention.factor", (width // heads) ** -0.5)
        scores = self.node("Mul", [products, factor], f"{layer}.scores")
        masked = self.node("Add", [scores, mask], f"{layer}.masked")
        shares = self.node("Softmax", [masked], f"{layer}.shares", axis=-1)
        mixed = self.node("MatMul", [shares, value], f"{layer}.mixed")
        back = self.node("Transpose", [mixed], f"{layer}.back", perm=[0, 2, 1, 3])
        joined = self.node("Reshape", [back, self.integers("heads.joined", 0, 0, width)], f"{layer}.joined")
        return self.add_and_normalise(self.linear(joined, layer, "Wo", "bo", width), source, f"{layer}_Wo")

    def _heads(self, source: str, name: str) -> str:
        """[N, S, width] -> [N, heads, S, width / heads]."""
        heads = self.sizes.heads
        shape = self.integers("heads.split", 0, 0, heads, self.sizes.width // heads)
        split = self.node("Reshape", [source, shape], f"{name}.split")
        return self.node("Transpose", [split], f"{name}.heads", perm=[0, 2, 1, 3])

    def feed_forward(self, source: str, layer: str) -> str:
        """Two linear layers with ReLU between them."""
        inner = self.node("Relu", [self.linear(source, layer, "W1", "b1")], f"{layer}.relu")
        return self.add_and_normalise(self.linear(inner, layer, "W2", "b2", self.sizes.width), source, f"{layer}_ffn")

    def recurrent(self, source: str, state: str, new_state: str, layer: str) -> str:
        """The simpler simple recurrent unit: `new = f * state + (1 - f) * W x` with `f = sigmoid(Wf x + bf)`."""
        width = self.sizes.width
        forget = self.node("Sigmoid", [self.linear(source, layer, "Wf", "bf", width)], f"{layer}.forget")
        candidate = self.linear(source, layer, "W", None, width)
        kept = self.node("Mul", [forget, state], f"{layer}.kept")
        learn = self.node("Sub", [self.number("one", 1.0), forget], f"{layer}.learn")
        learned = self.node("Mul", [learn, candidate], f"{layer}.learned")
        self.node("Add", [kept, learned], new_state)
        return self.add_and_normalise(self.node("Relu", [new_state], f"{layer}.relu"), source, f"{layer}_ffn")

    def output(self, source: str) -> None:
        """`logits` by the embedding, transposed, and the likeliest token as `next_id`."""
        vocabulary = self.sizes.vocabulary
        row = self.node("Squeeze", [source, self.integers("axis.1", 1)], "output.row")
        bounds = [self.integers("output.first", 0), self.integers("output.behind", vocabulary)]
        # Without the row for the start: it is no word. A constant, computed at load like the casts.
        words = self.node("Slice", [EMBEDDING, *bounds], "output.words")
        weights = self.floats(words, self.weights.matrix(EMBEDDING).scale, "output.weights")
        name = "decoder_ff_logit_out_b"
        bias = self.constant(name, self.weights.vector(name, vocabulary))
        self.node("Gemm", [row, weights, bias], "logits", transB=1)
        self.node("ArgMax", ["logits"], "next_id", axis=-1, keepdims=1)


def _encoder(weights: Weights, sizes: Architecture) -> onnx.ModelProto:
    graph = TranslationGraph(weights, sizes)
    length = graph.node("Shape", ["input_ids"], "positions.length", start=1, end=2)
    limit = graph.node("Squeeze", [length], "positions.limit")
    first = graph.constant("positions.first", np.array(0, np.int64))
    step = graph.constant("positions.step", np.array(1, np.int64))
    counted = graph.node("Range", [first, limit, step], "positions.counted")
    numbers = graph.node("Cast", [counted], "positions.numbers", to=TensorProto.FLOAT)
    positions = graph.node("Unsqueeze", [numbers, graph.integers("axis.0", 0)], "positions")
    current = graph.embedding("input_ids", positions)
    mask = graph.mask("attention_mask")
    for layer in range(1, sizes.encoder_layers + 1):
        current = graph.attention(current, current, mask, f"encoder_l{layer}_self")
        current = graph.feed_forward(current, f"encoder_l{layer}_ffn")
    graph.node("Identity", [current], "encoder_hidden")
    return graph.model(
        "bergamot_encoder",
        [_integers("input_ids", "N", "S"), _integers("attention_mask", "N", "S")],
        [floats("encoder_hidden", "N", "S", sizes.width)],
    )


def _decoder(weights: Weights, sizes: Architecture) -> onnx.ModelProto:
    graph = TranslationGraph(weights, sizes)
    current = graph.embedding("prev_id", "pos_in")
    mask = graph.mask("attention_mask")
    layers = range(1, sizes.decoder_layers + 1)
    for layer in layers:
        current = graph.recurrent(current, f"ssru{layer}_in", f"ssru{layer}_out", f"decoder_l{layer}_rnn")
        current = graph.attention(current, "encoder_hidden", mask, f"decoder_l{layer}_context")
        current = graph.feed_forward(current, f"decoder_l{layer}_ffn")
    graph.output(current)
    graph.node("Add", ["pos_in", graph.number("one", 1.0)], "pos_out")
    states = [[floats(f"ssru{layer}_{way}", "N", 1, sizes.width) for layer in layers] for way in ("in", "out")]
    return graph.model(
        "bergamot_decoder_step",
        [
            _integers("prev_id", "N", 1),
            floats("encoder_hidden", "N", "S", sizes.width),
            _integers("attention_mask", "N", "S"),
            *states[0],
            floats("pos_in", "N", 1),
        ],
        [
            floats("logits", "N", sizes.vocabulary),
            _integers("next_id", "N", 1),
            *states[1],
            floats("pos_out", "N", 1),
        ],
    )


def _integers(name: str, *shape: str | int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.INT64, shape)


def first_step(hidden: Array, mask: Array, architecture: Architecture = TINY11) -> dict[str, Array]:
    """The decoder's inputs before the first token: nothing yet, and a state of zeros."""
    rows = len(hidden)
    zeros = np.zeros((rows, 1, architecture.width), np.float32)
    return {
        "prev_id": np.full((rows, 1), architecture.start, np.int64),
        "encoder_hidden": hidden,
        "attention_mask": mask,
        **{f"ssru{layer}_in": zeros for layer in range(1, architecture.decoder_layers + 1)},
        "pos_in": np.zeros((rows, 1), np.float32),
    }


def translate(encoder: Session, decoder: Session, ids: Sequence[int], architecture: Architecture = TINY11) -> list[int]:
    """The likeliest translation, token by token: `ids` end with `END`, what is returned does not.

    Stops at `END`, or at `MAX_LENGTH_FACTOR` times the length of the source.
    """
    source = np.array([ids], np.int64)
    mask = np.ones_like(source)
    (hidden,) = encoder.run(["encoder_hidden"], {"input_ids": source, "attention_mask": mask})
    feeds = first_step(hidden, mask, architecture)
    states = [name for name in feeds if name.endswith("_in")]
    outputs = ["next_id", *(f"{name.removesuffix('_in')}_out" for name in states)]
    translated: list[int] = []
    for _ in range(math.ceil(MAX_LENGTH_FACTOR * len(ids))):
        previous, *kept = decoder.run(outputs, feeds)
        token = int(previous[0, 0])
        if token == END:
            break
        translated.append(token)
        feeds |= {"prev_id": previous, **dict(zip(states, kept, strict=True))}
    return translated
