"""What lies in the model repositories, before anything is loaded.

The layout is Triton Inference Server's:

    REPOSITORY/MODEL/config.pbtxt          optional
    REPOSITORY/MODEL/VERSION/model.onnx    VERSION is a whole number above 0, or as default_model_filename says

Promise: scanning reads directories and configuration files and no model. Nothing that is found is passed over in
silence: it is a model (perhaps with an `error`), or there is a warning that says why it is none. Only dotfiles are
ignored, and files beside the models of a repository (a README, labels).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from service.config.build import build_version_policy
from service.config.complete import model_filename
from service.config.graph import model_file
from service.config.heads import backbone_of
from service.config.model import SERVE_NEWEST, BackboneReference, VersionPolicy
from service.config.pbtxt import CONFIG_FILENAME, read_config
from service.errors import ConfigError, ModelLoadError
from service.pb.model_config_pb2 import ModelConfig

# Names travel in metric labels, file names and logs, and clients write them by hand.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+:@-]{0,254}")
_VERSION = re.compile(r"[1-9][0-9]{0,17}")  # fits the protocol's signed 64 bits
_NUMERIC = re.compile(r"[0-9]+")

# What the directories of a model hold besides its versions, by common use.
_NO_VERSIONS = frozenset({"warmup", "initial_state", "configs"})


@dataclass(frozen=True, slots=True)
class VersionFiles:
    """One version on disk. `model_path` is the ONNX file, or the directory that holds `model.onnx`."""

    version: int
    directory: Path
    model_path: Path


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """One model on disk. `config` is its file as read, None where there is none; `versions` ascend.

    `error`: it cannot be loaded, whatever is in the model files.
    """

    name: str
    directory: Path
    config: ModelConfig | None = None
    versions: tuple[VersionFiles, ...] = ()
    version_policy: VersionPolicy = SERVE_NEWEST
    error: ModelLoadError | None = None

    @property
    def backbone(self) -> BackboneReference | None:
        """What the model is a head on, if it is one (a configuration that is wrong about it is refused at load)."""
        try:
            return backbone_of(self.config)
        except ConfigError:
            return None

    def version(self, number: int) -> VersionFiles | None:
        """The files of one version, if it is there."""
        return next((files for files in self.versions if files.version == number), None)


@dataclass(frozen=True, slots=True)
class RepositoryWarning:
    """Something in a repository that is not served, and why."""

    path: Path
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


@dataclass(frozen=True, slots=True)
class Scan:
    """Everything found, models by name."""

    models: tuple[ModelFiles, ...]
    warnings: tuple[RepositoryWarning, ...]

    def model(self, name: str) -> ModelFiles | None:
        """The model of that name, if there is one."""
        return next((model for model in self.models if model.name == name), None)


def valid_name(name: str) -> bool:
    """Whether a model can have this name."""
    return _NAME.fullmatch(name) is not None


def scan(repositories: Sequence[Path]) -> Scan:
    """Read the repositories. Raises `ModelLoadError` for one that is no readable directory.

    A name found in two repositories is an error of that model: which one was meant is not for the server to guess.
    """
    found: dict[str, ModelFiles] = {}
    warnings: list[RepositoryWarning] = []
    for repository in repositories:
        for entry in _entries(repository):
            if not entry.is_dir():
                continue  # files beside the models: a README, labels
            if not _NAME.fullmatch(entry.name):
                warnings.append(
                    RepositoryWarning(
                        entry,
                        "not a model: a model's name has 1 to 255 letters, digits and _ . + : @ -, and starts with a "
                        "letter, a digit or _; rename the directory",
                    )
                )
                continue
            model = _scan_model(entry, warnings)
            first = found.get(model.name)
            if first is not None:
                clash = ModelLoadError(
                    f"model '{model.name}' is in two repositories: {first.directory} and {entry}; remove one of them"
                )
                model = ModelFiles(model.name, first.directory, error=clash)
            found[model.name] = model
    return Scan(tuple(found[name] for name in sorted(found)), tuple(warnings))


def scan_model(directory: Path, config: ModelConfig | None = None) -> tuple[ModelFiles, tuple[RepositoryWarning, ...]]:
    """Read one model's directory; with `config` instead of its configuration file, if given."""
    warnings: list[RepositoryWarning] = []
    return _scan_model(directory, warnings, config), tuple(warnings)


def _scan_model(directory: Path, warnings: list[RepositoryWarning], override: ModelConfig | None = None) -> ModelFiles:
    name = directory.name
    try:
        config = read_config(directory / CONFIG_FILENAME) if override is None else override
        policy = build_version_policy(config) if config is not None else SERVE_NEWEST
        filename = model_filename(config)
        versions = _scan_versions(directory, filename, warnings)
    except ModelLoadError as error:
        return ModelFiles(name, directory, error=error)
    if versions:
        return ModelFiles(name, directory, config, versions, policy)
    missing = ModelLoadError(
        f"{directory}: no version to serve; expected a directory with a whole number as its name and {filename} in it, "
        f"such as {directory / '1' / filename}"
    )
    return ModelFiles(name, directory, config, (), policy, error=missing)


def _scan_versions(directory: Path, filename: str, warnings: list[RepositoryWarning]) -> tuple[VersionFiles, ...]:
    versions = []
    for entry in _entries(directory):
        if not entry.is_dir() or entry.name in _NO_VERSIONS:
            continue
        if not _VERSION.fullmatch(entry.name):
            form = "without leading zeros, 1 or more" if _NUMERIC.fullmatch(entry.name) else "such as 1"
            warnings.append(RepositoryWarning(entry, f"not a version: expected a whole number, {form}"))
            continue
        path = entry / filename
        if not model_file(path).is_file():
            warnings.append(RepositoryWarning(entry, f"version has no {filename}"))
            continue
        versions.append(VersionFiles(int(entry.name), entry, path))
    return tuple(sorted(versions, key=lambda files: files.version))


def _entries(directory: Path) -> list[Path]:
    """What is in a directory, by name, without dotfiles."""
    try:
        with os.scandir(directory) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise ModelLoadError(f"{directory}: cannot be read as a directory: {error.strerror or error}") from error
    return [directory / name for name in names]
