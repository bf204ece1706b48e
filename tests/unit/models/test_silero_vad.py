"""What Silero VAD is given: chunks behind what came before, a state handed on, a voice to check with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from models.zoo.silero_vad import CHUNK, CONTEXT, RATE_HZ, chunks, probabilities, synthetic_voice

Array = npt.NDArray[Any]


class Counter:
    """Stands for the model: answers the sum of the state, which grows by one each time."""

    def __init__(self) -> None:
        self.feeds: list[Mapping[str, Array]] = []

    def run(self, output_names: Sequence[str], input_feed: Mapping[str, Array]) -> Sequence[Any]:
        assert list(output_names) == ["output", "stateN"]
        self.feeds.append(input_feed)
        return [input_feed["state"].sum().reshape(1, 1), input_feed["state"] + 1 / input_feed["state"].size]


def test_a_chunk_has_the_end_of_the_one_before() -> None:
    """The first has zeros there; samples that make no whole chunk are left out."""
    samples = np.arange(1, 2 * CHUNK + 100).astype(np.float32)
    first, second = chunks(samples)
    assert first.shape == second.shape == (1, CHUNK + CONTEXT)
    np.testing.assert_array_equal(first[0], np.concatenate([np.zeros(CONTEXT), samples[:CHUNK]]))
    np.testing.assert_array_equal(second[0], samples[CHUNK - CONTEXT : 2 * CHUNK])


def test_the_state_is_handed_on() -> None:
    """From zeros; the rate goes along as a single number."""
    model = Counter()
    likely = probabilities(model, np.zeros(3 * CHUNK, np.float32))
    np.testing.assert_allclose(likely, [0, 1, 2], atol=1e-5)
    for feed in model.feeds:
        assert feed["input"].dtype == np.float32
        assert feed["state"].shape == (2, 1, 128)
        assert feed["sr"].shape == ()
        assert int(feed["sr"]) == RATE_HZ


def test_the_voice_has_silence_around_it() -> None:
    """Two seconds within -1 to 1, the first and last half of one all zeros."""
    voice = synthetic_voice()
    assert voice.dtype == np.float32
    assert len(voice) == 2 * RATE_HZ
    assert not voice[: RATE_HZ // 2].any()
    assert not voice[-RATE_HZ // 2 :].any()
    assert np.abs(voice).max() == np.float32(0.5)
