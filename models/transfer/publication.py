"""What is published. All but the model is known before anything is learned: what would be refused is refused then."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from models.transfer.backbones import Backbone
from models.transfer.data import Column
from models.transfer.options import Options
from models.transfer.tables import order
from models.zoo.fetch import sha256
from models.zoo.publish import LABELS, PROVENANCE, Entry, PublishError, check_publishable, publish, publish_version
from service.config.graph import model_file
from service.repository.layout import scan_model

MAX_BATCH = 32

_TYPES = {TensorProto.FLOAT: "TYPE_FP32", TensorProto.INT64: "TYPE_INT64", TensorProto.STRING: "TYPE_STRING"}


@dataclass(frozen=True, slots=True)
class Publication:
    """A version that is to be. `preparation` says what clients have to send, `network` what it was made from; `facts`
    go into the provenance. `backbone` is what the head shares, if it does."""

    options: Options
    classes: tuple[str, ...]
    config: str
    preparation: str
    network: str
    facts: Mapping[str, str]
    backbone: Entry | None = None

    def check(self) -> None:
        """Raises `PublishError` for what could not be published."""
        check_publishable(self._entry({}), self.options.repository)
        self._check_backbone()

    def _check_backbone(self) -> None:
        """A head is made for one file: where its network is there already, the version that serves must be that."""
        if self.backbone is None:
            return
        name, there = self.backbone.name, self.options.repository / self.backbone.name
        if name == self.options.name:
            raise PublishError(f"'{name}' is the name of the network that is shared; give the head another one")
        if not there.exists():
            return
        advice = "remove it, or publish into another repository"
        found, _ = scan_model(there)
        if found.error is not None:
            raise PublishError(f"{there}: is to be shared and cannot be served: {found.error}; {advice}")
        newest = found.versions[-1]
        if sha256(model_file(newest.model_path)) != self.facts["backbone_sha256"]:
            raise PublishError(f"{newest.directory}: is not the '{name}' that the head is made for; {advice}")

    def publish(self, model: onnx.ModelProto, facts: Mapping[str, Any], card: str) -> Path:
        """The version's directory. Raises `PublishError` and `OSError`; nothing that `check` refuses is begun."""
        self.check()
        entry = self._entry(facts, {"model.onnx": model.SerializeToString()}, {"README.md": card})
        if self.backbone is not None and not (self.options.repository / self.backbone.name).exists():
            publish(self.backbone, self.options.repository)
        return publish_version(entry, self.options.repository)

    def _entry(
        self,
        facts: Mapping[str, Any],
        version_files: Mapping[str, bytes] | None = None,
        files: Mapping[str, str] | None = None,
    ) -> Entry:
        provenance = {**facts, **self.facts, "preparation": self.preparation}
        return Entry(
            name=self.options.name,
            config=self.config,
            files={LABELS: "".join(f"{name}\n" for name in self.classes), **(files or {})},
            version_files={PROVENANCE: (json.dumps(provenance, indent=2) + "\n").encode(), **(version_files or {})},
        )


def of_table(options: Options, classes: tuple[str, ...], columns: tuple[Column, ...]) -> Publication:
    """A model of a table's columns."""
    numbers, categories = order(columns)
    inputs, order_of = [], []
    for name, kind, places in (("numbers", TensorProto.FLOAT, numbers), ("categories", TensorProto.STRING, categories)):
        if places:
            inputs.append(helper.make_tensor_value_info(name, kind, ["N", len(places)]))
            order_of.append(f"`{name}` in this order: {', '.join(columns[at].name for at in places)}")
    return Publication(
        options,
        classes,
        _config(options, inputs, len(classes), {}),
        "; ".join(order_of),
        "none: learned from the data alone",
        {"columns": ", ".join(f"{column.name} ({column.kind})" for column in columns)},
    )


def of_network(options: Options, classes: tuple[str, ...], backbone: Backbone, below: onnx.ModelProto) -> Publication:
    """A head on what is left of a network, or with it."""
    digest = hashlib.sha256(backbone.model).hexdigest()
    shared = {"backbone": backbone.name, "backbone_sha256": digest} if options.shared else {}
    return Publication(
        options,
        classes,
        _config(options, [] if options.shared else below.graph.input, len(classes), shared),
        backbone.preparation,
        f"{backbone.source} ({backbone.licence})",
        {"backbone": backbone.source, "backbone_sha256": digest},
        backbone.entry if options.shared else None,
    )


def _config(options: Options, inputs: Iterable[Any], classes: int, parameters: Mapping[str, str]) -> str:
    """`config.pbtxt`; without inputs that of a head, which has those of its network."""
    lines = [f'# Made by transfer learning: see README.md.\nname: "{options.name}"\nbackend: "onnxruntime"']
    taken = [f"input {{ {_io(value)} }}" for value in inputs]
    if taken:
        lines += [f"max_batch_size: {MAX_BATCH}\ndynamic_batching {{ }}", *taken]
    lines.append('output { name: "label" data_type: TYPE_INT64 dims: [] }')
    lines.append(
        f'output {{ name: "probabilities" data_type: TYPE_FP32 dims: [{classes}] label_filename: "{LABELS}" }}'
    )
    for key, value in {"latency_slo_ms": f"{options.slo_ms:g}", **parameters}.items():
        lines.append(f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}')
    return "\n".join(lines) + "\n"


def _io(value: Any) -> str:
    tensor = value.type.tensor_type
    dims = [d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else -1 for d in tensor.shape.dim][1:]
    return f'name: "{value.name}" data_type: {_TYPES[tensor.elem_type]} dims: {dims}'
