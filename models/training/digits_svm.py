"""Train the support vector machine of `models/examples/digits_svm` with scikit-learn and convert it with skl2onnx.

    python -m models.training.digits_svm [--repository models/examples]

The same data and the same split as the network of `models.training.digits`. A kernel method: more accurate than the
network, and a few hundred times more work for each digit, so that a laptop can be brought to its limit with it. The
same versions of scikit-learn and skl2onnx give the same file byte for byte.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from models.training.digits import PIXELS, Split, load_split

# The values of scikit-learn's own digits example, sharper: pixels are 0 to 16.
GAMMA = 0.001
PENALTY = 10.0
OPSETS = {"": 17, "ai.onnx.ml": 3}


def train(split: Split) -> Any:
    """A fitted support vector classifier with a radial kernel."""
    from sklearn.svm import SVC

    return SVC(C=PENALTY, gamma=GAMMA).fit(split.train_pixels, split.train_digits)


def convert(classifier: Any) -> onnx.ModelProto:
    """`pixels` FP32 [N, 64] -> `label` INT64 [N], `scores` FP32 [N, 10], the largest for the label."""
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType

    model = to_onnx(
        classifier,
        name="digits_svm",
        initial_types=[("pixels", FloatTensorType([None, PIXELS]))],
        options={"zipmap": False, "raw_scores": True},
        target_opset=OPSETS,
        naming="svm_",
    )
    # They are no probabilities, whatever the converter calls them.
    for node in model.graph.node:
        node.output[:] = ["scores" if name == "probabilities" else name for name in node.output]
    for output in model.graph.output:
        output.name = "scores" if output.name == "probabilities" else output.name
    return model


def accuracy(model: onnx.ModelProto, split: Split) -> float:
    """Share of the held-out digits that the ONNX model itself, run by ONNX Runtime, reads right."""
    import onnxruntime as ort

    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (labels,) = session.run(["label"], {"pixels": split.test_pixels})
    return float(np.mean(labels == split.test_digits))


def main() -> None:
    """Train, measure on the held-out quarter, write `<repository>/digits_svm/1/model.onnx`."""
    parser = argparse.ArgumentParser(description="Train the digits_svm example and write it into a model repository.")
    parser.add_argument("--repository", type=Path, default=Path("models/examples"), help="model repository directory")
    target = parser.parse_args().repository / "digits_svm" / "1" / "model.onnx"
    split = load_split()
    model = convert(train(split))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(model.SerializeToString(deterministic=True))
    print(f"held-out accuracy {accuracy(model, split):.3f} on {len(split.test_digits)} digits")
    print(f"wrote {target} ({target.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
