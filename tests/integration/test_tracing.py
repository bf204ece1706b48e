"""Distributed tracing of a running server: a client that traces, a collector that receives, both ingresses."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.support import onnx_models
from tests.support.client import Client, request
from tests.support.native import needs_native
from tests.support.onnx_models import write_model
from tests.support.otlp import Collector, Received, collector
from tests.support.server import ROOT, RunningServer, running_server
from tests.support.stream import Stream, metric, wait_for

X = np.zeros((1, 4), np.float32)
STEP = {"x": np.zeros((1, 1), np.float32)}
SERVER_KIND = 2
UNARY = "inference.GRPCInferenceService/ModelInfer"
STREAM = "inference.GRPCInferenceService/ModelStreamInfer"
QUICK = {"OTEL_BSP_SCHEDULE_DELAY": "50"}
# Objectives: one that the queue behind others breaks, one that not even an idle server can keep.
PROMISED = 'max_batch_size: 1\nparameters { key: "latency_slo_ms" value { string_value: "50" } }\n'
HASTY = 'max_batch_size: 1\nparameters { key: "latency_slo_ms" value { string_value: "5" } }\n'


@dataclass
class Caller:
    """A span of a client's, as it goes into metadata."""

    sampled: bool = True
    trace_id: str = field(default_factory=lambda: secrets.token_hex(16))
    span_id: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-0{int(self.sampled)}"

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("traceparent", self.traceparent),)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    write_model(root, "identity", onnx_models.identity(), config="max_batch_size: 64\ndynamic_batching {}\n")
    write_model(root, "slow", onnx_models.slow_for(150), config="max_batch_size: 1\n")
    write_model(root, "promised", onnx_models.slow_for(5), config=PROMISED)
    write_model(root, "hasty", onnx_models.slow_for(60), config=HASTY)
    write_model(root, "poison", onnx_models.poison())
    write_model(root, "backbone", onnx_models.backbone(), config="max_batch_size: 16\ndynamic_batching {}\n")
    write_model(root, "head", onnx_models.head(), config=onnx_models.HEAD_CONFIG.replace("BACKBONE", "backbone"))
    write_model(root, "named", onnx_models.named_sequences(), config=onnx_models.NAMED_CONFIG)
    return root


@pytest.fixture(scope="module")
def receiver() -> Iterator[Collector]:
    with collector() as running:
        yield running


@pytest.fixture(scope="module", params=["native", "core"])
def server(request: pytest.FixtureRequest, repository: Path, receiver: Collector) -> Iterator[RunningServer]:
    """Traces what clients trace, and nothing else."""
    if request.param == "native":
        needs_native()
    # Either way to the collector, one for each ingress.
    protocol, url = ("http/protobuf", receiver.http) if request.param == "native" else ("grpc", receiver.grpc)
    flags = ("--ingress", request.param, "--metrics-port", "0", "--otlp-endpoint", url, "--trace-sample-ratio", "0")
    with running_server(repository, *flags, environment={**QUICK, "OTEL_EXPORTER_OTLP_PROTOCOL": protocol}) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Client:
    return Client(server.channel())


def spans_of(receiver: Collector, callers: Sequence[Caller], count: int) -> dict[str, list[Received]]:
    """Trace -> the server's spans in it, once there are `count` in all."""
    traces = {caller.trace_id for caller in callers}

    def of_server(spans: list[Received]) -> list[Received]:
        return [s for s in spans if s.trace_id in traces and s.resource.get("service.name") == "onclock"]

    found = of_server(receiver.wait_for(lambda spans: len(of_server(spans)) >= count))
    return {trace: [s for s in found if s.trace_id == trace] for trace in traces}


def one_span(receiver: Collector, caller: Caller) -> Received:
    """The only span of a request that was not answered."""
    (span,) = spans_of(receiver, [caller], 1)[caller.trace_id]
    assert span.kind == SERVER_KIND
    assert span.parent_id == caller.span_id
    return span


def named(spans: list[Received], name: str) -> Received:
    (span,) = (s for s in spans if s.name == name)
    return span


