"""Fetching wheels: verified, kept, and never half there. The package index is a directory made by the test."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from models.zoo.fetch import FetchError, NpmPackage, Wheel, cache_directory, cached, fetch, read_member, sha256

FILE = "onclock_probe-1.0-py3-none-any.whl"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that pip takes for the package index, holding one wheel."""
    directory = tmp_path / "index"
    directory.mkdir()
    info = "onclock_probe-1.0.dist-info"
    with zipfile.ZipFile(directory / FILE, "w") as wheel:
        wheel.writestr("onclock_probe/weights.bin", b"\x01\x02\x03")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: onclock-probe\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


def probe(index: Path) -> Wheel:
    return Wheel("onclock-probe", "1.0", sha256(index / FILE), "Apache-2.0")


def test_a_verified_wheel_is_kept_and_read(index: Path, tmp_path: Path) -> None:
    """The first call downloads; the second finds it in the cache, even when the index has gone."""
    wheel, cache = probe(index), tmp_path / "cache"
    path = fetch(wheel, cache)
    assert path == cache / FILE
    assert read_member(path, "onclock_probe/weights.bin") == b"\x01\x02\x03"
    (index / FILE).unlink()
    assert fetch(wheel, cache) == path
    assert [file.name for file in cache.iterdir()] == [FILE]


def test_a_wheel_of_another_platform_is_fetched_when_asked_for(index: Path, tmp_path: Path) -> None:
    """Nothing of it is run, so it may be one that could not be installed here."""
    other = index / FILE.replace("-any", "-win_arm64")
    (index / FILE).rename(other)
    wheel = Wheel("onclock-probe", "1.0", sha256(other), "Apache-2.0", platform="win_arm64")
    assert fetch(wheel, tmp_path / "cache") == tmp_path / "cache" / other.name
    with pytest.raises(FetchError, match="pip ended with status"):
        fetch(replace(wheel, platform=None), tmp_path / "empty")


def test_a_changed_wheel_is_refused_and_leaves_nothing(index: Path, tmp_path: Path) -> None:
    """A wheel of another hash is named with both hashes, and is not in the cache afterwards."""
    other = Wheel("onclock-probe", "1.0", "0" * 64, "Apache-2.0")
    with pytest.raises(FetchError, match=f"(?s){FILE} has SHA-256 {sha256(index / FILE)}, expected {'0' * 64}"):
        fetch(other, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_missing_package_says_what_pip_said(index: Path, tmp_path: Path) -> None:
    """A version that does not exist fails with pip's own words, and leaves nothing."""
    absent = Wheel("onclock-probe", "2.0", "0" * 64, "Apache-2.0")
    with pytest.raises(FetchError, match=r"(?s)onclock-probe==2\.0: pip ended with status 1.*No matching distribution"):
        fetch(absent, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_torn_file_in_the_cache_is_not_used(index: Path, tmp_path: Path) -> None:
    """A cached file that fails the check is fetched again."""
    wheel, cache = probe(index), tmp_path / "cache"
    cache.mkdir()
    (cache / FILE).write_bytes((index / FILE).read_bytes()[:-1])
    assert cached(wheel, cache) is None
    assert sha256(fetch(wheel, cache)) == wheel.sha256


def test_a_missing_member_is_named_with_what_is_there(index: Path) -> None:
    """The error lists the files of the same kind."""
    with pytest.raises(FetchError, match=r"no file 'other\.bin'.*onclock_probe/weights\.bin"):
        read_member(index / FILE, "other.bin")


def test_the_cache_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ONCLOCK_CACHE wins over XDG_CACHE_HOME, which wins over the home directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("ONCLOCK_CACHE", raising=False)
    assert cache_directory() == tmp_path / "xdg" / "onclock" / "wheels"
    monkeypatch.setenv("ONCLOCK_CACHE", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own" / "wheels"


TARBALL = "onclock-probe-1.0.0.tgz"


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a program called npm, which packs the one package there is as npm does."""
    directory = tmp_path / "npm"
    directory.mkdir()
    with tarfile.open(directory / TARBALL, "w:gz") as tarball:
        content = b"\x01\x02\x03"
        info = tarfile.TarInfo("package/weights.bin")
        info.size = len(content)
        tarball.addfile(info, io.BytesIO(content))
    program = directory / "npm"
    program.write_text(
        f"""#!/bin/sh
while [ $# -gt 1 ]; do [ "$1" = --pack-destination ] && target=$2; shift; done
[ "$1" = @onclock/probe@1.0.0 ] || {{ echo "npm error 404 Not Found"; exit 1; }}
cp {directory}/{TARBALL} "$target"/ && echo {TARBALL}
"""
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")
    return directory


def test_a_package_of_npm_is_fetched_and_read(npm: Path, tmp_path: Path) -> None:
    """Verified and kept as wheels are; members are those of the tarball."""
    package = NpmPackage("@onclock/probe", "1.0.0", sha256(npm / TARBALL), "MIT")
    path = fetch(package, tmp_path / "cache")
    assert path == tmp_path / "cache" / TARBALL
    assert read_member(path, "package/weights.bin") == b"\x01\x02\x03"
    with pytest.raises(FetchError, match=r"no file 'package/other\.bin'.*package/weights\.bin"):
        read_member(path, "package/other.bin")
    (npm / "npm").unlink()
    assert fetch(package, tmp_path / "cache") == path


def test_a_broken_package_of_npm_leaves_nothing(npm: Path, tmp_path: Path) -> None:
    """Another hash, a package that is not there, and npm itself missing: an error each, and an empty cache."""
    package = NpmPackage("@onclock/probe", "1.0.0", "0" * 64, "MIT")
    with pytest.raises(FetchError, match=f"{TARBALL} has SHA-256"):
        fetch(package, tmp_path / "cache")
    with pytest.raises(FetchError, match=r"(?s)@onclock/probe@2\.0\.0: npm ended with status 1.*404"):
        fetch(replace(package, version="2.0.0"), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_npm_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what is missing and where it comes from."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match=r"npm is not installed here; it comes with Node\.js"):
        fetch(NpmPackage("@onclock/probe", "1.0.0", "0" * 64, "MIT"), tmp_path / "cache")
