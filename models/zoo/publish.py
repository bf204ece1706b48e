"""Put a finished model into a model repository so that a running server never sees half of it.

`publish` writes everything into a hidden directory beside the target and renames it into place. What was published
under that name before is moved aside first and removed last.

`publish_version` adds to what is there. One configuration, one file of labels and one card serve all versions of a
model, so only what agrees with them becomes the next version; `check_publishable` says so before it is made.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from service.config.pbtxt import CONFIG_FILENAME, parse_text, read_config
from service.errors import ConfigError
from service.pb.model_config_pb2 import ModelConfig

# Every recipe makes a first version; later versions are the user's own.
VERSION = "1"
LABELS = "labels.txt"
PROVENANCE = "provenance.json"


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
            (fresh / name).write_bytes(_encoded(content))
        if entry.config is not None:
            (fresh / "config.pbtxt").write_text(entry.config, encoding="utf-8")
        if target.exists():
            shutil.move(target, Path(scratch) / "former")
        fresh.rename(target)
    return target


def check_publishable(entry: Entry, repository: Path) -> None:
    """Raises `PublishError` unless `entry` can be the next version of its model (or the first of a new one).

    It need not be finished: the configuration, `labels.txt`, and what the `provenance.json` of the version says of the
    `preparation` (what clients have to send) are compared; another latency objective is no difference.
    """
    target = repository / entry.name
    if not target.exists():
        return
    advice = "publish under another name, or remove it"
    versions = _versions(target)
    labels = target / LABELS
    if not versions or not labels.is_file() or not all((path / PROVENANCE).is_file() for path in versions):
        raise PublishError(
            f"{target}: was not made by transfer learning, as it has no {LABELS}, or a version without {PROVENANCE}; "
            f"{advice}"
        )
    if labels.read_bytes() != _encoded(entry.files.get(LABELS, "")):
        raise PublishError(f"{target}: is a model of other classes; {advice}")
    others = _differences(target / CONFIG_FILENAME, entry.config)
    if others:
        raise PublishError(
            f"{target}: its configuration, which is that of all versions, says otherwise about {', '.join(others)}; "
            f"{advice}"
        )
    there = _preparation((versions[-1] / PROVENANCE).read_bytes())
    if there not in (None, _preparation(entry.version_files.get(PROVENANCE, b"{}"))):
        raise PublishError(f"{target}: its clients send other data ({there}); {advice}")


def publish_version(entry: Entry, repository: Path) -> Path:
    """Add `entry` as the next version of its model, whose other versions stay; returns the version's directory.

    The version appears in one step; the files beside the versions are replaced one by one after it. Raises `OSError`,
    and `PublishError` as `check_publishable`.
    """
    check_publishable(entry, repository)
    target = repository / entry.name
    if not target.exists():
        return publish(entry, repository) / VERSION
    number = int(_versions(target)[-1].name) + 1
    with tempfile.TemporaryDirectory(prefix=".publishing-", dir=target) as scratch:
        fresh = Path(scratch) / "fresh"
        fresh.mkdir()
        for name, data in entry.version_files.items():
            (fresh / name).write_bytes(data)
        beside = dict(entry.files)
        if entry.config is not None:
            beside[CONFIG_FILENAME] = entry.config
        for name, content in beside.items():
            aside = Path(scratch) / Path(name).name
            aside.write_bytes(_encoded(content))
        fresh.rename(target / str(number))
        for name in beside:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(scratch) / Path(name).name).replace(target / name)
    return target / str(number)


def _encoded(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


def _versions(target: Path) -> list[Path]:
    """The directories of a model's versions, in order."""
    if not target.is_dir():
        return []
    return sorted((p for p in target.iterdir() if p.is_dir() and p.name.isdecimal()), key=lambda path: int(path.name))


def _differences(path: Path, config: str | None) -> list[str]:
    """What the configuration file at `path` says otherwise than `config`."""
    try:
        theirs = read_config(path) or ModelConfig()
        ours = parse_text(config or "")
    except ConfigError as error:
        raise PublishError(str(error)) from None
    keys = sorted({*theirs.parameters, *ours.parameters} - {"latency_slo_ms"})
    changed = [key for key in keys if _parameter(theirs, key) != _parameter(ours, key)]
    fields = [{field.name: value for field, value in one.ListFields()} for one in (theirs, ours)]
    names = sorted({*fields[0], *fields[1]} - {"parameters"})
    return [*(name for name in names if fields[0].get(name) != fields[1].get(name)), *changed]


def _parameter(config: ModelConfig, key: str) -> str | None:
    return str(config.parameters[key].string_value) if key in config.parameters else None


def _preparation(provenance: bytes) -> str | None:
    try:
        said = json.loads(provenance)
    except ValueError:
        return None
    found = said.get("preparation") if isinstance(said, dict) else None
    return found if isinstance(found, str) else None
