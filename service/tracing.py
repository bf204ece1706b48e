"""Traces: when each sampled request arrived, was batched, ran and was answered, written to a file.

What is traced is settled per server and may be settled otherwise per model, while the server runs: every n-th request
(`rate`), so many of them (`count`), in Triton's words and file format (docs/protocol.md). Times are monotonic
nanoseconds.

Promise: while nothing is traced a batch pays for one comparison. Traces wait in a bounded queue for a thread that
writes them; what does not fit is dropped and counted. The file is a valid JSON array after every write.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from service.batch import BatchRecord
from service.request import InferenceRequest

log = logging.getLogger(__name__)

UNLIMITED = -1
# Traces that may wait to be written: some 2 MiB. A disk that is slower than this is long is no place for traces.
MAX_WAITING = 4096
# Models that may have settings of their own: they outlive the model, and clients choose the names among those served.
MAX_MODELS = 4096


@dataclass(frozen=True, slots=True)
class TraceSettings:
    """What is traced. `timestamps`: anything at all. Every `rate`-th request, `count` in all (-1: without end).
    `log_frequency` > 0: a new file `NAME.INDEX` for as many traces; 0: all in one file."""

    timestamps: bool = False
    rate: int = 1000
    count: int = UNLIMITED
    log_frequency: int = 0


@dataclass(frozen=True, slots=True)
class TraceOverrides:
    """What a model (or a change) says otherwise; None: as for the whole server."""

    timestamps: bool | None = None
    rate: int | None = None
    count: int | None = None
    log_frequency: int | None = None

    def over(self, settings: TraceSettings) -> TraceSettings:
        """`settings` with these instead."""
        stated = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return replace(settings, **stated)


class Sampler:
    """Which requests are traced under some settings: the first of every `rate`, until `count` were. Not thread-safe."""

    __slots__ = ("_left", "_seen", "settings")

    def __init__(self, settings: TraceSettings) -> None:
        self.settings = settings
        self._seen = 0
        self._left = settings.count

    def takes(self) -> bool:
        """Whether the next request is traced."""
        if not self.settings.timestamps or self._left == 0:
            return False
        first = self._seen == 0
        self._seen = (self._seen + 1) % self.settings.rate
        if first and self._left > 0:
            self._left -= 1
        return first


class Tracer:
    """The traces of this process. Used from any thread. `path` None: there is no file, so nothing can be traced."""

    def __init__(self, path: Path | None, settings: TraceSettings | None = None) -> None:
        self.path = path
        self._start = settings or TraceSettings()
        self._lock = threading.Lock()
        self._server = Sampler(self._start)
        self._overrides: dict[str, TraceOverrides] = {}
        self._models: dict[str, Sampler] = {}
        self._ids = 0
        self._dropped = 0
        self._writer = None if path is None else _Writer(path)
        # Read without the lock, for each batch.
        self.active = self._start.timestamps and path is not None

    def settings(self, model: str = "") -> TraceSettings:
        """What is in force for a model, or for the whole server."""
        with self._lock:
            return self._sampler(model).settings

    def change(self, model: str, cleared: Iterable[str], overrides: TraceOverrides) -> TraceSettings:
        """Set `overrides` and put the fields named in `cleared` back to what they were without any; what is in force
        then. A change for the whole server reaches models where they say nothing else; counting starts anew.

        Raises `ValueError` when too many models have settings of their own.
        """
        stated = {f.name: value for f in fields(overrides) if (value := getattr(overrides, f.name)) is not None}
        with self._lock:
            if model:
                own = replace(self._overrides.get(model, TraceOverrides()), **dict.fromkeys(cleared), **stated)
                if model not in self._overrides and len(self._overrides) >= MAX_MODELS:
                    raise ValueError(f"{MAX_MODELS} models have trace settings of their own already")
                self._overrides[model] = own
                if own == TraceOverrides():
                    del self._overrides[model]
                    self._models.pop(model, None)
                else:
                    self._models[model] = Sampler(own.over(self._server.settings))
            else:
                back = {name: getattr(self._start, name) for name in cleared}
                self._server = Sampler(replace(self._server.settings, **back, **stated))
                self._models = {m: Sampler(o.over(self._server.settings)) for m, o in self._overrides.items()}
            samplers = (self._server, *self._models.values())
            self.active = self._writer is not None and any(s.settings.timestamps for s in samplers)
            return self._sampler(model).settings

    def batch(self, model: str, version: int, record: BatchRecord, answered: Sequence[InferenceRequest]) -> None:
        """Trace those of a batch's requests whose turn it is."""
        assert self._writer is not None
        for request in answered:
            with self._lock:
                sampler = self._sampler(model)
                if not sampler.takes():
                    continue
                self._ids += 1
                number, frequency = self._ids, sampler.settings.log_frequency
            if not self._writer.put(_trace(number, model, version, record, request), frequency):
                self._dropped += 1
                if self._dropped & (self._dropped - 1) == 0:
                    log.warning("traces are dropped: the file cannot be written as fast", extra={"lost": self._dropped})

    def close(self, timeout_s: float) -> None:
        """Write what waits. Nothing is traced any more."""
        self.active = False
        if self._writer is not None:
            self._writer.close(timeout_s)

    def _sampler(self, model: str) -> Sampler:
        return self._models.get(model, self._server)


