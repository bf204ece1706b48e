"""A receiver of OTLP on real ports, by HTTP and by gRPC: it keeps the spans it is sent and may be told to misbehave."""

from __future__ import annotations

import contextlib
import gzip
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
import trustme
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

WAIT_S = 20.0


@dataclass(slots=True)
class Received:
    """A span as it came: ids in hex, attributes as Python values."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    kind: int
    status: int
    attributes: dict[str, Any]
    resource: dict[str, Any]
    links: list[tuple[str, str]]
    state: str
    flags: int


@dataclass
class Collector:
    """What came, and how the next exports are answered: `statuses` are used up one by one (HTTP codes; by gRPC any but
    200 is UNAVAILABLE), each after `delay_s`."""

    http_port: int = 0
    grpc_port: int = 0
    spans: list[Received] = field(default_factory=list)
    exports: int = 0
    headers: list[dict[str, str]] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    rejected: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)
    # Exports wait while it is not set.
    answering: threading.Event = field(default_factory=threading.Event)

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def grpc(self) -> str:
        return f"http://127.0.0.1:{self.grpc_port}"

    def wait_for(self, enough: Callable[[list[Received]], bool], timeout_s: float = WAIT_S) -> list[Received]:
        """The spans, once there are enough of them."""
        end = time.monotonic() + timeout_s
        with self.changed:
            while not enough(self.spans):
                assert self.changed.wait(end - time.monotonic()), f"only these came: {[s.name for s in self.spans]}"
            return list(self.spans)

    def wait_exports(self, count: int) -> None:
        """Until so many exports were tried."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.exports >= count, WAIT_S), f"{self.exports} exports"

    def take(self, payload: bytes, headers: dict[str, str]) -> int:
        """Take an export in; the status to answer with."""
        with self.changed:
            self.exports += 1
            self.changed.notify_all()
        self.answering.wait(WAIT_S)
        message = ExportTraceServiceRequest.FromString(payload)
        with self.changed:
            status = self.statuses.pop(0) if self.statuses else 200
            self.headers.append(headers)
            if status == 200:
                self.spans += _spans(message)
            self.changed.notify_all()
        return status

    def answer(self) -> bytes:
        """The body of an answer."""
        message = ExportTraceServiceResponse()
        if self.rejected:
            message.partial_success.rejected_spans = self.rejected
        return bytes(message.SerializeToString())


@contextlib.contextmanager
def collector(certificate: trustme.LeafCert | None = None) -> Iterator[Collector]:
    """A receiver on two free ports; with TLS if there is a certificate."""
    collector = Collector()
    collector.answering.set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers["content-encoding"] == "gzip":
                body = gzip.decompress(body)
            status = collector.take(body, {"path": self.path, **{k.lower(): v for k, v in self.headers.items()}})
            with contextlib.suppress(OSError):
                answer = collector.answer()
                self.send_response(status)
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Nothing is logged."""

    def export(payload: bytes, context: grpc.ServicerContext) -> bytes:
        if collector.take(payload, dict(context.invocation_metadata())) != 200:
            context.abort(grpc.StatusCode.UNAVAILABLE, "come again")
        return collector.answer()

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(context)
        http.socket = context.wrap_socket(http.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True).start()
    server = grpc.server(ThreadPoolExecutor(4))
    method = grpc.unary_unary_rpc_method_handler(export)
    name = "opentelemetry.proto.collector.trace.v1.TraceService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {"Export": method}),))
    collector.http_port = http.server_port
    if certificate is None:
        collector.grpc_port = server.add_insecure_port("127.0.0.1:0")
    else:
        chain = b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
        credentials = grpc.ssl_server_credentials([(certificate.private_key_pem.bytes(), chain)])
        collector.grpc_port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield collector
    finally:
        collector.answering.set()
        server.stop(0).wait()
        http.shutdown()
        http.server_close()


def _spans(message: Any) -> list[Received]:
    return [
        Received(
            span.name,
            span.trace_id.hex(),
            span.span_id.hex(),
            span.parent_span_id.hex(),
            span.start_time_unix_nano,
            span.end_time_unix_nano,
            span.kind,
            span.status.code,
            _values(span.attributes),
            _values(resource.resource.attributes),
            [(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
            span.trace_state,
            span.flags,
        )
        for resource in message.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def _values(attributes: Any) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in attributes}
