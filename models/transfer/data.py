"""Examples to learn from: pictures, texts or rows of a table, each with a label.

A directory has one folder per class (of pictures, or of .txt files), or `train/` and `test/` with such folders. A CSV
or Parquet file has a column of labels, and a column of texts, a column of pictures (encoded, or paths beside the file),
or columns of numbers and categories. What is wrong with the data is a `DataError` that says where and what to do.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["images", "text", "table"]
Value = float | str | None

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
TEXTS = (".txt",)
# A class with fewer examples can be neither cross-validated nor tested.
LEAST_PER_CLASS = 4
MOST_CLASSES = 1000
# A picture, a text: beyond that it is something else.
MOST_BYTES = 64 << 20
MOST_PIXELS = 100_000_000
# Unreadable pictures that are left out with a warning; more means that something is wrong with all of them.
UNREADABLE_SHARE = 0.02
# A category with more values than that says too little about each.
MOST_VALUES = 200


class DataError(Exception):
    """The data cannot be learned from. The message says where the fault is, and what to do."""


@dataclass(frozen=True, slots=True)
class Example:
    """`content` is an encoded picture, a text, or the values of the columns (None: missing). Two examples with one
    `digest` show the same."""

    source: str
    content: bytes | str | tuple[Value, ...]
    label: int
    digest: str


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table."""

    name: str
    kind: Literal["number", "category"]


@dataclass(slots=True)
class Dataset:
    """Examples of one kind; `classes[label]` is a label's name. `notes` say what was left out."""

    kind: Kind
    classes: tuple[str, ...]
    examples: list[Example]
    columns: tuple[Column, ...] = ()
    notes: tuple[str, ...] = ()

    def part(self, examples: list[Example]) -> Dataset:
        """The same with other examples."""
        return Dataset(self.kind, self.classes, examples, self.columns, self.notes)


@dataclass(slots=True)
class Raw:
    """What was read, before labels are numbers: the part ("train", "test" or "") of each example, too."""

    kind: Kind
    rows: list[tuple[str, bytes | str | tuple[Value, ...], str, str]]
    columns: tuple[Column, ...] = ()
    notes: tuple[str, ...] = ()


def read(
    path: Path,
    label: str = "",
    text: str = "",
    image: str = "",
    split_column: str = "",
    leave_out: Sequence[str] = (),
) -> tuple[Dataset, Dataset | None]:
    """Training and test data; no test data (None) where `path` does not tell them apart.

    `leave_out` are columns of a table to leave out. Raises `DataError`.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or directory")
    if path.is_dir():
        raw = _read_directory(path)
    elif path.suffix.lower() in (".csv", ".parquet"):
        raw = _read_file(path, label, text, image, split_column, leave_out)
    else:
        raise DataError(f"{path}: expected a directory with a folder for each class, a .csv or a .parquet file")
    return _numbered(raw, path)


def _numbered(raw: Raw, path: Path) -> tuple[Dataset, Dataset | None]:
    counts = Counter(name for _, _, name, part in raw.rows if part != "test")
    classes = tuple(sorted(counts))
    if len(classes) < 2:
        only = f"only '{classes[0]}'" if classes else "none"
        raise DataError(f"{path}: a choice needs two classes at least, and there is {only}")
    if len(classes) > MOST_CLASSES:
        raise DataError(
            f"{path}: {len(classes)} classes, at most {MOST_CLASSES}; is the label a number to be predicted?"
        )
    few = [f"'{name}' ({count})" for name, count in sorted(counts.items()) if count < LEAST_PER_CLASS]
    if few:
        raise DataError(
            f"{path}: {', '.join(few[:5])}: fewer than {LEAST_PER_CLASS} examples; add some, or leave the class out"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    parts: dict[str, list[Example]] = {"train": [], "test": []}
    notes = list(raw.notes)
    unreadable: list[str] = []
    for source, content, name, part in raw.rows:
        if name not in numbers:
            raise DataError(f"{path}: the test data has the class '{name}', which the training data has not")
        digest = _digest(content, raw.kind)
        if not digest:
            unreadable.append(source)
            continue
        parts["test" if part == "test" else "train"].append(Example(source, content, numbers[name], digest))
    if unreadable:
        shown = ", ".join(unreadable[:3])
        if len(unreadable) > max(1, UNREADABLE_SHARE * len(raw.rows)):
            raise DataError(f"{path}: {len(unreadable)} of {len(raw.rows)} pictures cannot be read: {shown}, ...")
        notes.append(f"{len(unreadable)} pictures cannot be read and are left out: {shown}")
    made = [Dataset(raw.kind, classes, parts[part], raw.columns, tuple(notes)) for part in ("train", "test")]
    return made[0], made[1] if made[1].examples else None


def _digest(content: bytes | str | tuple[Value, ...], kind: Kind) -> str:
    """What two examples that show the same have in common; empty for a picture that cannot be read."""
    if kind == "images":
        assert isinstance(content, bytes)
        picture = decoded(content)
        if picture is None:
            return ""
        return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()
    text = " ".join(content.split()) if isinstance(content, str) else repr(content)
    return hashlib.sha256(text.encode()).hexdigest()


def decoded(content: bytes) -> Any:
    """The picture (RGB, as it is to be looked at), or None."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content)) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                return None
            return ImageOps.exif_transpose(opened.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


# ----------------------------------------------------------------------------------------------------- directories --


def _read_directory(path: Path) -> Raw:
    parts = {name: path / name for name in ("train", "val", "test") if (path / name).is_dir()}
    homes = list(parts.items()) if "train" in parts else [("", path)]
    rows: list[tuple[str, bytes | str | tuple[Value, ...], str, str]] = []
    kinds: set[Kind] = set()
    for part, home in homes:
        for folder in sorted(d for d in home.iterdir() if d.is_dir() and not d.name.startswith(".")):
            for file in _files(folder):
                kinds.add("images" if file.suffix.lower() in PICTURES else "text")
                content = file.read_bytes()
                rows.append((str(file.relative_to(path)), content, folder.name, part))
    if not rows:
        raise DataError(f"{path}: no pictures or .txt files in folders; expected {path}/CLASS/PICTURE.jpg")
    if len(kinds) > 1:
        raise DataError(f"{path}: holds pictures and texts; keep one kind in a data set")
    kind = kinds.pop()
    if kind == "text":
        rows = [(source, _decoded_text(source, content), label, part) for source, content, label, part in rows]
    return Raw(kind, rows)


def _files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() not in PICTURES + TEXTS or not file.is_file() or file.name.startswith("."):
            continue
        if file.stat().st_size > MOST_BYTES:
            raise DataError(f"{file}: has {file.stat().st_size >> 20} MB; at most {MOST_BYTES >> 20}")
        yield file


def _decoded_text(source: str, content: object) -> str:
    assert isinstance(content, bytes)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{source}: is not UTF-8 text") from None


# ----------------------------------------------------------------------------------------------------------- files --


def _read_file(path: Path, label: str, text: str, image: str, split_column: str, leave_out: Sequence[str]) -> Raw:
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
