"""Train the handwritten-digit classifier of `models/examples/digits` and write it as ONNX.

    python -m models.training.digits [--repository models/examples]

Data: the 1,797 scanned digits of scikit-learn (8x8 pixels, 0 to 16), a quarter held out. Network: one hidden layer,
written as five ONNX operators, so that the answers are plain tensors. Everything is seeded and single-threaded: the
same versions of NumPy and scikit-learn on the same kind of CPU give the same file byte for byte; another BLAS may
round the last bits of the weights differently.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

PIXELS = 64
CLASSES = 10
# The largest pixel value of the data set: the graph divides by it, so that clients send the pixels as they are.
BRIGHTEST = 16.0
HIDDEN = 96
SEED = 7
HELD_OUT = 0.25

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights [inputs, outputs] and bias [outputs] of a fully connected layer, FP32."""

    weight: Floats
    bias: Floats


@dataclass(frozen=True, slots=True)
class Split:
    """Pixels FP32 [rows, 64] and digits INT64 [rows], for training and held out."""

    train_pixels: Floats
    train_digits: npt.NDArray[np.int64]
    test_pixels: Floats
    test_digits: npt.NDArray[np.int64]


def load_split() -> Split:
    """The data set, split once and for all: the held-out digits are never trained on."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    parts = train_test_split(
        digits.data.astype(np.float32),
        digits.target.astype(np.int64),
        test_size=HELD_OUT,
        random_state=SEED,
        stratify=digits.target,
    )
    return Split(train_pixels=parts[0], train_digits=parts[2], test_pixels=parts[1], test_digits=parts[3])


def train(split: Split) -> list[Layer]:
    """Fit one hidden ReLU layer and a softmax layer."""
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits

    network = MLPClassifier(hidden_layer_sizes=(HIDDEN,), alpha=0.05, max_iter=1000, random_state=SEED)
    # One thread: the order of the sums, and so the last bit of every weight, does not depend on the machine's cores.
    with threadpool_limits(limits=1):
        network.fit(split.train_pixels / np.float32(BRIGHTEST), split.train_digits)
    pairs = zip(network.coefs_, network.intercepts_, strict=True)
    return [Layer(weight.astype(np.float32), bias.astype(np.float32)) for weight, bias in pairs]


def build(layers: list[Layer]) -> onnx.ModelProto:
    """`pixels` FP32 [N, 64] -> `label` INT64 [N, 1], `probabilities` FP32 [N, 10]."""
    hidden, output = layers
    # Dividing by the brightest pixel is folded into the first layer.
    constants = {
        "hidden.weight": hidden.weight / np.float32(BRIGHTEST),
        "hidden.bias": hidden.bias,
        "output.weight": output.weight,
        "output.bias": output.bias,
    }
    nodes = [
        helper.make_node("Gemm", ["pixels", "hidden.weight", "hidden.bias"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("Gemm", ["active", "output.weight", "output.bias"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
        helper.make_node("ArgMax", ["logits"], ["label"], axis=-1, keepdims=1),
    ]
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["N", PIXELS])],
        [
            helper.make_tensor_value_info("label", TensorProto.INT64, ["N", 1]),
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", CLASSES]),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="onclock models.training.digits"
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def accuracy(model: onnx.ModelProto, split: Split) -> float:
    """Share of the held-out digits that the ONNX model itself, run by ONNX Runtime, names right."""
    import onnxruntime as ort

    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (labels,) = session.run(["label"], {"pixels": split.test_pixels})
    return float(np.mean(labels[:, 0] == split.test_digits))


def main() -> None:
    """Train, measure on the held-out quarter, write `<repository>/digits/1/model.onnx`."""
    parser = argparse.ArgumentParser(description="Train the digits example and write it into a model repository.")
    parser.add_argument("--repository", type=Path, default=Path("models/examples"), help="model repository directory")
    target = parser.parse_args().repository / "digits" / "1" / "model.onnx"
    split = load_split()
    model = build(train(split))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(model.SerializeToString(deterministic=True))
    print(f"held-out accuracy {accuracy(model, split):.3f} on {len(split.test_digits)} digits")
    print(f"wrote {target} ({target.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
