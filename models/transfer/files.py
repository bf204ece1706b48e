"""Examples in a CSV or Parquet file: a row each."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.transfer.data import Column, DataError, Raw, Value

# A category with more values than that says too little about each.
MOST_VALUES = 200


def read_file(path: Path, label: str, text: str, image: str, split_column: str, leave_out: Sequence[str]) -> Raw:
    names, columns = _table(path)
    if not label:
        raise DataError(f"{path}: which column has the labels? Say so with --label; there are {', '.join(names)}")
    for name in filter(None, (label, text, image, split_column, *leave_out)):
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(names)}"
            raise DataError(f"{path}: has no column '{name}'; {hint}")
    labels = columns[label]
    missing = [number for number, value in enumerate(labels) if value is None or value != value or value == ""]
    if missing:
        raise DataError(f"{path}: row {missing[0] + 1} has no label ({len(missing)} rows have none); remove them")
    parts = [_part(path, value) for value in columns[split_column]] if split_column else [""] * len(labels)
    sources = [f"{path.name}, row {number + 1}" for number in range(len(labels))]
    named = [str(value) for value in labels]
    if text:
        texts = ["" if value is None else str(value) for value in columns[text]]
        return Raw("text", list(zip(sources, texts, named, parts, strict=True)))
    if image:
        pictures = [_picture(path, source, value) for source, value in zip(sources, columns[image], strict=True)]
        return Raw("images", list(zip(sources, pictures, named, parts, strict=True)))
    used = [name for name in names if name not in (label, split_column, *leave_out)]
    kept, notes = _columns(used, columns)
    if not kept:
        raise DataError(f"{path}: no column is left to learn from")
    rows = list(zip(*(_values(column, columns[column.name]) for column in kept), strict=True))
    return Raw("table", list(zip(sources, rows, named, parts, strict=True)), kept, notes)


def _table(path: Path) -> tuple[list[str], dict[str, list[Any]]]:
    """The columns of a CSV or Parquet file, by name."""
    try:
        import pyarrow as pa
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError:
        raise DataError("CSV and Parquet files need pyarrow: pip install 'onclock[models]'") from None
    try:
        if path.suffix.lower() == ".parquet":
            table = pyarrow.parquet.read_table(path)
        else:
            quoted = pyarrow.csv.ParseOptions(newlines_in_values=True)
            table = pyarrow.csv.read_csv(path, parse_options=quoted)
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    names = [name for name in table.column_names if not name.startswith("__index_level_")]
    if table.num_rows == 0:
        raise DataError(f"{path}: has no rows")
    return names, {name: table[name].to_pylist() for name in names}


def _part(path: Path, value: object) -> str:
    parts = {"train": "train", "val": "train", "valid": "train", "validation": "train", "test": "test"}
    found = parts.get(str(value).lower())
    if found is None:
        raise DataError(f"{path}: the split column says '{value}'; expected train, val or test")
    return found


def _picture(path: Path, source: str, value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    file = path.parent / str(value)
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{source}: the picture {file} cannot be read: {error.strerror}") from None


def _columns(names: Sequence[str], columns: dict[str, list[Any]]) -> tuple[tuple[Column, ...], tuple[str, ...]]:
    """What kind each column is; constant ones and texts that all differ teach nothing."""
    kept: list[Column] = []
    notes: list[str] = []
    for name in names:
        values = [value for value in columns[name] if value is not None]
        different = len(set(map(str, values)))
        number = bool(values) and all(isinstance(value, int | float) for value in values)
        if different < 2:
            notes.append(f"column '{name}' is left out: it always says the same")
        elif not number and different > MOST_VALUES:
            notes.append(f"column '{name}' is left out: it has {different} values (ids, times or texts?)")
        else:
            kept.append(Column(name, "number" if number else "category"))
    return tuple(kept), tuple(notes)


def _values(column: Column, values: Sequence[Any]) -> list[Value]:
    if column.kind == "category":
        return [None if value is None else str(value) for value in values]
    return [None if value is None or math.isnan(float(value)) else float(value) for value in values]
