"""Silero VAD: is somebody speaking?"""

from __future__ import annotations

import numpy as np

from models.zoo import silero_vad
from models.zoo.fetch import Wheel, fetch, read_member
from models.zoo.publish import Entry
from models.zoo.recipe import Recipe, require_close
from models.zoo.session import Feeds, Session, latency_row, open_session

SILERO_VAD = Wheel(
    name="silero-vad",
    version="6.2.3",
    sha256="7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8",
    licence="MIT",
)

SILERO_MODEL = "silero_vad/data/silero_vad.onnx"

# Every fourth chunk of `silero_vad.synthetic_voice`. A second export in the package (`silero_vad_16k_op15.onnx`) gives
# the same to these four digits.
RECORDED_CHUNKS = 4
RECORDED_SPEECH = (
    *(0.0017, 0.0059, 0.0059, 0.0047, 0.8950, 0.8925, 0.9979, 0.9933),
    *(0.9991, 0.9102, 0.8173, 0.6053, 0.0592, 0.0091, 0.0077, 0.0071),
)
# Other processors sum in another order.
RECORDED_TOLERANCE = 2e-3


def silero_vad_16khz() -> Entry:
    """Silero VAD as it is in the package."""
    model = read_member(fetch(SILERO_VAD), SILERO_MODEL)
    session = open_session(model)
    _check_silero(session)
    chunk = next(silero_vad.chunks(silero_vad.synthetic_voice()))
    state = np.zeros(silero_vad.STATE_SHAPE, np.float32)
    feeds: Feeds = {"input": chunk, "state": state, "sr": np.array(silero_vad.RATE_HZ, np.int64)}
    card = _SILERO_CARD.format(latency=latency_row(session, feeds, "a chunk"))
    return Entry(
        name="silero-vad",
        config=_SILERO_CONFIG,
        files={"README.md": card},
        version_files={"model.onnx": model},
    )


def _check_silero(session: Session) -> None:
    """Compare with the recorded probabilities. Raises `RecipeError`."""
    likely = silero_vad.probabilities(session, silero_vad.synthetic_voice())
    require_close("silero-vad", "probabilities", likely[::RECORDED_CHUNKS], RECORDED_SPEECH, RECORDED_TOLERANCE)


_SILERO_CONFIG = """\
# Silero VAD. The server keeps `state` from chunk to chunk of a sequence; its batch dimension is the second, where the
# model file leaves room beside the dims below. `sr` has none.
name: "silero-vad"
backend: "onnxruntime"
max_batch_size: 64
input [ { name: "input" data_type: TYPE_FP32 dims: [ 576 ] } ]
output [ { name: "output" data_type: TYPE_FP32 dims: [ 1 ] } ]
sequence_batching {
  max_sequence_idle_microseconds: 5000000
  direct { }
  state [
    {
      input_name: "state"
      output_name: "stateN"
      data_type: TYPE_FP32
      dims: [ 2, 128 ]
      initial_state: { name: "zero" data_type: TYPE_FP32 dims: [ 2, 128 ] zero_data: true }
    }
  ]
}
parameters { key: "unbatched_inputs" value { string_value: "sr" } }
# A chunk is 32 ms of sound: answers that take no longer keep pace with a microphone.
parameters { key: "latency_slo_ms" value { string_value: "32" } }
"""

_SILERO_CARD = f"""\
# silero-vad

Says whether somebody is speaking, in 32 ms of sound at a time.

| | |
| --- | --- |
| Inputs | `input` FP32 [N, 576]; `sr` INT64, a single number: 16000 |
| State | `state` -> `stateN` FP32 [2, N, 128], zeros at first: kept by the server from chunk to chunk |
| Preparation | 16 kHz, mono, -1 to 1; 512 samples behind the last 64 of the chunk before (`models/zoo/silero_vad.py`) |
| Output | `output` FP32 [N, 1]: how likely it is speech |
| Afterwards | above 0.5 is speech |
| First chunk | 64 zeros before it |
| Objective | 32 ms per request (`latency_slo_ms` in `config.pbtxt`), the length of a chunk |
{{latency}}
| Source | `{SILERO_VAD.requirement}`, `{SILERO_MODEL}`, unchanged |
| SHA-256 | `{SILERO_VAD.sha256}` (the wheel) |
| Licence | MIT (licence file of the package), Silero Team |
| Made by | `onclock models fetch silero-vad` |

A recording, or a call that is going on, is a sequence: `sequence_id` of the client's choice with every chunk,
`sequence_start` with the first, `sequence_end` with the last. What is silent for 5 s is forgotten. The model takes
8 kHz, too (`sr` 8000, chunks of 256 behind 32); this entry is for 16 kHz. Its accuracy was not measured here.
"""

RECIPE = Recipe(
    name="silero-vad",
    task="voice activity",
    summary="sound: is somebody speaking? (state from chunk to chunk)",
    packages=(SILERO_VAD,),
    make=lambda: (silero_vad_16khz(),),
)
