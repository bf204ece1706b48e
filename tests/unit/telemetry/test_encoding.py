"""What finished, as spans."""

from __future__ import annotations

from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from service.clock import NEVER_NS, NS_PER_MS
from service.telemetry.encoding import MAX_LINKS, Encoder
from service.telemetry.finished import Finished, TracedBatch, TracedFailure, TracedRequest
from service.trace_context import RequestTrace
from tests.unit.metrics.records import batch

SECOND = 1_000_000_000
EPOCH = 1_700_000_000 * SECOND
SERVER, INTERNAL, ERROR = 2, 1, 2


def request(number: int = 1, parent: bytes = b"p" * 8, deadline_ns: int = NEVER_NS, state: str = "") -> TracedRequest:
    trace = RequestTrace(number.to_bytes(16, "big"), number.to_bytes(8, "big"), parent, state, "ModelInfer")
    return TracedRequest(trace, 90 * NS_PER_MS, deadline_ns, 2, 1, b"the id")


def encoded(*items: Finished) -> list[Any]:
    pauses: list[None] = []
    message = ExportTraceServiceRequest.FromString(
        Encoder({"service.name": "x"}, lambda: pauses.append(None)).encode(list(items), EPOCH)
    )
    (resource,) = message.resource_spans
    assert attributes(resource.resource) == {"service.name": "x"}
    (scope,) = resource.scope_spans
    assert scope.scope.name == "onclock"
    return list(scope.spans)


def attributes(of: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in of.attributes}


def test_an_answered_request() -> None:
    """Four spans, one below the other, with the batch's own times."""
    record = batch(100, rows=5, requests=3, expected_ms=12.5)
    spans = encoded(TracedBatch("resnet", 7, record, [request(state="a=1", deadline_ns=110 * NS_PER_MS)]))
    server, queue, ridden, execution = spans
    assert [(s.name, s.kind) for s in spans] == [
        ("inference.GRPCInferenceService/ModelInfer", SERVER),
        ("queue", INTERNAL),
        ("batch", INTERNAL),
        ("execution", INTERNAL),
    ]
    assert {s.trace_id for s in spans} == {(1).to_bytes(16, "big")}
    assert {s.trace_state for s in spans} == {"a=1"}
    assert server.parent_span_id == b"p" * 8
    assert queue.parent_span_id == ridden.parent_span_id == server.span_id == (1).to_bytes(8, "big")
    assert execution.parent_span_id == ridden.span_id
    assert len({s.span_id for s in spans}) == 4
    assert [s.flags for s in spans] == [0x301, 0x101, 0x101, 0x101]
    times = [((s.start_time_unix_nano - EPOCH) / NS_PER_MS, (s.end_time_unix_nano - EPOCH) / NS_PER_MS) for s in spans]
    assert times == [(90, 113), (90, 100), (100, 113), (101, 111)]
    assert attributes(server) == {
        "rpc.system.name": "grpc",
        "rpc.method": "inference.GRPCInferenceService/ModelInfer",
        "rpc.response.status_code": "OK",
        "onclock.model.name": "resnet",
        "onclock.model.version": 7,
        "onclock.request.id": "the id",
        "onclock.request.rows": 2,
        "onclock.request.priority": 1,
        "onclock.request.deadline_ms": 20.0,
        "onclock.outcome": "late",
    }
    assert attributes(ridden) == {
        "onclock.batch.id": "cpu:100000000",
        "onclock.batch.device": "cpu",
        "onclock.batch.rows": 5,
        "onclock.batch.bucket": 5,
        "onclock.batch.requests": 3,
        "onclock.batch.reason": "drained",
        "onclock.batch.expected_ms": 12.5,
    }


def test_a_first_span_and_one_without_a_deadline() -> None:
    """No parent, no attribute; in time."""
    server = encoded(TracedBatch("m", 1, batch(100), [request(parent=b"")]))[0]
    assert server.parent_span_id == b""
    assert server.flags == 0x101
    assert "onclock.request.deadline_ms" not in attributes(server)
    assert attributes(server)["onclock.outcome"] == "ok"


def test_requests_of_one_batch_are_linked() -> None:
    """The first to all others, all others to the first; what is beyond the limit is counted."""
    count = MAX_LINKS + 10
    spans = encoded(TracedBatch("m", 1, batch(100), [request(number) for number in range(1, count + 1)]))
    ridden = [s for s in spans if s.name == "batch"]
    first, *others = ridden
    assert [(link.trace_id, link.span_id) for link in first.links] == [
        (s.trace_id, s.span_id) for s in others[:MAX_LINKS]
    ]
    assert first.dropped_links_count == 9
    for other in others:
        assert [(link.trace_id, link.span_id) for link in other.links] == [(first.trace_id, first.span_id)]


def test_one_that_was_refused() -> None:
    """A span with the reason: an error where it is the server's by OpenTelemetry's list, else the client's doing."""
    end = 95 * NS_PER_MS
    refused = TracedFailure("m", 1, request(), "UNAVAILABLE", "overloaded", "would take 30 ms", end)
    invalid = TracedFailure("", 0, request(), "INVALID_ARGUMENT", "unknown_model", "no such model", end)
    gone = TracedFailure("m", 1, request(), "CANCELLED", "cancelled", "", end)
    one, two, three = encoded(refused, invalid, gone)
    assert (one.status.code, one.status.message) == (ERROR, "would take 30 ms")
    assert (one.end_time_unix_nano - EPOCH) == end
    facts = attributes(one)
    assert facts["onclock.outcome"] == "overloaded"
    assert facts["error.type"] == facts["rpc.response.status_code"] == "UNAVAILABLE"
    assert two.status.code == three.status.code == 0
    assert "onclock.model.name" not in attributes(two)
    assert attributes(two)["onclock.message"] == "no such model"
    assert "error.type" not in attributes(two)
    assert attributes(three)["rpc.response.status_code"] == "CANCELLED"


def test_text_of_clients_is_bounded() -> None:
    """An id of a megabyte, and one that is no text."""
    long = request()._replace(request_id=b"x" * (1 << 20))
    broken = request()._replace(request_id=b"\xff\xfe")
    spans = encoded(TracedBatch("m", 1, batch(100), [long, broken]))
    found = [attributes(s)["onclock.request.id"] for s in spans if s.kind == SERVER]
    assert found == ["x" * 1024, "\ufffd\ufffd"]


def test_others_get_the_interpreter_meanwhile() -> None:
    """A pause every few requests."""
    pauses: list[None] = []
    items = [TracedBatch("m", 1, batch(100), [request()]) for _ in range(100)]
    Encoder({}, lambda: pauses.append(None)).encode(items, EPOCH)
    assert len(pauses) == 6
