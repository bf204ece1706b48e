"""A thread that does what it is handed, for what must always be done on the same thread.

ONNX Runtime keeps captured CUDA graphs with the thread that ran the session: on another thread they are not there.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any


class Home:
    """One thread, used by one caller at a time. It ends when `owner` is collected, or with the process."""

    def __init__(self, name: str, owner: object) -> None:
        self._inbox = _Inbox()
        self._thread = threading.Thread(target=_serve, args=(self._inbox,), name=name, daemon=True)
        self._thread.start()
        weakref.finalize(owner, self._inbox.put, None).atexit = False

    def call(self, work: Callable[[], Any]) -> Any:
        """Do `work` there; what it returns or raises. From within it: at once."""
        if threading.current_thread() is self._thread:
            return work()
        inbox = self._inbox
        inbox.put(work)
        inbox.done.acquire()
        result, error = inbox.result, inbox.error
        inbox.result = inbox.error = None
        if error is not None:
            raise error
        return result

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()


class _Inbox:
    """What is to be done, and what came of it. Two locks as binary semaphores: half the price of a queue."""

    __slots__ = ("done", "error", "go", "result", "work")

    def __init__(self) -> None:
        self.work: Callable[[], Any] | None = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.go = threading.Lock()
        self.go.acquire()
        self.done = threading.Lock()
        self.done.acquire()

    def put(self, work: Callable[[], Any] | None) -> None:
        self.work = work
        self.go.release()


def _serve(inbox: _Inbox) -> None:
    while True:
        inbox.go.acquire()
        work = inbox.work
        inbox.work = None
        if work is None:
            return
        try:
            inbox.result = work()
        except BaseException as error:  # noqa: BLE001 - handed to the caller, who raises it
            inbox.error = error
        # What the closure holds must not live until the next call.
        del work
        inbox.done.release()
