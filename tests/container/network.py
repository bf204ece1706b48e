"""Addresses for pods: a bridge of this machine, and a network namespace with one address on it for each pod.

So every pod listens on the same port of an address of its own, as in a cluster, and the clients beside them reach all.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Networks of the range 10.0.0.0/8 that a cluster could have: one for each process that tests at the same time.
_SECOND, _THIRD = 200 + os.getpid() % 50, os.getpid() // 50 % 250
# More pods than a rollout has at once; addresses are used once, as a cluster's are not used again at once.
MOST_PODS = 200


def _ip(*arguments: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0 or not check, f"ip {' '.join(arguments)}: {done.stderr}"


@dataclass(slots=True)
class Place:
    """Where a pod lives: a network namespace with one address."""

    name: str
    address: str

    @property
    def path(self) -> Path:
        """The namespace as a file."""
        return Path("/run/netns") / self.name


class Network:
    """Hands out places; made by `pod_network`, which takes them back."""

    def __init__(self, bridge: str) -> None:
        self._bridge = bridge
        self._places: list[Place] = []

    def place(self) -> Place:
        """A new one."""
        number = len(self._places) + 2
        assert number < MOST_PODS
        place = Place(f"{self._bridge}-{number}", f"10.{_SECOND}.{_THIRD}.{number}")
        outside = f"{self._bridge}v{number}"
        _ip("netns", "add", place.name)
        self._places.append(place)
        _ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", place.name)
        _ip("link", "set", outside, "master", self._bridge, "up")
        _ip("-n", place.name, "addr", "add", f"{place.address}/24", "dev", "eth0")
        _ip("-n", place.name, "link", "set", "eth0", "up")
        _ip("-n", place.name, "link", "set", "lo", "up")
        return place

    def close(self) -> None:
        """Remove every place."""
        for place in self._places:
            _ip("netns", "delete", place.name, check=False)


@contextlib.contextmanager
def pod_network() -> Iterator[Network]:
    """A network of its own, gone when the block is left."""
    # Names of interfaces have 15 characters at most.
    bridge = f"oc{os.getpid()}"
    _ip("link", "add", bridge, "type", "bridge")
    network = Network(bridge)
    try:
        _ip("addr", "add", f"10.{_SECOND}.{_THIRD}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        yield network
    finally:
        network.close()
        _ip("link", "delete", bridge, check=False)