def _trace(number: int, model: str, version: int, record: BatchRecord, request: InferenceRequest) -> dict[str, Any]:
    times = (
        ("REQUEST_START", request.arrival_ns),
        ("QUEUE_START", request.arrival_ns),
        ("COMPUTE_START", record.dispatched_ns),
        ("COMPUTE_INPUT_END", record.started_ns),
        ("COMPUTE_OUTPUT_START", record.finished_ns),
        ("COMPUTE_END", record.done_ns),
        ("REQUEST_END", record.done_ns),
    )
    return {
        "id": number,
        "model_name": model,
        "model_version": version,
        "request_id": request.request_id.decode(errors="replace"),
        "timestamps": [{"name": name, "ns": ns} for name, ns in times],
    }


class _Writer:
    """A thread that appends traces to files."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: queue.Queue[tuple[dict[str, Any], int] | None] = queue.Queue(MAX_WAITING)
        self._in_file = 0
        self._files = 0
        self._begun: set[Path] = set()
        self._failed = False
        self._thread = threading.Thread(target=self._write, name="traces", daemon=True)
        self._thread.start()

    def put(self, trace: dict[str, Any], log_frequency: int) -> bool:
        """Hand over a trace; False when too many wait."""
        try:
            self._waiting.put_nowait((trace, log_frequency))
        except queue.Full:
            return False
        return True

    def close(self, timeout_s: float) -> None:
        """End after what waits, within `timeout_s`."""
        try:
            self._waiting.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _write(self) -> None:
        while (item := self._waiting.get()) is not None:
            trace, frequency = item
            try:
                self._append(self._file(frequency), trace)
            except OSError as error:
                if not self._failed:
                    log.error("traces cannot be written", extra={"path": str(self._path), "reason": str(error)})
                self._failed = True

    def _file(self, frequency: int) -> Path:
        if frequency == 0:
            return self._path
        if self._in_file >= frequency:
            self._files += 1
            self._in_file = 0
        self._in_file += 1
        return self._path.with_name(f"{self._path.name}.{self._files}")

    def _append(self, path: Path, trace: dict[str, Any]) -> None:
        line = json.dumps(trace, separators=(",", ":")).encode()
        if path not in self._begun:
            # What an earlier server left there is not ours to continue: its clock may be another.
            path.write_bytes(b"[\n" + line + b"\n]\n")
            self._begun.add(path)
            return
        with path.open("r+b") as file:
            file.seek(-3, 2)
            file.write(b",\n" + line + b"\n]\n")
