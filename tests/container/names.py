"""The name of a headless Service, answered by a real DNS server (dnsmasq), as late as a cluster's may be."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.container.podman import free_ports
from tests.helm import tools

# CoreDNS keeps an answer for as long as its records live: 5 s for Services. For so long it tells of what has gone.
TTL_S = 5


class Names:
    """Which addresses a name has. Made by `dns`."""

    def __init__(self, name: str, hosts: Path, server: subprocess.Popen[bytes], port: int) -> None:
        self.name = name
        self.port = port
        self._hosts = hosts
        self._server = server
        self._latest: tuple[str, ...] = ()
        self._timers: list[threading.Timer] = []

    def publish(self, addresses: Sequence[str], after_s: float = TTL_S) -> None:
        """The addresses of the Service's ready pods now; told to who asks `after_s` later."""
        if tuple(addresses) == self._latest:
            return
        self._latest = tuple(addresses)
        timer = threading.Timer(after_s, self._tell, [self._latest])
        self._timers.append(timer)
        timer.start()

    def _tell(self, addresses: tuple[str, ...]) -> None:
        self._hosts.write_text("".join(f"{address} {self.name}\n" for address in addresses))
        self._server.send_signal(signal.SIGHUP)

    def close(self) -> None:
        """Tell nothing more."""
        for timer in self._timers:
            timer.cancel()


@contextlib.contextmanager
def dns(name: str, directory: Path) -> Iterator[Names]:
    """A DNS server on a port of the loopback that knows this name, without addresses at first, and no other."""
    (port,) = free_ports(1)
    hosts = directory / "hosts"
    hosts.write_text("")
    command = [
        *(str(tools.dnsmasq()), "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file=", "--user=root"),
        *(f"--port={port}", "--listen-address=127.0.0.1", "--bind-interfaces", "--no-resolv", "--no-hosts"),
        *(f"--addn-hosts={hosts}", f"--local-ttl={TTL_S}", "--local=/cluster.local/"),
    ]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    names = Names(name, hosts, server, port)
    try:
        yield names
    finally:
        names.close()
        server.terminate()
        server.wait(10)
