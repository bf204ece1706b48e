"""Speech to text with Moonshine: an encoder that listens to a whole recording, a decoder that writes token by token.

N. Jeffries et al., "Moonshine: Speech Recognition for Live Transcription and Voice Commands" (2024). The encoder takes
samples as they are, 16 kHz. The decoder has one branch for the first token, which also makes the keys and values of
what was heard, and one for the others, which reuses them: `use_cache_branch` chooses. Those of what was written grow by
one with each token; what the second branch gives for those of what was heard is empty, so the first are kept.
"""

from __future__ import annotations

import io
import json
import re
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from models.zoo.errors import ConversionError
from models.zoo.session import Session

Floats = npt.NDArray[np.float32]

RATE_HZ = 16000
# The tokens before the first and behind the last.
START = 1
END = 2
# Nobody speaks faster than this; the package stops here, too.
TOKENS_PER_SECOND = 6
LAYERS = 6
HEADS = 8
HEAD_WIDTH = 36

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"
_WORD = re.compile(r"[a-z0-9']+")


class SoundError(ConversionError):
    """The recording is not of a kind that is read here."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """What each token stands for."""

    pieces: Sequence[str]

    @classmethod
    def from_json(cls, content: str) -> Pieces:
        """From the content of a `tokenizer.json` (byte pairs with a fallback to bytes)."""
        vocabulary = json.loads(content)["model"]["vocab"]
        return cls(sorted(vocabulary, key=vocabulary.__getitem__))

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens without start and end; a byte is a piece where a character has none of its own."""
        content = bytearray()
        for token in tokens:
            piece = self.pieces[token] if token < len(self.pieces) else ""
            byte = _BYTE.fullmatch(piece)
            content += bytes([int(byte[1], 16)]) if byte else piece.replace(_SPACE, " ").encode("utf-8")
        return content.decode("utf-8", "replace").removeprefix(" ")


def read_wav(content: bytes) -> Floats:
    """The samples of a WAV file (16 bits, mono) at 16 kHz, -1 to 1. Raises `SoundError`. Needs SciPy."""
    from scipy.signal import resample_poly

    try:
        with wave.open(io.BytesIO(content)) as recording:
            kind = (recording.getnchannels(), recording.getsampwidth())
            rate = recording.getframerate()
            raw = recording.readframes(recording.getnframes())
    except (wave.Error, EOFError) as error:
        raise SoundError(f"not a WAV file: {error}") from None
    if kind != (1, 2):
        raise SoundError(f"{kind[0]} channels of {8 * kind[1]} bits; one of 16 bits is read")
    samples = np.frombuffer(raw, "<i2").astype(np.float32) / np.float32(1 << 15)
    if rate != RATE_HZ:
        common = np.gcd(rate, RATE_HZ)
        samples = resample_poly(samples, RATE_HZ // common, rate // common)
    return samples.astype(np.float32)


def no_past() -> dict[str, Floats]:
    """The 24 tensors before the first token: keys and values, of what was written and heard, of no length."""
    names = [
        f"{layer}.{source}.{part}"
        for layer in range(LAYERS)
        for source in ("decoder", "encoder")
        for part in ("key", "value")
    ]
    return {name: np.zeros((1, HEADS, 0, HEAD_WIDTH), np.float32) for name in names}


def decoder_feeds(token: int, heard: Floats, past: dict[str, Floats], first: bool) -> dict[str, npt.NDArray[Any]]:
    """The decoder's inputs for one step."""
    return {
        "input_ids": np.array([[token]], np.int64),
        "encoder_hidden_states": heard,
        "use_cache_branch": np.array([not first]),
        **{f"past_key_values.{name}": value for name, value in past.items()},
    }


def transcribe(encoder: Session, decoder: Session, samples: Floats) -> list[int]:
    """The likeliest text of a recording (16 kHz, mono, -1 to 1), as tokens."""
    (heard,) = encoder.run(["last_hidden_state"], {"input_values": samples[np.newaxis]})
    past = no_past()
    token = START
    tokens: list[int] = []
    for step in range(int(len(samples) / RATE_HZ * TOKENS_PER_SECOND)):
        outputs = ["logits", *(f"present.{name}" for name in past)]
        logits, *present = decoder.run(outputs, decoder_feeds(token, heard, past, first=step == 0))
        for name, value in zip(past, present, strict=True):
            if step == 0 or ".decoder." in name:
                past[name] = value
        token = int(logits[0, -1].argmax())
        if token == END:
            break
        tokens.append(token)
    return tokens


def word_errors(spoken: str, understood: str) -> int:
    """Words left out, put in, or mistaken: the smallest number of changes from one text to the other."""
    expected, actual = (_WORD.findall(text.lower()) for text in (spoken, understood))
    row = list(range(len(actual) + 1))
    for number, word in enumerate(expected, 1):
        above, row = row, [number]
        for column, other in enumerate(actual, 1):
            row.append(min(above[column] + 1, row[-1] + 1, above[column - 1] + (word != other)))
    return row[-1]
