"""Examples in folders: one for each class, of pictures or of .txt files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from models.transfer.data import PARTS, DataError, Kind, Raw, Value

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
TEXTS = (".txt",)
# A picture, a text: beyond that it is something else.
MOST_BYTES = 64 << 20


def read_directory(path: Path) -> Raw:
    """All pictures or texts below `path`, in the parts that it has. Raises `DataError`."""
    rows: list[tuple[str, bytes | str | tuple[Value, ...], str, str]] = []
    kinds: set[Kind] = set()
    passed_over: list[Path] = []
    empty: list[Path] = []
    for part, home in _homes(path):
        for folder in _folders(home):
            files, others = _files(folder)
            passed_over += others
            empty += [] if files else [folder]
            kinds |= {"images" if file.suffix.lower() in PICTURES else "text" for file in files}
            rows += [(str(file.relative_to(path)), file.read_bytes(), folder.name, part) for file in files]
    if not rows:
        raise DataError(
            f"{path}: no pictures or .txt files in folders{_counted(passed_over)}; expected {path}/CLASS/PICTURE.jpg"
        )
    if empty:
        there = _counted(file for file in passed_over if empty[0] in file.parents)
        raise DataError(
            f"{empty[0]}: holds no picture and no .txt file{there}; "
            f"expected {', '.join(PICTURES)} or .txt, so convert what is there, or remove the folder"
        )
    if len(kinds) > 1:
        raise DataError(f"{path}: holds pictures and texts; keep one kind in a data set")
    kind = kinds.pop()
    if kind == "text":
        rows = [(source, _decoded_text(source, content), label, part) for source, content, label, part in rows]
    return Raw(kind, rows, notes=_notes(path, passed_over))


def _homes(path: Path) -> list[tuple[str, Path]]:
    """The parts, and where the folders of their classes are."""
    folders = _folders(path)
    parts = [folder for folder in folders if folder.name.lower() in PARTS]
    others = [folder.name for folder in folders if folder not in parts]
    if not any(folder.name.lower() == "train" for folder in parts):
        if parts and not others:
            names = ", ".join(f"{folder.name}/" for folder in parts)
            raise DataError(f"{path}: has {names} and no train/; name the folder that holds those of the classes")
        return [("", path)]
    if others:
        raise DataError(
            f"{path}: has train/, so its folders are parts (train, val, test), and '{others[0]}' is none; move the "
            f"folders of all classes, one called 'train' as well, into {path}/train/"
        )
    return [(PARTS[folder.name.lower()], folder) for folder in parts]


def _folders(home: Path) -> list[Path]:
    return sorted(entry for entry in home.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _files(folder: Path) -> tuple[list[Path], list[Path]]:
    """What can be read in a folder and below, and what cannot."""
    usable: list[Path] = []
    others: list[Path] = []
    for file in sorted(folder.rglob("*")):
        if file.is_dir() or any(name.startswith(".") for name in file.relative_to(folder).parts):
            continue
        if file.suffix.lower() not in PICTURES + TEXTS or not file.is_file():
            others.append(file)
            continue
        if file.stat().st_size > MOST_BYTES:
            raise DataError(f"{file}: has {file.stat().st_size >> 20} MB; at most {MOST_BYTES >> 20}")
        usable.append(file)
    return usable, others


def _notes(path: Path, passed_over: list[Path]) -> tuple[str, ...]:
    """What of the directory is not among the examples."""
    notes = []
    if passed_over:
        known = ", ".join((*PICTURES, *TEXTS))
        notes.append(f"{len(passed_over)} files are left out{_counted(passed_over)}; read are {known}")
    loose = [
        str(file.relative_to(path))
        for _, home in _homes(path)
        for file in sorted(home.iterdir())
        if file.is_file() and file.suffix.lower() in PICTURES + TEXTS and not file.name.startswith(".")
    ]
    if loose:
        notes.append(f"{len(loose)} files that are in no class's folder are left out: {', '.join(loose[:3])}")
    return tuple(notes)


def _counted(files: Iterable[Path]) -> str:
    """How many there are of which kind, in brackets; nothing of nothing."""
    kinds = Counter(file.suffix.lower() or "without a suffix" for file in files)
    said = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f" ({said})" if said else ""


def _decoded_text(source: str, content: object) -> str:
    assert isinstance(content, bytes)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{source}: is not UTF-8 text") from None
