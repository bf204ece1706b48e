"""Cut a network before its classifier: what it has learned to see, without what it was made to say.

By default the cut is the input of the last layer that makes class scores (a Gemm or MatMul with constant weights whose
result reaches an output through nothing but additions, softmaxes and changes of shape). A tensor may be named instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import TensorProto, helper, shape_inference, utils

from models.zoo.errors import ConversionError

FEATURES = "features"
_LAYERS = ("Gemm", "MatMul")
# What may stand between the layer and an output.
_THROUGH = ("Add", "Softmax", "LogSoftmax", "Sigmoid", "Identity", "Reshape", "Flatten", "Squeeze", "Cast", "ArgMax")


class CutError(ConversionError):
    """There is no such place to cut, or what is there are no features. The message names what there is."""


def cut_point(model: onnx.ModelProto) -> str:
    """The tensor that the last classifier reads. Raises `CutError`."""
    made_by = {name: node for node in model.graph.node for name in node.output}
    constant = {tensor.name for tensor in model.graph.initializer}
    for output in model.graph.output:
        name = output.name
        for _ in range(len(model.graph.node)):
            node = made_by.get(name)
            if node is None:
                break
            if node.op_type in _LAYERS and node.input[1] in constant:
                return str(node.input[0])
            if node.op_type not in _THROUGH:
                break
            name = next((n for n in node.input if n not in constant and n in made_by), "")
    kinds = sorted({made_by[o.name].op_type for o in model.graph.output if o.name in made_by})
    raise CutError(
        f"no classifier is found at the end of the network (its outputs are made by {', '.join(kinds) or 'nothing'}); "
        "name the tensor to cut at with --cut"
    )


def cut(model: onnx.ModelProto, tensor: str) -> onnx.ModelProto:
    """The network up to `tensor`, whose rows become the output `features` [N, width]. Raises `CutError`."""
    known = [name for node in model.graph.node for name in node.output]
    if tensor not in known:
        near = ", ".join(known[-6:])
        raise CutError(f"the network has no tensor '{tensor}'; the last ones are {near}")
    inferred = shape_inference.infer_shapes(model)
    shapes = {v.name: v for v in (*inferred.graph.value_info, *inferred.graph.output)}
    info = shapes.get(tensor)
    kind = info.type.tensor_type.elem_type if info is not None else TensorProto.FLOAT
    if kind != TensorProto.FLOAT:
        raise CutError(f"'{tensor}' has no floating-point elements, so it holds no features")
    rank = len(info.type.tensor_type.shape.dim) if info is not None and info.type.tensor_type.HasField("shape") else 2
    if rank < 2:
        raise CutError(f"'{tensor}' has {rank} dimensions; features have one row for each example")
    inputs = [value.name for value in model.graph.input if value.name not in _initializers(model)]
    free = _free(info, model) if info is not None else []
    if free:
        raise CutError(
            f"a row of '{tensor}' is as wide as the example is long ({', '.join(free)}); expected as many numbers for "
            "each: cut behind what makes one row of them, or leave --cut out"
        )
    below = utils.Extractor(inferred).extract_model(inputs, [tensor])
    # Whatever its rank, a row of features is flat.
    flatten = helper.make_node("Flatten", [tensor], [FEATURES], axis=1)
    if tensor == FEATURES:
        for node in below.graph.node:
            _rename(node.output, FEATURES, "uncut")
            _rename(node.input, FEATURES, "uncut")
        flatten = helper.make_node("Flatten", ["uncut"], [FEATURES], axis=1)
    below.graph.node.append(flatten)
    del below.graph.output[:]
    below.graph.output.append(helper.make_tensor_value_info(FEATURES, TensorProto.FLOAT, ["N", None]))
    return below


def _free(value: onnx.ValueInfoProto, model: onnx.ModelProto) -> list[str]:
    """The dimensions of a row that are what an example makes them: those of an input but for the first, by name."""
    of_inputs = {d.dim_param for v in model.graph.input for d in v.type.tensor_type.shape.dim[1:]} - {""}
    return sorted({d.dim_param for d in value.type.tensor_type.shape.dim[1:]} & of_inputs)


def _rename(names: Sequence[str], old: str, new: str) -> None:
    for at, name in enumerate(names):
        if name == old:
            names[at] = new  # type: ignore[index]


def _initializers(model: onnx.ModelProto) -> set[str]:
    return {tensor.name for tensor in model.graph.initializer}
