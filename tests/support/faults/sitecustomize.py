"""Faults for a server process, put in by Python's own start-up hook: `PYTHONPATH` names this folder.

`FAULT_FILE` is the path of a file that is looked for before every execution of a model. When it is there, its text is
what ONNX Runtime raises, as if the device had failed; the text `address space +N` lets the process have N bytes more
than it has, so that allocations fail for real.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

from service.engine.session import OnnxSession

_FILE = Path(os.environ["FAULT_FILE"])
_ADDRESS_SPACE = "address space +"
_load = OnnxSession.__init__


class _Faulty:
    def __init__(self, core: Any) -> None:
        self._core = core
        self._limited = False

    def run(self, *arguments: Any) -> Any:
        self._fault()
        return self._core.run(*arguments)

    def run_with_iobinding(self, *arguments: Any) -> None:
        self._fault()
        self._core.run_with_iobinding(*arguments)

    def _fault(self) -> None:
        if self._limited or not _FILE.exists():
            return
        text = _FILE.read_text()
        if not text.startswith(_ADDRESS_SPACE):
            raise RuntimeError(text)
        self._limited = True
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = used + int(text.removeprefix(_ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _init(self: Any, *arguments: Any) -> None:
    _load(self, *arguments)
    self._core = _Faulty(self._core)


OnnxSession.__init__ = _init  # type: ignore[method-assign]
