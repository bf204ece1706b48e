"""Text to the tokens of BERT's vocabularies (uncased), from a `tokenizer.json`, with the standard library alone.

As J. Devlin et al., "BERT" (2018) do it: text is put into lower case without accents and cut at spaces and punctuation;
each word becomes the longest pieces of the vocabulary, from the left, those inside a word written `##piece`.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from models.zoo.errors import ConversionError

# A longer word is not cut into pieces; it is unknown.
LONGEST_WORD = 100
INSIDE = "##"
# Blocks of ideographs, which stand for words of their own.
_IDEOGRAPHS = (
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2CEAF),
    (0x2F800, 0x2FA1F),
)
# ASCII signs that Unicode does not call punctuation, but BERT does.
_SIGNS = "$+<=>^`|~"
# Categories of what cannot be seen. What Unicode has not assigned yet is kept, as in the library `tokenizers`.
_CONTROL = ("Cc", "Cf", "Co", "Cs")


class TokenizerError(ConversionError):
    """The file is not the description of a tokenizer that is known here."""


@dataclass(frozen=True, slots=True)
class WordPiece:
    """A vocabulary, and the tokens that stand for the beginning, the end and what is not in it."""

    vocabulary: Mapping[str, int]
    start: int
    end: int
    unknown: int

    @classmethod
    def from_json(cls, content: str) -> WordPiece:
        """From the content of a `tokenizer.json`. Raises `TokenizerError`."""
        try:
            described = json.loads(content)
            model, normalizer = described["model"], described["normalizer"]
            vocabulary = model["vocab"]
            known = model["type"] == "WordPiece" and normalizer["type"] == "BertNormalizer" and normalizer["lowercase"]
            special = (vocabulary["[CLS]"], vocabulary["[SEP]"], vocabulary["[UNK]"])
        except (ValueError, KeyError, TypeError) as error:
            raise TokenizerError(f"not a tokenizer of BERT's kind: {type(error).__name__}: {error}") from None
        if not known:
            raise TokenizerError("not a tokenizer of BERT's kind, uncased")
        return cls(vocabulary, *special)

    def encode(self, text: str, longest: int | None = None) -> list[int]:
        """The tokens of `text` between start and end, at most `longest` with both."""
        tokens = [token for word in words(text) for token in self._pieces(word)]
        kept = tokens if longest is None else tokens[: longest - 2]
        return [self.start, *kept, self.end]

    def _pieces(self, word: str) -> list[int]:
        if len(word) > LONGEST_WORD:
            return [self.unknown]
        tokens: list[int] = []
        first = 0
        while first < len(word):
            prefix = INSIDE if first else ""
            for last in range(len(word), first, -1):
                token = self.vocabulary.get(prefix + word[first:last])
                if token is not None:
                    break
            else:
                return [self.unknown]
            tokens.append(token)
            first = last
        return tokens


def words(text: str) -> Iterator[str]:
    """The words and punctuation marks of `text`, in lower case and without accents."""
    cleaned = "".join(_cleaned(character) for character in text)
    plain = "".join(c for c in unicodedata.normalize("NFD", cleaned.lower()) if unicodedata.category(c) != "Mn")
    for chunk in plain.split():
        word = ""
        for character in chunk:
            if _is_punctuation(character):
                if word:
                    yield word
                yield character
                word = ""
            else:
                word += character
        if word:
            yield word


def _cleaned(character: str) -> str:
    """Spaces around an ideograph, a space for any white space, nothing for control characters."""
    if character.isspace():
        return " "
    if character == "\ufffd" or unicodedata.category(character) in _CONTROL:
        return ""
    code = ord(character)
    if any(first <= code <= last for first, last in _IDEOGRAPHS):
        return f" {character} "
    return character


def _is_punctuation(character: str) -> bool:
    return character in _SIGNS or unicodedata.category(character).startswith("P")
