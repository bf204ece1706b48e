"""Put a finished model into a model repository so that a running server never sees half of it.

`publish` writes everything into a hidden directory beside the target and renames it into place. What was published
under that name before is moved aside first and removed last.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# Every recipe makes a first version; later versions are the user's own.
VERSION = "1"


class PublishError(Exception):
    """What is there already does not go together with what is to be published."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A model as it lies in a repository.

    `config` is the text of `config.pbtxt`, or None where the server shall read everything from the model. `files` go
    beside it (labels, the card, `initial_state/...`); `version_files` into the version's directory:
    `model.onnx` and its external data.
    """

    name: str
    config: str | None
    files: Mapping[str, str | bytes]
    version_files: Mapping[str, bytes]


def publish(entry: Entry, repository: Path) -> Path:
    """Write `entry` as `<repository>/<name>/`; returns that directory. Raises `OSError` if it cannot be written."""
    repository.mkdir(parents=True, exist_ok=True)
    target = repository / entry.name
    # In the repository itself, as a rename is one step only within a file system; hidden, as it is not a model yet.
    with tempfile.TemporaryDirectory(prefix=".publishing-", dir=repository) as scratch:
        fresh = Path(scratch) / "fresh"
        (fresh / VERSION).mkdir(parents=True)
        for name, data in entry.version_files.items():
            (fresh / VERSION / name).write_bytes(data)
        for name, content in entry.files.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).write_bytes(content.encode() if isinstance(content, str) else content)
        if entry.config is not None:
            (fresh / "config.pbtxt").write_text(entry.config, encoding="utf-8")
        if target.exists():
            shutil.move(target, Path(scratch) / "former")
        fresh.rename(target)
    return target


def publish_version(entry: Entry, repository: Path) -> Path:
    """Add `entry` as the next version of its model, whose other versions stay; returns the version's directory.

    The version appears in one step; the files beside the versions are replaced one by one after it. Raises `OSError`,
    and `PublishError` if the model there has other labels: they are those of all its versions.
    """
    target = repository / entry.name
    if not target.exists():
        return publish(entry, repository) / VERSION
    labels = target / "labels.txt"
    if (
        "labels.txt" in entry.files
        and labels.exists()
        and labels.read_text(encoding="utf-8") != entry.files["labels.txt"]
    ):
        raise PublishError(f"{target}: is a model of other classes; publish under another name, or remove it")
    numbers = [int(path.name) for path in target.iterdir() if path.is_dir() and path.name.isdecimal()]
    number = max(numbers, default=0) + 1
    with tempfile.TemporaryDirectory(prefix=".publishing-", dir=target) as scratch:
        fresh = Path(scratch) / "fresh"
        fresh.mkdir()
        for name, data in entry.version_files.items():
            (fresh / name).write_bytes(data)
        beside = dict(entry.files)
        if entry.config is not None:
            beside["config.pbtxt"] = entry.config
        for name, content in beside.items():
            aside = Path(scratch) / Path(name).name
            aside.write_bytes(content.encode() if isinstance(content, str) else content)
        fresh.rename(target / str(number))
        for name in beside:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(scratch) / Path(name).name).replace(target / name)
    return target / str(number)
