"""The metrics port: HTTP GET /metrics; /livez and /readyz for probes that cannot ask by gRPC; pages for people.

Promise: constructing does nothing; `start` binds and serves from a thread of its own, or raises `MetricsPortError`
saying what to do; `stop` closes the port and returns when the thread has ended. At most a few connections are served
at once, each for a few seconds, and one scrape is rendered at a time, so that no client of this port can slow down
inference or pile up threads.
"""

from __future__ import annotations

import gzip
import socket
import socketserver
import ssl
import sys
import threading
from collections.abc import Callable, Iterable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import urlsplit

from service.metrics.exposition import CONTENT_TYPE
from service.metrics.negotiation import wants_openmetrics
from service.metrics.openmetrics import CONTENT_TYPE as OPENMETRICS_TYPE
from service.metrics.pages import CHALLENGES, Pages, as_bearer, no_pages
from service.metrics.registry import MetricsRegistry

# Two Prometheus servers, a person and a probe or two; beyond that the connection is closed.
MAX_CONNECTIONS = 8
# A client gets this long for each read or write; Prometheus itself gives up after 10 s by default.
_CLIENT_TIMEOUT_S = 5.0
# How often the accept loop looks whether it was stopped.
_POLL_S = 0.1
# The fastest level: text as repetitive as this shrinks tenfold even so.
_GZIP_LEVEL = 1


_TEXT = "text/plain; charset=utf-8"
_NO_KEY = b"expected an API key of the group 'metrics' in 'Authorization: Bearer KEY', or as a password\n"


class MetricsPortError(Exception):
    """The metrics port cannot be listened on."""


class MetricsServer:
    """Serves one registry over HTTP. Port 0 = any free one; `port` is the real one after `start`."""

    def __init__(
        self,
        host: str,
        port: int,
        registry: MetricsRegistry,
        tls: Callable[[], ssl.SSLContext] | None = None,
        may_scrape: Callable[[str | None], bool] | None = None,
        ready: Callable[[], bool] = lambda: True,
        pages: Pages = no_pages,
    ) -> None:
        """`tls` is asked for each connection (None: no TLS); `may_scrape` for each scrape, with its `Authorization`
        header (None: everybody may); `ready` for each probe, which needs no key: it learns no more than whoever
        connects; `pages` for what else there is, which needs what a scrape needs."""
        self._ready = ready
        self._pages = pages
        self._tls = tls
        self._may_scrape = may_scrape
        self.host = host
        self.port = port
        self._registry = registry
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Bind and serve. Raises `MetricsPortError` when the address cannot be listened on."""
        if self._server is not None:
            return
        host = self.host.removeprefix("[").removesuffix("]")
        try:
            family = socket.getaddrinfo(host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
            server = _Server(
                family, (host, self.port), self._registry, self._tls, self._may_scrape, self._ready, self._pages
            )
        except OSError as error:
            raise MetricsPortError(
                f"cannot listen on {self.host}:{self.port} for metrics: {error.strerror or error}; choose another with "
                "--metrics-port (0 = any free port, off = none) or --metrics-host"
            ) from error
        self._server = server
        self.port = server.server_address[1]
        self._thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": _POLL_S}, name="metrics", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Close the port; a scrape in progress ends within its own time limit. Nothing happens when not started."""
        server, thread = self._server, self._thread
        self._server = self._thread = None
        if server is None or thread is None:
            return
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A bounded threading server. Not `http.server.HTTPServer`: that one looks up the host's name in DNS to bind."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(
        self,
        family: socket.AddressFamily,
        address: tuple[str, int],
        registry: MetricsRegistry,
        tls: Callable[[], ssl.SSLContext] | None,
        may_scrape: Callable[[str | None], bool] | None,
        ready: Callable[[], bool],
        pages: Pages,
    ) -> None:
        self.ready = ready
        self.pages = pages
        self.may_scrape = may_scrape
        self._tls = tls
        self.address_family = family
        self.registry = registry
        self.render_lock = threading.Lock()
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            if self._tls is not None:
                # Here and not where connections are accepted: a client that is slow to shake hands holds up nobody.
                request.settimeout(_CLIENT_TIMEOUT_S)
                try:
                    request = self._tls().wrap_socket(request, server_side=True)
                except OSError:
                    self.shutdown_request(request)
                    return
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no incident; anything else is a defect and is shown as such."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    timeout = _CLIENT_TIMEOUT_S
    server: _Server

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == "/livez" or (path == "/readyz" and self.server.ready()):
            self._answer(HTTPStatus.OK, _TEXT, b"ok\n")
            return
        if path == "/readyz":
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, b"not ready\n")
            return
        may_scrape = self.server.may_scrape
        if may_scrape is not None and not may_scrape(as_bearer(self.headers.get("Authorization"))):
            self._answer(HTTPStatus.UNAUTHORIZED, _TEXT, _NO_KEY)
            return
        page = self.server.pages(path)
        if page is not None:
            self._answer(HTTPStatus.OK, page.content_type, page.body, page.headers)
            return
        if path != "/metrics":
            self._answer(HTTPStatus.NOT_FOUND, _TEXT, b"not found; metrics are at /metrics\n")
            return
        openmetrics = wants_openmetrics(",".join(self.headers.get_all("Accept", ())))
        with self.server.render_lock:
            body = self.server.registry.render(openmetrics)
        self._answer(HTTPStatus.OK, OPENMETRICS_TYPE if openmetrics else CONTENT_TYPE, body)

    do_HEAD = do_GET  # noqa: N815

    def _answer(
        self, status: HTTPStatus, content_type: str, body: bytes, headers: Iterable[tuple[str, str]] = ()
    ) -> None:
        accepted = (part.split(";")[0].strip().lower() for part in self.headers.get("Accept-Encoding", "").split(","))
        compressed = status is HTTPStatus.OK and "gzip" in accepted
        if compressed:
            body = gzip.compress(body, _GZIP_LEVEL)
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (*headers, *(CHALLENGES if status is HTTPStatus.UNAUTHORIZED else ())):
            self.send_header(name, value)
        if compressed:
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the name http.server calls)
        """Scrapes are not logged."""
