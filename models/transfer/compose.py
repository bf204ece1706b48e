"""A head as ONNX, and the two as one model: checked against the pieces before anybody sees it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, compose, helper, version_converter

from models.transfer.backbone import FEATURES
from models.zoo.errors import ConversionError

Floats = npt.NDArray[np.float32]

# scikit-learn computes with 64 bits where ONNX has 32.
TOLERANCE = 2e-3
OPSET = 17
IR_VERSION = 8


class ComposeError(ConversionError):
    """The pieces do not fit, or the whole does not answer as they do. The message says by how much."""


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the standard operators that a model is written in."""
    return int({entry.domain: entry.version for entry in model.opset_import}.get("", OPSET))


def head_model(pipeline: Any, width: int, opset: int = OPSET) -> onnx.ModelProto:
    """A fitted scikit-learn pipeline as a model: `features` FP32 [N, width] -> `label` INT64 [N], `probabilities`."""
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType

    model: onnx.ModelProto = to_onnx(
        pipeline,
        initial_types=[(FEATURES, FloatTensorType([None, width]))],
        target_opset={"": max(OPSET, opset), "ai.onnx.ml": 3},
        options={"zipmap": False},
    )
    return finished(model, width)


def finished(model: onnx.ModelProto, width: int | None) -> onnx.ModelProto:
    """Outputs by the names that clients see, the batch dimension by one name."""
    names = {"label": "label", "output_label": "label", "probabilities": "probabilities"}
    names["output_probability"] = "probabilities"
    for output in model.graph.output:
        wanted = names.get(output.name)
        if wanted is None or wanted == output.name:
            continue
        for node in model.graph.node:
            for at, name in enumerate(node.output):
                if name == output.name:
                    node.output[at] = wanted
        output.name = wanted
    for value in (*model.graph.input, *model.graph.output):
        shape = value.type.tensor_type.shape
        if shape.dim:
            shape.dim[0].Clear()
            shape.dim[0].dim_param = "N"
    if width is not None and model.graph.input[0].name != FEATURES:
        raise ComposeError(f"the head takes '{model.graph.input[0].name}', expected '{FEATURES}'")
    model.ir_version = max(IR_VERSION, onnx.helper.find_min_ir_version_for(model.opset_import, True))
    onnx.checker.check_model(model)
    return model


def width_of(head: onnx.ModelProto) -> int:
    """Features that a head takes."""
    return int(head.graph.input[0].type.tensor_type.shape.dim[1].dim_value)


def composed(below: onnx.ModelProto, head: onnx.ModelProto, width: int) -> onnx.ModelProto:
    """Backbone and head as one model, with `features` as an output as well.

    Raises `ComposeError` when the head takes other than the `width` features that the backbone gives.
    """
    if width_of(head) != width:
        raise ComposeError(f"the head takes {width_of(head)} features, the backbone gives {width}")
    lower = _raised(below)
    upper = compose.add_prefix(
        head, "head/", rename_inputs=False, rename_outputs=False, rename_edges=True, rename_nodes=True
    )
    for model in (lower, upper):
        model.ir_version = max(below.ir_version, head.ir_version)
    whole = compose.merge_models(lower, upper, io_map=[(FEATURES, FEATURES)], outputs=None)
    if FEATURES not in [output.name for output in whole.graph.output]:
        whole.graph.output.append(helper.make_tensor_value_info(FEATURES, TensorProto.FLOAT, ["N", width]))
    onnx.checker.check_model(whole)
    return whole


def _raised(model: onnx.ModelProto) -> onnx.ModelProto:
    """A backbone that is older than heads are written in, as one that is not. Raises `ComposeError`."""
    if opset_of(model) >= OPSET:
        return model
    try:
        return version_converter.convert_version(model, OPSET)
    except (RuntimeError, onnx.checker.ValidationError) as error:
        raise ComposeError(
            f"the backbone is of opset {opset_of(model)} and cannot be brought to {OPSET}: "
            f"{str(error).splitlines()[0]}; export it anew"
        ) from error


def of_every_class(labels: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """The places of at most `count` labels: as many of every class as there are and fit, from all over; of as many
    classes as fit."""
    classes = np.unique(labels)
    places = [np.flatnonzero(labels == label) for label in classes[_spread(len(classes), count)]]
    each = count // len(places)
    return np.concatenate([mine[_spread(len(mine), each)] for mine in places])


def _spread(among: int, count: int) -> npt.NDArray[np.int64]:
    """`count` places in a row of `among`, or all of them, as far from each other as they can be."""
    return np.linspace(0, among - 1, min(among, count)).round().astype(np.int64)


def check(model: onnx.ModelProto, feeds: dict[str, npt.NDArray[Any]], expected: Floats, what: str) -> None:
    """Compare a model's probabilities with what the pieces gave. Raises `ComposeError`."""
    import onnxruntime as ort

    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    probabilities, label = session.run(["probabilities", "label"], feeds)
    difference = float(np.abs(probabilities - expected).max())
    sure = np.sort(expected, axis=1)
    clear = sure[:, -1] - sure[:, -2] > 2 * TOLERANCE
    wrong = int((np.asarray(label).reshape(-1)[clear] != expected.argmax(axis=1)[clear]).sum())
    if not difference <= TOLERANCE or wrong:
        raise ComposeError(
            f"{what} does not answer as its pieces do: probabilities differ by {difference:.2g} (at most {TOLERANCE}), "
            f"{wrong} labels are others"
        )
