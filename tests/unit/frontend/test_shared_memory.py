"""Regions of shared memory: what can be registered, read and written, and what hostile clients try."""

from __future__ import annotations

import contextlib
import gc
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import AlreadyExists, InvalidRequest, NotFound, QueueFull, ServiceError, UnsupportedFeature
from service.frontend import shared_memory
from service.frontend.shared_memory import CudaRegions, Regions
from service.pb import grpc_service_pb2 as pb


@pytest.fixture
def regions(tmp_path: Path) -> Regions:
    (tmp_path / "object").write_bytes(bytes(range(100)))
    return Regions(allowed=True, max_bytes=1000, root=tmp_path)


def register(regions: Regions, name: str = "r", key: str = "/object", offset: int = 0, byte_size: int = 100) -> None:
    regions.register(pb.SystemSharedMemoryRegisterRequest(name=name, key=key, offset=offset, byte_size=byte_size))


def open_files(root: Path) -> int:
    """How many files below `root` this process has open."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found += str(link.readlink()).startswith(str(root))
    return found


def names(regions: Regions) -> list[str]:
    return sorted(regions.status(pb.SystemSharedMemoryStatusRequest()).regions)


def test_regions_are_listed_and_taken_away(regions: Regions) -> None:
    """One or all; one that is not there may be taken away."""
    register(regions, "a")
    register(regions, "b", offset=10, byte_size=20)
    shown = regions.status(pb.SystemSharedMemoryStatusRequest(name="b")).regions["b"]
    assert (shown.name, shown.key, shown.offset, shown.byte_size) == ("b", "/object", 10, 20)
    assert names(regions) == ["a", "b"]
    regions.unregister(pb.SystemSharedMemoryUnregisterRequest(name="nobody"))
    regions.unregister(pb.SystemSharedMemoryUnregisterRequest(name="a"))
    assert names(regions) == ["b"]
    regions.unregister(pb.SystemSharedMemoryUnregisterRequest())
    assert names(regions) == []
    with pytest.raises(NotFound, match="Unable to find shared memory region: 'b'"):
        regions.status(pb.SystemSharedMemoryStatusRequest(name="b"))


@given(st.integers(0, 90), st.integers(1, 10), st.data())
def test_bytes_come_and_go_where_they_are_asked_for(offset: int, size: int, data: Any) -> None:
    """Within the region, counted from its own start."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        content = bytearray(os.urandom(100))
        (Path(folder) / "o").write_bytes(content)
        regions = Regions(allowed=True, root=Path(folder))
        register(regions, key="o", offset=offset, byte_size=size)
        region = regions.find("r")
        start = data.draw(st.integers(0, size))
        length = data.draw(st.integers(0, size - start))
        assert region.read(start, length) == content[offset + start : offset + start + length]
        region.write(start, b"\xee" * length)
        content[offset + start : offset + start + length] = b"\xee" * length
        assert (Path(folder) / "o").read_bytes() == content
        for wrong in ((0, size + 1), (size, 1), (size + 1, 0)):
            with pytest.raises(InvalidRequest, match="Invalid offset"):
                region.check(*wrong)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"name": ""}, InvalidRequest, "must not be empty"),
        ({"byte_size": 0}, InvalidRequest, "greater than 0"),
        ({"key": "/nothing"}, InvalidRequest, "Unable to open shared memory object '/nothing'"),
        ({"key": "/../etc/passwd"}, InvalidRequest, "is no name of"),
        ({"key": "../object"}, InvalidRequest, "is no name of"),
        ({"key": "//object"}, InvalidRequest, "is no name of"),
        ({"key": "/folder/object"}, InvalidRequest, "is no name of"),
        ({"key": ""}, InvalidRequest, "is no name of"),
        ({"key": "/object\0"}, InvalidRequest, "is no name of"),
        ({"key": "x" * 300}, InvalidRequest, "is no name of"),
        ({"key": "/triton_python_backend_shm_region_1"}, InvalidRequest, "reserved"),
        ({"key": "/folder"}, InvalidRequest, "Unable to open"),
        ({"key": "/link"}, InvalidRequest, "Unable to open"),
        ({"key": "/pipe"}, InvalidRequest, "it has 0 bytes|Unable to open"),
        ({"byte_size": 101}, InvalidRequest, "it has 100 bytes, 101 are needed"),
        ({"offset": 50, "byte_size": 51}, InvalidRequest, "it has 100 bytes, 101 are needed"),
        ({"offset": 2**64 - 1, "byte_size": 2}, InvalidRequest, "are needed"),
    ],
)
def test_what_cannot_be_registered(
    arguments: dict[str, Any], error: type[ServiceError], words: str, regions: Regions, tmp_path: Path
) -> None:
    """Each says why; no file stays open."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "object")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(error, match=words):
        register(regions, **arguments)
    assert open_files(tmp_path) == 0
    assert names(regions) == []


def test_a_name_that_is_taken(regions: Regions) -> None:
    """The first one stays."""
    register(regions)
    with pytest.raises(AlreadyExists, match="'r' already in manager"):
        register(regions, byte_size=10)
    assert regions.find("r").byte_size == 100


def test_regions_are_bounded(regions: Regions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each holds a file open."""
    monkeypatch.setattr(shared_memory, "MAX_REGIONS", 2)
    register(regions, "a")
    register(regions, "b")
    with pytest.raises(InvalidRequest, match="2 shared memory regions"):
        register(regions, "c")


