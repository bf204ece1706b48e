"""Page-locked host memory: what a GPU copies from and to without the driver's own staging.

Measured on an H200: sixteen images of 3x224x224 are copied in 137 us instead of 697, and a batch of a residual network
takes 811 us instead of 1,407 (docs/performance.md).

Promise: memory is registered with the CUDA runtime in whole pages of its own, and given back to it before it is freed
(else the allocator hands it to somebody whose next copy fails). Where the runtime refuses (no library, a limit on
locked memory) the arrays are ordinary ones: slower, and said once.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import threading
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from service.engine.gate import GPUS
from service.tensor import Array

log = logging.getLogger(__name__)

# Locked memory cannot be swapped, and belongs to the host as a whole. A model's buffers are tens of megabytes; clients
# choose shapes, so there must be a bound.
MAX_LOCKED_BYTES = 1 << 30
# cudaHostRegisterPortable: locked for every device of the process, not only for the current one.
_PORTABLE = 1
_LIBRARIES = ("libcudart.so.13", "libcudart.so.12")


class PageLocked:
    """Makes arrays in page-locked memory for the copies of one device. Safe to use from several threads.

    `library` is the CUDA runtime; unset, the one that is loaded already.
    """

    # Address to bytes, of the whole process. Entries are removed by finalizers, which run wherever the collector does,
    # perhaps on a thread that holds the lock: removing one takes no lock.
    _locked: ClassVar[dict[int, int]] = {}
    _lock = threading.Lock()
    _said = False

    def __init__(self, device_index: int, library: Any = None, limit: int = MAX_LOCKED_BYTES) -> None:
        self._index = device_index
        # Locking memory is an allocation: it would spoil the capture of a graph.
        self._gate = GPUS
        self._runtime = library if library is not None else _loaded()
        self._limit = limit

    def zeros(self, shape: Sequence[int], dtype: Any) -> Array:
        """A C-contiguous array of zeros. Raises `MemoryError` when there is none for it."""
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        size = -(-max(1, nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        if self._runtime is None:
            return self._ordinary(shape, dtype, "the CUDA runtime library is not loaded")
        base = np.zeros(size + mmap.PAGESIZE, np.uint8)
        start = -base.ctypes.data % mmap.PAGESIZE
        address = base.ctypes.data + start
        with self._gate.shared, self._lock:
            if sum(list(self._locked.values())) + size > self._limit:
                return self._ordinary(shape, dtype, f"more than {self._limit >> 20} MiB would be locked")
            self._runtime.cudaSetDevice(ctypes.c_int(self._index))
            status = self._runtime.cudaHostRegister(ctypes.c_void_p(address), ctypes.c_size_t(size), _PORTABLE)
            if status != 0:
                # The runtime remembers an error for whoever asks next, which would be ONNX Runtime.
                self._runtime.cudaGetLastError()
                return self._ordinary(shape, dtype, f"cudaHostRegister: error {status}")
            self._locked[address] = size
        # NumPy calls this before it frees the memory, once the last view is gone. Not at exit: the process's end gives
        # everything back, and the runtime may be gone by then.
        weakref.finalize(base, self._release, address).atexit = False
        array: Array = base[start : start + nbytes].view(dtype).reshape(shape)
        return array

    def _release(self, address: int) -> None:
        self._runtime.cudaHostUnregister(ctypes.c_void_p(address))
        self._locked.pop(address, None)

    def _ordinary(self, shape: Sequence[int], dtype: Any, reason: str) -> Array:
        if not PageLocked._said:
            PageLocked._said = True
            log.warning("buffers are not page-locked: copies to the GPU are slower", extra={"reason": reason})
        return np.zeros(shape, dtype)


def _loaded() -> Any:
    """The CUDA runtime, if one can be loaded: ONNX Runtime's CUDA provider has loaded its own."""
    for name in _LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None
