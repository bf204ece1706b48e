"""The models the benchmarks serve, built with `onnx.helper` from seeded random weights, and repositories made of them.

Every model has one FP32 input `x` and one FP32 output `y` with a dynamic first dimension. The stacks of 4096 x 4096
layers are large (64 MiB a layer) because they are meant to be bound by the bandwidth of their weights: one row costs
nearly as much as sixteen, which is the case where batching decides. They are written once under `build/bench/models`
and reused.

    tiny        MLP 16-16-16: nothing to compute, so all that is measured is the way in and out
    identity    3x224x224 to itself: large both ways, as the echo answers
    average     3x224x224 to 3 channel means: a large input with a small answer, as image models have
    resnet      residual conv net 3x224x224 to 1000, one basic block per stage
    resnet50    the same with bottlenecks, 3, 4, 6 and 3 of them: as large as what people serve
    resnet50_fp16  with weights and activations in half precision, input and output in single
    cheap       MLP 4096-4096-4096-64, 130 MiB of weights
    heavy       eight layers 4096-4096, 512 MiB of weights
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from benchmarks.harness import BenchmarkError

Floats = npt.NDArray[np.float32]
OPSET = 17


@dataclass(frozen=True, slots=True)
class BenchmarkModel:
    """A model: `row` is the shape of one row of its input, `max_batch` the largest batch it is configured for."""

    name: str
    row: tuple[int, ...]
    max_batch: int
    build: Callable[[], onnx.ModelProto]


class _Graph:
    """Collects nodes and initialisers; every method returns the name of its output."""

    def __init__(self, seed: int, precision: int = TensorProto.FLOAT) -> None:
        self.precision = precision
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def weight(self, *shape: int, fan_in: int) -> str:
        """Normal weights scaled by 1/sqrt(fan_in), so that activations neither vanish nor overflow (no denormals)."""
        values: Floats = self.random.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(fan_in))
        name = f"w{len(self.weights)}"
        raw = values.astype(helper.tensor_dtype_to_np_dtype(self.precision)).tobytes()
        self.weights.append(helper.make_tensor(name, self.precision, shape, raw, raw=True))
        return name

    def node(self, kind: str, *inputs: str, output: str | None = None, **attributes: object) -> str:
        name = output or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def conv(self, x: str, channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> str:
        fan_in = channels_in * kernel * kernel
        weight = self.weight(channels_out, channels_in, kernel, kernel, fan_in=fan_in)
        bias = self.weight(channels_out, fan_in=fan_in)
        return self.node("Conv", x, weight, bias, strides=[stride, stride], pads=[kernel // 2] * 4)

    def model(self, row: tuple[int, ...], answer: tuple[int, ...]) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "benchmark",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", *row])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", *answer])],
            self.weights,
        )
        # IR version 8 goes with opset 17, which every ONNX Runtime since 1.13 reads.
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)


def dense_stack(*widths: int) -> onnx.ModelProto:
    """Fully connected layers of these widths, ReLU between them."""
    graph = _Graph(seed=1)
    x = "x"
    for index, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        last = index == len(widths) - 2
        weight, bias = graph.weight(fan_in, fan_out, fan_in=fan_in), graph.weight(fan_out, fan_in=fan_in)
        x = graph.node("Gemm", x, weight, bias, output="y" if last else None)
        if not last:
            x = graph.node("Relu", x)
    return graph.model(widths[:1], widths[-1:])


def identity() -> onnx.ModelProto:
    """Answers its input."""
    graph = _Graph(seed=2)
    graph.node("Identity", "x", output="y")
    return graph.model((3, 224, 224), (3, 224, 224))


def average() -> onnx.ModelProto:
    """The mean of each channel."""
    graph = _Graph(seed=3)
    graph.node("GlobalAveragePool", "x", output="y")
    return graph.model((3, 224, 224), (3, 1, 1))


def residual_net() -> onnx.ModelProto:
    """Residual conv net with one basic block (He et al. 2015) in each of four stages, 64 to 512 channels."""
    graph = _Graph(seed=4)
    x = graph.node("Relu", graph.conv("x", 3, 64, kernel=7, stride=4))
    channels_in = 64
    for channels in (64, 128, 256, 512):
        stride = 1 if channels == channels_in else 2
        body = graph.node("Relu", graph.conv(x, channels_in, channels, kernel=3, stride=stride))
        body = graph.conv(body, channels, channels, kernel=3)
        skip = x if channels == channels_in else graph.conv(x, channels_in, channels, kernel=1, stride=stride)
        x = graph.node("Relu", graph.node("Add", body, skip))
        channels_in = channels
    x = graph.node("Flatten", graph.node("GlobalAveragePool", x))
    graph.node("Gemm", x, graph.weight(512, 1000, fan_in=512), graph.weight(1000, fan_in=512), output="y")
    return graph.model((3, 224, 224), (1000,))


def bottleneck_net(precision: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """ResNet-50's shape (He et al. 2015, table 1): 3, 4, 6 and 3 bottlenecks, 64 to 512 channels and four times those.

    Random weights, without the normalisation that would be folded into the convolutions anyway. `precision` FLOAT16:
    everything between input and output is computed in it.
    """
    graph = _Graph(seed=5, precision=precision)
    half = precision != TensorProto.FLOAT
    x = graph.node("Cast", "x", to=precision) if half else "x"
    x = graph.node("Relu", graph.conv(x, 3, 64, kernel=7, stride=2))
    x = graph.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels_in = 64
    for stage, (channels, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            body = graph.node("Relu", graph.conv(x, channels_in, channels, kernel=1))
            body = graph.node("Relu", graph.conv(body, channels, channels, kernel=3, stride=stride))
            body = graph.conv(body, channels, 4 * channels, kernel=1)
            skip = x if block else graph.conv(x, channels_in, 4 * channels, kernel=1, stride=stride)
            x = graph.node("Relu", graph.node("Add", body, skip))
            channels_in = 4 * channels
    x = graph.node("Flatten", graph.node("GlobalAveragePool", x))
    weights = graph.weight(2048, 1000, fan_in=2048), graph.weight(1000, fan_in=2048)
    y = graph.node("Gemm", x, *weights, output=None if half else "y")
    if half:
        graph.node("Cast", y, output="y", to=TensorProto.FLOAT)
    return graph.model((3, 224, 224), (1000,))


def efficientnet() -> onnx.ModelProto:
    """EfficientNet-Lite0 of the zoo, one input and one output: `image` FP32 [N, 3, 224, 224] -> `probabilities`.

    Raises `BenchmarkError` where it cannot be fetched.
    """
    from models.zoo.fetch import FetchError
    from models.zoo.recipes import efficientnet_lite0

    try:
        entry = efficientnet_lite0()
    except FetchError as error:
        raise BenchmarkError(f"EfficientNet-Lite0 cannot be had: {error}") from error
    model = onnx.load_model_from_string(entry.version_files["model.onnx"])
    kept = [output for output in model.graph.output if output.name == "probabilities"]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    return model


def efficientnet_fp16() -> onnx.ModelProto:
    """The same in half precision; input and output stay FP32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model: onnx.ModelProto = convert_float_to_float16(efficientnet(), keep_io_types=True)
    return model