def test_a_trace_goes_through(client: Client, receiver: Collector) -> None:
    """From a client with OpenTelemetry's own library: its span is the server's parent, and times are in order."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(f"{receiver.http}/v1/traces")))
    carrier: dict[str, str] = {}
    with provider.get_tracer("client").start_as_current_span("calling", kind=SpanKind.CLIENT) as calling:
        TraceContextTextMapPropagator().inject(carrier)
        client.infer(request("identity", {"x": X}, request_id="one"), metadata=tuple(carrier.items()), timeout=20)
    provider.shutdown()
    trace = f"{calling.get_span_context().trace_id:032x}"
    found = receiver.wait_for(lambda spans: sum(s.trace_id == trace for s in spans) >= 5)
    by_name = {s.name: s for s in found if s.trace_id == trace}
    assert set(by_name) == {"calling", UNARY, "queue", "batch", "execution"}
    assert by_name[UNARY].parent_id == by_name["calling"].span_id
    assert by_name["queue"].parent_id == by_name["batch"].parent_id == by_name[UNARY].span_id
    assert by_name["execution"].parent_id == by_name["batch"].span_id
    order = [
        by_name["calling"].start_ns,
        by_name[UNARY].start_ns,
        by_name["queue"].end_ns,
        by_name["execution"].start_ns,
        by_name["execution"].end_ns,
        by_name[UNARY].end_ns,
    ]
    assert order == sorted(order)
    assert by_name["queue"].start_ns == by_name[UNARY].start_ns
    # The server's span ends when its batch is done, a little after the client has its answer.
    assert by_name[UNARY].end_ns < by_name["calling"].end_ns + 1_000_000_000
    facts = by_name[UNARY].attributes
    assert facts["onclock.model.name"] == "identity"
    assert facts["onclock.request.id"] == "one"
    assert facts["rpc.response.status_code"] == "OK"
    assert 19_000 < facts["onclock.request.deadline_ms"] < 20_000


def test_the_callers_decision_counts(client: Client, receiver: Collector) -> None:
    """Unsampled, absent or invalid: no span (at a ratio of 0). What is sampled comes, with its state."""
    quiet, broken, sampled = Caller(sampled=False), Caller(), Caller()
    client.infer(request("identity", {"x": X}), metadata=quiet.metadata)
    client.infer(request("identity", {"x": X}), metadata=(("traceparent", broken.traceparent + "x"),))
    client.infer(request("identity", {"x": X}))
    state = (("tracestate", "a=1"), ("tracestate", "b=2"))
    client.infer(request("identity", {"x": X}), metadata=sampled.metadata + state)
    spans = spans_of(receiver, [quiet, broken, sampled], 4)
    assert {trace: len(found) for trace, found in spans.items() if found} == {sampled.trace_id: 4}
    assert {s.state for s in spans[sampled.trace_id]} == {"a=1,b=2"}
    assert named(spans[sampled.trace_id], UNARY).flags == 0x301


def test_requests_that_shared_a_batch(client: Client, receiver: Collector) -> None:
    """Each trace is whole, and their `batch` spans are linked: the first with all others, those with it."""
    callers = [Caller() for _ in range(6)]
    before = client.infer_future(request("slow", {"x": X}))
    # While that one runs, these come together; one of them is not traced.
    futures = [client.infer_future(request("identity", {"x": X}), metadata=caller.metadata) for caller in callers]
    futures.append(client.infer_future(request("identity", {"x": X})))
    for future in (before, *futures):
        future.result()
    spans = spans_of(receiver, callers, 4 * len(callers))
    batches = [named(found, "batch") for found in spans.values()]
    together: dict[str, list[Received]] = {}
    for batch in batches:
        together.setdefault(batch.attributes["onclock.batch.id"], []).append(batch)
    largest = max(together.values(), key=len)
    assert len(largest) >= 3
    assert len({(b.start_ns, b.end_ns) for b in largest}) == 1
    first = max(largest, key=lambda b: len(b.links))
    others = {(b.trace_id, b.span_id) for b in largest if b is not first}
    assert set(first.links) == others
    for batch in largest:
        assert batch.attributes["onclock.batch.requests"] >= len(largest)
        if batch is not first:
            assert batch.links == [(first.trace_id, first.span_id)]


def test_requests_that_are_not_answered(client: Client, receiver: Collector) -> None:
    """Each has its span, which says why: unknown, invalid, out of time, failed."""
    for message, status, outcome in (
        (request("nobody", {"x": X}), "INVALID_ARGUMENT", "unknown_model"),
        (request("identity", {"nonsense": X}), "INVALID_ARGUMENT", "invalid"),
        (request("hasty", {"x": X}), "DEADLINE_EXCEEDED", "unreachable"),
        (request("poison", {"index": np.array([[1000]])}), "INTERNAL", "execution"),
    ):
        # Several, since an idle server tries now and then what it thinks it cannot keep.
        callers = [Caller() for _ in range(5)]
        futures = [client.infer_future(message, metadata=caller.metadata) for caller in callers]
        codes = [future.code().name for future in futures]
        assert status in codes
        span = one_span(receiver, callers[codes.index(status)])
        assert span.attributes["rpc.response.status_code"] == status
        assert span.attributes["onclock.outcome"] == outcome
        assert span.status == (0 if status == "INVALID_ARGUMENT" else 2)
        assert ("onclock.model.name" in span.attributes) == (outcome not in ("unknown_model", "invalid"))


def test_a_request_that_is_refused_behind_others(client: Client, receiver: Collector) -> None:
    """It is told that the server is overloaded; so does its span. (Some may be refused unread, and have none.)"""
    callers = [Caller() for _ in range(400)]
    futures = [client.infer_future(request("promised", {"x": X}), metadata=c.metadata) for c in callers]
    codes = {caller.trace_id: future.code().name for caller, future in zip(callers, futures, strict=True)}

    def refused(spans: list[Received]) -> list[Received]:
        return [s for s in spans if s.trace_id in codes and s.attributes.get("onclock.outcome") == "overloaded"]

    for span in refused(receiver.wait_for(lambda spans: bool(refused(spans)))):
        assert codes[span.trace_id] == span.attributes["rpc.response.status_code"] == "UNAVAILABLE"
        assert span.attributes["onclock.model.name"] == "promised"
        assert span.parent_id in {caller.span_id for caller in callers}


def test_a_request_that_is_given_up(client: Client, server: RunningServer, receiver: Collector) -> None:
    """Its span ends when the client goes away while it waits."""
    for _ in range(20):
        caller = Caller()
        running = client.infer_future(request("slow", {"x": X}))
        waiting = client.infer_future(request("identity", {"x": X}), metadata=caller.metadata)
        seen = False
        while not seen and not running.done():
            seen = metric(server, 'onclock_queue_requests{model="identity"') == 1
        waiting.cancel()
        running.exception()  # it has ended, whatever became of it on a busy machine
        if not seen:
            continue
        span = next(iter(spans_of(receiver, [caller], 1)[caller.trace_id]))
        if span.attributes["rpc.response.status_code"] == "CANCELLED":
            assert span.attributes["onclock.outcome"] == "cancelled"
            assert span.attributes["onclock.model.name"] == "identity"
            return
    pytest.fail("no request was ever given up while it waited")


def test_streams(server: RunningServer, receiver: Collector) -> None:
    """A stream's metadata is for all its requests; a request's own parameter is for that one."""
    whole, own, quiet = Caller(), Caller(), Caller(sampled=False)
    stream = Stream(server, whole.metadata)
    stream.send(
        request("identity", {"x": X}, request_id="a"),
        request("identity", {"x": X}, request_id="b", parameters={"traceparent": own.traceparent}),
        request("identity", {"x": X}, request_id="c", parameters={"traceparent": quiet.traceparent}),
        request("nobody", {"x": X}, request_id="d"),
    )
    stream.done()
    assert len(stream.rest()) == 4
    spans = spans_of(receiver, [whole, own, quiet], 9)
    ids = {
        name: sorted(s.attributes.get("onclock.request.id", "") for s in spans[caller.trace_id] if s.name == STREAM)
        for name, caller in (("whole", whole), ("own", own), ("quiet", quiet))
    }
    assert ids == {"whole": ["", "a"], "own": ["b"], "quiet": []}
    assert named(spans[own.trace_id], STREAM).parent_id == own.span_id


def test_heads_and_steps_have_spans_of_their_own_name(client: Client, receiver: Collector) -> None:
    """A head's request, run by its backbone; steps of a sequence, the one that must not be run included."""
    head, first, second, lost = Caller(), Caller(), Caller(), Caller()
    client.infer(request("head", {"x": np.ones((2, 8), np.float32)}), metadata=head.metadata)
    started = {"sequence_id": "s", "sequence_start": True}
    client.infer(request("named", STEP, parameters=started), metadata=first.metadata)
    client.infer(request("named", STEP, parameters={"sequence_id": "s"}), metadata=second.metadata)
    with pytest.raises(grpc.RpcError):
        client.infer(request("named", STEP, parameters={"sequence_id": "nobody"}), metadata=lost.metadata)
    spans = spans_of(receiver, [head, first, second, lost], 13)
    for caller, model in ((head, "head"), (first, "named"), (second, "named")):
        found = spans[caller.trace_id]
        assert named(found, UNARY).attributes["onclock.model.name"] == model
        assert named(found, UNARY).attributes["onclock.outcome"] == "ok"
        assert len(found) == 4
    (refused,) = spans[lost.trace_id]
    assert refused.attributes["onclock.outcome"] == "invalid"
    assert refused.attributes["onclock.model.name"] == "named"


