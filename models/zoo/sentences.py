"""Sentences to vectors with all-MiniLM-L6-v2: what means alike lies close together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from models.zoo.session import Session
from models.zoo.wordpiece import WordPiece

Array = npt.NDArray[Any]

OUTPUT = "last_hidden_state"
# The model was trained on pieces of at most this many tokens, and its tokenizer cuts there.
LONGEST = 128


def feeds(tokenizer: WordPiece, texts: Sequence[str]) -> dict[str, Array]:
    """The three inputs INT64 [N, S]; shorter texts are filled up with zeros and masked."""
    tokens = [tokenizer.encode(text, LONGEST) for text in texts]
    ids = np.zeros((len(tokens), max(map(len, tokens))), np.int64)
    mask = np.zeros_like(ids)
    for row, found in enumerate(tokens):
        ids[row, : len(found)] = found
        mask[row, : len(found)] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def pooled(hidden: Array, mask: Array) -> npt.NDArray[np.float32]:
    """FP32 [N, 384] of length 1: the mean of a text's tokens. The product of two of them is their cosine."""
    weights = mask[:, :, np.newaxis].astype(np.float32)
    mean = (hidden * weights).sum(axis=1) / weights.sum(axis=1)
    vectors: npt.NDArray[np.float32] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    return vectors


def embed(session: Session, tokenizer: WordPiece, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """A vector for each text."""
    inputs = feeds(tokenizer, texts)
    (hidden,) = session.run([OUTPUT], inputs)
    return pooled(hidden, inputs["attention_mask"])
