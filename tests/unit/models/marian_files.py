"""Writes Marian model files byte by byte, and the tensors of a small random translation network."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from models.zoo.bergamot import Architecture
from models.zoo.marian import EMBEDDING, FLOAT32, INTGEMM8, SETTINGS, TEXT, MarianFile, Quantised

Array = npt.NDArray[Any]

# Marian starts the data, and each item of it, at a multiple of this.
ALIGNMENT = 256
INNER = 12


@dataclass(frozen=True, slots=True)
class Item:
    """One entry of a file. `stated` is the length that the table gives, where it is not that of the data."""

    name: str
    kind: int
    shape: Sequence[int]
    data: bytes
    stated: int | None = None


def floats(name: str, value: Array) -> Item:
    """A float32 tensor."""
    return Item(name, FLOAT32, value.shape, padded(value.astype("<f4").tobytes()))


def quantised(name: str, value: Array, multiplier: float) -> Item:
    """A matrix of eight-bit integers, transposed unless it is the embedding, with its multiplier."""
    stored = value if name == EMBEDDING else value.T
    raw = stored.astype(np.int8).tobytes() + struct.pack("<f", multiplier)
    return Item(name, INTGEMM8, value.shape, padded(raw))


def text(content: str, name: str = SETTINGS) -> Item:
    raw = content.encode() + b"\0"
    return Item(name, TEXT, [len(raw)], raw)


def padded(raw: bytes) -> bytes:
    return raw + bytes(-len(raw) % ALIGNMENT)


def write(items: Sequence[Item], version: int = 1) -> bytes:
    """The file."""
    names = [item.name.encode() + b"\0" for item in items]
    content = struct.pack("<QQ", version, len(items))
    for item, name in zip(items, names, strict=True):
        length = len(item.data) if item.stated is None else item.stated
        content += struct.pack("<QQQQ", len(name), item.kind, len(item.shape), length)
    content += b"".join(names)
    for item in items:
        content += struct.pack(f"<{len(item.shape)}i", *item.shape)
    gap = -(len(content) + 8) % ALIGNMENT
    return content + struct.pack("<Q", gap) + bytes(gap) + b"".join(item.data for item in items)


def random_network(sizes: Architecture, seed: int = 0) -> MarianFile:
    """Random tensors of the whole network, named and shaped as in the file."""
    rng = np.random.default_rng(seed)
    source = MarianFile({}, {}, "\n".join(sizes.settings()))

    def matrix(name: str, rows: int, columns: int) -> None:
        values = rng.integers(-127, 128, (rows, columns)).astype(np.int8)
        source.quantised[name] = Quantised(values, 1 / (70 * np.sqrt(rows)))

    def vector(name: str, size: int) -> None:
        source.floats[name] = rng.standard_normal((1, size)).astype(np.float32)

    def normalisation(layer: str) -> None:
        vector(f"{layer}_ln_scale", sizes.width)
        vector(f"{layer}_ln_bias", sizes.width)

    def attention(layer: str) -> None:
        for part in "qkvo":
            matrix(f"{layer}_W{part}", sizes.width, sizes.width)
            vector(f"{layer}_b{part}", sizes.width)
        normalisation(f"{layer}_Wo")

    def feed_forward(layer: str) -> None:
        for part, rows, columns in (("1", sizes.width, INNER), ("2", INNER, sizes.width)):
            matrix(f"{layer}_W{part}", rows, columns)
            vector(f"{layer}_b{part}", columns)
        normalisation(f"{layer}_ffn")

    matrix(EMBEDDING, sizes.vocabulary, sizes.width)
    vector("decoder_ff_logit_out_b", sizes.vocabulary)
    for layer in range(1, sizes.encoder_layers + 1):
        attention(f"encoder_l{layer}_self")
        feed_forward(f"encoder_l{layer}_ffn")
    for layer in range(1, sizes.decoder_layers + 1):
        matrix(f"decoder_l{layer}_rnn_W", sizes.width, sizes.width)
        matrix(f"decoder_l{layer}_rnn_Wf", sizes.width, sizes.width)
        vector(f"decoder_l{layer}_rnn_bf", sizes.width)
        normalisation(f"decoder_l{layer}_rnn_ffn")
        attention(f"decoder_l{layer}_context")
        feed_forward(f"decoder_l{layer}_ffn")
    return source
