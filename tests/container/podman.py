"""Images built with buildah and run with podman, as the tests need it. Both are Debian packages."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Set where a run that does not test the image must not pass.
REQUIRE = "ONCLOCK_TEST_CONTAINER"
TOOLS = ("buildah", "podman", "mmdebstrap", "dpkg-deb", "unshare", "ip")
START_S = 60.0

# crun refuses a machine that has both versions of control groups. In a mount namespace of its own it sees the second.
_UNIFIED = 'mount -t cgroup2 none /sys/fs/cgroup 2>/dev/null; exec podman "$@"'
# What every orchestrator that takes security seriously sets.
LOCKED = ("--read-only", "--cap-drop=all", "--security-opt=no-new-privileges")


def _own_limits() -> tuple[str, ...]:
    """No more than this process may have itself: without the right to raise limits podman's defaults are refused, and
    `--ulimit=host` names them all the same. Podman lowers the number of its processes to 32768 before."""
    files, processes = (resource.getrlimit(kind)[1] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
    files = 1 << 20 if files == resource.RLIM_INFINITY else min(files, 1 << 20)
    processes = 1 << 15 if processes == resource.RLIM_INFINITY else min(processes, 1 << 15)
    return f"--ulimit=nofile={files}:{files}", f"--ulimit=nproc={processes}:{processes}"


# Without control groups, which nested machines may not have, and within the limits of this process.
PLAIN = ("--cgroups=disabled", *_own_limits())


def needs_containers() -> None:
    """Skip the test where images cannot be made and run; fail it where `ONCLOCK_TEST_CONTAINER=require` says so."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    packages = "buildah podman crun mmdebstrap iproute2"
    reason = f"needs {', '.join(missing)} (Debian: apt-get install {packages})" if missing else ""
    if not reason and os.geteuid() != 0:
        reason = "needs root, to make the bases"
    if reason and os.environ.get(REQUIRE) == "require":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


def podman(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run podman; its output as text. Raises `AssertionError` with what it said when it fails."""
    command = ["unshare", "--mount", "sh", "-c", _UNIFIED, "podman", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 or not check, f"podman {' '.join(arguments)}: {done.stderr[-2000:]}"
    return done


def build(target: str, image: str, bases: dict[str, str]) -> None:
    """Build a target of the `Dockerfile`. Raises `AssertionError` with the end of what buildah said."""
    given = [part for name, base in bases.items() for part in ("--build-arg", f"{name}={base}")]
    command = ["buildah", "bud", "--isolation=chroot", "--network=host", "--layers", f"--target={target}", *given]
    done = subprocess.run([*command, "--tag", image, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at this moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(sock.getsockname()[1]) for sock in sockets]


class Container:
    """A running container."""

    def __init__(self, identity: str, grpc_port: int, metrics_port: int) -> None:
        self.identity = identity
        self.grpc_port = grpc_port
        self.metrics_port = metrics_port

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def log(self) -> list[dict[str, object]]:
        """What the server has said so far."""
        said = podman("logs", self.identity)
        return [json.loads(line) for line in (said.stdout + said.stderr).splitlines() if line.startswith("{")]

    def wait_for_log(self, message: str) -> dict[str, object]:
        """The first line with this message."""
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            for line in self.log():
                if line["message"] == message:
                    return line
            assert self.state()["Running"], f"the server ended: {self.log()[-3:]}"
            time.sleep(0.05)
        raise AssertionError(f"the server never said {message!r}: {self.log()[-3:]}")

    def state(self) -> dict[str, object]:
        """As podman has it: `Running`, `ExitCode`."""
        found: dict[str, object] = json.loads(podman("inspect", self.identity).stdout)[0]["State"]
        return found

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        podman("stop", "--time=40", self.identity)
        return int(str(self.state()["ExitCode"]))


@contextlib.contextmanager
def running(image: str, *flags: str, mounts: Sequence[str] = ()) -> Iterator[Container]:
    """A container of `image`, locked down, that serves on ports of the loopback. Gone when the block is left."""
    grpc_port, metrics_port = free_ports(2)
    volumes = [part for mount in mounts for part in ("--volume", mount)]
    network = ("--network=host", *PLAIN)
    serve = ("serve", "--host", "127.0.0.1", "--grpc-port", str(grpc_port), "--metrics-port", str(metrics_port), *flags)
    identity = podman("run", "--detach", *network, *LOCKED, *volumes, image, *serve).stdout.strip()
    try:
        yield Container(identity, grpc_port, metrics_port)
    finally:
        podman("rm", "--force", "--time=0", identity, check=False)
