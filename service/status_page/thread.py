"""The thread that has the observer take in each step, a little after its end."""

from __future__ import annotations

import threading

from service.clock import NS_PER_S, now_ns
from service.metrics.shard import WINDOW_STEP_NS
from service.status_page.observer import LAG_NS, Observer


class ObserverThread:
    """Calls `observe` at the end of each step. `start` and `stop` once each; `stop` without `start` is fine."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)

    def start(self) -> None:
        """Observe from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Observe no more; returns when the step in progress is done."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(until_next_step_s(now_ns())):
            self._observer.observe()


def until_next_step_s(at_ns: int) -> float:
    """From `at_ns` until the next step can be taken in, seconds: more than 0, at most a step."""
    return (WINDOW_STEP_NS - (at_ns - LAG_NS) % WINDOW_STEP_NS) / NS_PER_S
