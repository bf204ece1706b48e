"""Sound to what Silero VAD takes, chunk by chunk: is somebody speaking?

The model looks at 512 samples (32 ms) at a time behind the last 64 of the chunk before, and hands a state from chunk to
chunk. Both figures are those of the package's own `OnnxWrapper` for 16 kHz.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from models.zoo.session import Session

Floats = npt.NDArray[np.float32]

RATE_HZ = 16000
CHUNK = 512
CONTEXT = 64
STATE_SHAPE = (2, 1, 128)
# Above this the package takes a chunk for speech.
THRESHOLD = 0.5

# A voice of sorts, for a check that needs no recording: four vowels of a quarter of a second each, given by their first
# three formants, a pitch that sways, and loudness that rises and falls with each.
VOWELS_HZ = ((700, 1220, 2600), (300, 2300, 3000), (400, 800, 2500), (600, 1700, 2500))
PITCH_HZ = 130
LOUDEST = 0.5


def chunks(samples: Floats) -> Iterator[Floats]:
    """FP32 [1, 576] for each whole chunk of `samples`: 16 kHz, mono, -1 to 1. The first has silence before it."""
    padded = np.concatenate([np.zeros(CONTEXT, np.float32), samples])
    for first in range(0, len(samples) - CHUNK + 1, CHUNK):
        yield padded[np.newaxis, first : first + CONTEXT + CHUNK]


def probabilities(session: Session, samples: Floats) -> list[float]:
    """How likely each whole chunk of `samples` is speech."""
    state = np.zeros(STATE_SHAPE, np.float32)
    rate = np.array(RATE_HZ, np.int64)
    likely = []
    for chunk in chunks(samples):
        answer, state = session.run(["output", "stateN"], {"input": chunk, "state": state, "sr": rate})
        likely.append(float(answer[0, 0]))
    return likely


def synthetic_voice() -> Floats:
    """Half a second of silence, a second of vowels, half a second of silence."""
    seconds = np.arange(RATE_HZ) / RATE_HZ
    pitch = PITCH_HZ * (1 + 0.08 * np.sin(2 * np.pi * 2.1 * seconds))
    phase = 2 * np.pi * np.cumsum(pitch) / RATE_HZ
    # Overtones up to 7 kHz: below half the sampling rate, sway included.
    overtones = np.arange(1, 7000 // PITCH_HZ + 1)
    vowels = []
    for part, formants in zip(np.split(phase, len(VOWELS_HZ)), VOWELS_HZ, strict=True):
        strength = np.zeros(len(overtones))
        for index, formant in enumerate(formants, 1):
            bandwidth = 80 + 0.05 * formant
            strength += 1 / (1 + ((overtones * PITCH_HZ - formant) / bandwidth) ** 2) / index
        vowels.append(np.sin(np.outer(part, overtones)) @ strength)
    voice = np.concatenate(vowels) * (0.55 - 0.45 * np.cos(2 * np.pi * len(VOWELS_HZ) * seconds))
    silence = np.zeros(RATE_HZ // 2)
    return np.concatenate([silence, voice / np.abs(voice).max() * LOUDEST, silence]).astype(np.float32)
