"""API keys: who may call what.

A TOML file names each key by its SHA-256, so that reading the file gives nobody a key:

    [[key]]
    name = "checkout"
    sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    groups = ["inference", "metadata"]
    models = ["fraud", "fraud-*"]

    [anonymous]
    groups = ["health"]

Promise: what is not listed is denied. A key is a long random text (`new_key`), which a plain hash protects as well as a
slow one would; passwords of people are not meant.
"""

from __future__ import annotations

import difflib
import enum
import hashlib
import json
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from service.errors import ConfigError

# Beyond that it is a directory of users, which belongs elsewhere.
MAX_KEYS = 10_000
MAX_FILE_BYTES = 4 << 20
# Decisions that are remembered for each caller; there are as many as models, unless names are made up.
_MAX_REMEMBERED = 4096
# 256 bits: as many as the digest has.
_KEY_BYTES = 32
_PREFIX = "onclock_"


class Group(enum.StrEnum):
    """What belongs together of all that can be called. `docs/security.md` has the methods of each."""

    HEALTH = "health"
    METADATA = "metadata"
    INFERENCE = "inference"
    REPOSITORY = "repository"
    SHARED_MEMORY = "shared_memory"
    SETTINGS = "settings"
    METRICS = "metrics"


# Groups whose calls name a model.
OF_MODELS = frozenset({Group.METADATA, Group.INFERENCE, Group.REPOSITORY})
# Whoever shows no key may ask whether the server lives and is ready: probes and load balancers have none.
DEFAULT_ANONYMOUS = frozenset({Group.HEALTH})


@dataclass(slots=True)
class Caller:
    """Whoever has a key. `models` are patterns (`*`, `?`); a call that names no model concerns all of them."""

    name: str
    groups: frozenset[Group]
    models: tuple[str, ...] = ()
    _remembered: dict[str, bool] = field(default_factory=dict, repr=False, compare=False)

    def may(self, group: Group) -> bool:
        """Whether calls of a group are allowed at all."""
        return group in self.groups

    def reaches(self, model: str) -> bool:
        """Whether calls may be about `model` ("": about all)."""
        known = self._remembered.get(model)
        if known is None:
            known = "*" in self.models if not model else any(fnmatchcase(model, pattern) for pattern in self.models)
            if len(self._remembered) >= _MAX_REMEMBERED:
                self._remembered.clear()
            self._remembered[model] = known
        return known


@dataclass(frozen=True, slots=True)
class Keys:
    """SHA-256 digest (32 bytes) of each key -> who has it; and whoever shows none."""

    callers: Mapping[bytes, Caller]
    anonymous: Caller


def new_key() -> str:
    """A key that nobody else has."""
    return _PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def digest_of(key: str) -> bytes:
    """What a key is known by."""
    return hashlib.sha256(key.encode()).digest()


def parse_keys(text: str) -> Keys:
    """The keys of a file. Raises `ConfigError`, which names the entry."""
    try:
        given = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError("api keys", f"not TOML: {error}") from None
    _known(given, {"key", "anonymous"}, "api keys")
    entries = given.get("key", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError("key", "expected [[key]] tables")
    if len(entries) > MAX_KEYS:
        raise ConfigError("key", f"{len(entries)} keys, at most {MAX_KEYS}")
    callers: dict[bytes, Caller] = {}
    for number, entry in enumerate(entries):
        path = f"key[{number}]"
        _known(entry, {"name", "sha256", "groups", "models"}, path)
        caller = _caller(entry, path, _text(entry, "name", path))
        digest = _digest(entry, path)
        if digest in callers:
            raise ConfigError(f"{path}.sha256", f"is that of '{callers[digest].name}' already")
        callers[digest] = caller
    nobody = given.get("anonymous", {"groups": [group.value for group in DEFAULT_ANONYMOUS]})
    if not isinstance(nobody, dict):
        raise ConfigError("anonymous", "expected a table")
    _known(nobody, {"groups", "models"}, "anonymous")
    return Keys(callers, _caller(nobody, "anonymous", "anonymous"))


def entry_text(name: str, key: str, groups: tuple[Group, ...], models: tuple[str, ...]) -> str:
    """What a file says of a key."""
    lines = ["[[key]]", f"name = {_quoted(name)}", f'sha256 = "{digest_of(key).hex()}"']
    lines.append(f"groups = [{', '.join(_quoted(group.value) for group in groups)}]")
    if models:
        lines.append(f"models = [{', '.join(map(_quoted, models))}]")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    # JSON's texts are TOML's basic strings, but for one character, which TOML wants escaped as well.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _caller(entry: Mapping[str, Any], path: str, name: str) -> Caller:
    groups = frozenset(_group(text, path) for text in _texts(entry, "groups", path))
    if "groups" not in entry:
        raise ConfigError(f"{path}.groups", f"missing; expected a list of {', '.join(Group)}")
    models = _texts(entry, "models", path)
    if groups & OF_MODELS and "models" not in entry:
        raise ConfigError(f"{path}.models", 'missing; expected a list of models, such as ["fraud-*"], or ["*"] for all')
    return Caller(name, groups, models)


def _known(entry: Mapping[str, Any], names: set[str], path: str) -> None:
    for name in entry:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"expected {', '.join(sorted(names))}"
            raise ConfigError(path, f"unknown '{name}'; {hint}")


def _text(entry: Mapping[str, Any], name: str, path: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{path}.{name}", "expected a text")
    return value


def _texts(entry: Mapping[str, Any], name: str, path: str) -> tuple[str, ...]:
    value = entry.get(name, [])
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise ConfigError(f"{path}.{name}", "expected a list of texts")
    return tuple(value)


def _group(text: str, path: str) -> Group:
    try:
        return Group(text)
    except ValueError:
        close = difflib.get_close_matches(text, list(Group), n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"expected {', '.join(Group)}"
        raise ConfigError(f"{path}.groups", f"unknown group '{text}'; {hint}") from None


def _digest(entry: Mapping[str, Any], path: str) -> bytes:
    text = _text(entry, "sha256", path)
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise ConfigError(f"{path}.sha256", "expected 64 hexadecimal digits: the SHA-256 of the key ('onclock key')")
    return digest
