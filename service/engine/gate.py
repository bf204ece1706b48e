"""Who may use the GPUs while a CUDA graph is captured: nobody else of this process.

ONNX Runtime captures in CUDA's global mode: an allocation, a copy or a wait by any other thread of the process fails
meanwhile (error 900) and spoils the capture. So whatever touches a GPU passes the gate, together with others; a
capture passes alone.

Promise: who waits to be alone keeps later comers out, so it waits for what is running, not for what may come. Runs end
or are given up by the watchdog, which bounds the wait. Who is alone may pass again, either way.
"""

from __future__ import annotations

import threading


class Gate:
    """A lock that many may hold together, or one alone: `with gate.shared:` or `with gate.alone:`.

    `shared` is not to be entered within another `shared` of the same thread, `alone` not within either.
    """

    def __init__(self) -> None:
        # Taken by itself where nobody has to wait: a condition's own methods cost more than all the rest.
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.together = 0
        self.waiting = 0
        self.owner: int | None = None
        self.shared = _Shared(self)
        self.alone = _Alone(self)


class _Shared:
    __slots__ = ("_gate",)

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def __enter__(self) -> None:
        gate = self._gate
        if gate.owner == threading.get_ident():
            return
        with gate.lock:
            while gate.waiting or gate.owner is not None:
                gate.changed.wait()
            gate.together += 1

    def __exit__(self, *_: object) -> None:
        gate = self._gate
        if gate.owner == threading.get_ident():
            return
        with gate.lock:
            gate.together -= 1
            if gate.waiting:
                gate.changed.notify_all()


class _Alone:
    __slots__ = ("_gate",)

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def __enter__(self) -> None:
        gate = self._gate
        with gate.lock:
            gate.waiting += 1
            while gate.together or gate.owner is not None:
                gate.changed.wait()
            gate.waiting -= 1
            gate.owner = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        gate = self._gate
        with gate.lock:
            gate.owner = None
            gate.changed.notify_all()


# CUDA's global mode is global to the process: one GPU's traffic spoils a capture on another.
GPUS = Gate()
