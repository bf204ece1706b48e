"""Server processes under test: started on one core, awaited until ready, stopped cleanly."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from benchmarks.harness import ROOT, BenchmarkError, Settings, say
from service.pb import grpc_service_pb2 as pb

# The command under test.
ONCLOCK = (sys.executable, "-m", "service")

SERVICE = "/inference.GRPCInferenceService/"

# A server that warms up a large model runs every bucket of it two dozen times before it reports ready.
READY_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 20.0


def free_port() -> int:
    """A TCP port free at this moment on the loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@dataclass(slots=True)
class Server:
    """A server process: where to reach it, and its process id for CPU accounting."""

    name: str
    process: subprocess.Popen[bytes]
    port: int
    log: Path
    metrics_port: int = 0
    # How it is reached where it is secured.
    credentials: grpc.ChannelCredentials | None = None
    metadata: tuple[tuple[str, str], ...] = ()

    def channel(self) -> grpc.Channel:
        """A channel to it."""
        if self.credentials is None:
            return grpc.insecure_channel(self.url)
        return grpc.secure_channel(self.url, self.credentials)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.port}"

    def check_alive(self) -> None:
        """Raise `BenchmarkError` with the end of its log if the process has ended."""
        if self.process.poll() is not None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
            raise BenchmarkError(f"{self.name} ended with status {self.process.returncode}; its log ends:\n{tail}")

    def stop(self) -> None:
        """Ask it to stop; kill it if it does not within `STOP_TIMEOUT_S`."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                say(f"{self.name} did not stop within {STOP_TIMEOUT_S:.0f} s of SIGTERM: killed")
                self.process.kill()
                self.process.wait()


def pinned(core: int, command: Sequence[str]) -> list[str]:
    """`command` bound to one core. Raises `BenchmarkError` where that cannot be done."""
    taskset = shutil.which("taskset")
    if taskset is None:
        raise BenchmarkError("`taskset` (util-linux) is needed to pin processes to cores; install it")
    if core not in os.sched_getaffinity(0):
        allowed = sorted(os.sched_getaffinity(0))
        raise BenchmarkError(
            f"core {core} is not one of this process's cores {allowed}; see --server-core, --client-core"
        )
    return [taskset, "-c", str(core), *command]


def _launch(name: str, command: Sequence[str], core: int, out: Path) -> tuple[subprocess.Popen[bytes], Path]:
    out.mkdir(parents=True, exist_ok=True)
    log = out / f"{name}.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(pinned(core, command), stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT)
    return process, log


@contextlib.contextmanager
def echo_server(settings: Settings, threads: int = 80) -> Iterator[Server]:
    """A bare threaded `grpc.server` that answers the request's own bytes: the floor of a Python gRPC server."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.echo_server", "--port", str(port), "--threads", str(threads)]
    process, log = _launch("echo_server", command, settings.server_core, settings.out)
    server = Server("echo server", process, port, log)
    try:
        _wait_connected(server)
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def onclock_server(
    settings: Settings,
    repository: Path,
    models: Sequence[str],
    flags: Sequence[str] = (),
    credentials: grpc.ChannelCredentials | None = None,
    metadata: tuple[tuple[str, str], ...] = (),
) -> Iterator[Server]:
    """`onclock serve` on `repository`, once every one of `models` is ready."""
    port, metrics_port = free_port(), free_port()
    command = [*ONCLOCK, "serve", "--model-repository", str(repository), "--host", "127.0.0.1"]
    command += ["--grpc-port", str(port), "--metrics-port", str(metrics_port)]
    # Measure the models anew: a profile kept from a busier or quieter moment would be what is benchmarked.
    command += ["--profile-cache", "none", *flags]
    process, log = _launch(f"onclock_{repository.name}", command, settings.server_core, settings.out)
    server = Server("onclock", process, port, log, metrics_port, credentials, metadata)
    try:
        _wait_connected(server)
        _wait_models(server, models)
        yield server
    finally:
        server.stop()


def _wait_connected(server: Server) -> None:
    with server.channel() as channel:
        end = time.monotonic() + READY_TIMEOUT_S
        ready = grpc.channel_ready_future(channel)
        while time.monotonic() < end:
            server.check_alive()
            with contextlib.suppress(grpc.FutureTimeoutError):
                ready.result(timeout=0.5)
                return
    raise BenchmarkError(
        f"{server.name} did not listen on {server.url} within {READY_TIMEOUT_S:.0f} s; see {server.log}"
    )


def _wait_models(server: Server, models: Sequence[str]) -> None:
    """Wait until every model is ready. Raises `BenchmarkError` with the server's reason as soon as one has failed."""
    with server.channel() as channel:
        index = channel.unary_unary(
            SERVICE + "RepositoryIndex",
            request_serializer=pb.RepositoryIndexRequest.SerializeToString,
            response_deserializer=pb.RepositoryIndexResponse.FromString,
        )
        end = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < end:
            server.check_alive()
            states = {
                entry.name: entry
                for entry in index(pb.RepositoryIndexRequest(), timeout=10, metadata=server.metadata).models
            }
            found = [states[name] for name in models if name in states]
            if len(found) == len(models) and all(entry.state == "READY" for entry in found):
                return
            failed = [entry for entry in found if entry.state == "UNAVAILABLE" and entry.reason]
            if failed:
                raise BenchmarkError(f"model '{failed[0].name}' did not load: {failed[0].reason}; see {server.log}")
            time.sleep(0.1)
    raise BenchmarkError(f"models {list(models)} not ready within {READY_TIMEOUT_S:.0f} s; see {server.log}")