def scraped(server: RunningServer, accept: str) -> tuple[str, str]:
    asked = urllib.request.Request(server.metrics_url, headers={"Accept": accept})
    with urllib.request.urlopen(asked, timeout=10) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def test_exemplars_name_the_trace(client: Client, server: RunningServer) -> None:
    """In OpenMetrics, for who asks for it; the classic format has none."""
    caller = Caller()
    client.infer(request("identity", {"x": X}), metadata=caller.metadata)
    prometheus = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    wait_for(lambda: caller.trace_id in scraped(server, prometheus)[1], "the exemplar")
    kind, text = scraped(server, prometheus)
    assert kind == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    found = {
        (family.name, sample.labels["model"])
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.exemplar and sample.exemplar.labels == {"trace_id": caller.trace_id}
    }
    assert ("onclock_request_duration_seconds", "identity") in found
    kind, text = scraped(server, "*/*")
    assert kind == "text/plain; version=0.0.4; charset=utf-8"
    assert "trace_id" not in text


def test_clients_cannot_ask_for_more_than_the_limit(repository: Path, receiver: Collector) -> None:
    """What is beyond it is served all the same, without spans, and counted."""
    flags = ("--metrics-port", "0", "--otlp-endpoint", receiver.http, "--trace-client-limit", "5")
    with running_server(repository, *flags, environment=QUICK) as server:
        client = Client(server.channel())
        began = time.monotonic()
        for _ in range(50):
            client.infer(request("identity", {"x": X}), metadata=Caller().metadata)
        most = 5 + 5 * (time.monotonic() - began) + 1
        over = 'onclock_traced_requests_total{result="over_limit"}'
        exported = 'onclock_traced_requests_total{result="exported"}'
        wait_for(lambda: metric(server, over) + metric(server, exported) == 50, "the counts")
        assert 5 <= metric(server, exported) <= most


