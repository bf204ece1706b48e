"""Train the cultivar classifier of `models/examples/wine` with scikit-learn and convert it with skl2onnx.

    python -m models.training.wine [--repository models/examples]

Data: the chemical analysis of 178 Italian wines that comes with scikit-learn, a quarter held out. It shows the road of
any scikit-learn pipeline: `ZipMap` switched off, so that every output is a tensor, and class names as strings. The same
versions of scikit-learn and skl2onnx give the same file byte for byte.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

MEASUREMENTS = 13
SEED = 7
HELD_OUT = 0.25
OPSETS = {"": 17, "ai.onnx.ml": 3}


@dataclass(frozen=True, slots=True)
class Split:
    """Measurements FP32 [rows, 13] and cultivars (text) [rows], for training and held out."""

    train_measurements: npt.NDArray[np.float32]
    train_cultivars: npt.NDArray[np.str_]
    test_measurements: npt.NDArray[np.float32]
    test_cultivars: npt.NDArray[np.str_]


def load_split() -> Split:
    """The data set, split once and for all: the held-out wines are never trained on."""
    from sklearn.datasets import load_wine
    from sklearn.model_selection import train_test_split

    wine = load_wine()
    cultivars = np.array(["Barolo", "Grignolino", "Barbera"])[wine.target]
    parts = train_test_split(
        wine.data.astype(np.float32), cultivars, test_size=HELD_OUT, random_state=SEED, stratify=cultivars
    )
    return Split(
        train_measurements=parts[0], train_cultivars=parts[2], test_measurements=parts[1], test_cultivars=parts[3]
    )


def train(split: Split) -> Any:
    """Standardise, then logistic regression: a fitted scikit-learn pipeline."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    pipeline = make_pipeline(StandardScaler(), LogisticRegression(random_state=SEED))
    return pipeline.fit(split.train_measurements, split.train_cultivars)


def convert(pipeline: Any) -> onnx.ModelProto:
    """`measurements` FP32 [N, 13] -> `label` BYTES [N], `probabilities` FP32 [N, 3] in alphabetical order."""
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType

    return to_onnx(
        pipeline,
        name="wine",
        initial_types=[("measurements", FloatTensorType([None, MEASUREMENTS]))],
        options={"zipmap": False},
        target_opset=OPSETS,
        naming="wine_",
    )


def accuracy(model: onnx.ModelProto, split: Split) -> float:
    """Share of the held-out wines that the ONNX model itself, run by ONNX Runtime, names right."""
    import onnxruntime as ort

    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (labels,) = session.run(["label"], {"measurements": split.test_measurements})
    return float(np.mean(labels == split.test_cultivars))


def main() -> None:
    """Train, measure on the held-out quarter, write `<repository>/wine/1/model.onnx`."""
    parser = argparse.ArgumentParser(description="Train the wine example and write it into a model repository.")
    parser.add_argument("--repository", type=Path, default=Path("models/examples"), help="model repository directory")
    target = parser.parse_args().repository / "wine" / "1" / "model.onnx"
    split = load_split()
    model = convert(train(split))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(model.SerializeToString(deterministic=True))
    print(f"held-out accuracy {accuracy(model, split):.3f} on {len(split.test_cultivars)} wines")
    print(f"wrote {target} ({target.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
