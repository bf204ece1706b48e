"""Card payments to the features of a fraud score, and classifiers of three kinds trained on them.

The data are the demonstration data of evalml: 99,992 payments of seven months, 15 % of them fraud. They look made up:
nearly all that there is to find lies in the amount. Trained on the first 70 % in time, scored on the rest.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from models.zoo.errors import ConversionError

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

INPUT = "features"
PROBABILITIES = "probabilities"
SEED = 5
TRAINED_PART = 0.7
# What the library's converters write; the runtime takes older sets as well.
OPSETS = {"": 17, "ai.onnx.ml": 3}

PROVIDERS = (
    "American Express",
    "Diners Club / Carte Blanche",
    "Discover",
    "JCB 15 digit",
    "JCB 16 digit",
    "Maestro",
    "Mastercard",
    "VISA 13 digit",
    "VISA 16 digit",
    "VISA 19 digit",
)
FEATURES = (
    "amount, in the units of the data",
    "1 if the customer is present",
    "hour of the day",
    "day of the week, Monday is 0",
    "months until the card expires",
    "latitude",
    "longitude",
    *(f"1 if the card is {provider}" for provider in PROVIDERS),
)


@dataclass(frozen=True, slots=True)
class Payments:
    """Features FP32 [N, 17], whether each was fraud (0 or 1), and how many, from the first, are for training."""

    features: Floats
    fraud: Labels
    trained: int


def features(payment: Mapping[str, str]) -> list[float]:
    """The features of one payment, by the columns of the data, in the order of `FEATURES`."""
    when = datetime.fromisoformat(payment["datetime"])
    month, year = (int(part) for part in payment["expiration_date"].split("/"))
    return [
        float(payment["amount"]),
        float(payment["customer_present"] == "True"),
        when.hour,
        when.weekday(),
        (2000 + year - when.year) * 12 + month - when.month,
        float(payment["lat"]),
        float(payment["lng"]),
        *(float(payment["provider"] == provider) for provider in PROVIDERS),
    ]


def read_payments(content: bytes) -> Payments:
    """The payments of the data set (CSV, compressed), in the order of time. Raises `ConversionError`."""
    try:
        rows = list(csv.DictReader(io.StringIO(gzip.decompress(content).decode("utf-8"))))
        rows.sort(key=lambda row: row["datetime"])
        table = np.array([features(row) for row in rows], np.float32)
        fraud = np.array([row["fraud"] == "True" for row in rows], np.int64)
    except (OSError, EOFError, KeyError, ValueError) as error:
        raise ConversionError(f"not the payments expected: {type(error).__name__}: {error}") from None
    return Payments(table, fraud, int(len(fraud) * TRAINED_PART))


def logistic(table: Floats, fraud: Labels) -> tuple[Any, bytes]:
    """A logistic regression on scaled features, and its ONNX. Needs scikit-learn and skl2onnx."""
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fitted = make_pipeline(StandardScaler(), LogisticRegression(random_state=SEED)).fit(table, fraud)
    types = [(INPUT, FloatTensorType([None, table.shape[1]]))]
    model = to_onnx(fitted, initial_types=types, options={id(fitted): {"zipmap": False}}, target_opset=OPSETS)
    return fitted, _finished(model)


def lightgbm(table: Floats, fraud: Labels) -> tuple[Any, bytes]:
    """A hundred boosted trees by LightGBM, and their ONNX. Needs lightgbm and onnxmltools."""
    from lightgbm import LGBMClassifier
    from onnxmltools.convert import convert_lightgbm
    from onnxmltools.convert.common.data_types import FloatTensorType

    fitted = LGBMClassifier(
        n_estimators=100,
        num_leaves=31,
        random_state=SEED,
        n_jobs=1,
        deterministic=True,
        force_row_wise=True,
        verbose=-1,
    ).fit(table, fraud)
    types = [(INPUT, FloatTensorType([None, table.shape[1]]))]
    model = convert_lightgbm(fitted, initial_types=types, zipmap=False, target_opset=15)
    return fitted, _finished(model)


def xgboost(table: Floats, fraud: Labels) -> tuple[Any, bytes]:
    """A hundred boosted trees by XGBoost, and their ONNX. Needs xgboost and onnxmltools."""
    from onnxmltools.convert import convert_xgboost
    from onnxmltools.convert.common.data_types import FloatTensorType
    from xgboost import XGBClassifier

    fitted = XGBClassifier(n_estimators=100, max_depth=5, learning_rate=0.1, random_state=SEED, n_jobs=1)
    fitted.fit(table, fraud)
    types = [(INPUT, FloatTensorType([None, table.shape[1]]))]
    model = convert_xgboost(fitted, initial_types=types, target_opset=15)
    return fitted, _finished(model)


def _finished(model: onnx.ModelProto) -> bytes:
    """What converters leave: names of their own for each run, a set of operators listed twice, `[1]` labels."""
    model.graph.name = "fraud"
    versions = {opset.domain: opset.version for opset in model.opset_import}
    del model.opset_import[:]
    model.opset_import.extend(onnx.helper.make_opsetid(domain, versions[domain]) for domain in sorted(versions))
    for output in model.graph.output:
        output.type.tensor_type.shape.dim[0].dim_param = "N"
    return bytes(model.SerializeToString(deterministic=True))


TRAINERS: Mapping[str, Callable[[Floats, Labels], tuple[Any, bytes]]] = {
    "logistic": logistic,
    "lightgbm": lightgbm,
    "xgboost": xgboost,
}
