"""Reading examples: from folders, or from a CSV or Parquet file.

A directory has one folder per class (of pictures, or of .txt files), or `train/` and `test/` with such folders. A CSV
or Parquet file has a column of labels, and a column of texts, a column of pictures (encoded, or paths beside the file),
or columns of numbers and categories. What is wrong with the data is a `DataError` that says where and what to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from models.transfer.data import DataError, Dataset, Example, Raw, digest_of
from models.transfer.files import Roles, read_file, read_file_like
from models.transfer.folders import read_directory

# A class with fewer examples can be neither cross-validated nor tested.
LEAST_PER_CLASS = 4
MOST_CLASSES = 1000
# Unreadable pictures that are left out with a warning; more means that something is wrong with all of them.
UNREADABLE_SHARE = 0.02

_SHOWN = {"images": "pictures", "text": "texts", "table": "rows of a table"}


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
    roles = Roles(label, text, image, split_column, tuple(leave_out))
    raw = read_file(path, roles) if _is_file(path) else read_directory(path)
    classes = _classes(raw, path)
    examples, notes = _examples(raw, path, classes)
    made = [
        Dataset(raw.kind, classes, examples[part], raw.columns, (*raw.notes, *notes), raw.types)
        for part in ("train", "test")
    ]
    return made[0], made[1] if made[1].examples else None


def read_test(path: Path, like: Dataset, label: str = "", text: str = "", image: str = "") -> Dataset:
    """Everything in `path` as test data for what is learned from `like`: with its classes, and the columns it has, by
    name, whatever else there is. Raises `DataError`."""
    roles = Roles(label, text, image)
    raw = read_file_like(path, roles, like) if _is_file(path) else read_directory(path)
    if raw.kind != like.kind:
        raise DataError(
            f"{path}: holds {_SHOWN[raw.kind]}, and the training data {_SHOWN[like.kind]}; test with the same kind"
        )
    examples, notes = _examples(raw, path, like.classes)
    tested = [example for part in examples.values() for example in part]
    if not tested:
        raise DataError(f"{path}: none of its pictures can be read; there is nothing to test with")
    return Dataset(like.kind, like.classes, tested, like.columns, (*raw.notes, *notes), like.types)


def _is_file(path: Path) -> bool:
    """False: a directory."""
    if not path.exists():
        raise DataError(f"{path}: no such file or directory")
    if not path.is_dir() and path.suffix.lower() not in (".csv", ".parquet"):
        raise DataError(f"{path}: expected a directory with a folder for each class, a .csv or a .parquet file")
    return not path.is_dir()


def _classes(raw: Raw, path: Path) -> tuple[str, ...]:
    """Those that there is something of to learn from, in order."""
    counts = Counter(name for _, _, name, part in raw.rows if part != "test")
    classes = tuple(sorted(counts))
    if len(classes) < 2:
        only = f"only '{classes[0]}'" if classes else "none"
        raise DataError(f"{path}: a choice needs two classes at least, and there is {only}")
    if len(classes) > MOST_CLASSES:
        raise DataError(
            f"{path}: {len(classes)} classes, at most {MOST_CLASSES}; is the label a number to be predicted?"
        )
    broken = [name for name in classes if name.splitlines() != [name]]
    if broken:
        raise DataError(f"{path}: the class {broken[0]!r} has a line break in its name; labels are lines, so rename it")
    few = [f"'{name}' ({count})" for name, count in sorted(counts.items()) if count < LEAST_PER_CLASS]
    if few:
        raise DataError(
            f"{path}: {', '.join(few[:5])}: fewer than {LEAST_PER_CLASS} examples; add some, or leave the class out"
        )
    return classes


def _examples(raw: Raw, path: Path, classes: Sequence[str]) -> tuple[Mapping[str, list[Example]], list[str]]:
    """The examples of training and of test, and what was left out."""
    numbers = {name: number for number, name in enumerate(classes)}
    parts: dict[str, list[Example]] = {"train": [], "test": []}
    unreadable: list[str] = []
    for source, content, name, part in raw.rows:
        if name not in numbers:
            raise DataError(f"{path}: the test data has the class '{name}', which the training data has not")
        digest = digest_of(content, raw.kind)
        if not digest:
            unreadable.append(source)
            continue
        parts["test" if part == "test" else "train"].append(Example(source, content, numbers[name], digest))
    if not unreadable:
        return parts, []
    shown = ", ".join(unreadable[:3])
    if len(unreadable) > max(1, UNREADABLE_SHARE * len(raw.rows)):
        raise DataError(f"{path}: {len(unreadable)} of {len(raw.rows)} pictures cannot be read: {shown}, ...")
    return parts, [f"{len(unreadable)} pictures cannot be read and are left out: {shown}"]
