"""What a client gives `RepositoryModelLoad` instead of the files of the repository: a configuration, and model files.

    config                  a `ModelConfig` as JSON
    file:<version>/<path>   the contents of a file, with `config`: the model is then made of these files alone

Files are kept in a private directory until the model is unloaded or loaded without them. Nothing is written outside it.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from google.protobuf import json_format

from service.errors import InvalidRequest
from service.pb.model_config_pb2 import ModelConfig

FILE = "file:"
# A version and a file name or two, such as `1/model.onnx` or `1/model.onnx/weights.bin`.
_PATH = re.compile(r"[1-9][0-9]{0,17}(/[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}){1,3}")
# A model has a handful of files; more are somebody filling the disk.
MAX_FILES = 1000


@dataclass(frozen=True, slots=True)
class Overrides:
    """`config` instead of the model's own; `files`, if any, instead of all of its files. `digest` tells them apart."""

    config: ModelConfig | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    digest: str = ""


NONE = Overrides()


def parse(name: str, texts: Mapping[str, str], blobs: Mapping[str, bytes]) -> Overrides:
    """The overrides among the parameters of a load: those of type string and of type bytes. Raises `InvalidRequest`."""
    for key in texts:
        if key != "config":
            raise InvalidRequest(
                f"unrecognized load parameter '{key[:60]}' for model '{name}'; known: config, {FILE}PATH"
            )
    for key in blobs:
        if not key.startswith(FILE):
            raise InvalidRequest(f"unrecognized load parameter '{key[:60]}' of type bytes for model '{name}'")
        if not _PATH.fullmatch(key.removeprefix(FILE)):
            raise InvalidRequest(
                f"load parameter '{key[:60]}' for model '{name}': expected {FILE}VERSION/NAME, as {FILE}1/model.onnx"
            )
    if blobs and "config" not in texts:
        raise InvalidRequest(f"load parameter 'config' must be given with files for model '{name}'")
    if len(blobs) > MAX_FILES:
        raise InvalidRequest(f"{len(blobs)} files are given for model '{name}', at most {MAX_FILES} are taken")
    if "config" not in texts:
        return NONE
    try:
        config = json_format.Parse(texts["config"], ModelConfig())
    except json_format.ParseError as error:
        raise InvalidRequest(f"load parameter 'config' for model '{name}' is no ModelConfig: {error}") from None
    if config.name and config.name != name:
        raise InvalidRequest(f"load parameter 'config' is for model '{config.name}', not for '{name}'")
    digest = sha256(texts["config"].encode())
    for key in sorted(blobs):
        digest.update(key.encode() + b"\0" + sha256(blobs[key]).digest())
    return Overrides(config, {key.removeprefix(FILE): value for key, value in blobs.items()}, digest.hexdigest())


class OverrideFiles:
    """The private directory with the files of models that were loaded from clients' bytes."""

    def __init__(self) -> None:
        self._root: Path | None = None
        self._kept: dict[str, Path] = {}

    def write(self, name: str, files: Mapping[str, bytes]) -> Path:
        """Write the files of a model; its directory. Raises `OSError`."""
        if self._root is None:
            self._root = Path(tempfile.mkdtemp(prefix="onclock-models-"))
        parent = Path(tempfile.mkdtemp(dir=self._root))
        directory = parent / name
        for path, content in files.items():
            target = directory / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        return directory

    def keep(self, name: str, directory: Path | None) -> None:
        """From now on the model's files are those in `directory` (None: not of ours); earlier ones are removed."""
        old = self._kept.pop(name, None)
        if old is not None and old != directory:
            self.remove(old)
        if directory is not None:
            self._kept[name] = directory

    def remove(self, directory: Path) -> None:
        """Remove what `write` made."""
        shutil.rmtree(directory.parent, ignore_errors=True)

    def close(self) -> None:
        """Remove everything."""
        if self._root is not None:
            shutil.rmtree(self._root, ignore_errors=True)