def test_a_ratio_of_one_traces_everything(repository: Path, receiver: Collector) -> None:
    """Also those whose client says nothing, as traces of their own, but not those whose client says no. Where to is in
    the environment, as are the names of the process."""
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.http,
        "OTEL_SERVICE_NAME": "everything",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
        **QUICK,
    }
    with running_server(repository, "--trace-sample-ratio", "1", environment=environment) as server:
        client = Client(server.channel())
        client.infer(request("identity", {"x": X}), metadata=Caller(sampled=False).metadata)
        for _ in range(3):
            client.infer(request("identity", {"x": X}))
    mine = [s for s in receiver.spans if s.resource["service.name"] == "everything"]
    roots = [s for s in mine if s.kind == SERVER_KIND]
    assert [s.parent_id for s in roots] == [""] * 3
    assert len({s.trace_id for s in roots}) == 3
    assert len(mine) == 12
    assert mine[0].resource["deployment.environment.name"] == "test"


def test_what_waits_is_sent_before_the_end(repository: Path, receiver: Collector) -> None:
    """The last requests before SIGTERM have their spans, though it was not yet time to send them."""
    caller = Caller()
    environment = {"OTEL_BSP_SCHEDULE_DELAY": "3600000"}
    with running_server(repository, "--otlp-endpoint", receiver.http, environment=environment) as server:
        Client(server.channel()).infer(request("identity", {"x": X}), metadata=caller.metadata)
    assert len([s for s in receiver.spans if s.trace_id == caller.trace_id]) == 4


