"""Tables: rows of numbers and categories to the inputs of one model, preparation included.

The model takes `numbers` FP32 [N, k] and `categories` BYTES [N, m], in the order of the columns. Missing numbers are
NaN (the mean is taken), missing categories are empty; categories that were not there in training count as none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from models.transfer.compose import IR_VERSION, OPSET
from models.transfer.data import Column, Dataset, Example


def order(columns: Sequence[Column]) -> tuple[list[int], list[int]]:
    """Where the numbers and the categories are."""
    numbers = [at for at, column in enumerate(columns) if column.kind == "number"]
    return numbers, [at for at, column in enumerate(columns) if column.kind == "category"]


def matrix(examples: Sequence[Example], columns: Sequence[Column]) -> npt.NDArray[np.object_]:
    """Object [N, k + m]: numbers first, then categories."""
    numbers, categories = order(columns)
    made = np.empty((len(examples), len(columns)), object)
    for row, example in enumerate(examples):
        for to, at in enumerate(numbers):
            value = example.content[at]
            made[row, to] = np.nan if value is None else float(value)
        for to, at in enumerate(categories, len(numbers)):
            value = example.content[at]
            made[row, to] = "" if value is None else str(value)
    return made


def feeds(rows: npt.NDArray[np.object_], columns: Sequence[Column]) -> dict[str, npt.NDArray[Any]]:
    """The model's inputs for rows of `matrix`."""
    numbers, categories = order(columns)
    made: dict[str, npt.NDArray[Any]] = {}
    if numbers:
        made["numbers"] = rows[:, : len(numbers)].astype(np.float32)
    if categories:
        made["categories"] = rows[:, len(numbers) :].astype(object)
    return made


def preparation(data: Dataset) -> Any:
    """The first step of a pipeline, unfitted."""
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    numbers, categories = order(data.columns)
    steps = []
    if numbers:
        # A column that is empty in one part of a cross-validation is not so in all.
        filled = SimpleImputer(keep_empty_features=True)
        steps.append(("numbers", make_pipeline(filled, StandardScaler()), list(range(len(numbers)))))
    if categories:
        at = list(range(len(numbers), len(data.columns)))
        steps.append(("categories", OneHotEncoder(handle_unknown="ignore"), at))
    return ColumnTransformer(steps, sparse_threshold=0.0)


def table_model(pipeline: Any, columns: Sequence[Column]) -> Any:
    """The fitted pipeline as an ONNX model."""
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType, StringTensorType

    from models.transfer.compose import finished

    numbers, categories = order(columns)
    types: list[tuple[str, Any]] = []
    if numbers:
        types.append(("numbers", FloatTensorType([None, len(numbers)])))
    if categories:
        types.append(("categories", StringTensorType([None, len(categories)])))
    target = {"": OPSET, "ai.onnx.ml": 3}
    model = to_onnx(pipeline, initial_types=types, target_opset=target, options={"zipmap": False})
    model.ir_version = IR_VERSION
    return finished(model, None)
