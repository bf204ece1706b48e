"""A socket under the HTTP/2 client: TCP or TLS, never blocking once it is open, optionally slow on purpose."""

from __future__ import annotations

import ipaddress
import select
import socket
import ssl
import time
from dataclasses import dataclass

from loadtests.errors import LoadTestError
from loadtests.http2 import Event, Http2Client, Http2Error

CONNECT_S = 10.0
# Enough for what arrives between two looks; the kernel gives what it has.
READ_BYTES = 262_144


@dataclass(frozen=True, slots=True)
class Tls:
    """How to trust the server and who we are. Paths of PEM files; `name` overrides the name that is verified."""

    ca: str | None = None
    certificate: str | None = None
    key: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Throttle:
    """A slow client: at most `bytes` each way every `every_ns`."""

    bytes: int
    every_ns: int


class Connection:
    """One connection to the server, ready for requests when the constructor returns.

    Raises `LoadTestError` when it cannot be opened, naming the address and what to check.
    """

    def __init__(self, address: str, tls: Tls | None = None, throttle: Throttle | None = None) -> None:
        self.address = address
        self.http2 = Http2Client()
        self.throttle = throttle
        self.gone = False
        self._next_read_ns = 0
        self._next_write_ns = 0
        host, port = split_address(address)
        try:
            self._socket = self._open(host, port, tls)
            self._greet()
        except (OSError, Http2Error) as error:
            raise LoadTestError(
                f"cannot connect to {address}{' with TLS' if tls else ''}: {error}; is the server running there, and "
                f"is {'its certificate trusted (tls.ca)' if tls else 'it without TLS (see tls)'}?"
            ) from error
        self._socket.setblocking(False)

    def _open(self, host: str, port: int, tls: Tls | None) -> socket.socket:
        plain = socket.create_connection((host, port), timeout=CONNECT_S)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_CONGESTION") and ipaddress.ip_address(plain.getpeername()[0]).is_loopback:
            # BBR, the default of some machines, paces what it sends: over loopback that holds requests back for
            # milliseconds, which would be counted against the server.
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        if tls is None:
            return plain
        context = ssl.create_default_context(cafile=tls.ca)
        context.set_alpn_protocols(["h2"])
        if tls.certificate:
            context.load_cert_chain(tls.certificate, tls.key)
        secure = context.wrap_socket(plain, server_hostname=tls.name or host)
        if secure.selected_alpn_protocol() not in ("h2", None):
            raise Http2Error("the server does not speak HTTP/2 over TLS")
        return secure

    def _greet(self) -> None:
        """Exchange settings: until the server has acknowledged ours nothing is sent (see `Http2Client.ready`)."""
        end = time.monotonic() + CONNECT_S
        while not self.http2.ready:
            self._socket.sendall(self.http2.out)
            self.http2.out.clear()
            self._socket.settimeout(max(0.01, end - time.monotonic()))
            data = self._socket.recv(READ_BYTES)
            if not data:
                raise Http2Error("the server closed the connection; it may not be a gRPC server")
            self.http2.receive(data)
        self._socket.sendall(self.http2.out)
        self.http2.out.clear()

    def fileno(self) -> int:
        return self._socket.fileno()

    def wants_write(self, now_ns: int) -> bool:
        """Whether there is something to send, and a slow client may send it now."""
        return bool(self.http2.out) and now_ns >= self._next_write_ns and not self.gone

    def wants_read(self, now_ns: int) -> bool:
        return now_ns >= self._next_read_ns and not self.gone

    def next_turn_ns(self) -> int:
        """When a slow client next does something; 0 for others."""
        return min(self._next_read_ns, self._next_write_ns) if self.throttle else 0

    def write(self, now_ns: int) -> None:
        """Send what the kernel takes. A broken connection is found by the next read."""
        out = self.http2.out
        try:
            if self.throttle is None:
                sent = self._socket.send(out)
            else:
                sent = self._socket.send(out[: self.throttle.bytes])
                self._next_write_ns = now_ns + self.throttle.every_ns
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return
        except OSError:
            out.clear()
            return
        if sent == len(out):
            out.clear()
        else:
            del out[:sent]

    def read(self, now_ns: int) -> list[Event]:
        """What the server has said. When the connection is gone, every open stream ends as lost."""
        limit = READ_BYTES
        if self.throttle is not None:
            limit = self.throttle.bytes
            self._next_read_ns = now_ns + self.throttle.every_ns
        events: list[Event] = []
        try:
            while True:
                data = self._socket.recv(limit)
                if not data:
                    return events + self._lost()
                events += self.http2.receive(data)
                # TLS may hold decrypted bytes that no poll would show.
                if self.throttle is not None or not isinstance(self._socket, ssl.SSLSocket):
                    return events
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return events
        except (OSError, Http2Error):
            return events + self._lost()

    def _lost(self) -> list[Event]:
        self.gone = True
        return self.http2.lost()

    def close(self) -> None:
        self._socket.close()


def wait(connections: list[Connection], now_ns: int, timeout_s: float) -> list[Connection]:
    """Wait until a connection can be read, or written where something is left to send; those that can be read.

    `select` and not `epoll`, whose timeout is in milliseconds.
    """
    readers = [c for c in connections if c.wants_read(now_ns)]
    writers = [c for c in connections if c.wants_write(now_ns)]
    readable, _, _ = select.select(readers, writers, (), max(0.0, timeout_s))
    return readable


def split_address(address: str) -> tuple[str, int]:
    """`host:port`, `[::1]:port`. Raises `LoadTestError`."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65_536:
        raise LoadTestError(f"'{address}' is no address; expected HOST:PORT, for example 127.0.0.1:8001")
    return host.strip("[]"), int(port)
