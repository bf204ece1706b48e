"""The spans of this process: which requests are traced, and what is told of each when it is over.

Promise: a request that is not traced costs a look at its headers; one that is, a few microseconds on the threads that
serve. Spans are made and sent on a thread of their own.
"""

from __future__ import annotations

import importlib.metadata
import os
import random
import socket
import threading
import uuid
from collections.abc import Sequence

from service.batch import BatchRecord
from service.config.otlp import Destination, TelemetryError
from service.request import InferenceRequest
from service.telemetry.exporter import Counts, Exporter
from service.telemetry.finished import MAX_TEXT, TracedBatch, TracedFailure, TracedRequest
from service.telemetry.sampling import Allowance, follows, ratio_bound
from service.trace_context import RequestTrace, parse_parent, parse_state

_INSTALL = "spans need the package opentelemetry-proto: pip install 'onclock[otlp]'"


class SpanTracer:
    """Decides and tells. Used from any thread."""

    def __init__(self, exporter: Exporter, ratio: float, clients_per_s: int) -> None:
        """`ratio`: the share of requests without a caller's context that is traced. `clients_per_s`: so many a second,
        at most, because their callers are."""
        self._exporter = exporter
        self._bound = ratio_bound(ratio)
        self._allowance = Allowance(clients_per_s)
        self._lock = threading.Lock()
        self._random = random.Random()  # noqa: S311 - ids need to differ, not to be secret

    @property
    def counts(self) -> Counts:
        """What became of what was traced."""
        return self._exporter.counts

    def begin(self, parent_text: str | None, state: str | None, method: str, at_ns: int) -> RequestTrace | None:
        """Where a request stands in a trace, by its `traceparent` and `tracestate`; None: it is not traced."""
        parent = None if parent_text is None else parse_parent(parent_text)
        if parent is None:
            if not self._bound:
                return None
            trace_id = self._random.getrandbits(128) or 1
            if not follows(None, trace_id, self._bound, self._allowance, at_ns):
                return None
            return RequestTrace(trace_id.to_bytes(16, "big"), self._span_id(), b"", "", method)
        if not parent.sampled:
            return None
        with self._lock:
            decided = follows(parent, 0, self._bound, self._allowance, at_ns)
            if decided is None:
                self.counts.over_limit += 1
        if not decided:
            return None
        return RequestTrace(
            parent.trace_id, self._span_id(), parent.span_id, parse_state(state) if state else "", method
        )

    def batch(
        self, model: str, version: int, record: BatchRecord, answered: Sequence[InferenceRequest]
    ) -> Sequence[TracedRequest]:
        """A batch has answered these requests: tell of those that are traced, which are returned."""
        traced = [traced_request(request) for request in answered if request.trace is not None]
        if traced:
            self._exporter.put(TracedBatch(model, version, record, traced))
        return traced

    def failed(
        self, model: str, version: int, request: TracedRequest, status: str, reason: str, message: str, end_ns: int
    ) -> None:
        """A request was refused, failed or given up. `status`: the name of gRPC's status code."""
        self._exporter.put(TracedFailure(model, version, request, status, reason, message, end_ns))

    def start(self) -> None:
        """Begin to send."""
        self._exporter.start()

    def close(self, timeout_s: float) -> None:
        """Send what waits, within this time."""
        self._exporter.close(timeout_s)

    def _span_id(self) -> bytes:
        return (self._random.getrandbits(64) or 1).to_bytes(8, "big")


def traced_request(request: InferenceRequest) -> TracedRequest:
    """What is told of a traced request, without its tensors and what else clients can make large."""
    assert request.trace is not None
    return TracedRequest(
        request.trace,
        request.arrival_ns,
        request.deadline_ns,
        request.rows,
        request.priority,
        request.request_id[:MAX_TEXT],
    )


def make_tracer(destination: Destination, ratio: float, clients_per_s: int) -> SpanTracer:
    """What traces to a collector, which need not be there yet, from `start` on. Raises `TelemetryError`."""
    try:
        from service.telemetry.encoding import Encoder
        from service.telemetry.sender import make_sender
    except ImportError as error:
        raise TelemetryError(f"{_INSTALL} ({error})") from None
    resource: dict[str, str | int] = {
        "service.version": importlib.metadata.version("onclock"),
        "service.instance.id": str(uuid.uuid4()),
        "host.name": socket.gethostname(),
        "process.pid": os.getpid(),
        **destination.resource,
    }
    exporter = Exporter(
        Encoder(resource).encode,
        make_sender(destination),
        destination.timeout_s,
        destination.delay_s,
        destination.queue_spans,
        destination.batch_spans,
    )
    return SpanTracer(exporter, ratio, clients_per_s)
