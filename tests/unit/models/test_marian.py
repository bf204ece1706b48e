"""The reader of Marian's model files: what it reads, and that damage is named."""

from __future__ import annotations

import numpy as np
import pytest

from models.zoo.errors import ConversionError
from models.zoo.marian import FLOAT32, INTGEMM8, read_marian
from tests.unit.models.marian_files import Item, floats, quantised, text, write

BIAS = np.array([[1.5, -2.0, 0.25]], np.float32)
MATRIX = np.arange(-3, 3).reshape(2, 3)
ITEMS = (
    quantised("Wemb", MATRIX, 4.0),
    floats("decoder_b", BIAS),
    quantised("decoder_W", MATRIX, 0.5),
    floats("decoder_W_QuantMultA", np.ones((1, 1))),
    text("type: transformer\n"),
)


def test_tensors_and_settings_are_read() -> None:
    """Matrices come as their shape says, with the scale that undoes the multiplier; activations' are left out."""
    model = read_marian(write(ITEMS))
    assert model.settings == "type: transformer\n"
    assert list(model.floats) == ["decoder_b"]
    np.testing.assert_array_equal(model.floats["decoder_b"], BIAS)
    assert list(model.quantised) == ["Wemb", "decoder_W"]
    for name, scale in (("Wemb", 0.25), ("decoder_W", 2.0)):
        np.testing.assert_array_equal(model.quantised[name].values, MATRIX)
        assert model.quantised[name].scale == scale


def test_a_file_cut_anywhere_is_refused() -> None:
    """Whatever part the cut hits, the error says so; nothing else is raised."""
    content = write(ITEMS)
    for length in range(len(content)):
        with pytest.raises(ConversionError, match="not a whole Marian model"):
            read_marian(content[:length])


def test_damage_at_random_raises_nothing_else() -> None:
    """Bytes changed in the table, names and shapes: read all the same, or refused by `ConversionError`."""
    content = write(ITEMS)
    rng = np.random.default_rng(3)
    refused = 0
    for _ in range(2000):
        torn = bytearray(content)
        torn[rng.integers(0, 400)] = rng.integers(0, 256)
        try:
            read_marian(bytes(torn))
        except ConversionError:
            refused += 1
    assert refused > 500


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([floats("b", BIAS), floats("b", BIAS)], "'b' is there twice"),
        ([Item("w", 0x402, [1, 3], bytes(6))], "'w' is of type 0x402"),
        ([text("a", "special:other")], "'special:other' is of type 0x101"),
        ([Item("b", FLOAT32, [1, 3], bytes(8))], r"'b' of shape \(1, 3\) has 8 bytes of 12"),
        ([Item("b", FLOAT32, [-1, 3], bytes(12))], r"'b' has shape \(-1, 3\)"),
        ([Item("w", INTGEMM8, [2, 3], bytes(8))], "'w' has no multiplier"),
        ([Item("w", INTGEMM8, [2, 3], bytes(10))], "'w' has multiplier 0.0"),
        ([quantised("w", MATRIX, float("nan"))], "'w' has multiplier nan"),
        ([Item("w", INTGEMM8, [6], bytes(10))], r"'w' has shape \(6,\), expected a matrix"),
        ([Item("b", FLOAT32, [1, 1], bytes(4), stated=1 << 62)], "the data of 'b' needs 4611686018427387904 bytes"),
        ([Item("b", FLOAT32, [1, 1], bytes(8), stated=4)], "4 bytes follow the last item"),
        ([Item("caf\u00e9", FLOAT32, [1, 1], bytes(4))], "is not the name of an item"),
    ],
)
def test_what_is_wrong_is_named(items: list[Item], message: str) -> None:
    """The message names the item."""
    with pytest.raises(ConversionError, match=message):
        read_marian(write(items))


def test_another_version_is_refused() -> None:
    """So is a file that is no Marian model at all."""
    with pytest.raises(ConversionError, match="begins with version 2, expected 1"):
        read_marian(write(ITEMS, version=2))
    with pytest.raises(ConversionError, match="not a Marian model"):
        read_marian(b"PK\3\4" + bytes(60))
