"""Text to BERT's tokens, by a vocabulary of a few pieces."""

from __future__ import annotations

import json

import pytest

from models.zoo.wordpiece import TokenizerError, WordPiece, words

PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##aff", "##able", "naive", ".", "日", "able", "##a")
VOCABULARY = {piece: number for number, piece in enumerate(PIECES)}


def described(**changes: object) -> str:
    """A `tokenizer.json` of this vocabulary."""
    model = {"type": "WordPiece", "vocab": VOCABULARY}
    return json.dumps({"model": model, "normalizer": {"type": "BertNormalizer", "lowercase": True}} | changes)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("unaffable", ["un", "##aff", "##able"]),
        ("Na\u00efve.", ["naive", "."]),
        ("un\u0007aff \t able", ["un", "##aff", "able"]),
        ("able日", ["able", "日"]),
        ("unx able", ["[UNK]", "able"]),
        ("a" * 101, ["[UNK]"]),
        ("", []),
    ],
    ids=["longest pieces", "accents and case", "control characters", "ideographs", "unknown", "too long", "nothing"],
)
def test_words_become_the_longest_pieces(text: str, pieces: list[str]) -> None:
    """Between start and end; what has no pieces is unknown as a whole."""
    tokens = WordPiece.from_json(described()).encode(text)
    assert [PIECES[token] for token in tokens] == ["[CLS]", *pieces, "[SEP]"]


def test_the_end_stays_when_text_is_cut() -> None:
    """At most so many tokens, start and end among them."""
    tokenizer = WordPiece.from_json(described())
    assert tokenizer.encode("able able able", longest=4) == [2, 10, 10, 3]


def test_punctuation_stands_alone() -> None:
    """Signs that Unicode counts among symbols, too."""
    assert list(words("can't $5,00")) == ["can", "'", "t", "$", "5", ",", "00"]


@pytest.mark.parametrize(
    "content",
    [
        "no JSON",
        "[]",
        json.dumps({"model": {"type": "WordPiece", "vocab": {}}}),
        described(model={"type": "BPE", "vocab": VOCABULARY}),
        described(normalizer={"type": "BertNormalizer", "lowercase": False}),
    ],
)
def test_another_tokenizer_is_refused(content: str) -> None:
    """Its rules would be others."""
    with pytest.raises(TokenizerError, match="not a tokenizer of BERT's kind"):
        WordPiece.from_json(content)
