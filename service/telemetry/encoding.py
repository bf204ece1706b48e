"""Spans as OTLP's protobuf messages: what finished in, one serialized export request out.

Of an answered request: a SERVER span, below it `queue` and `batch`, below that `execution`. Each trace is whole: it has
its own `batch`, with what they all have in common. Traced requests of one batch are linked in a star, as OpenTelemetry
advises for batches: the first one's `batch` span to those of the others, and theirs to it. Of a request that was
refused, failed or given up: its SERVER span.

Attributes of `rpc.*` and `error.type` are OpenTelemetry's conventions for gRPC; `onclock.*` are ours (docs/tracing.md).
"""

from __future__ import annotations

import importlib.metadata
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from service.clock import NEVER_NS, NS_PER_MS
from service.telemetry.finished import MAX_TEXT, Finished, TracedBatch, TracedFailure, TracedRequest, size_of

SCHEMA_URL = "https://opentelemetry.io/schemas/1.45.0"
_SERVICE = "inference.GRPCInferenceService"
# OpenTelemetry's limit on links of a span.
MAX_LINKS = 128
_MAX_KNOWN = 1024
# Of W3C's flags the sampled bit; OTLP adds that it is known whether the parent is elsewhere, and whether it is.
_SAMPLED, _REMOTE_KNOWN, _REMOTE = 0x1, 0x100, 0x200
# What a server's span calls an error: OpenTelemetry's list for gRPC. The others are the client's doing.
_ERRORS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
# Requests encoded between two pauses: half a millisecond, a fraction of the interpreter's switch interval.
_TURN = 16
_TURN_S = 50e-6


def attribute(key: str, value: str | int | float | bool) -> Any:
    """One attribute."""
    if isinstance(value, bool):
        return KeyValue(key=key, value=AnyValue(bool_value=value))
    if isinstance(value, int):
        return KeyValue(key=key, value=AnyValue(int_value=value))
    if isinstance(value, float):
        return KeyValue(key=key, value=AnyValue(double_value=value))
    return KeyValue(key=key, value=AnyValue(string_value=value[:MAX_TEXT]))


