"""From examples to a new version of a served model: read, learn, compare, compose, check, publish."""

from __future__ import annotations

import hashlib
import importlib.metadata
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from models.transfer import baselines, publication, report, tables
from models.transfer.backbone import FEATURES, CutError, cut, cut_point
from models.transfer.backbones import BACKBONES, Backbone
from models.transfer.compose import check, composed, head_model, of_every_class, opset_of
from models.transfer.data import DataError, Dataset
from models.transfer.evaluate import Scores
from models.transfer.features import extract
from models.transfer.heads import Fitted, fit
from models.transfer.options import Options, check_options
from models.transfer.publication import Publication
from models.transfer.reading import read, read_test
from models.transfer.splits import Leakage, groups, separate

# Test examples with which the finished model is compared with its pieces, at most.
CHECKED = 32


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


@dataclass(slots=True)
class _Work:
    """What all steps need."""

    options: Options
    train: Dataset
    test: Dataset
    leakage: Leakage
    clock: _Clock

    @property
    def labels(self) -> baselines.Labels:
        return baselines.labels_of(self.train.examples)

    @property
    def truth(self) -> baselines.Labels:
        return baselines.labels_of(self.test.examples)

    def scores(self, name: str, probabilities: Any) -> Scores:
        """Of the head."""
        return Scores(name, probabilities.argmax(axis=1), self.truth, len(self.train.classes), probabilities)

    def plain(self) -> list[Scores]:
        """Of what needs no transfer learning."""
        return [
            baselines.plain(self.train, self.test, self.options.seed),
            baselines.majority(self.train, self.test),
        ]


def transfer(options: Options, say: Callable[[str], None] = lambda _: None) -> Result:
    """Do all of it. Raises `OptionError`, `DataError`, `HeadError`, `CutError`, `ComposeError`, `PublishError` and what
    fetching a backbone raises; nothing is published then."""
    check_options(options.name, options.slo_ms)
    clock = _Clock(say)
    clock.step("reading the data")
    train, test, leakage = separate(*_read(options), options.seed)
    work = _Work(options, train, test, leakage, clock)
    return _table(work) if train.kind == "table" else _network(work)


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


def _network(work: _Work) -> Result:
    """A head on a network, and both as one model unless the network is shared."""
    options, train, test, clock = work.options, work.train, work.test, work.clock
    backbone = _backbone(work)
    whole = onnx.load_from_string(backbone.model)
    at = options.cut or backbone.cut or cut_point(whole)
    if options.shared:
        _check_shared(backbone, at)
    below = cut(whole, at)
    planned = publication.of_network(options, train.classes, backbone, below)
    planned.check()
    content = below.SerializeToString()
    clock.step(f"features of {len(train.examples)} and {len(test.examples)} examples")
    ours, theirs = (extract(content, backbone.prepare, backbone.prepared_by, d.examples) for d in (train, test))
    clock.step("fitting and choosing a head")
    fitted = fit(ours, work.labels, options.head, options.seed, options.weighted)
    probabilities = fitted.pipeline.predict_proba(theirs)
    clock.step("baselines")
    scores = [work.scores(f"{backbone.name} and {fitted.candidate.name}", probabilities)]
    other = baselines.unchanged(backbone, train, test, content)
    scores += [*([] if other is None else [other]), *work.plain()]
    clock.step("one model of the two, checked")
    head = head_model(fitted.pipeline, ours.shape[1], opset_of(below))
    some = of_every_class(work.truth, CHECKED)
    check(head, {FEATURES: theirs[some]}, probabilities[some], "the head")
    served = head
    if not options.shared:
        served = composed(below, head, ours.shape[1])
        check(served, backbone.prepare([test.examples[at] for at in some]), probabilities[some], "the composed model")
    return _finish(work, planned, scores, fitted, served, {"cut": at})


def _backbone(work: _Work) -> Backbone:
    options, kind = work.options, work.train.kind
    if not options.backbone:
        raise DataError(f"{options.data}: holds {kind}; name a network to build on (--backbone)")
    work.clock.step(f"fetching {options.backbone}")
    backbone = BACKBONES[options.backbone]()
    if backbone.kind != kind:
        raise DataError(f"{options.data}: holds {kind}, '{backbone.name}' takes {backbone.kind}")
    return backbone


def _check_shared(backbone: Backbone, at: str) -> None:
    outputs = [] if backbone.entry is None else [o.name for o in onnx.load_from_string(backbone.model).graph.output]
    if at != FEATURES or FEATURES not in outputs or backbone.kind == "text":
        raise CutError(
            f"a head can share '{backbone.name}' only at an output of what is served of it ('{FEATURES}'), not at "
            f"'{at}'; leave --shared out"
        )


def _table(work: _Work) -> Result:
    """A table has no network below it: its columns are prepared and classified by one model."""
    options, train, test, clock = work.options, work.train, work.test, work.clock
    if options.backbone:
        raise DataError(f"{options.data}: is a table, to which '{options.backbone}' has nothing to say; leave it out")
    planned = publication.of_table(options, train.classes, train.columns)
    planned.check()
    clock.step("fitting and choosing a head")
    ours, theirs = (tables.matrix(data.examples, train.columns) for data in (train, test))
    prepared = tables.preparation(train)
    alike = groups(train.examples)
    fitted = fit(ours, work.labels, options.head, options.seed, options.weighted, prepared, alike)
    probabilities = fitted.pipeline.predict_proba(theirs)
    clock.step("baselines")
    scores = [work.scores(f"all columns and {fitted.candidate.name}", probabilities), *work.plain()]
    clock.step("one model, checked")
    model = tables.table_model(fitted.pipeline, train.columns)
    some = of_every_class(work.truth, CHECKED)
    check(model, tables.feeds(theirs[some], train.columns), probabilities[some], "the model")
    return _finish(work, planned, scores, fitted, model, {})


def _finish(
    work: _Work,
    planned: Publication,
    scores: list[Scores],
    fitted: Fitted,
    model: onnx.ModelProto,
    facts: dict[str, str],
) -> Result:
    options, train, test, clock = work.options, work.train, work.test, work.clock
    clock.step("report and publication")
    notes = [*dict.fromkeys((*train.notes, *test.notes)), *work.leakage.lines(), *fitted.notes]
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
    version = planned.publish(model, provenance, _card(planned, scores, text))
    clock.step("")
    return Result(scores, fitted, version, page, clock.seconds, notes)


def _data_digest(*parts: Dataset) -> str:
    """Of all examples and their labels, whatever their order."""
    lines = sorted(f"{example.digest} {example.label}" for part in parts for example in part.examples)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _card(planned: Publication, scores: Sequence[Scores], text: str) -> str:
    return f"""\
# {planned.options.name}

A classifier made by transfer learning: {scores[0].accuracy:.1%} of {len(scores[0].truth)} held-out examples right.

| | |
| --- | --- |
| Preparation | {planned.preparation} |
| Outputs | `probabilities` FP32 [N, classes], `label` INT64 [N]; `labels.txt` names the classes |
| Objective | {planned.options.slo_ms:g} ms per request (`latency_slo_ms` in `config.pbtxt`) |
| Network | {planned.network} |
| Made by | `onclock transfer`; `provenance.json` beside each version says of what |

{text.partition(chr(10))[2]}"""
