"""Page-locked buffers: registered in whole pages, given back before they are freed, ordinary where that is refused.

There is a CUDA runtime only where there is a GPU (tests/gpu); what it is told is checked with one that keeps a ledger.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.buffers import Memory
from service.engine.pinned import PageLocked
from service.engine.pool import Instance
from tests.support import onnx_models
from tests.unit.engine.support import Requests, session_of, split_rows, whole

ALREADY_REGISTERED = 712
OUT_OF_MEMORY = 2


class Ledger:
    """A CUDA runtime that keeps who registered what, and refuses what the real one would refuse."""

    def __init__(self, refuses: int = 0) -> None:
        self.registered: dict[int, int] = {}
        self.refuses = refuses
        self.errors_cleared = 0
        self.contents_at_release: list[bytes] = []

    def cudaSetDevice(self, index: ctypes.c_int) -> int:  # noqa: N802
        return 0

    def cudaHostRegister(self, address: ctypes.c_void_p, size: ctypes.c_size_t, flags: int) -> int:  # noqa: N802
        start, end = int(address.value or 0), int(address.value or 0) + size.value
        if self.refuses:
            return self.refuses
        if any(start < other + length and other < end for other, length in self.registered.items()):
            return ALREADY_REGISTERED
        self.registered[start] = size.value
        return 0

    def cudaHostUnregister(self, address: ctypes.c_void_p) -> int:  # noqa: N802
        # The memory must still be the owner's: its contents are there.
        self.contents_at_release.append(ctypes.string_at(address, 8))
        del self.registered[int(address.value or 0)]
        return 0

    def cudaGetLastError(self) -> int:  # noqa: N802
        self.errors_cleared += 1
        return self.refuses


@pytest.fixture(autouse=True)
def nothing_locked() -> Any:
    """Each test starts and ends with nothing locked."""
    gc.collect()
    assert not PageLocked._locked
    yield
    gc.collect()
    assert not PageLocked._locked


@given(st.lists(st.integers(0, 40), max_size=3), st.sampled_from(["float32", "float16", "int64", "uint8", "bool"]))
def test_an_array_lies_alone_in_pages_that_are_registered(shape: list[int], dtype: str) -> None:
    """Several at a time never share a page, which could not be registered twice."""
    ledger = Ledger()
    locked = PageLocked(0, ledger)
    arrays = [locked.zeros(shape, dtype) for _ in range(3)]
    for array in arrays:
        assert array.shape == tuple(shape)
        assert array.dtype == np.dtype(dtype)
        assert array.flags.c_contiguous
        assert not array.any()
    assert len(ledger.registered) == 3
    for start, size in ledger.registered.items():
        assert start % mmap.PAGESIZE == 0
        assert size % mmap.PAGESIZE == 0
    for array in arrays:
        if array.size:
            assert array.ctypes.data in ledger.registered
            assert array.nbytes <= ledger.registered[array.ctypes.data]
    del arrays, array
    gc.collect()
    assert ledger.registered == {}


def test_it_is_given_back_when_the_last_view_goes_and_before_it_is_freed() -> None:
    """A view or a memoryview of a few rows keeps it; then its contents are still there when it is unregistered."""
    ledger = Ledger()
    array = PageLocked(0, ledger).zeros((4, 8), np.uint8)
    array[:] = np.frombuffer(b"contents", np.uint8)
    view = memoryview(array[1:2])
    del array
    gc.collect()
    assert len(ledger.registered) == 1
    del view
    gc.collect()
    assert ledger.registered == {}
    assert ledger.contents_at_release == [b"contents"]


def test_where_the_runtime_refuses_memory_is_ordinary(caplog: pytest.LogCaptureFixture) -> None:
    """A limit on locked memory: the arrays work, the runtime's error is not left for others, one line says so."""
    PageLocked._said = False
    ledger = Ledger(refuses=OUT_OF_MEMORY)
    locked = PageLocked(0, ledger)
    arrays = [locked.zeros((3, 5), np.float32) for _ in range(4)]
    assert all(array.shape == (3, 5) and not array.any() for array in arrays)
    assert ledger.errors_cleared == 4
    assert [record.getMessage() for record in caplog.records] == [
        "buffers are not page-locked: copies to the GPU are slower"
    ]


def test_no_more_is_locked_than_the_bound() -> None:
    """What is beyond it is ordinary; what was given back may be locked again."""
    ledger = Ledger()
    locked = PageLocked(0, ledger, limit=2 * mmap.PAGESIZE)
    first, second, third = (locked.zeros((mmap.PAGESIZE,), np.uint8) for _ in range(3))
    assert len(ledger.registered) == 2
    assert third.nbytes == mmap.PAGESIZE
    del first
    gc.collect()
    fourth = locked.zeros((10,), np.uint8)
    assert len(ledger.registered) == 2
    del second, fourth


def test_an_instance_answers_from_such_buffers(tmp_path: Path) -> None:
    """The pool's own code over page-locked arrays: right answers, also after the buffers have grown."""
    ledger = Ledger()
    session, config = session_of(tmp_path, onnx_models.mlp())
    memory = Memory(PageLocked(0, ledger).zeros, PageLocked(0, ledger).zeros)
    locked = Instance(session, config.inputs, config.outputs, 64, memory)
    ordinary = Instance(session, config.inputs, config.outputs, 64)
    columns = config.inputs[0].shape[0]
    requests = Requests(config.inputs)
    for rows in (1, 3, 20, 64, 5):
        sent = [requests.make(np.random.default_rng(rows).random((rows, columns), np.float32))]
        got = split_rows(sent, locked.run(whole(*sent), rows, rows).outputs)
        wanted = split_rows(sent, ordinary.run(whole(*sent), rows, rows).outputs)
        assert all(np.array_equal(a, b) for a, b in zip(got[0], wanted[0], strict=True))
    assert len(ledger.registered) == len(config.inputs) + len(config.outputs)
    del locked, got, wanted
    gc.collect()
    assert ledger.registered == {}