def test_a_file_that_shrinks_or_goes(regions: Regions, tmp_path: Path) -> None:
    """A short read is an error; a file that was removed is still there for who has it open."""
    register(regions)
    region = regions.find("r")
    os.truncate(tmp_path / "object", 50)
    assert region.read(0, 50) == bytes(range(50))
    with pytest.raises(InvalidRequest, match="is smaller now"):
        region.read(0, 51)
    (tmp_path / "object").unlink()
    assert region.read(0, 50) == bytes(range(50))


def test_a_region_in_use_outlives_its_name(regions: Regions, tmp_path: Path) -> None:
    """Its file closes with the last who uses it."""
    register(regions)
    region = regions.find("r")
    regions.unregister(pb.SystemSharedMemoryUnregisterRequest())
    assert region.read(0, 3) == b"\0\1\2"
    del region
    gc.collect()
    assert open_files(tmp_path) == 0


def test_what_requests_hold_is_bounded(regions: Regions) -> None:
    """Views count for as long as they are used."""
    register(regions)
    region = regions.find("r")
    views = [memoryview(region.read(0, 100)) for _ in range(10)]
    with pytest.raises(QueueFull, match="1000 bytes of shared memory"):
        region.read(0, 1)
    del views[0]
    region.read(0, 100)
    del views
    gc.collect()
    assert regions.budget.taken == 0


def test_a_server_that_was_not_started_for_it(tmp_path: Path) -> None:
    """Says which flag; what clients do before they begin is harmless."""
    regions = Regions(allowed=False, root=tmp_path)
    with pytest.raises(UnsupportedFeature, match="--allow-client-shm"):
        register(regions)
    assert names(regions) == []
    regions.unregister(pb.SystemSharedMemoryUnregisterRequest())


def test_cuda_memory() -> None:
    """None can be registered."""
    cuda = CudaRegions()
    assert not cuda.status(pb.CudaSharedMemoryStatusRequest()).regions
    cuda.unregister(pb.CudaSharedMemoryUnregisterRequest())
    with pytest.raises(UnsupportedFeature, match="CUDA"):
        cuda.register(pb.CudaSharedMemoryRegisterRequest(name="x"))
    with pytest.raises(NotFound, match="cuda"):
        cuda.status(pb.CudaSharedMemoryStatusRequest(name="x"))