MODELS: dict[str, BenchmarkModel] = {
    model.name: model
    for model in (
        BenchmarkModel("tiny", (16,), 64, lambda: dense_stack(16, 16, 16)),
        BenchmarkModel("identity", (3, 224, 224), 8, identity),
        BenchmarkModel("average", (3, 224, 224), 8, average),
        BenchmarkModel("resnet", (3, 224, 224), 16, residual_net),
        BenchmarkModel("resnet50", (3, 224, 224), 64, bottleneck_net),
        BenchmarkModel("resnet50_fp16", (3, 224, 224), 64, lambda: bottleneck_net(TensorProto.FLOAT16)),
        BenchmarkModel("efficientnet", (3, 224, 224), 64, efficientnet),
        BenchmarkModel("efficientnet_fp16", (3, 224, 224), 64, efficientnet_fp16),
        BenchmarkModel("mid", (2048,), 64, lambda: dense_stack(*[2048] * 5)),
        BenchmarkModel("cheap", (4096,), 64, lambda: dense_stack(4096, 4096, 4096, 64)),
        BenchmarkModel("heavy", (4096,), 64, lambda: dense_stack(*[4096] * 9)),
    )
}


def model_file(name: str, folder: Path) -> Path:
    """The ONNX file of a benchmark model, built on first use. Raises `KeyError` for a name not in `MODELS`."""
    model = MODELS[name]
    path = folder / f"{name}.onnx"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        onnx.save_model(model.build(), str(partial))
        partial.rename(path)
    return path


def config_text(model: BenchmarkModel, slo_ms: float | None, device: str = "cpu") -> str:
    """The `config.pbtxt` of a benchmark model: one instance on the device (`cpu` or `cuda`), dynamic batching; all else
    is the default."""
    lines = [
        f'name: "{model.name}"',
        'platform: "onnxruntime_onnx"',
        f"max_batch_size: {model.max_batch}",
        f"instance_group {{ kind: {'KIND_GPU' if device == 'cuda' else 'KIND_CPU'} count: 1 }}",
        "dynamic_batching { }",
    ]
    if slo_ms is not None:
        lines.append(f'parameters {{ key: "latency_slo_ms" value {{ string_value: "{slo_ms:g}" }} }}')
    return "\n".join(lines) + "\n"


def make_repository(root: Path, models_folder: Path, slos_ms: dict[str, float | None], device: str = "cpu") -> Path:
    """A model repository at `root` (replaced if it exists) with these models and objectives; None = sheds nothing."""
    if root.exists():
        shutil.rmtree(root)
    for name, slo_ms in slos_ms.items():
        version = root / name / "1"
        version.mkdir(parents=True)
        # A hard link: the large models are neither copied nor, as a symbolic link might be, refused.
        os.link(model_file(name, models_folder), version / "model.onnx")
        (root / name / "config.pbtxt").write_text(config_text(MODELS[name], slo_ms, device))
    return root
