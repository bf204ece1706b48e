"""Small ONNX models for tests, one builder per behaviour a server has to cope with.

Every builder returns an `onnx.ModelProto` that passes the ONNX checker and runs on ONNX Runtime's CPU provider; weights
come from a seeded generator, so two calls give the same bytes. `N` is the dynamic batch dimension. `write_model` puts a
model into a repository directory.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

# The oldest pair every operator below needs; far below what the pinned ONNX Runtime accepts.
OPSET = 17
IR_VERSION = 8
ML_OPSET = 3

Dims = Sequence[int | str]

# Protocol name -> ONNX element type, for the types a tensor can have on the wire.
ELEMENT_TYPES: dict[str, int] = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}


def write_model(
    repository: Path, name: str, model: onnx.ModelProto, version: int = 1, config: str | None = None
) -> Path:
    """Write `<repository>/<name>/<version>/model.onnx` (and `config.pbtxt` if given); returns the model's directory."""
    directory = repository / name
    (directory / str(version)).mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(directory / str(version) / "model.onnx"))
    if config is not None:
        (directory / "config.pbtxt").write_text(config, encoding="utf-8")
    return directory


# A network and heads on it


def backbone(inputs: int = 8, width: int = 16, layers: int = 1, seed: int = 0) -> onnx.ModelProto:
    """`x` FP32 [N, inputs] -> `features` FP32 [N, width]: `layers` of MatMul and Tanh, and `scores` FP32 [N, 3]."""
    rng = np.random.default_rng(seed)
    weights = {f"w{at}": _weights(rng, inputs if at == 0 else width, width) for at in range(layers)}
    nodes = []
    for at in range(layers):
        before = "x" if at == 0 else f"t{at - 1}"
        after = "features" if at == layers - 1 else f"t{at}"
        nodes += [
            helper.make_node("MatMul", [before, f"w{at}"], [f"m{at}"]),
            helper.make_node("Tanh", [f"m{at}"], [after]),
        ]
    nodes.append(helper.make_node("MatMul", ["features", "top"], ["scores"]))
    return make_model(
        "backbone",
        nodes,
        [value("x", "FP32", ["N", inputs])],
        [value("features", "FP32", ["N", width]), value("scores", "FP32", ["N", 3])],
        {**weights, "top": _weights(rng, width, 3)},
    )


