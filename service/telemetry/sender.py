"""One export to a collector: bytes out, what became of them in. HTTP by the standard library, gRPC by the library that
serves.

Promise: `send` returns within about the time it is given, and never raises for what a collector or a network does.
"""

from __future__ import annotations

import gzip
import http.client
import importlib.metadata
import math
import ssl

import grpc
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from service.config.otlp import Destination, Protocol, TelemetryError
from service.telemetry.exporter import Sender, Sent

_EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
# What the specification says may be tried again.
_HTTP_AGAIN = frozenset({429, 502, 503, 504})
_GRPC_AGAIN = frozenset(
    {
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)
# An answer says little; whoever says more is not a collector.
_MAX_ANSWER = 64 << 10


def make_sender(destination: Destination) -> Sender:
    """What sends there; nothing is sent or connected yet. Raises `TelemetryError`."""
    try:
        return GrpcSender(destination) if destination.protocol is Protocol.GRPC else HttpSender(destination)
    except (OSError, ValueError) as error:
        raise TelemetryError(f"{destination}: certificates cannot be used: {error}") from error


class HttpSender:
    """OTLP over HTTP, protobuf."""

    def __init__(self, destination: Destination) -> None:
        self._destination = destination
        self._tls = _context(destination) if destination.secure else None
        self._connection: http.client.HTTPConnection | None = None
        self._headers = {
            "content-type": "application/x-protobuf",
            "user-agent": f"onclock/{importlib.metadata.version('onclock')}",
            **dict(destination.headers),
        }
        if destination.gzip:
            self._headers["content-encoding"] = "gzip"

    def send(self, payload: bytes, timeout_s: float) -> Sent:
        if self._destination.gzip:
            payload = gzip.compress(payload, 1)
        try:
            connection = self._connect(timeout_s)
            connection.request("POST", self._destination.path, payload, self._headers)
            answer = connection.getresponse()
            body = answer.read(_MAX_ANSWER)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            return Sent(f"{type(error).__name__}: {error}", again=True)
        if answer.will_close or not answer.isclosed():
            self.close()
        if answer.status // 100 == 2:
            return _partial(body)
        wait_s = _seconds(answer.getheader("retry-after"))
        return Sent(f"HTTP {answer.status} {answer.reason}", again=answer.status in _HTTP_AGAIN, wait_s=wait_s)

    def _connect(self, timeout_s: float) -> http.client.HTTPConnection:
        connection = self._connection
        if connection is None:
            host, port = self._destination.host, self._destination.port
            connection = self._connection = (
                http.client.HTTPConnection(host, port)
                if self._tls is None
                else http.client.HTTPSConnection(host, port, context=self._tls)
            )
        connection.timeout = timeout_s
        if connection.sock is not None:
            connection.sock.settimeout(timeout_s)
        return connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class GrpcSender:
    """OTLP over gRPC."""

    def __init__(self, destination: Destination) -> None:
        host = f"[{destination.host}]" if ":" in destination.host else destination.host
        target = f"{host}:{destination.port}"
        options = (("grpc.primary_user_agent", f"onclock/{importlib.metadata.version('onclock')}"),)
        compression = grpc.Compression.Gzip if destination.gzip else grpc.Compression.NoCompression
        self._channel = (
            grpc.secure_channel(target, _credentials(destination), options, compression)
            if destination.secure
            else grpc.insecure_channel(target, options, compression)
        )
        self._metadata = destination.headers
        self._export = self._channel.unary_unary(_EXPORT)

    def send(self, payload: bytes, timeout_s: float) -> Sent:
        try:
            return _partial(self._export(payload, timeout=timeout_s, metadata=self._metadata))
        except grpc.RpcError as error:
            code = error.code()
            return Sent(f"{code.name}: {error.details()}", again=code in _GRPC_AGAIN)

    def close(self) -> None:
        self._channel.close()


def _partial(body: bytes) -> Sent:
    """What a collector says of an export that arrived."""
    try:
        partial = ExportTraceServiceResponse.FromString(body).partial_success
    except DecodeError:
        return Sent()  # a proxy's page with status 200, or JSON: it was taken
    return Sent(rejected=max(0, partial.rejected_spans))


def _seconds(retry_after: str | None) -> float:
    """Of a `Retry-After` in seconds; dates are rare, and our own pause will do."""
    try:
        seconds = float(retry_after or 0)
    except ValueError:
        return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0


def _context(destination: Destination) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=destination.authorities)
    if destination.certificate is not None:
        context.load_cert_chain(destination.certificate, destination.key)
    return context


def _credentials(destination: Destination) -> grpc.ChannelCredentials:
    read = (None if path is None else path.read_bytes() for path in (destination.authorities, destination.key))
    authorities, key = read
    certificate = None if destination.certificate is None else destination.certificate.read_bytes()
    return grpc.ssl_channel_credentials(authorities, key, certificate)