@pytest.mark.parametrize(
    ("protocol", "fault"),
    [("http/protobuf", "nobody"), ("grpc", "hangs"), ("http/protobuf", "hangs"), ("grpc", "errors")],
)
def test_a_collector_in_trouble_harms_nobody(repository: Path, protocol: str, fault: str) -> None:
    """Requests are answered, what is lost is counted, and the server ends in time and as ever."""
    with collector() as receiver, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = receiver.grpc if protocol == "grpc" else receiver.http
        if fault == "nobody":
            url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        elif fault == "hangs":
            receiver.answering.clear()
        else:
            receiver.statuses += [500] * 10_000
        environment = {**QUICK, "OTEL_EXPORTER_OTLP_PROTOCOL": protocol, "OTEL_EXPORTER_OTLP_TIMEOUT": "300"}
        with running_server(
            repository, "--otlp-endpoint", url, "--metrics-port", "0", environment=environment
        ) as server:
            client = Client(server.channel())
            for _ in range(20):
                client.infer(request("identity", {"x": X}), metadata=Caller().metadata)
            failed = 'onclock_traced_requests_total{result="failed"}'
            wait_for(lambda: metric(server, failed) > 0, "the count")
            for _ in range(20):
                client.infer(request("identity", {"x": X}), metadata=Caller().metadata)
            before = time.monotonic()
            server.stop()
            assert time.monotonic() - before < 10
        assert any("spans are lost" in str(line.get("message")) for line in server.log_lines())
        assert server.log_lines("stopped")


def serve(repository: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A server that is to end by itself."""
    command = [sys.executable, "-m", "service", "serve", "--model-repository", str(repository), "--grpc-port", "0"]
    return subprocess.run(
        [*command, "--metrics-port", "off", *flags],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def test_what_is_missing_is_named(repository: Path, tmp_path: Path) -> None:
    """Without the package, a server that is to send spans says what to install and does not start; one whose
    environment merely mentions a collector serves without."""
    (tmp_path / "opentelemetry").mkdir()
    (tmp_path / "opentelemetry" / "__init__.py").write_text("")
    hidden = {"PYTHONPATH": str(tmp_path)}
    ended = serve(repository, "--otlp-endpoint", "http://127.0.0.1:4318", **hidden)
    assert ended.returncode == 1
    assert "pip install 'onclock[otlp]'" in ended.stderr
    environment = {**hidden, "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}
    with running_server(repository, environment=environment) as server:
        assert "onclock[otlp]" in server.wait_for_log("no spans are sent")["reason"]
        Client(server.channel()).infer(request("identity", {"x": X}), metadata=Caller().metadata)


def test_what_is_wrong_is_named(repository: Path) -> None:
    """A flag that is no URL ends it at once (2); with a variable that is wrong it does not start."""
    ended = serve(repository, "--otlp-endpoint", "collector:4318")
    assert ended.returncode == 2
    assert "--otlp-endpoint (or ONCLOCK_OTLP_ENDPOINT): 'collector:4318' is not accepted" in ended.stderr
    ended = serve(repository, "--otlp-endpoint", "http://127.0.0.1:1", OTEL_EXPORTER_OTLP_TIMEOUT="soon")
    assert ended.returncode == 1
    assert "OTEL_EXPORTER_OTLP_TIMEOUT" in ended.stderr