def head(width: int = 16, classes: int = 4, seed: int = 1) -> onnx.ModelProto:
    """`features` FP32 [batch, width] -> `probabilities` FP32 [batch, classes], `label` INT64 [batch, 1]."""
    rng = np.random.default_rng(seed)
    return make_model(
        "head",
        [
            helper.make_node("Gemm", ["features", "w", "b"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
            helper.make_node("ArgMax", ["logits"], ["label"], axis=-1, keepdims=1),
        ],
        [value("features", "FP32", ["batch", width])],
        [value("probabilities", "FP32", ["batch", classes]), value("label", "INT64", ["batch", 1])],
        {"w": _weights(rng, width, classes), "b": _weights(rng, classes)},
    )


def composed(below: onnx.ModelProto, above: onnx.ModelProto) -> onnx.ModelProto:
    """A backbone and a head as one model."""
    nodes = [*below.graph.node]
    renamed = []
    for node in above.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for names in (copy.input, copy.output):
            for at, name in enumerate(names):
                names[at] = name if name in ("features", *(o.name for o in above.graph.output)) else f"head_{name}"
        renamed.append(copy)
    weights = {i.name: numpy_helper.to_array(i) for i in below.graph.initializer}
    weights |= {f"head_{i.name}": numpy_helper.to_array(i) for i in above.graph.initializer}
    return make_model("composed", nodes + renamed, [*below.graph.input], [*above.graph.output], weights)


HEAD_CONFIG = 'parameters { key: "backbone" value { string_value: "BACKBONE" } }\n'


# Plain numeric models


def mlp(inputs: int = 8, hidden: int = 16, outputs: int = 4, seed: int = 0) -> onnx.ModelProto:
    """`x` FP32 [N, inputs] -> Gemm, Relu, Gemm -> `y` FP32 [N, outputs]."""
    rng = np.random.default_rng(seed)
    return make_model(
        "mlp",
        [
            helper.make_node("Gemm", ["x", "w1", "b1"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("Gemm", ["r", "w2", "b2"], ["y"]),
        ],
        [value("x", "FP32", ["N", inputs])],
        [value("y", "FP32", ["N", outputs])],
        {
            "w1": _weights(rng, inputs, hidden),
            "b1": _weights(rng, hidden),
            "w2": _weights(rng, hidden, outputs),
            "b2": _weights(rng, outputs),
        },
    )


def matmul_stack(layers: int = 4, width: int = 4096, seed: int = 0) -> onnx.ModelProto:
    """`x` FP32 [N, width] -> `layers` times MatMul and Relu -> `y` FP32 [N, width].

    Reading the weights (64 MiB a layer at width 4096) bounds its time, so a batch costs little more than one row.
    """
    rng = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    initializers: dict[str, npt.NDArray[Any]] = {}
    previous = "x"
    for layer in range(layers):
        initializers[f"w{layer}"] = _weights(rng, width, width)
        nodes.append(helper.make_node("MatMul", [previous, f"w{layer}"], [f"m{layer}"]))
        previous = "y" if layer == layers - 1 else f"r{layer}"
        nodes.append(helper.make_node("Relu", [f"m{layer}"], [previous]))
    return make_model(
        "matmul_stack", nodes, [value("x", "FP32", ["N", width])], [value("y", "FP32", ["N", width])], initializers
    )


def conv_net(
    size: int = 224, channels: int = 16, blocks: int = 2, classes: int = 10, batch: int | str = "N", seed: int = 0
) -> onnx.ModelProto:
    """A small residual network: `image` FP32 [batch, 3, size, size] -> `logits` FP32 [batch, classes]."""
    rng = np.random.default_rng(seed)
    initializers: dict[str, npt.NDArray[Any]] = {"stem": _filters(rng, channels, 3)}
    nodes = [
        helper.make_node("Conv", ["image", "stem"], ["stem_out"], kernel_shape=[3, 3], strides=[4, 4], pads=[1] * 4),
        helper.make_node("Relu", ["stem_out"], ["block0"]),
    ]
    for block in range(blocks):
        initializers[f"k{block}"] = _filters(rng, channels, channels)
        nodes += [
            helper.make_node("Conv", [f"block{block}", f"k{block}"], [f"c{block}"], kernel_shape=[3, 3], pads=[1] * 4),
            helper.make_node("Add", [f"block{block}", f"c{block}"], [f"a{block}"]),
            helper.make_node("Relu", [f"a{block}"], [f"block{block + 1}"]),
        ]
    initializers["w"] = _weights(rng, channels, classes)
    nodes += [
        helper.make_node("GlobalAveragePool", [f"block{blocks}"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["logits"]),
    ]
    return make_model(
        "conv_net",
        nodes,
        [value("image", "FP32", [batch, 3, size, size])],
        [value("logits", "FP32", [batch, classes])],
        initializers,
    )


def fixed_batch_cnn(size: int = 28, seed: int = 0) -> onnx.ModelProto:
    """A network exported for one image at a time: `image` FP32 [1, 3, size, size] -> `logits` FP32 [1, 10]."""
    return conv_net(size=size, channels=8, blocks=1, batch=1, seed=seed)


def global_average(size: int | str = 224) -> onnx.ModelProto:
    """`image` FP32 [N, 3, size, size] -> `mean` FP32 [N, 3]: a large input, hardly any work."""
    second = "W" if isinstance(size, str) else size
    return make_model(
        "global_average",
        [helper.make_node("ReduceMean", ["image"], ["mean"], axes=[2, 3], keepdims=0)],
        [value("image", "FP32", ["N", 3, size, second])],
        [value("mean", "FP32", ["N", 3])],
    )


def slow(iterations: int = 100, width: int = 128, seed: int = 0) -> onnx.ModelProto:
    """`x` FP32 [N, 4] -> `y` FP32 [N, 4], equal to x, after `iterations` products of [width, width] matrices.

    The time does not depend on the rows. The loop hangs on the input, so that no optimiser folds it away.
    """
    rng = np.random.default_rng(seed)
    # An orthogonal matrix keeps the norm of the state, so that no number of iterations overflows.
    orthogonal, _ = np.linalg.qr(rng.standard_normal((width, width)))
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state_in", "rotation"], ["state_out"]),
            helper.make_node("Identity", ["go_in"], ["go_out"]),
        ],
        "rotate",
        [
            value("i", "INT64", []),
            value("go_in", "BOOL", []),
            value("state_in", "FP32", [width, width]),
        ],
        [value("go_out", "BOOL", []), value("state_out", "FP32", [width, width])],
    )
    return make_model(
        "slow",
        [
            helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
            helper.make_node("Mul", ["sum", "zero"], ["nothing"]),
            helper.make_node("Add", ["rotation", "nothing"], ["start"]),
            helper.make_node("Loop", ["iterations", "go", "start"], ["end"], body=body),
            helper.make_node("ReduceSum", ["end"], ["end_sum"], keepdims=0),
            helper.make_node("Mul", ["end_sum", "zero"], ["end_nothing"]),
            helper.make_node("Add", ["x", "end_nothing"], ["y"]),
        ],
        [value("x", "FP32", ["N", 4])],
        [value("y", "FP32", ["N", 4])],
        {
            "rotation": orthogonal.astype(np.float32),
            "zero": np.array(0, np.float32),
            "go": np.array(True),
            "iterations": np.array(iterations, np.int64),
        },
    )


def slow_for(milliseconds: float) -> onnx.ModelProto:
    """The `slow` model with its iterations chosen so that one run takes about `milliseconds` on this machine now."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    trial = 50
    session = ort.InferenceSession(slow(trial).SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {"x": np.zeros((1, 4), np.float32)}
    session.run(None, feeds)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        session.run(None, feeds)
        seconds.append(time.perf_counter() - began)
    # The shortest: on a busy machine the others are too long, and the model would be too fast once it is not.
    return slow(max(1, round(trial * milliseconds / 1000 / min(seconds))))


# Text and strings


def text_encoder(vocabulary: int = 100, width: int = 8, seed: int = 0) -> onnx.ModelProto:
    """`input_ids`, `attention_mask` INT64 [N, S] -> `states` FP32 [N, S, width], `pooled` FP32 [N, width].

    Two dynamic axes: requests of different S cannot share a batch unless padded. `pooled` is the mean of the states
    that the mask keeps, so padding with mask 0 does not change it. An id outside the vocabulary fails the run.
    """
    rng = np.random.default_rng(seed)
    return make_model(
        "text_encoder",
        [
            helper.make_node("Gather", ["table", "input_ids"], ["embedded"], axis=0),
            helper.make_node("MatMul", ["embedded", "w"], ["projected"]),
            helper.make_node("Tanh", ["projected"], ["states"]),
            helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["mask", "last"], ["mask3"]),
            helper.make_node("Mul", ["states", "mask3"], ["kept"]),
            helper.make_node("ReduceSum", ["kept", "first"], ["total"], keepdims=0),
            helper.make_node("ReduceSum", ["mask", "first"], ["length"], keepdims=1),
            helper.make_node("Max", ["length", "one"], ["divisor"]),
            helper.make_node("Div", ["total", "divisor"], ["pooled"]),
        ],
        [value("input_ids", "INT64", ["N", "S"]), value("attention_mask", "INT64", ["N", "S"])],
        [value("states", "FP32", ["N", "S", width]), value("pooled", "FP32", ["N", width])],
        {
            "table": _weights(rng, vocabulary, width),
            "w": _weights(rng, width, width),
            "last": np.array([-1], np.int64),
            "first": np.array([1], np.int64),
            "one": np.array(1, np.float32),
        },
    )


def string_tfidf(words: Sequence[str] = ("ham", "spam", "eggs"), columns: int = 4) -> onnx.ModelProto:
    """`words` BYTES [N, columns] -> how often each known word occurs in the row, `counts` FP32 [N, len(words)]."""
    node = helper.make_node(
        "TfIdfVectorizer",
        ["words"],
        ["counts"],
        mode="TF",
        min_gram_length=1,
        max_gram_length=1,
        max_skip_count=0,
        ngram_counts=[0],
        ngram_indexes=list(range(len(words))),
        pool_strings=list(words),
    )
    return make_model(
        "string_tfidf", [node], [value("words", "BYTES", ["N", columns])], [value("counts", "FP32", ["N", len(words)])]
    )


def string_labels(labels: Sequence[str] = ("cat", "dog", "bird"), columns: int = 1) -> onnx.ModelProto:
    """`name` BYTES [N, columns] -> `id` INT64 [N, columns] (-1 = unknown) and `echo` BYTES: the labels of the ids."""
    ids = list(range(len(labels)))
    nodes = [
        helper.make_node(
            "LabelEncoder",
            ["name"],
            ["id"],
            domain="ai.onnx.ml",
            keys_strings=list(labels),
            values_int64s=ids,
            default_int64=-1,
        ),
        helper.make_node(
            "LabelEncoder",
            ["id"],
            ["echo"],
            domain="ai.onnx.ml",
            keys_int64s=ids,
            values_strings=list(labels),
            default_string="unknown",
        ),
    ]
    return make_model(
        "string_labels",
        nodes,
        [value("name", "BYTES", ["N", columns])],
        [value("id", "INT64", ["N", columns]), value("echo", "BYTES", ["N", columns])],
    )


def string_upper() -> onnx.ModelProto:
    """`text` BYTES [1, C] -> `upper` BYTES [1, C], upper case. The operator takes one row only: batch fixed to 1."""
    node = helper.make_node("StringNormalizer", ["text"], ["upper"], case_change_action="UPPER", locale="C")
    return make_model("string_upper", [node], [value("text", "BYTES", [1, "C"])], [value("upper", "BYTES", [1, "C"])])


# Shapes and types


def identity(datatype: str = "FP32", dims: Dims = ("N", 4)) -> onnx.ModelProto:
    """`x` -> `y`, unchanged, of a protocol datatype (`FP32`, `BF16`, `BYTES`...) and dimensions."""
    return make_model(
        f"identity_{datatype.lower()}",
        [helper.make_node("Identity", ["x"], ["y"])],
        [value("x", datatype, dims)],
        [value("y", datatype, dims)],
    )


def image_identity() -> onnx.ModelProto:
    """`x` -> `y` FP32 [N, 3, 224, 224]: 602,112 bytes a row in and out, no work."""
    return identity("FP32", ("N", 3, 224, 224))


def scalar_sum() -> onnx.ModelProto:
    """`a`, `b` FP32 [] -> `sum` FP32 []: tensors of rank 0, no batch."""
    return make_model(
        "scalar_sum",
        [helper.make_node("Add", ["a", "b"], ["sum"])],
        [value("a", "FP32", []), value("b", "FP32", [])],
        [value("sum", "FP32", [])],
    )


def side_input(columns: int = 4) -> onnx.ModelProto:
    """`x` FP32 [N, columns] and `rate` INT64 [] -> `y` = x * rate: a scalar beside the rows, as Silero VAD's `sr`."""
    return make_model(
        "side_input",
        [
            helper.make_node("Cast", ["rate"], ["factor"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["x", "factor"], ["y"]),
        ],
        [value("x", "FP32", ["N", columns]), value("rate", "INT64", [])],
        [value("y", "FP32", ["N", columns])],
    )


def recurrent(columns: int = 4) -> onnx.ModelProto:
    """`x` FP32 [N, columns], `state` FP32 [2, N, columns] -> `y` [N, columns], `state_out` [2, N, columns].

    The batch is axis 1 of the state: state_out = state / 2 + x, y = the sum of state_out over axis 0.
    """
    return make_model(
        "recurrent",
        [
            helper.make_node("Mul", ["state", "half"], ["decayed"]),
            helper.make_node("Add", ["decayed", "x"], ["state_out"]),
            helper.make_node("ReduceSum", ["state_out", "axis"], ["y"], keepdims=0),
        ],
        [value("x", "FP32", ["N", columns]), value("state", "FP32", [2, "N", columns])],
        [value("y", "FP32", ["N", columns]), value("state_out", "FP32", [2, "N", columns])],
        {"half": np.array(0.5, np.float32), "axis": np.array([0], np.int64)},
    )


def sequence_probe(factor: float = 1.0) -> onnx.ModelProto:
    """A model with a state and every control: it tells what it is told.

    `x` FP32 [N, 2], `pick` INT64 [N, 1], `first` FP32 [N, 1], `ready` BOOL [N, 1], `last` INT32 [N, 1], `who` UINT64
    [N, 1], `total` FP32 [N, 2] -> `sum` = `total_out` = total + factor * x, `was_first`, `was_ready`, `was_last`,
    `was_who`, `picked` FP32 [N, 1]. A `pick` outside 0 to 7 fails the whole batch.
    """
    echoes = (("first", "FP32"), ("ready", "BOOL"), ("last", "INT32"), ("who", "UINT64"))
    return make_model(
        "sequence_probe",
        [
            helper.make_node("Mul", ["x", "factor"], ["scaled"]),
            helper.make_node("Add", ["total", "scaled"], ["sum"]),
            helper.make_node("Identity", ["sum"], ["total_out"]),
            *_checked("pick", "checked"),
            helper.make_node("Gather", ["table", "checked"], ["picked"]),
            *(helper.make_node("Identity", [name], [f"was_{name}"]) for name, _ in echoes),
        ],
        [
            value("x", "FP32", ["N", 2]),
            value("pick", "INT64", ["N", 1]),
            *(value(name, datatype, ["N", 1]) for name, datatype in echoes),
            value("total", "FP32", ["N", 2]),
        ],
        [
            value("sum", "FP32", ["N", 2]),
            value("total_out", "FP32", ["N", 2]),
            value("picked", "FP32", ["N", 1]),
            *(value(f"was_{name}", datatype, ["N", 1]) for name, datatype in echoes),
        ],
        {"table": np.arange(8, dtype=np.float32), "numbers": _numbers(8), "factor": np.array(factor, np.float32)},
    )


PROBE_CONFIG = """
max_batch_size: 16
sequence_batching {
  max_sequence_idle_microseconds: 2000000
  control_input { name: "first" control { kind: CONTROL_SEQUENCE_START fp32_false_true: [ 0, 1 ] } }
  control_input { name: "ready" control { kind: CONTROL_SEQUENCE_READY bool_false_true: [ false, true ] } }
  control_input { name: "last" control { kind: CONTROL_SEQUENCE_END int32_false_true: [ 0, 1 ] } }
  control_input { name: "who" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 } }
  state { input_name: "total" output_name: "total_out" data_type: TYPE_FP32 dims: [ 2 ] }
}
"""


def named_sequences() -> onnx.ModelProto:
    """`x` FP32 [N, 1], `words` BYTES [N, 1] (the correlation id) -> `y` = x, `who` = words."""
    return make_model(
        "named_sequences",
        [helper.make_node("Identity", ["words"], ["who"]), helper.make_node("Identity", ["x"], ["y"])],
        [value("x", "FP32", ["N", 1]), value("words", "BYTES", ["N", 1])],
        [value("y", "FP32", ["N", 1]), value("who", "BYTES", ["N", 1])],
    )


NAMED_CONFIG = """
max_batch_size: 8
sequence_batching { control_input { name: "words" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_STRING } } }
"""


def growing_cache(columns: int = 4) -> onnx.ModelProto:
    """`past` FP32 [N, L, columns] (L = 0 at first), `x` FP32 [N, 1, columns] -> `present` FP32 [N, L + 1, columns]."""
    return make_model(
        "growing_cache",
        [helper.make_node("Concat", ["past", "x"], ["present"], axis=1)],
        [value("past", "FP32", ["N", "L", columns]), value("x", "FP32", ["N", 1, columns])],
        [value("present", "FP32", ["N", "M", columns])],
    )


def empty_rows() -> onnx.ModelProto:
    """`x` FP32 [N, 0] -> `y` FP32 [N, 0]: rows without elements."""
    return identity("FP32", ("N", 0))


def constant_output() -> onnx.ModelProto:
    """No input at all -> `y` FP32 [3], always 1, 2, 3."""
    return make_model(
        "constant_output",
        [helper.make_node("Identity", ["values"], ["y"])],
        [],
        [value("y", "FP32", [3])],
        {"values": np.array([1, 2, 3], np.float32)},
    )


def unbatched_matrix() -> onnx.ModelProto:
    """`a` FP32 [3, 4] -> `columns` FP32 [4], the column sums: no axis is a batch."""
    return make_model(
        "unbatched_matrix",
        [helper.make_node("ReduceSum", ["a", "axis"], ["columns"], keepdims=0)],
        [value("a", "FP32", [3, 4])],
        [value("columns", "FP32", [4])],
        {"axis": np.array([0], np.int64)},
    )


def mixed_batch_outputs(columns: int = 4) -> onnx.ModelProto:
    """`x` FP32 [N, columns] -> `rows` [N, columns], `total` [columns] (no batch), `twice` [M, columns] with M = 2 N."""
    return make_model(
        "mixed_batch_outputs",
        [
            helper.make_node("Relu", ["x"], ["rows"]),
            helper.make_node("ReduceSum", ["x", "axis"], ["total"], keepdims=0),
            helper.make_node("Concat", ["x", "x"], ["twice"], axis=0),
        ],
        [value("x", "FP32", ["N", columns])],
        [
            value("rows", "FP32", ["N", columns]),
            value("total", "FP32", [columns]),
            value("twice", "FP32", ["M", columns]),
        ],
        {"axis": np.array([0], np.int64)},
    )


def default_input(columns: int = 4) -> onnx.ModelProto:
    """`x` FP32 [N, columns], `scale` FP32 [1] optional (an initializer of the same name holds 2) -> `y` = x * scale."""
    return make_model(
        "default_input",
        [helper.make_node("Mul", ["x", "scale"], ["y"])],
        [value("x", "FP32", ["N", columns]), value("scale", "FP32", [1])],
        [value("y", "FP32", ["N", columns])],
        {"scale": np.array([2], np.float32)},
    )


def odd_names() -> onnx.ModelProto:
    """`serving/x:0` FP32 [N, 2] -> `1959` FP32 [N, 2] = 2 x: names as exporters write them."""
    return make_model(
        "odd_names",
        [helper.make_node("Add", ["serving/x:0", "serving/x:0"], ["1959"])],
        [value("serving/x:0", "FP32", ["N", 2])],
        [value("1959", "FP32", ["N", 2])],
    )


# Behaviour


def branching_conv() -> onnx.ModelProto:
    """`x` FP32 [N, 1, 8, 8] -> `y` the same, convolved in one of two branches: what CUDA graphs cannot capture."""

    def branch(name: str, weight: float) -> onnx.GraphProto:
        kernel = numpy_helper.from_array(np.full((1, 1, 3, 3), weight, np.float32), f"w_{name}")
        node = helper.make_node("Conv", ["x", kernel.name], [f"y_{name}"], pads=[1, 1, 1, 1])
        return helper.make_graph([node], name, [], [value(f"y_{name}", "FP32", ["N", 1, 8, 8])], [kernel])

    return make_model(
        "branching_conv",
        [
            helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
            helper.make_node("Greater", ["largest", "limit"], ["large"]),
            helper.make_node("If", ["large"], ["y"], then_branch=branch("a", 0.1), else_branch=branch("b", 0.1)),
        ],
        [value("x", "FP32", ["N", 1, 8, 8])],
        [value("y", "FP32", ["N", 1, 8, 8])],
        {"limit": np.array(0, np.float32)},
    )


def poison(rows: int = 64, columns: int = 4, seed: int = 0) -> onnx.ModelProto:
    """`index` INT64 [N, 1] -> `row` FP32 [N, columns]. One index outside [-rows, rows) fails the whole batch."""
    rng = np.random.default_rng(seed)
    return make_model(
        "poison",
        [
            *_checked("index", "checked"),
            helper.make_node("Gather", ["table", "checked"], ["gathered"], axis=0),
            helper.make_node("Squeeze", ["gathered", "axis"], ["row"]),
        ],
        [value("index", "INT64", ["N", 1])],
        [value("row", "FP32", ["N", columns])],
        {"table": _weights(rng, rows, columns), "numbers": _numbers(rows), "axis": np.array([1], np.int64)},
    )


def dynamic_quantised(inputs: int = 16, outputs: int = 8, seed: int = 0) -> onnx.ModelProto:
    """`x` FP32 [N, inputs] -> int8 product -> `y` FP32 [N, outputs].

    The quantisation scale is taken over the whole batch, so a row's answer depends on its neighbours.
    """
    rng = np.random.default_rng(seed)
    return make_model(
        "dynamic_quantised",
        [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
            helper.make_node("MatMulInteger", ["xq", "w", "xz"], ["yi"]),
            helper.make_node("Cast", ["yi"], ["yf"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["xs", "ws"], ["scale"]),
            helper.make_node("Mul", ["yf", "scale"], ["y"]),
        ],
        [value("x", "FP32", ["N", inputs])],
        [value("y", "FP32", ["N", outputs])],
        {
            "w": rng.integers(-127, 128, (inputs, outputs), dtype=np.int8),
            "ws": np.array(0.01, np.float32),
        },
    )


# What a row of `hungry` needs while it is computed.
HUNGRY_BYTES = 16 << 20


def hungry() -> onnx.ModelProto:
    """`x` FP32 [N, 4] -> `y` FP32 [N, 1], its largest element, by way of `HUNGRY_BYTES` for each row."""
    return make_model(
        "hungry",
        [
            helper.make_node("Tile", ["x", "repeats"], ["wide"]),
            helper.make_node("ReduceMax", ["wide"], ["y"], axes=[1], keepdims=1),
        ],
        [value("x", "FP32", ["N", 4])],
        [value("y", "FP32", ["N", 1])],
        {"repeats": np.array([1, HUNGRY_BYTES // 16], np.int64)},
    )


def branching(columns: int = 4) -> onnx.ModelProto:
    """`x` FP32 [N, columns], `negate` BOOL [1] -> `y` = -x or x, through an `If` with two sub-graphs."""
    then_branch = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["negated"])], "then", [], [value("negated", "FP32", ["N", columns])]
    )
    else_branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["same"])], "else", [], [value("same", "FP32", ["N", columns])]
    )
    return make_model(
        "branching",
        [helper.make_node("If", ["negate"], ["y"], then_branch=then_branch, else_branch=else_branch)],
        [value("x", "FP32", ["N", columns]), value("negate", "BOOL", [1])],
        [value("y", "FP32", ["N", columns])],
    )


def looping(columns: int = 4) -> onnx.ModelProto:
    """`x` FP32 [N, columns], `times` INT64 [] -> `y` = x * 2 ** times, through a `Loop`."""
    body = helper.make_graph(
        [
            helper.make_node("Add", ["value_in", "value_in"], ["value_out"]),
            helper.make_node("Identity", ["go_in"], ["go_out"]),
        ],
        "double",
        [value("i", "INT64", []), value("go_in", "BOOL", []), value("value_in", "FP32", ["N", columns])],
        [value("go_out", "BOOL", []), value("value_out", "FP32", ["N", columns])],
    )
    return make_model(
        "looping",
        [helper.make_node("Loop", ["times", "go", "x"], ["y"], body=body)],
        [value("x", "FP32", ["N", columns]), value("times", "INT64", [])],
        [value("y", "FP32", ["N", columns])],
        {"go": np.array(True)},
    )


# Classifiers in the ai.onnx.ml domain, declared as the usual converters declare them


def linear_classifier(features: int = 4, classes: int = 3, seed: int = 0) -> onnx.ModelProto:
    """`features` FP32 [N, features] -> `label` INT64 [N], wrongly declared [1]; `probabilities` FP32 [N, classes]."""
    node = _linear_classifier_node(features, classes, seed, "probabilities")
    return make_model(
        "linear_classifier",
        [node],
        [value("features", "FP32", ["N", features])],
        [value("label", "INT64", [1]), value("probabilities", "FP32", ["N", classes])],
    )


def tree_classifier(features: int = 4) -> onnx.ModelProto:
    """Two stumps over `features` FP32 [N, features] -> `label` INT64 (declared [1]), `probabilities` (declared [1, 2]).

    Both outputs come back with N rows: the declared shapes are wrong, as onnxmltools writes them for LightGBM.
    """
    node = helper.make_node(
        "TreeEnsembleClassifier",
        ["features"],
        ["label", "probabilities"],
        domain="ai.onnx.ml",
        nodes_treeids=[0, 0, 0, 1, 1, 1],
        nodes_nodeids=[0, 1, 2, 0, 1, 2],
        nodes_featureids=[0, 0, 0, 1, 0, 0],
        nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"] * 2,
        nodes_values=[0.0] * 6,
        nodes_truenodeids=[1, 0, 0, 1, 0, 0],
        nodes_falsenodeids=[2, 0, 0, 2, 0, 0],
        class_treeids=[0, 0, 1, 1],
        class_nodeids=[1, 2, 1, 2],
        class_ids=[0, 0, 0, 0],
        class_weights=[-1.0, 1.0, -0.5, 0.5],
        classlabels_int64s=[0, 1],
        post_transform="LOGISTIC",
    )
    return make_model(
        "tree_classifier",
        [node],
        [value("features", "FP32", ["N", features])],
        [value("label", "INT64", [1]), value("probabilities", "FP32", [1, 2])],
    )


def zipmap_classifier(features: int = 4, classes: int = 3, seed: int = 0) -> onnx.ModelProto:
    """As `linear_classifier`, but `output_probability` is a sequence of maps, which no tensor protocol can carry."""
    node = _linear_classifier_node(features, classes, seed, "scores")
    zipmap = helper.make_node(
        "ZipMap", ["scores"], ["output_probability"], domain="ai.onnx.ml", classlabels_int64s=list(range(classes))
    )
    maps = helper.make_sequence_type_proto(
        helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    )
    return make_model(
        "zipmap_classifier",
        [node, zipmap],
        [value("features", "FP32", ["N", features])],
        [value("label", "INT64", ["N"]), helper.make_value_info("output_probability", maps)],
    )


def external_data(directory: Path, inputs: int = 64, outputs: int = 64, seed: int = 0) -> onnx.ModelProto:
    """`x` FP32 [N, inputs] -> `y` FP32 [N, outputs]; the weights lie beside the model.

    Writes `directory/model.onnx` and `directory/weights.bin`; such a model loads from its path only, not from bytes.
    Returns the model with its weights inside, for comparison.
    """
    rng = np.random.default_rng(seed)
    model = make_model(
        "external_data",
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [value("x", "FP32", ["N", inputs])],
        [value("y", "FP32", ["N", outputs])],
        {"w": _weights(rng, inputs, outputs)},
    )
    split = onnx.ModelProto()
    split.CopyFrom(model)
    directory.mkdir(parents=True, exist_ok=True)
    onnx.save_model(
        split,
        str(directory / "model.onnx"),
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location="weights.bin",
        size_threshold=0,
    )
    return model


# Parts


def value(name: str, datatype: str, dims: Dims) -> onnx.ValueInfoProto:
    """A typed graph input or output; a string among `dims` is a dynamic dimension."""
    return helper.make_tensor_value_info(name, ELEMENT_TYPES[datatype], list(dims))


def make_model(
    name: str,
    nodes: Iterable[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    initializers: dict[str, npt.NDArray[Any]] | None = None,
) -> onnx.ModelProto:
    """Assemble and check a model; imports the `ai.onnx.ml` domain only where a node needs it."""
    nodes = list(nodes)
    opsets = [helper.make_opsetid("", OPSET)]
    if any(node.domain == "ai.onnx.ml" for node in nodes):
        opsets.append(helper.make_opsetid("ai.onnx.ml", ML_OPSET))
    constants = [numpy_helper.from_array(array, key) for key, array in (initializers or {}).items()]
    graph = helper.make_graph(nodes, name, list(inputs), list(outputs), constants)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="onclock-tests")
    onnx.checker.check_model(model)
    return model


def _checked(index: str, output: str) -> list[onnx.NodeProto]:
    """`output` = `index`, both INT64, where `numbers` (made by `_numbers`) has it; another one fails the run.

    On a GPU ONNX Runtime gathers numbers without a look at the index, but strings are gathered on the CPU everywhere.
    """
    return [
        helper.make_node("Gather", ["numbers", index], [f"{output}_words"], axis=0),
        helper.make_node("Cast", [f"{output}_words"], [output], to=TensorProto.INT64),
    ]


def _numbers(count: int) -> npt.NDArray[Any]:
    """What `_checked` looks in for indices from `-count` to `count - 1`."""
    return np.array([str(number) for number in range(count)], object)


def _weights(rng: np.random.Generator, *shape: int) -> npt.NDArray[np.float32]:
    """Normal weights scaled by 1 / sqrt(fan-in), so that deep stacks neither vanish nor overflow."""
    scale = np.float32(1 / np.sqrt(shape[0]))
    return rng.standard_normal(shape, dtype=np.float32) * scale


def _filters(rng: np.random.Generator, outputs: int, inputs: int) -> npt.NDArray[np.float32]:
    """3x3 convolution filters, scaled by 1 / sqrt(fan-in)."""
    return rng.standard_normal((outputs, inputs, 3, 3), dtype=np.float32) / np.float32(np.sqrt(inputs * 9))


def _linear_classifier_node(features: int, classes: int, seed: int, scores: str) -> onnx.NodeProto:
    rng = np.random.default_rng(seed)
    return helper.make_node(
        "LinearClassifier",
        ["features"],
        ["label", scores],
        domain="ai.onnx.ml",
        coefficients=_weights(rng, features, classes).T.ravel().tolist(),
        intercepts=[0.0] * classes,
        classlabels_ints=list(range(classes)),
        multi_class=1,
        post_transform="SOFTMAX",
    )
