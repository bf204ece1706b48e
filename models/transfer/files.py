"""Examples in a CSV or Parquet file: a row each."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.transfer.data import PARTS, Column, DataError, Dataset, Kind, Raw, Value

# A category with more values than that says too little about each.
MOST_VALUES = 200
# The model takes numbers of 32 bits.
LARGEST = 3.4e38


@dataclass(frozen=True, slots=True)
class Roles:
    """What the columns of a file are for, by name; those that are not named are measurements."""

    label: str = ""
    text: str = ""
    image: str = ""
    split: str = ""
    leave_out: tuple[str, ...] = ()

    @property
    def kind(self) -> Kind:
        return "text" if self.text else "images" if self.image else "table"


@dataclass(frozen=True, slots=True)
class _Table:
    """A file's columns, by name, and what they hold by the file's own account ("string", "int64")."""

    path: Path
    columns: Mapping[str, list[Any]]
    types: Mapping[str, str]

    def check(self, wanted: Iterable[str], why: str = "") -> None:
        """Raises `DataError` for a column that is not there."""
        names = list(self.columns)
        for name in filter(None, wanted):
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(names)}"
                raise DataError(f"{self.path}: has no column '{name}'{why}; {hint}")

    def sources(self) -> list[str]:
        """What to call each row."""
        return [f"{self.path.name}, row {row + 1}" for row in range(len(next(iter(self.columns.values()))))]


def read_file(path: Path, roles: Roles) -> Raw:
    """All rows. Raises `DataError`."""
    table = _read(path, {})
    labels = _labels(table, roles)
    table.check((roles.text, roles.image, roles.split, *roles.leave_out))
    parts = [_part(path, value) for value in table.columns[roles.split]] if roles.split else [""] * len(labels)
    if roles.kind != "table":
        return Raw(roles.kind, _rows(table, _contents(table, roles), labels, parts), types=table.types)
    used = [name for name in table.columns if name not in (roles.label, roles.split, *roles.leave_out)]
    kept, notes = _columns(used, table.columns)
    if not kept:
        raise DataError(f"{path}: no column is left to learn from")
    return Raw("table", _rows(table, _measurements(table, kept), labels, parts), kept, notes, table.types)


def read_file_like(path: Path, roles: Roles, like: Dataset) -> Raw:
    """All rows of a second file, as those of the first were read: the same columns in the same order, by name, and of
    the same kinds; other columns are passed over. Raises `DataError`."""
    table = _read(path, like.types)
    labels = _labels(table, roles, like.types)
    if roles.kind != "table" or like.kind != "table":
        table.check((roles.text, roles.image))
        return Raw(roles.kind, _rows(table, _contents(table, roles), labels, [""] * len(labels)))
    table.check((column.name for column in like.columns), ", which the training data has")
    return Raw("table", _rows(table, _measurements(table, like.columns), labels, [""] * len(labels)), like.columns)


def _read(path: Path, known: Mapping[str, str]) -> _Table:
    """A CSV or Parquet file. In a CSV file, what is a text in the types `known` stays one: 0123 is no number."""
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
            texts = {name: pa.string() for name, kind in known.items() if "string" in kind}
            convert = pyarrow.csv.ConvertOptions(column_types=texts)
            table = pyarrow.csv.read_csv(path, parse_options=quoted, convert_options=convert)
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    names = [name for name in table.column_names if not name.startswith("__index_level_")]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(f"{path}: has several columns '{twice[0]}'; give each a name of its own")
    if table.num_rows == 0:
        raise DataError(f"{path}: has no rows")
    types = {name: str(table.schema.field(name).type) for name in names}
    return _Table(path, {name: table[name].to_pylist() for name in names}, types)


def _labels(table: _Table, roles: Roles, known: Mapping[str, str] | None = None) -> list[str]:
    """The name of each row's class, written as in a file of the types `known`."""
    if not roles.label:
        names = ", ".join(table.columns)
        raise DataError(f"{table.path}: which column has the labels? Say so with --label; there are {names}")
    table.check((roles.label,))
    labels = table.columns[roles.label]
    missing = [number for number, value in enumerate(labels) if value is None or value != value or value == ""]
    if missing:
        raise DataError(f"{table.path}: row {missing[0] + 1} has no label ({len(missing)} rows have none); remove them")
    fractions = (known or {}).get(roles.label) in ("float", "double")
    return [str(float(value)) if fractions and isinstance(value, int) else str(value) for value in labels]


def _part(path: Path, value: object) -> str:
    found = PARTS.get(str(value).lower())
    if found is None:
        raise DataError(f"{path}: the split column says '{value}'; expected train, val or test")
    return found


def _contents(table: _Table, roles: Roles) -> Sequence[bytes | str | tuple[Value, ...]]:
    """The texts or the pictures; of a table, which is of another kind than was expected, nothing."""
    if roles.text:
        return ["" if value is None else str(value) for value in table.columns[roles.text]]
    if roles.image:
        values = table.columns[roles.image]
        return [_picture(table.path, source, value) for source, value in zip(table.sources(), values, strict=True)]
    return [()] * len(table.sources())


def _picture(path: Path, source: str, value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    file = path.parent / str(value)
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{source}: the picture {file} cannot be read: {error.strerror}") from None


def _rows(
    table: _Table,
    contents: Sequence[bytes | str | tuple[Value, ...]],
    labels: Sequence[str],
    parts: Sequence[str],
) -> list[tuple[str, bytes | str | tuple[Value, ...], str, str]]:
    return list(zip(table.sources(), contents, labels, parts, strict=True))


def _columns(names: Sequence[str], columns: Mapping[str, list[Any]]) -> tuple[tuple[Column, ...], tuple[str, ...]]:
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


def _measurements(table: _Table, columns: Sequence[Column]) -> list[tuple[Value, ...]]:
    return list(zip(*(_values(table, column) for column in columns), strict=True))


def _values(table: _Table, column: Column) -> list[Value]:
    values = table.columns[column.name]
    if column.kind == "category":
        return [None if value is None else str(value) for value in values]
    return [_number(table, column, row, value) for row, value in enumerate(values)]


def _number(table: _Table, column: Column, row: int, value: object) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float):
        raise DataError(
            f"{table.path}: row {row + 1} has '{value}' in column '{column.name}', which has numbers in the training "
            "data; expected a number, or nothing"
        )
    if abs(value) > LARGEST:
        raise DataError(
            f"{table.path}: row {row + 1} has {value} in column '{column.name}'; expected a number of 32 bits, or "
            "nothing where it is not known"
        )
    return None if math.isnan(value) else float(value)
