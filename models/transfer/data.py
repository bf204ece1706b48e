"""Examples to learn from: pictures, texts or rows of a table, each with a label. `reading` reads them.

What is wrong with the data is a `DataError` that says where and what to do.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Kind = Literal["images", "text", "table"]
Value = float | str | None

# What parts of the data may be called, and which part they are: validation data is learned from, by cross-validation.
PARTS = {"train": "train", "val": "train", "valid": "train", "validation": "train", "test": "test"}
# A picture: beyond that it is something else.
MOST_PIXELS = 100_000_000


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
    """Examples of one kind; `classes[label]` is a label's name. `notes` say what was left out. `types` are those of all
    columns of the file, so that another file can be read alike."""

    kind: Kind
    classes: tuple[str, ...]
    examples: list[Example]
    columns: tuple[Column, ...] = ()
    notes: tuple[str, ...] = ()
    types: Mapping[str, str] = field(default_factory=dict)

    def part(self, examples: list[Example]) -> Dataset:
        """The same with other examples."""
        return replace(self, examples=examples)


@dataclass(slots=True)
class Raw:
    """What was read, before labels are numbers: the part ("train", "test" or "") of each example, too."""

    kind: Kind
    rows: list[tuple[str, bytes | str | tuple[Value, ...], str, str]]
    columns: tuple[Column, ...] = ()
    notes: tuple[str, ...] = ()
    types: Mapping[str, str] = field(default_factory=dict)


def digest_of(content: bytes | str | tuple[Value, ...], kind: Kind) -> str:
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
