"""System shared memory: regions that clients register by name, and requests that point into them.

Tensors are read from and written to a region's file with `preadv` and `pwrite`; nothing is mapped. A client can shrink
or remove its file at any moment, and touching a mapping beyond the end kills the process; a short read is an error of
one request ([ADR 11](../../docs/adr/0011-shared-memory.md)).

Promise: a region is a regular file below /dev/shm, never what a link points to, and large enough when it is registered.
Unregistering takes the name away at once; the file stays open while a request that was accepted still needs it. What
requests have read is bounded in bytes, like the messages of those that carry their tensors.
"""

from __future__ import annotations

import os
import re
import stat
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from service.clock import NS_PER_MS
from service.errors import AlreadyExists, InvalidRequest, NotFound, QueueFull, UnsupportedFeature
from service.pb import grpc_service_pb2 as pb
from service.tensor import Array

ROOT = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory is, on Linux
# Names of POSIX shared memory objects, as shm_open takes them: one slash in front at most, none within.
_KEY = re.compile(r"/?[A-Za-z0-9_][A-Za-z0-9_.:+-]{0,249}")
# Triton keeps this prefix for its Python backend; clients of both should fail on both.
RESERVED = "triton_python_backend_shm_region_"
# Each holds a file open. A client has one region for its inputs and one for its outputs.
MAX_REGIONS = 1024
# Buffers kept to be used again: a hundred images.
MAX_SPARE_BYTES = 64 << 20
_NAME_SHOWN = 80


class Budget:
    """Bytes that requests have read from regions and still hold, and buffers that were used before. Any thread.

    A buffer that is used again costs no page faults: for an image that is more than the copy.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0
        # By size; the sum of their sizes is bounded.
        self._spare: dict[int, list[Array]] = {}
        self._spare_bytes = 0
        # Buffers may be collected while this very lock is held.
        self._lock = threading.RLock()

    def take(self, size: int) -> memoryview:
        """A buffer of arbitrary contents, which counts until its last view is collected. Raises `QueueFull`."""
        with self._lock:
            if self.taken + size > self.limit:
                held = f"requests hold more than {self.limit} bytes of shared memory"
                raise QueueFull(f"Exceeds maximum queue size: {held}", NS_PER_MS)
            self.taken += size
            spare = self._spare.get(size)
            buffer = spare.pop() if spare else None
            if buffer is not None:
                self._spare_bytes -= size
        if buffer is None:
            buffer = np.empty(size, np.uint8)
        # What is handed out is a view: when it goes, the buffer is still there to be used again.
        view = buffer[:]
        weakref.finalize(view, self._give_back, buffer).atexit = False
        return view.data

    def _give_back(self, buffer: Array) -> None:
        size = buffer.nbytes
        with self._lock:
            self.taken -= size
            if self._spare_bytes + size > MAX_SPARE_BYTES:
                self._spare.clear()
                self._spare_bytes = 0
            if size <= MAX_SPARE_BYTES:
                self._spare.setdefault(size, []).append(buffer)
                self._spare_bytes += size


class Region:
    """A registered part of a shared memory object. Whoever refers to it can use it; it closes with the last of them."""

    __slots__ = ("_budget", "_file", "byte_size", "key", "name", "offset")

    def __init__(self, name: str, key: str, offset: int, byte_size: int, descriptor: int, budget: Budget) -> None:
        self._budget = budget
        self.name = name
        self.key = key
        self.offset = offset
        self.byte_size = byte_size
        # Closes the descriptor when it is collected.
        self._file = os.fdopen(descriptor, "r+b", buffering=0)

    def read(self, offset: int, size: int) -> memoryview:
        """`size` bytes from `offset` within the region. Raises `InvalidRequest` or `QueueFull`."""
        self.check(offset, size)
        data = self._budget.take(size)
        if size and os.preadv(self._file.fileno(), [data], self.offset + offset) != size:
            raise InvalidRequest(f"shared memory region '{self.name}' is smaller now than when it was registered")
        return data

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Put `data` at `offset` within the region. Raises `InvalidRequest`."""
        self.check(offset, len(data))
        try:
            written = os.pwrite(self._file.fileno(), data, self.offset + offset)
        except OSError as error:
            raise InvalidRequest(f"shared memory region '{self.name}': {error.strerror}") from error
        if written != len(data):
            raise InvalidRequest(f"shared memory region '{self.name}': there is no room left for an output")

    def check(self, offset: int, size: int) -> None:
        """Raises `InvalidRequest` when these bytes are not all within the region."""
        if offset + size > self.byte_size:
            raise InvalidRequest(
                f"Invalid offset + byte size for shared memory region: '{self.name}' has {self.byte_size} bytes, "
                f"{offset} + {size} were asked for"
            )


