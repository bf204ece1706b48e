"""Where spans are sent and how: the setting, and OpenTelemetry's own environment variables. Pure.

https://opentelemetry.io/docs/specs/otel/protocol/exporter/. A variable for traces (`OTEL_EXPORTER_OTLP_TRACES_...`)
wins over the one for all signals, our own setting over both. What cannot be used raises `TelemetryError`, which names
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from urllib.parse import unquote, urlsplit

_PREFIX = "OTEL_EXPORTER_OTLP_"
_HTTP_PATH = "/v1/traces"
_PORTS = {"http": 80, "https": 443}
# The port that collectors speak gRPC on, by convention; 4318 is the one for HTTP.
_GRPC_PORT = 4317
# The specification's defaults, but for the delay (5 s there): who looks at a trace has just made it. And for the queue
# (2048 spans there): that is half of what a second of traced requests may bring.
_DEFAULT_TIMEOUT_MS = 10_000
_DEFAULT_DELAY_MS = 1_000
_DEFAULT_QUEUE_SPANS = 16_384
_DEFAULT_BATCH_SPANS = 512
# What somebody may set and we do not do. (The sampler is parent-based by ratio, and the ratio a setting of ours.)
_IGNORED = ("OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG", "OTEL_PROPAGATORS")


class TelemetryError(Exception):
    """Spans cannot be sent as the settings say. The message names the setting or what to install."""


class Protocol(Enum):
    """How OTLP is spoken; the values are those of `OTEL_EXPORTER_OTLP_PROTOCOL`."""

    GRPC = "grpc"
    HTTP = "http/protobuf"


@dataclass(frozen=True, slots=True)
class Destination:
    """A collector. `path` is for HTTP alone; `headers` go with every export. `authorities`, `certificate` and `key` are
    files in PEM, for TLS. `resource` are the attributes of this process that were given."""

    protocol: Protocol
    host: str
    port: int
    path: str
    secure: bool
    headers: tuple[tuple[str, str], ...] = ()
    timeout_s: float = _DEFAULT_TIMEOUT_MS / 1e3
    gzip: bool = False
    authorities: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    delay_s: float = _DEFAULT_DELAY_MS / 1e3
    queue_spans: int = _DEFAULT_QUEUE_SPANS
    batch_spans: int = _DEFAULT_BATCH_SPANS
    resource: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.secure else 'http'}://{host}:{self.port}{self.path}"


def find_destination(endpoint: str | None, environment: Mapping[str, str]) -> Destination | None:
    """Where to send spans; None: nowhere. `endpoint` is the setting. Raises `TelemetryError`."""
    variables = _Variables(environment)
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    if endpoint is None and environment.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower() != "otlp":
        return None
    own = environment.get(f"{_PREFIX}TRACES_ENDPOINT", "").strip()
    whole = endpoint or own or environment.get(f"{_PREFIX}ENDPOINT", "").strip()
    if not whole:
        return None
    name = "--otlp-endpoint" if endpoint else f"{_PREFIX}TRACES_ENDPOINT" if own else f"{_PREFIX}ENDPOINT"
    secure, host, port, path = parse_endpoint(whole, name)
    protocol = variables.protocol(port)
    if protocol is Protocol.GRPC:
        path = ""
    elif not (own and not endpoint) and not path.endswith(_HTTP_PATH):
        # A base that the signal's path is added to; only the variable for traces is taken as it is.
        path = path.rstrip("/") + _HTTP_PATH
    certificate, key = variables.path("CLIENT_CERTIFICATE"), variables.path("CLIENT_KEY")
    if (certificate is None) != (key is None):
        raise TelemetryError(f"{_PREFIX}CLIENT_CERTIFICATE and {_PREFIX}CLIENT_KEY: each needs the other")
    return Destination(
        protocol,
        host,
        port,
        path or ("" if protocol is Protocol.GRPC else "/"),
        secure,
        variables.pairs("HEADERS"),
        variables.milliseconds(f"{_PREFIX}TRACES_TIMEOUT", f"{_PREFIX}TIMEOUT", _DEFAULT_TIMEOUT_MS),
        variables.compression(),
        variables.path("CERTIFICATE"),
        certificate,
        key,
        variables.milliseconds("OTEL_BSP_SCHEDULE_DELAY", "", _DEFAULT_DELAY_MS),
        variables.count("OTEL_BSP_MAX_QUEUE_SIZE", _DEFAULT_QUEUE_SPANS),
        variables.count("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", _DEFAULT_BATCH_SPANS),
        resource_of(environment),
    )


def parse_endpoint(text: str, name: str) -> tuple[bool, str, int, str]:
    """Whether to use TLS, the host, the port and the path of a URL. Raises `TelemetryError`, which begins with
    `name`."""
    try:
        url = urlsplit(text)
        host, port = url.hostname, url.port
    except ValueError as error:
        raise TelemetryError(f"{name}: '{text}': {error}") from None
    if url.scheme not in _PORTS or not host or url.query or url.fragment or not text.isascii() or " " in text:
        raise TelemetryError(f"{name}: '{text}' is not accepted; expected a URL such as http://collector:4318")
    if url.username is not None:
        raise TelemetryError(f"{name}: a URL with a password would be logged; use {_PREFIX}HEADERS")
    return url.scheme == "https", host, _PORTS[url.scheme] if port is None else port, url.path


def resource_of(environment: Mapping[str, str]) -> dict[str, str]:
    """The attributes given for this process; `service.name` among them, `onclock` where nobody says otherwise."""
    resource = {"service.name": "onclock"}
    resource.update(_parse_pairs(environment.get("OTEL_RESOURCE_ATTRIBUTES", ""), "OTEL_RESOURCE_ATTRIBUTES"))
    name = environment.get("OTEL_SERVICE_NAME", "").strip()
    if name:
        resource["service.name"] = name
    return resource


def ignored_variables(environment: Mapping[str, str]) -> list[str]:
    """Variables of OpenTelemetry that are set and mean nothing here."""
    return [name for name in _IGNORED if environment.get(name, "").strip()]


class _Variables:
    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def _text(self, name: str) -> tuple[str, str]:
        """The value of a variable for traces or else for all signals, and which it is."""
        for variable in (f"{_PREFIX}TRACES_{name}", f"{_PREFIX}{name}"):
            value = self._environment.get(variable, "").strip()
            if value:
                return value, variable
        return "", ""

    def protocol(self, port: int) -> Protocol:
        text, name = self._text("PROTOCOL")
        if not text:
            return Protocol.GRPC if port == _GRPC_PORT else Protocol.HTTP
        try:
            return Protocol(text)
        except ValueError:
            raise TelemetryError(f"{name}: '{text}' is not accepted; expected grpc or http/protobuf") from None

    def compression(self) -> bool:
        text, name = self._text("COMPRESSION")
        if text not in ("", "none", "gzip"):
            raise TelemetryError(f"{name}: '{text}' is not accepted; expected gzip or none")
        return text == "gzip"

    def path(self, name: str) -> Path | None:
        text, variable = self._text(name)
        if text and not Path(text).is_file():
            raise TelemetryError(f"{variable}: '{text}' is not a file")
        return Path(text) if text else None

    def pairs(self, name: str) -> tuple[tuple[str, str], ...]:
        text, variable = self._text(name)
        return tuple((key.lower(), value) for key, value in _parse_pairs(text, variable).items())

    def milliseconds(self, name: str, other: str, default: int) -> float:
        return self._number(name if self._environment.get(name, "").strip() else other, default) / 1e3

    def count(self, name: str, default: int) -> int:
        return int(self._number(name, default))

    def _number(self, name: str, default: int) -> float:
        text = self._environment.get(name, "").strip()
        if not text:
            return default
        if not text.isdecimal() or not 1 <= int(text) <= 3_600_000:
            raise TelemetryError(f"{name}: '{text}' is not accepted; expected an integer from 1 to 3600000")
        return int(text)


def _parse_pairs(text: str, name: str) -> dict[str, str]:
    """`key=value,...`, values percent-encoded."""
    pairs: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        key, value = key.strip(), unquote(value.strip())
        if not part.strip():
            continue
        if not equals or not key or not value.isprintable():
            raise TelemetryError(f"{name}: '{key}' is not accepted; expected KEY=VALUE,...")
        pairs[key] = value
    return pairs
