"""Virtual environments for programs that cannot share one with us: made once, kept under `build/venvs`.

Published clients register the protobuf package `inference`, as we do, and pin other versions of protobuf: they run in
a process and an environment of their own. An environment that cannot be made is an error, never a reason to skip.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2] / "build" / "venvs"
# Downloading and unpacking takes 10 s; a slow mirror gets this long.
INSTALL_TIMEOUT_S = 300.0
_READY = ".complete"


class VenvError(Exception):
    """An environment could not be made; the message holds what pip said."""


def python_with(*requirements: str, root: Path = ROOT) -> Path:
    """The interpreter of an environment that has `requirements` (pip's syntax) and nothing of ours.

    The same requirements and Python version give the same environment, whoever asks first makes it. Raises `VenvError`.
    """
    wanted = [sys.version.split()[0], *sorted(requirements)]
    directory = root / hashlib.sha256("\n".join(wanted).encode()).hexdigest()[:16]
    python = directory / "bin" / "python"
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{directory.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / _READY).exists():
            _make(directory, python, requirements)
            (directory / _READY).write_text("\n".join(wanted) + "\n")
    return python


def _make(directory: Path, python: Path, requirements: Sequence[str]) -> None:
    # What is left of an attempt that was interrupted is of no use.
    shutil.rmtree(directory, ignore_errors=True)
    venv.create(directory, with_pip=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise VenvError(f"installing {' '.join(requirements)} took more than {INSTALL_TIMEOUT_S:g} s") from error
    if done.returncode:
        raise VenvError(f"{' '.join(requirements)} cannot be installed (is there a network?):\n{done.stderr.strip()}")