class Regions:
    """The regions of this server. Any thread. `allowed`: the server was started with `--allow-client-shm`. `max_bytes`:
    what requests may hold."""

    def __init__(self, allowed: bool, max_bytes: int = 1 << 30, root: Path = ROOT) -> None:
        self.budget = Budget(max_bytes)
        self.allowed = allowed
        self._root = root
        self._lock = threading.Lock()
        self._regions: dict[str, Region] = {}

    def find(self, name: str) -> Region:
        """The region of that name. Raises `NotFound`."""
        region = self._regions.get(name)
        if region is None:
            raise NotFound(f"Unable to find shared memory region: '{name[:_NAME_SHOWN]}'")
        return region

    # ---------------------------------------------------------------- the RPCs

    def status(self, request: Any) -> Any:
        """One region, or all of them."""
        response = pb.SystemSharedMemoryStatusResponse()
        with self._lock:
            found = [self.find(request.name)] if request.name else list(self._regions.values())
        for region in found:
            shown = response.regions[region.name]
            shown.name, shown.key = region.name, region.key
            shown.offset, shown.byte_size = region.offset, region.byte_size
        return response

    def register(self, request: Any) -> Any:
        """Register a region. Raises `ServiceError`."""
        if not self.allowed:
            raise UnsupportedFeature(
                "shared memory of clients is not allowed: start the server with --allow-client-shm"
            )
        name = request.name
        if not name:
            raise InvalidRequest("the name of a shared memory region must not be empty")
        if not request.byte_size:
            raise InvalidRequest(f"shared memory region '{name[:_NAME_SHOWN]}': byte_size must be greater than 0")
        with self._lock:
            if name in self._regions:
                raise AlreadyExists(f"shared memory region '{name[:_NAME_SHOWN]}' already in manager")
            if len(self._regions) >= MAX_REGIONS:
                raise InvalidRequest(f"{MAX_REGIONS} shared memory regions are registered already; unregister some")
            descriptor = self._open(name, request.key, request.offset + request.byte_size)
            self._regions[name] = Region(name, request.key, request.offset, request.byte_size, descriptor, self.budget)
        return pb.SystemSharedMemoryRegisterResponse()

    def unregister(self, request: Any) -> Any:
        """Unregister a region, or all of them; one that is not there is no error."""
        with self._lock:
            if request.name:
                self._regions.pop(request.name, None)
            else:
                self._regions.clear()
        return pb.SystemSharedMemoryUnregisterResponse()

    def _open(self, name: str, key: str, needed: int) -> int:
        shown = f"shared memory region '{name[:_NAME_SHOWN]}'"
        if not _KEY.fullmatch(key):
            raise InvalidRequest(
                f"{shown}: '{key[:_NAME_SHOWN]}' is no name of a shared memory object, such as '/input'"
            )
        if key.lstrip("/").startswith(RESERVED):
            raise InvalidRequest(f"{shown}: keys that start with '{RESERVED}' are reserved")
        path = self._root / key.lstrip("/")
        try:
            # Not what a link points to, and without waiting for the other end of a pipe.
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise InvalidRequest(f"{shown}: Unable to open shared memory object '{key}': {error.strerror}") from None
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size < needed:
            os.close(descriptor)
            has = f"it has {facts.st_size} bytes, {needed} are needed"
            raise InvalidRequest(f"{shown}: Invalid offset + byte size for shared memory object '{key}': {has}")
        return descriptor


class CudaRegions:
    """The RPCs of CUDA shared memory: nothing can be registered, so there is nothing to tell or to take away."""

    def status(self, request: Any) -> Any:
        """Of one region, or of all: there are none."""
        if request.name:
            raise NotFound(f"Unable to find cuda shared memory region: '{request.name[:_NAME_SHOWN]}'")
        return pb.CudaSharedMemoryStatusResponse()

    def register(self, _request: Any) -> Any:
        """Refused."""
        raise UnsupportedFeature("onclock does not offer CUDA shared memory; use system shared memory")

    def unregister(self, _request: Any) -> Any:
        """Nothing to do: clients ask for it before they begin."""
        return pb.CudaSharedMemoryUnregisterResponse()
