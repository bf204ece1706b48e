"""Recordings to what Moonshine takes, its steps, and its tokens to text."""

from __future__ import annotations

import io
import json
import wave
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from models.zoo import moonshine
from models.zoo.moonshine import Pieces, SoundError, read_wav, word_errors


def wav(samples: npt.NDArray[np.int16], rate: int, channels: int = 1) -> bytes:
    content = io.BytesIO()
    with wave.open(content, "wb") as recording:
        recording.setnchannels(channels)
        recording.setsampwidth(2)
        recording.setframerate(rate)
        recording.writeframes(samples.astype("<i2").tobytes())
    return content.getvalue()


def test_a_recording_is_brought_to_16_khz() -> None:
    """A tone stays a tone of that height and loudness."""
    pytest.importorskip("scipy.signal", reason="install onclock[models]")
    rate = 22050
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    samples = read_wav(wav(np.round(tone * 16384), rate))
    assert samples.dtype == np.float32
    assert len(samples) == 16000
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    np.testing.assert_allclose(samples[200:-200], expected[200:-200], atol=2e-3)


def test_other_recordings_are_refused() -> None:
    """Two channels, or no recording at all."""
    pytest.importorskip("scipy.signal", reason="install onclock[models]")
    with pytest.raises(SoundError, match="2 channels of 16 bits"):
        read_wav(wav(np.zeros(10, np.int16), 16000, channels=2))
    with pytest.raises(SoundError, match="not a WAV file"):
        read_wav(b"RIFF")


def test_tokens_become_text() -> None:
    """Spaces within the pieces, bytes for characters that have no piece, tokens beyond the vocabulary left out."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0xC3>": 3, "<0xA9>": 4, "\u2581caf": 5, "\u2581au": 6}
    pieces = Pieces.from_json(json.dumps({"model": {"vocab": vocabulary}}))
    assert pieces.text([5, 3, 4, 6, 9]) == "caf\u00e9 au"
    assert pieces.text([]) == ""


class Encoder:
    """Hears one vector for each sample."""

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, npt.NDArray[Any]]) -> list[Any]:
        return [feeds["input_values"][:, :, np.newaxis]]


class Decoder:
    """Writes 7, 8, 9, and so on to the end; keys and values say in which step they were made."""

    def __init__(self, end: int) -> None:
        self.end = end
        self.feeds: list[Mapping[str, npt.NDArray[Any]]] = []

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, npt.NDArray[Any]]) -> list[Any]:
        assert names is not None
        self.feeds.append(feeds)
        step = len(self.feeds)
        logits = np.zeros((1, 1, 40), np.float32)
        logits[0, 0, moonshine.END if step == self.end else 6 + step] = 1
        return [logits, *(np.full((1, 8, step, 36), step, np.float32) for _ in names[1:])]


def test_a_step_gets_what_the_one_before_gave() -> None:
    """What was written grows; what was heard stays that of the first step."""
    decoder = Decoder(end=4)
    samples = np.zeros(16000, np.float32)
    assert moonshine.transcribe(Encoder(), decoder, samples) == [7, 8, 9]
    first, second, third, _ = decoder.feeds
    assert [int(feeds["input_ids"][0, 0]) for feeds in decoder.feeds] == [1, 7, 8, 9]
    assert [bool(feeds["use_cache_branch"][0]) for feeds in decoder.feeds] == [False, True, True, True]
    assert first["past_key_values.5.encoder.value"].shape == (1, 8, 0, 36)
    assert second["past_key_values.0.decoder.key"].max() == 1
    assert third["past_key_values.0.decoder.key"].max() == 2
    assert third["past_key_values.0.encoder.key"].max() == 1
    assert len(first) == 27


def test_a_text_does_not_grow_without_end() -> None:
    """Six tokens for every second."""
    assert len(moonshine.transcribe(Encoder(), Decoder(end=0), np.zeros(16000, np.float32))) == 6


@pytest.mark.parametrize(
    ("spoken", "understood", "errors"),
    [
        ("The quick brown fox.", "the quick brown fox", 0),
        ("one two three", "one three", 1),
        ("one three", "one two three", 1),
        ("a dog", "the dog", 1),
        ("one two", "", 2),
        ("", "", 0),
    ],
)
def test_word_errors(spoken: str, understood: str, errors: int) -> None:
    """Left out, put in, mistaken; case and punctuation do not count."""
    assert word_errors(spoken, understood) == errors
