"""The networks to build on, and how examples become what they take."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from PIL import Image

from models.transfer.data import Example, decoded
from models.transfer.features import Prepare
from models.zoo import sentences
from models.zoo.preprocess import image_tensor, imagenet_tensor
from models.zoo.publish import Entry
from models.zoo.recipes import RECIPES
from models.zoo.wordpiece import WordPiece

# What a preparation is told apart by: capitals, accents, marks, words that are no words, numbers, more than fits.
_TEXTS = ("", "Ünïcode, naïve—and (CAPITALS) 3.14 日本 zzqxv", "one after the other " * 200)
_ORIENTATION = 0x0112  # of a picture, in its EXIF data


@dataclass(frozen=True, slots=True)
class Backbone:
    """`prepare` makes the network's inputs of examples. `labels` are the names of its own classes, if it has any, and
    `scores` the output that rates them. `entry` is what the zoo publishes, for heads that share it; `cut` is where to
    cut, where that is known. `prepared_by` changes with what `prepare` makes of an example."""

    name: str
    kind: Literal["images", "text"]
    model: bytes
    prepare: Prepare
    prepared_by: str
    preparation: str
    source: str
    licence: str
    labels: tuple[str, ...] = ()
    scores: str = ""
    entry: Entry | None = None
    cut: str = ""


def _pictures(tensor: Callable[[Any], npt.NDArray[np.float32]], name: str) -> Prepare:
    def prepare(examples: Sequence[Example]) -> dict[str, npt.NDArray[Any]]:
        rows = []
        for example in examples:
            assert isinstance(example.content, bytes)
            picture = decoded(example.content)
            assert picture is not None
            rows.append(tensor(picture)[0])
        return {name: np.stack(rows)}

    return prepare


def _texts(tokenizer: WordPiece) -> Prepare:
    def prepare(examples: Sequence[Example]) -> dict[str, npt.NDArray[Any]]:
        return sentences.feeds(tokenizer, [str(example.content) for example in examples])

    return prepare


def prepared_alike(prepare: Prepare, kind: Literal["images", "text"]) -> str:
    """The same for preparations that make the same of an example made up for that: a digest of what they make."""
    examples = [Example("made up", content, 0, "") for content in ([_picture()] if kind == "images" else _TEXTS)]
    digest = hashlib.sha256()
    for name, array in sorted(prepare(examples).items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _picture() -> bytes:
    """Wider than high, with colours that all differ, lying on its side as the camera says."""
    rows, columns = np.mgrid[0:240, 0:320]
    colours = np.stack([rows, columns * 3 // 4, (rows * columns) % 256], axis=2).astype(np.uint8)
    content = io.BytesIO()
    exif = Image.Exif()
    exif[_ORIENTATION] = 6
    Image.fromarray(colours).save(content, "PNG", exif=exif)
    return content.getvalue()


def _picture_backbone(name: str, tensor: Callable[[Any], npt.NDArray[np.float32]]) -> Backbone:
    recipe = RECIPES[name]
    (entry,) = recipe.make()
    labels = str(entry.files["labels.txt"]).splitlines()
    prepare = _pictures(tensor, "image")
    return Backbone(
        name=name,
        kind="images",
        model=entry.version_files["model.onnx"],
        prepare=prepare,
        prepared_by=f"{name}-{prepared_alike(prepare, 'images')}",
        preparation=f"as for `{name}` (`models/zoo/preprocess.py`)",
        source=recipe.packages[0].requirement,
        licence=recipe.packages[0].licence,
        labels=tuple(labels),
        scores="logits",
        entry=entry,
    )


def _minilm() -> Backbone:
    recipe = RECIPES["minilm"]
    (entry,) = recipe.make()
    prepare = _texts(WordPiece.from_json(str(entry.files["tokenizer.json"])))
    return Backbone(
        name="minilm",
        kind="text",
        model=_pooling(entry),
        prepare=prepare,
        prepared_by=f"minilm-{prepared_alike(prepare, 'text')}",
        preparation="the tokens of `tokenizer.json`, as for `minilm` (`models/zoo/sentences.py`)",
        source=recipe.packages[0].requirement,
        licence=recipe.packages[0].licence,
        entry=entry,
        cut="features",
    )


def _pooling(entry: Entry) -> bytes:
    """The network with its weights inside, its rows averaged over the tokens that are there and scaled to length 1."""
    import tempfile

    from onnx import TensorProto, helper, numpy_helper

    with tempfile.TemporaryDirectory() as scratch:
        for name, part in entry.version_files.items():
            (Path(scratch) / name).write_bytes(part)
        model = onnx.load(str(Path(scratch) / "model.onnx"))
    numbers = {"pool/axis": np.array([1], np.int64), "pool/last": np.array([2], np.int64)}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in numbers.items())
    model.graph.node.extend(
        [
            helper.make_node("Cast", ["attention_mask"], ["pool/mask"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["pool/mask", "pool/last"], ["pool/column"]),
            helper.make_node("Mul", ["last_hidden_state", "pool/column"], ["pool/kept"]),
            helper.make_node("ReduceSum", ["pool/kept", "pool/axis"], ["pool/sum"], keepdims=0),
            helper.make_node("ReduceSum", ["pool/mask", "pool/axis"], ["pool/count"], keepdims=1),
            helper.make_node("Div", ["pool/sum", "pool/count"], ["pool/mean"]),
            helper.make_node("LpNormalization", ["pool/mean"], ["features"], axis=1, p=2),
        ]
    )
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", 384]))
    content: bytes = model.SerializeToString()
    return content


BACKBONES: dict[str, Callable[[], Backbone]] = {
    "efficientnet-lite0": lambda: _picture_backbone("efficientnet-lite0", image_tensor),
    "mobilenet-v2": lambda: _picture_backbone("mobilenet-v2", imagenet_tensor),
    "minilm": _minilm,
}
