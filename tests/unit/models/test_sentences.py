"""What goes into the text model and what is made of its answer."""

from __future__ import annotations

import numpy as np

from models.zoo import sentences
from models.zoo.wordpiece import WordPiece

TOKENIZER = WordPiece({"[UNK]": 1, "a": 4, "b": 5}, start=2, end=3, unknown=1)


def test_shorter_texts_are_filled_up_and_masked() -> None:
    """One row for each text, as long as the longest; never longer than the model was trained on."""
    feeds = sentences.feeds(TOKENIZER, ["a b", "a"])
    np.testing.assert_array_equal(feeds["input_ids"], [[2, 4, 5, 3], [2, 4, 3, 0]])
    np.testing.assert_array_equal(feeds["attention_mask"], [[1, 1, 1, 1], [1, 1, 1, 0]])
    assert not feeds["token_type_ids"].any()
    assert {value.dtype for value in feeds.values()} == {np.dtype(np.int64)}
    assert sentences.feeds(TOKENIZER, ["a " * 500])["input_ids"].shape == (1, 128)


def test_masked_tokens_do_not_count() -> None:
    """The mean over the others, of length 1."""
    hidden = np.array([[[3, 0], [0, 4], [100, 100]]], np.float32)
    np.testing.assert_allclose(sentences.pooled(hidden, np.array([[1, 1, 0]])), [[0.6, 0.8]], rtol=1e-6)
