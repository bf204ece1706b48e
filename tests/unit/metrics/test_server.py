"""The metrics port: what it answers, and how it starts and stops."""

from __future__ import annotations

import base64
import gzip
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from service.metrics import MetricsPortError, MetricsRegistry, MetricsServer, ModelMetrics
from service.metrics.pages import Page, as_bearer
from service.metrics.server import MAX_CONNECTIONS


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    registry = MetricsRegistry()
    registry.add(ModelMetrics("m", "1"))
    server = MetricsServer("127.0.0.1", 0, registry)
    server.start()
    yield server
    server.stop()


def get(server: MetricsServer, path: str, **headers: str) -> tuple[bytes, dict[str, str]]:
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read(), dict(answer.headers)


def test_metrics_are_served_as_prometheus_text(server: MetricsServer) -> None:
    """With the format's content type, for a path with or without a query."""
    body, headers = get(server, "/metrics?x=1")
    assert b'\nnv_inference_count{model="m",version="1"} 0\n' in body
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert body.endswith(b"\n")


def test_a_scrape_is_compressed_when_asked_for(server: MetricsServer) -> None:
    """gzip, as Prometheus asks."""
    body, headers = get(server, "/metrics", **{"Accept-Encoding": "deflate, gzip;q=0.5"})
    assert headers["Content-Encoding"] == "gzip"
    assert b"nv_inference_count" in gzip.decompress(body)


@pytest.mark.parametrize("path", ["/", "/metricsx", "/metrics/"])
def test_other_paths_are_not_found(server: MetricsServer, path: str) -> None:
    """And the answer says where the metrics are."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(server, path)
    assert caught.value.code == 404
    assert b"/metrics" in caught.value.read()


def test_a_taken_port_is_a_clear_error(server: MetricsServer) -> None:
    """It names the address and the flag."""
    with pytest.raises(MetricsPortError, match=rf"127\.0\.0\.1:{server.port} .* in use; .* --metrics-port"):
        MetricsServer("127.0.0.1", server.port, MetricsRegistry()).start()


def test_an_address_of_nobody_is_a_clear_error() -> None:
    """A host name that does not resolve, and an address of another machine."""
    for host in ("no-such-host.invalid", "192.0.2.1"):
        with pytest.raises(MetricsPortError, match="--metrics-host"):
            MetricsServer(host, 0, MetricsRegistry()).start()


def test_stopping_frees_the_port_and_ends_the_thread() -> None:
    """Another server can take it at once; stopping twice is fine."""
    first = MetricsServer("127.0.0.1", 0, MetricsRegistry())
    first.stop()
    first.start()
    port = first.port
    first.stop()
    first.stop()
    assert not any(thread.name == "metrics" for thread in threading.enumerate())
    second = MetricsServer("127.0.0.1", port, MetricsRegistry())
    second.start()
    assert get(second, "/metrics")[0]
    second.stop()


def test_idle_connections_do_not_block_a_scrape_and_are_bounded(server: MetricsServer) -> None:
    """A browser's unused connections leave room; more than the bound are closed at once."""
    idle = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(MAX_CONNECTIONS - 1)]
    assert get(server, "/metrics")[0]
    more = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(2)]
    assert more[1].recv(1) == b""
    for connection in idle + more:
        connection.close()


def test_probes_are_answered_without_a_key_and_follow_readiness() -> None:
    """Kubernetes' HTTP probes; a scrape needs its key all the same."""
    ready = False
    server = MetricsServer(
        "127.0.0.1", 0, MetricsRegistry(), may_scrape=lambda header: header == "Bearer k", ready=lambda: ready
    )
    server.start()
    try:
        assert get(server, "/livez")[0] == b"ok\n"
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(server, "/readyz")
        assert refused.value.code == 503
        ready = True
        assert get(server, "/readyz")[0] == b"ok\n"
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(server, "/metrics")
        assert refused.value.code == 401
        assert b"onclock_build_info" in get(server, "/metrics", Authorization="Bearer k")[0]
    finally:
        server.stop()


def test_pages_are_served_with_their_headers_to_whoever_may_scrape() -> None:
    """A browser shows its key as a password; a 401 asks for either form."""
    page = Page("text/html", b"<p>", (("Content-Security-Policy", "default-src 'none'"),))
    server = MetricsServer(
        "127.0.0.1",
        0,
        MetricsRegistry(),
        may_scrape=lambda header: header == "Bearer k:1",
        pages=lambda path: page if path == "/" else None,
    )
    server.start()
    try:
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(server, "/")
        assert refused.value.code == 401
        assert [word.split()[0] for word in refused.value.headers.get_all("WWW-Authenticate")] == ["Bearer", "Basic"]
        basic = "Basic " + base64.b64encode(b"anybody:k:1").decode()
        for key in (basic, "Bearer k:1"):
            body, headers = get(server, "/?x", Authorization=key)
            assert (body, headers["Content-Type"]) == (b"<p>", "text/html")
            assert headers["Content-Security-Policy"] == "default-src 'none'"
        assert b"onclock_build_info" in get(server, "/metrics", Authorization=basic)[0]
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("header", "bearer"),
    [
        (None, None),
        ("Bearer abc", "Bearer abc"),
        ("bAsIc " + base64.b64encode(b":abc").decode(), "Bearer abc"),
        ("Basic " + base64.b64encode(b"abc").decode(), "Basic YWJj"),
        ("Basic ???", "Basic ???"),
        ("Basic " + base64.b64encode(b"\xff:\xff").decode(), "Basic /zr/"),
    ],
)
def test_only_well_formed_passwords_become_keys(header: str | None, bearer: str | None) -> None:
    """Whatever else comes is passed on as it is, to be refused."""
    assert as_bearer(header) == bearer
