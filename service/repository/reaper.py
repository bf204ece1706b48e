"""Forgets sequences whose clients are gone: looks at every stateful model a few times a second.

A sequence is gone at most `PERIOD_S` after its idle timeout.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from service.clock import now_ns
from service.model import Model
from service.sequence_model import SequenceModel

PERIOD_S = 0.25


class Reaper:
    """A thread that runs between `start` and `stop`. `models`: those that serve and keep sequences."""

    def __init__(self, models: Callable[[], Iterable[Model]]) -> None:
        self._models = models
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sequences", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, within a period."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(PERIOD_S):
            for model in self._models():
                if isinstance(model, SequenceModel):
                    model.expire(now_ns())
