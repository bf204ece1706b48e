"""What lies below a model's directory, told apart without reading it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from service.repository.changes import FileFacts, Files

# Files of a model that are looked at. A directory with more is no model.
MAX_FILES = 10_000


def files_below(directory: Path, version: Path | None = None) -> Files:
    """The files of a model, dotfiles left out; with `version`, without those of its other versions.

    What vanishes meanwhile is not there. A directory without files is a model that is being made, or unmade.
    """
    found: dict[str, FileFacts] = {}
    for folder, folders, names in os.walk(directory):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".")
            and not (version is not None and Path(folder) == directory and name.isdigit() and name != version.name)
        ]
        for name in names:
            if name.startswith(".") or len(found) >= MAX_FILES:
                continue
            path = Path(folder) / name
            with contextlib.suppress(OSError):
                facts = path.stat()
                found[str(path.relative_to(directory))] = FileFacts(facts.st_size, facts.st_mtime_ns, facts.st_ino)
    return found
