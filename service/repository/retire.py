"""How a model that serves no more goes: it answers what it was given, then its sessions and buffers are let go.

Requests that were decoded for it just before the change may still come, so it stays open for a moment after the last.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from service.clock import NS_PER_S, now_ns
from service.metrics import MetricsRegistry
from service.model import Model

log = logging.getLogger(__name__)

# From looking a model up to queueing the request takes microseconds, on a thread that may be kept from running.
LINGER_S = 0.5
# Requests without a deadline may wait behind others for long; then they are answered as refused.
PATIENCE_S = 30.0
# Sequences that began before a stateful model was replaced end there, or begin anew after so long: two models in memory
# are the price of the first.
SEQUENCE_PATIENCE_S = 600.0
_POLL_S = 0.02
_HEADS_POLL_S = 0.5


def retire(model: Model, registry: MetricsRegistry, done: Callable[[], None] = lambda: None) -> threading.Thread:
    """Let `model` go in a thread of its own; `done` is called when it is gone."""

    def work() -> None:
        pause = threading.Event()
        pause.wait(LINGER_S)
        model.retiring()
        end_ns = now_ns() + int((SEQUENCE_PATIENCE_S if model.stateful else PATIENCE_S) * NS_PER_S)
        # Seen twice: a request may be on its way from the handler into the queue.
        idle = False
        while now_ns() < end_ns:
            before, idle = idle, model.finished()
            if before and idle and model.seal():
                break
            if model.heads:
                # A backbone stays for as long as somebody builds on it.
                end_ns = now_ns() + int(PATIENCE_S * NS_PER_S)
                pause.wait(_HEADS_POLL_S)
            pause.wait(_POLL_S)
        else:
            who = {"model": model.name, "version": model.version}
            log.warning("requests of a model that goes are refused", extra=who)
        model.close()
        # A batch may be running; its instance is needed until it ends.
        end_ns = now_ns() + int(PATIENCE_S * NS_PER_S)
        while not model.idle() and now_ns() < end_ns:
            pause.wait(_POLL_S)
        registry.remove(model.metrics)
        model.release()
        done()

    thread = threading.Thread(target=work, name=f"retire-{model.name}", daemon=True)
    thread.start()
    return thread