class Encoder:
    """Makes export requests. Used by one thread. `pause` lets other threads have the interpreter."""

    def __init__(
        self, resource: Mapping[str, str | int], pause: Callable[[], None] = lambda: time.sleep(_TURN_S)
    ) -> None:
        """`resource`: the attributes of this process."""
        self._resource = [attribute(key, value) for key, value in resource.items()]
        self._random = random.Random()  # noqa: S311 - ids need to differ, not to be secret
        self._pause = pause
        self._common: dict[tuple[str, int, str], list[Any]] = {}
        self._version = importlib.metadata.version("onclock")

    def encode(self, items: Sequence[Finished], offset_ns: int) -> bytes:
        """One serialized `ExportTraceServiceRequest`. `offset_ns`: time since 1970 minus the monotonic clock."""
        message = ExportTraceServiceRequest()
        resource_spans = message.resource_spans.add(schema_url=SCHEMA_URL)
        resource_spans.resource.attributes.extend(self._resource)
        scope_spans = resource_spans.scope_spans.add(schema_url=SCHEMA_URL)
        scope_spans.scope.name = "onclock"
        scope_spans.scope.version = self._version
        done = 0
        for item in items:
            if isinstance(item, TracedBatch):
                self._batch(scope_spans.spans, item, offset_ns)
            else:
                self._failure(scope_spans.spans, item, offset_ns)
            done += size_of(item)
            if done >= _TURN:
                done = 0
                self._pause()
        return bytes(message.SerializeToString())

    def _span_id(self) -> bytes:
        return (self._random.getrandbits(64) or 1).to_bytes(8, "big")

    def _batch(self, spans: Any, batch: TracedBatch, offset_ns: int) -> None:
        record = batch.record
        common = [
            attribute("onclock.batch.id", f"{record.device}:{record.dispatched_ns}"),
            attribute("onclock.batch.device", record.device),
            attribute("onclock.batch.rows", record.rows),
            attribute("onclock.batch.bucket", record.bucket),
            attribute("onclock.batch.requests", record.requests),
            attribute("onclock.batch.reason", record.reason.value),
            attribute("onclock.batch.expected_ms", record.expected_ns / NS_PER_MS),
        ]
        dispatched, done = record.dispatched_ns + offset_ns, record.done_ns + offset_ns
        ids = [self._span_id() for _ in batch.requests]
        for number, (request, batch_id) in enumerate(zip(batch.requests, ids, strict=True)):
            late = record.done_ns > request.deadline_ns
            server = self._server(spans, batch.model, batch.version, request, "OK", done, offset_ns)
            server.attributes.append(attribute("onclock.outcome", "late" if late else "ok"))
            trace = request.trace
            child = {"trace_id": trace.trace_id, "trace_state": trace.state, "flags": _SAMPLED | _REMOTE_KNOWN}
            internal = Span.SPAN_KIND_INTERNAL
            spans.add(
                span_id=self._span_id(),
                parent_span_id=trace.span_id,
                name="queue",
                kind=internal,
                start_time_unix_nano=request.arrival_ns + offset_ns,
                end_time_unix_nano=dispatched,
                **child,
            )
            span = spans.add(
                span_id=batch_id,
                parent_span_id=trace.span_id,
                name="batch",
                kind=internal,
                start_time_unix_nano=dispatched,
                end_time_unix_nano=done,
                attributes=common,
                **child,
            )
            others = range(1, len(ids)) if number == 0 else range(1)
            for other in others[:MAX_LINKS]:
                other_trace = batch.requests[other].trace
                span.links.add(
                    trace_id=other_trace.trace_id,
                    span_id=ids[other],
                    trace_state=other_trace.state,
                    flags=_SAMPLED | _REMOTE_KNOWN,
                )
            span.dropped_links_count = max(0, len(others) - MAX_LINKS)
            spans.add(
                span_id=self._span_id(),
                parent_span_id=batch_id,
                name="execution",
                kind=internal,
                start_time_unix_nano=record.started_ns + offset_ns,
                end_time_unix_nano=record.finished_ns + offset_ns,
                **child,
            )

    def _failure(self, spans: Any, failure: TracedFailure, offset_ns: int) -> None:
        end = failure.end_ns + offset_ns
        span = self._server(spans, failure.model, failure.version, failure.request, failure.status, end, offset_ns)
        span.attributes.extend(
            [attribute("onclock.outcome", failure.reason), attribute("error.type", failure.status)]
            if failure.status in _ERRORS
            else [attribute("onclock.outcome", failure.reason)]
        )
        if failure.status in _ERRORS:
            span.status.code = Status.STATUS_CODE_ERROR
            span.status.message = failure.message[:MAX_TEXT]
        elif failure.message:
            span.attributes.append(attribute("onclock.message", failure.message))

    def _server(
        self, spans: Any, model: str, version: int, request: TracedRequest, status: str, end: int, offset_ns: int
    ) -> Any:
        trace = request.trace
        span = spans.add(
            trace_id=trace.trace_id,
            span_id=trace.span_id,
            parent_span_id=trace.parent_id,
            trace_state=trace.state,
            flags=_SAMPLED | _REMOTE_KNOWN | (_REMOTE if trace.parent_id else 0),
            name=f"{_SERVICE}/{trace.method}",
            kind=Span.SPAN_KIND_SERVER,
            start_time_unix_nano=request.arrival_ns + offset_ns,
            end_time_unix_nano=end,
            attributes=self._of_model(model, version, trace.method),
        )
        own = [attribute("rpc.response.status_code", status)]
        if request.rows:
            own += [
                attribute("onclock.request.rows", request.rows),
                attribute("onclock.request.priority", request.priority),
            ]
        if request.deadline_ns != NEVER_NS:
            own.append(attribute("onclock.request.deadline_ms", (request.deadline_ns - request.arrival_ns) / NS_PER_MS))
        if request.request_id:
            own.append(attribute("onclock.request.id", request.request_id.decode(errors="replace")))
        span.attributes.extend(own)
        return span

    def _of_model(self, model: str, version: int, method: str) -> list[Any]:
        key = (model, version, method)
        known = self._common.get(key)
        if known is None:
            if len(self._common) >= _MAX_KNOWN:
                self._common.clear()
            known = [attribute("rpc.system.name", "grpc"), attribute("rpc.method", f"{_SERVICE}/{method}")]
            if model:
                known += [attribute("onclock.model.name", model), attribute("onclock.model.version", version)]
            self._common[key] = known
        return known
