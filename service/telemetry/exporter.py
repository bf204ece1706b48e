"""The thread that sends spans: off the way of requests, and in nobody's way when the collector is slow or gone.

Promise: `put` never waits. What does not fit into the queue is dropped and counted; what cannot be sent within the
time for one export is dropped and counted, and the next is tried. `close` returns within its time.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from service.clock import NS_PER_S, now_ns
from service.telemetry.finished import Finished, size_of

log = logging.getLogger(__name__)

# The most spans that one request makes: its own, queue, batch, execution.
SPANS = 4
# Between two tries of one export: doubled each time, and shortened by chance so that servers do not try in step.
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 8.0
# One warning in so long while the collector does not take spans.
_WARN_NS = 60 * NS_PER_S


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of an export. `problem` is empty when it arrived, but for `rejected` spans. Else it may be tried
    `again`, after `wait_s` at least."""

    problem: str = ""
    rejected: int = 0
    again: bool = False
    wait_s: float = 0.0


class Sender(Protocol):
    """A way to a collector. Used by one thread."""

    def send(self, payload: bytes, timeout_s: float) -> Sent:
        """Send a serialized `ExportTraceServiceRequest`."""

    def close(self) -> None:
        """Close the connection."""


@dataclass(slots=True)
class Counts:
    """What became of traced requests. `over_limit`: clients asked for more than is traced a second."""

    exported: int = 0
    rejected: int = 0
    failed: int = 0
    queue_full: int = 0
    over_limit: int = 0
    shutdown: int = 0


class Exporter:
    """Sends what is put. `encode` makes an export of what finished, `timeout_s` bounds one with all its tries."""

    def __init__(
        self,
        encode: Callable[[list[Finished], int], bytes],
        sender: Sender,
        timeout_s: float,
        delay_s: float,
        queue_spans: int,
        batch_spans: int,
    ) -> None:
        self.counts = Counts()
        self._encode = encode
        self._sender = sender
        self._timeout_s = timeout_s
        self._delay_s = delay_s
        self._most = max(1, queue_spans // SPANS)
        self._at_once = max(1, min(batch_spans, queue_spans) // SPANS)
        self._lock = threading.Lock()
        self._waiting: deque[Finished] = deque()
        self._size = 0
        self._wake = threading.Event()
        # Set when the server stops, with the time by which everything is over.
        self._stop = threading.Event()
        self._end_ns = 0
        self._warned_ns = -_WARN_NS
        self._thread = threading.Thread(target=self._run, name="spans", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def put(self, item: Finished) -> None:
        """Have it sent. From any thread."""
        size = size_of(item)
        with self._lock:
            if self._end_ns:
                self.counts.shutdown += size
                return
            # A batch larger than the whole queue fits into an empty one.
            if self._size and self._size + size > self._most:
                self.counts.queue_full += size
                return
            self._waiting.append(item)
            self._size += size
            enough = self._size >= self._at_once
        if enough and not self._wake.is_set():
            self._wake.set()

    def close(self, timeout_s: float) -> None:
        """Send what waits, within `timeout_s`; what is left then is dropped and counted."""
        with self._lock:
            self._end_ns = now_ns() + int(timeout_s * NS_PER_S)
        self._stop.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        with self._lock:
            left, self._size = self._size, 0
            self._waiting.clear()
            self.counts.shutdown += left
        if left or self._thread.is_alive():
            log.warning("spans are lost: the collector did not take them in time", extra={"requests": left})

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(self._delay_s)
            self._wake.clear()
            self._drain()
        self._drain()
        self._sender.close()

    def _drain(self) -> None:
        while items := self._take():
            self._export(items)
            if self._end_ns and now_ns() >= self._end_ns:
                return

    def _take(self) -> list[Finished]:
        items: list[Finished] = []
        size = 0
        with self._lock:
            while self._waiting and (not items or size + size_of(self._waiting[0]) <= self._at_once):
                item = self._waiting.popleft()
                size += size_of(item)
                items.append(item)
            self._size -= size
        return items

    def _left_s(self, end_ns: int) -> float:
        """Until `end_ns`, or until everything is over."""
        if self._end_ns:
            end_ns = min(end_ns, self._end_ns)
        return (end_ns - now_ns()) / NS_PER_S

    def _export(self, items: list[Finished]) -> None:
        count = sum(map(size_of, items))
        try:
            payload = self._encode(items, time.time_ns() - now_ns())
        except Exception:
            # The boundary of this thread: a defect costs these spans, not all that follow.
            log.exception("spans could not be encoded")
            self.counts.failed += count
            return
        end_ns = now_ns() + int(self._timeout_s * NS_PER_S)
        pause_s = _FIRST_PAUSE_S
        while True:
            left_s = self._left_s(end_ns)
            if left_s <= 0:
                self._lost(count, "no time left")
                return
            sent = self._sender.send(payload, left_s)
            if not sent.problem:
                rejected = min(count, -(-sent.rejected // SPANS))
                self.counts.rejected += rejected
                self.counts.exported += count - rejected
                return
            wait_s = max(sent.wait_s, pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - not a secret
            if not sent.again or wait_s >= self._left_s(end_ns):
                self._lost(count, sent.problem)
                return
            # A stop ends the pause: the last try is then the next one.
            self._stop.wait(wait_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _lost(self, count: int, problem: str) -> None:
        if self._end_ns:
            self.counts.shutdown += count
        else:
            self.counts.failed += count
        at_ns = now_ns()
        if at_ns - self._warned_ns >= _WARN_NS:
            self._warned_ns = at_ns
            log.warning(
                "spans are lost: the collector does not take them", extra={"reason": problem, "requests": count}
            )
