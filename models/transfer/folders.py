"""Examples in folders: one for each class, of pictures or of .txt files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from models.transfer.data import DataError, Kind, Raw, Value

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
TEXTS = (".txt",)
# A picture, a text: beyond that it is something else.
MOST_BYTES = 64 << 20


def read_directory(path: Path) -> Raw:
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
