"""From examples to a new version of a served model: read, learn, compare, compose, check, publish."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from models.transfer import baselines, report, tables
from models.transfer.backbone import FEATURES, CutError, cut, cut_point
from models.transfer.backbones import BACKBONES, Backbone
from models.transfer.compose import check, composed, head_model, opset_of
from models.transfer.data import DataError, Dataset
from models.transfer.evaluate import Scores
from models.transfer.features import extract
from models.transfer.heads import Fitted, fit
from models.transfer.reading import read, read_test
from models.transfer.splits import Leakage, separate
from models.zoo.publish import Entry, publish, publish_version

# Test examples with which the finished model is compared with its pieces.
CHECKED = 32
MAX_BATCH = 32


@dataclass(frozen=True, slots=True)
class Options:
    """What to learn from, on what, and where the result goes. `backbone` empty: a table."""

    data: Path
    name: str
    repository: Path
    backbone: str = ""
    cut: str = ""
    test: Path | None = None
    label: str = ""
    text: str = ""
    image: str = ""
    split_column: str = ""
    leave_out: tuple[str, ...] = ()
    head: str = "auto"
    weighted: bool = False
    seed: int = 0
    slo_ms: float = 200.0
    shared: bool = False
    report: Path | None = None


@dataclass(slots=True)
class Result:
    """What was learned: `scores` are the head's and the baselines'."""

    scores: list[Scores]
    fitted: Fitted
    version: Path
    page: Path
    seconds: dict[str, float]
    notes: list[str]


@dataclass(slots=True)
class _Clock:
    say: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)
    _began: float = field(default_factory=time.monotonic)
    _step: str = ""

    def step(self, name: str) -> None:
        now = time.monotonic()
        if self._step:
            self.seconds[self._step] = round(now - self._began, 2)
        self._step, self._began = name, now
        if name:
            self.say(name)


def transfer(options: Options, say: Callable[[str], None] = lambda _: None) -> Result:
    """Do all of it. Raises `DataError`, `HeadError`, `CutError`, `ComposeError`, and what fetching a backbone raises;
    nothing is published then."""
    clock = _Clock(say)
    clock.step("reading the data")
    train, test, leakage = separate(*_read(options), options.seed)
    if train.kind == "table":
        return _table(options, train, test, leakage, clock)
    if not options.backbone:
        raise DataError(f"{options.data}: holds {train.kind}; name a network to build on (--backbone)")
    clock.step(f"fetching {options.backbone}")
    backbone = BACKBONES[options.backbone]()
    if backbone.kind != train.kind:
        raise DataError(f"{options.data}: holds {train.kind}, '{backbone.name}' takes {backbone.kind}")
    whole = onnx.load_from_string(backbone.model)
    at = options.cut or backbone.cut or cut_point(whole)
    if options.shared:
        _check_shared(backbone, at)
    below = cut(whole, at)
    content = below.SerializeToString()
    clock.step(f"features of {len(train.examples)} and {len(test.examples)} examples")
    ours, theirs = (extract(content, backbone.prepare, backbone.prepared_by, d.examples) for d in (train, test))
    clock.step("fitting and choosing a head")
    labels, truth = baselines.labels_of(train.examples), baselines.labels_of(test.examples)
    fitted = fit(ours, labels, options.head, options.seed, options.weighted)
    probabilities = fitted.pipeline.predict_proba(theirs)
    mine = Scores(
        f"{backbone.name} and {fitted.candidate.name}",
        probabilities.argmax(axis=1),
        truth,
        len(train.classes),
        probabilities,
    )
    clock.step("baselines")
    scores = [mine]
    other = baselines.unchanged(backbone, train, test, content)
    scores += [] if other is None else [other]
    scores += [baselines.plain(train, test, options.seed), baselines.majority(train, test)]
    clock.step("one model of the two, checked")
    head = head_model(fitted.pipeline, ours.shape[1], opset_of(below))
    few = test.examples[:CHECKED]
    check(head, {FEATURES: theirs[: len(few)]}, probabilities[: len(few)], "the head")
    served = head
    if not options.shared:
        served = composed(below, head, ours.shape[1])
        check(served, backbone.prepare(few), probabilities[: len(few)], "the composed model")
    facts = {"backbone": backbone.source, "cut": at, "backbone_sha256": hashlib.sha256(backbone.model).hexdigest()}
    config = _config(options, served, backbone)
    card = (backbone.preparation, f"{backbone.source} ({backbone.licence})")
    if options.shared and backbone.entry is not None and not (options.repository / backbone.name).exists():
        publish(backbone.entry, options.repository)
    return _finish(options, train, test, leakage, clock, scores, fitted, served, config, facts, card)


def _read(options: Options) -> tuple[Dataset, Dataset | None]:
    """Training and test data, which is that of `--test` if there is such."""
    train, test = read(
        options.data, options.label, options.text, options.image, options.split_column, options.leave_out
    )
    if options.test is None:
        return train, test
    if test is not None:
        train.notes += (f"{len(test.examples)} test examples of {options.data} are not used: --test names others",)
    return train, read_test(options.test, train, options.label, options.text, options.image)


def _table(options: Options, train: Dataset, test: Dataset, leakage: Leakage, clock: _Clock) -> Result:
    """A table has no network below it: its columns are prepared and classified by one model."""
    if options.backbone:
        raise DataError(f"{options.data}: is a table, to which '{options.backbone}' has nothing to say; leave it out")
    clock.step("fitting and choosing a head")
    ours, theirs = (tables.matrix(data.examples, train.columns) for data in (train, test))
    labels, truth = baselines.labels_of(train.examples), baselines.labels_of(test.examples)
    prepared = tables.preparation(train)
    fitted = fit(ours, labels, options.head, options.seed, options.weighted, prepared)  # type: ignore[arg-type]
    probabilities = fitted.pipeline.predict_proba(theirs)
    name = f"all columns and {fitted.candidate.name}"
    mine = Scores(name, probabilities.argmax(axis=1), truth, len(train.classes), probabilities)
    clock.step("baselines")
    scores = [mine, baselines.plain(train, test, options.seed), baselines.majority(train, test)]
    clock.step("one model, checked")
    model = tables.table_model(fitted.pipeline, train.columns)
    check(model, tables.feeds(theirs[:CHECKED], train.columns), probabilities[:CHECKED], "the model")
    columns = ", ".join(f"{column.name} ({column.kind})" for column in train.columns)
    card = (f"`numbers` and `categories` in the order of the columns: {columns}", "none: learned from the data alone")
    config = _config(options, model, None)
    return _finish(options, train, test, leakage, clock, scores, fitted, model, config, {"columns": columns}, card)


def _check_shared(backbone: Backbone, at: str) -> None:
    outputs = [] if backbone.entry is None else [o.name for o in onnx.load_from_string(backbone.model).graph.output]
    if at != FEATURES or FEATURES not in outputs or backbone.kind == "text":
        raise CutError(
            f"a head can share '{backbone.name}' only at an output of what is served of it ('{FEATURES}'), not at "
            f"'{at}'; leave --shared out"
        )


_TYPES = {1: "TYPE_FP32", 7: "TYPE_INT64", 8: "TYPE_STRING"}


def _config(options: Options, model: onnx.ModelProto, backbone: Backbone | None) -> str:
    """`config.pbtxt` of what is published."""
    lines = [f'# Made by transfer learning: see README.md.\nname: "{options.name}"\nbackend: "onnxruntime"']
    if not options.shared:
        lines.append(f"max_batch_size: {MAX_BATCH}\ndynamic_batching {{ }}")
        lines += [f"input {{ {_io(value)} }}" for value in model.graph.input]
    for value in model.graph.output:
        if value.name != FEATURES:
            labels = ' label_filename: "labels.txt"' if value.name == "probabilities" else ""
            lines.append(f"output {{ {_io(value)}{labels} }}")
    lines.append(f'parameters {{ key: "latency_slo_ms" value {{ string_value: "{options.slo_ms:g}" }} }}')
    if options.shared and backbone is not None:
        digest = hashlib.sha256(backbone.model).hexdigest()
        lines.append(f'parameters {{ key: "backbone" value {{ string_value: "{backbone.name}" }} }}')
        lines.append(f'parameters {{ key: "backbone_sha256" value {{ string_value: "{digest}" }} }}')
    return "\n".join(lines) + "\n"


def _io(value: Any) -> str:
    tensor = value.type.tensor_type
    dims = [d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else -1 for d in tensor.shape.dim][1:]
    return f'name: "{value.name}" data_type: {_TYPES[tensor.elem_type]} dims: {dims}'


def _finish(
    options: Options,
    train: Dataset,
    test: Dataset,
    leakage: Leakage,
    clock: _Clock,
    scores: list[Scores],
    fitted: Fitted,
    model: onnx.ModelProto,
    config: str,
    facts: dict[str, str],
    card: tuple[str, str],
) -> Result:
    clock.step("report and publication")
    notes = [*dict.fromkeys((*train.notes, *test.notes)), *leakage.lines()]
    notes += [f"cross-validated log loss of {name}: {loss:.4f}" for name, loss in fitted.scores.items()]
    text = report.markdown(options.name, scores, train.classes, notes)
    out = options.report or Path("build/transfer") / options.name
    page = report.write(out, options.name, text, report.pictures(scores, train.classes))
    provenance = {
        "data": _data_digest(train, test),
        "train": len(train.examples),
        "test": len(test.examples),
        "classes": list(train.classes),
        "head": fitted.candidate.name,
        "seed": options.seed,
        **facts,
        "accuracy": {one.name: round(one.accuracy, 4) for one in scores},
        "libraries": {name: importlib.metadata.version(name) for name in ("scikit-learn", "skl2onnx", "onnx", "numpy")},
    }
    entry = Entry(
        name=options.name,
        config=config,
        files={"labels.txt": "\n".join(train.classes) + "\n", "README.md": _card(options, scores, card, text)},
        version_files={
            "model.onnx": model.SerializeToString(),
            "provenance.json": (json.dumps(provenance, indent=2) + "\n").encode(),
        },
    )
    version = publish_version(entry, options.repository)
    clock.step("")
    return Result(scores, fitted, version, page, clock.seconds, notes)


def _data_digest(*parts: Dataset) -> str:
    """Of all examples and their labels, whatever their order."""
    lines = sorted(f"{example.digest} {example.label}" for part in parts for example in part.examples)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _card(options: Options, scores: Sequence[Scores], card: tuple[str, str], text: str) -> str:
    preparation, source = card
    return f"""\
# {options.name}

A classifier made by transfer learning: {scores[0].accuracy:.1%} of {len(scores[0].truth)} held-out examples right.

| | |
| --- | --- |
| Preparation | {preparation} |
| Outputs | `probabilities` FP32 [N, classes], `label` INT64 [N]; `labels.txt` names the classes |
| Objective | {options.slo_ms:g} ms per request (`latency_slo_ms` in `config.pbtxt`) |
| Network | {source} |
| Made by | `onclock transfer`; `provenance.json` beside each version says of what |

{text.partition(chr(10))[2]}"""
