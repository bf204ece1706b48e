"""Where spans are sent, by setting and environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.config.otlp import Protocol, TelemetryError, find_destination, ignored_variables, resource_of

E = "OTEL_EXPORTER_OTLP_"


@pytest.mark.parametrize(
    ("endpoint", "environment", "where", "protocol"),
    [
        ("http://c:4318", {}, "http://c:4318/v1/traces", Protocol.HTTP),
        ("http://c:4318/", {}, "http://c:4318/v1/traces", Protocol.HTTP),
        ("https://c/base/", {}, "https://c:443/base/v1/traces", Protocol.HTTP),
        ("http://c:4318/v1/traces", {}, "http://c:4318/v1/traces", Protocol.HTTP),
        ("http://[::1]:4318", {}, "http://[::1]:4318/v1/traces", Protocol.HTTP),
        # By convention this is the port for gRPC; a variable may say otherwise.
        ("http://c:4317", {}, "http://c:4317", Protocol.GRPC),
        ("http://c:4317", {f"{E}PROTOCOL": "http/protobuf"}, "http://c:4317/v1/traces", Protocol.HTTP),
        ("http://c:55", {f"{E}TRACES_PROTOCOL": "grpc", f"{E}PROTOCOL": "x"}, "http://c:55", Protocol.GRPC),
        (None, {f"{E}ENDPOINT": "http://c:4318"}, "http://c:4318/v1/traces", Protocol.HTTP),
        # The variable for traces is taken as it is.
        (None, {f"{E}TRACES_ENDPOINT": "http://c:4318/mine"}, "http://c:4318/mine", Protocol.HTTP),
        (None, {f"{E}TRACES_ENDPOINT": "http://c:4318"}, "http://c:4318/", Protocol.HTTP),
        (None, {f"{E}TRACES_ENDPOINT": "http://t", f"{E}ENDPOINT": "http://e"}, "http://t:80/", Protocol.HTTP),
        ("http://f", {f"{E}TRACES_ENDPOINT": "http://t/x"}, "http://f:80/v1/traces", Protocol.HTTP),
    ],
)
def test_where(endpoint: str | None, environment: dict[str, str], where: str, protocol: Protocol) -> None:
    """The setting wins over the variable for traces, that one over the general one."""
    found = find_destination(endpoint, environment)
    assert found is not None
    assert (str(found), found.protocol) == (where, protocol)


@pytest.mark.parametrize(
    ("endpoint", "environment"),
    [
        (None, {}),
        (None, {f"{E}ENDPOINT": " "}),
        (None, {f"{E}ENDPOINT": "http://c", "OTEL_TRACES_EXPORTER": "none"}),
        (None, {f"{E}ENDPOINT": "http://c", "OTEL_TRACES_EXPORTER": "zipkin"}),
        ("http://c", {"OTEL_SDK_DISABLED": "true"}),
    ],
)
def test_nowhere(endpoint: str | None, environment: dict[str, str]) -> None:
    """Nothing says where, or something says no."""
    assert find_destination(endpoint, environment) is None


@pytest.mark.parametrize(
    ("endpoint", "environment", "named"),
    [
        ("c:4318", {}, "--otlp-endpoint"),
        ("http://", {}, "--otlp-endpoint"),
        ("ftp://c", {}, "--otlp-endpoint"),
        ("http://c:99999", {}, "--otlp-endpoint"),
        ("http://c\r\nx: y", {}, "--otlp-endpoint"),
        ("http://user:secret@c", {}, f"{E}HEADERS"),
        (None, {f"{E}ENDPOINT": "c"}, f"{E}ENDPOINT"),
        (None, {f"{E}TRACES_ENDPOINT": "c"}, f"{E}TRACES_ENDPOINT"),
        ("http://c", {f"{E}PROTOCOL": "http/json"}, f"{E}PROTOCOL"),
        ("http://c", {f"{E}COMPRESSION": "zstd"}, f"{E}COMPRESSION"),
        ("http://c", {f"{E}HEADERS": "nonsense"}, f"{E}HEADERS"),
        ("http://c", {f"{E}HEADERS": "a=b%0d%0ac"}, f"{E}HEADERS"),
        ("http://c", {f"{E}TIMEOUT": "10s"}, f"{E}TIMEOUT"),
        ("http://c", {f"{E}TIMEOUT": "0"}, f"{E}TIMEOUT"),
        ("http://c", {f"{E}CERTIFICATE": "/nowhere.pem"}, f"{E}CERTIFICATE"),
        ("http://c", {"OTEL_BSP_SCHEDULE_DELAY": "-1"}, "OTEL_BSP_SCHEDULE_DELAY"),
        ("http://c", {"OTEL_RESOURCE_ATTRIBUTES": "a"}, "OTEL_RESOURCE_ATTRIBUTES"),
    ],
)
def test_what_cannot_be_used(endpoint: str | None, environment: dict[str, str], named: str) -> None:
    """The message names the setting or the variable."""
    with pytest.raises(TelemetryError, match=named):
        find_destination(endpoint, environment)


def test_a_password_is_not_repeated() -> None:
    """The message goes to the log."""
    with pytest.raises(TelemetryError) as caught:
        find_destination("http://user:secret@c", {})
    assert "secret" not in str(caught.value)


def test_how(tmp_path: Path) -> None:
    """Headers, time, compression, certificates and the sizes of the queue."""
    for name in ("ca", "cert", "key"):
        (tmp_path / name).write_text("")
    found = find_destination(
        "https://c",
        {
            f"{E}HEADERS": "Authorization=Basic%20abc, x-tenant = t=1 ,",
            f"{E}TRACES_TIMEOUT": "2500",
            f"{E}TIMEOUT": "1",
            f"{E}COMPRESSION": "gzip",
            f"{E}CERTIFICATE": str(tmp_path / "ca"),
            f"{E}CLIENT_CERTIFICATE": str(tmp_path / "cert"),
            f"{E}CLIENT_KEY": str(tmp_path / "key"),
            "OTEL_BSP_SCHEDULE_DELAY": "250",
            "OTEL_BSP_MAX_QUEUE_SIZE": "100",
            "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "10",
        },
    )
    assert found is not None
    assert found.headers == (("authorization", "Basic abc"), ("x-tenant", "t=1"))
    assert (found.timeout_s, found.delay_s, found.gzip) == (2.5, 0.25, True)
    assert (found.queue_spans, found.batch_spans) == (100, 10)
    assert (found.authorities, found.certificate, found.key) == (tmp_path / "ca", tmp_path / "cert", tmp_path / "key")
    with pytest.raises(TelemetryError, match=f"{E}CLIENT_KEY"):
        find_destination("https://c", {f"{E}CLIENT_CERTIFICATE": str(tmp_path / "cert")})


def test_what_the_process_is_called() -> None:
    """Its own variable wins over the attributes, and there is always a name."""
    assert resource_of({}) == {"service.name": "onclock"}
    attributes = {"OTEL_RESOURCE_ATTRIBUTES": "service.name=a,deployment.environment.name=prod%20eu"}
    assert resource_of(attributes) == {"service.name": "a", "deployment.environment.name": "prod eu"}
    assert resource_of({**attributes, "OTEL_SERVICE_NAME": "b"})["service.name"] == "b"


def test_variables_that_mean_nothing_here() -> None:
    """They are told of."""
    assert ignored_variables({"OTEL_TRACES_SAMPLER": "always_on", "OTEL_PROPAGATORS": ""}) == ["OTEL_TRACES_SAMPLER"]
