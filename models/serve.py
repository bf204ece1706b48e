"""The server for a while, as a process of its own on free ports: for demonstrations and for checking what is served."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from models.clients.inference import InferenceClient, NotReadyError

HOST = "127.0.0.1"
# Loading and profiling a model takes seconds; a machine that is this slow cannot serve it anyway.
READY_TIMEOUT_S = 120.0
# Beyond the server's own grace period, 30 s by default.
STOP_TIMEOUT_S = 40.0
LOG_LINES = 15


class ServeError(Exception):
    """The server did not start, or a model did not load; the message says which and why."""


def free_ports(count: int) -> list[int]:
    """Distinct ports nobody listens on at the moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(count)]
        return [int(held.getsockname()[1]) for held in sockets]


@contextlib.contextmanager
def running_server(repository: Path, log: Path, models: Sequence[str], flags: Sequence[str] = ()) -> Iterator[str]:
    """Serve `repository` while the block runs; gives the gRPC address. Raises `ServeError` unless `models` load."""
    grpc_port, metrics_port = free_ports(2)
    command = [sys.executable, "-m", "service", "serve", "--model-repository", str(repository), "--host", HOST]
    command += ["--grpc-port", str(grpc_port), "--metrics-port", str(metrics_port), *flags]
    url = f"{HOST}:{grpc_port}"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as server:  # noqa: S603
        try:
            for model in models:
                _wait_until_ready(server, url, model, log)
            yield url
        finally:
            server.terminate()
            try:
                server.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                server.kill()


def _wait_until_ready(server: subprocess.Popen[bytes], url: str, model: str, log: Path) -> None:
    """Ask for readiness in short turns, so that a server that died is noticed at once. Raises `ServeError`."""
    turn_s = 1.0
    last = ""
    with InferenceClient(url) as client:
        for _ in range(round(READY_TIMEOUT_S / turn_s)):
            if server.poll() is not None:
                tail = "\n".join(log.read_text().splitlines()[-LOG_LINES:])
                raise ServeError(f"the server ended with status {server.returncode} ({log}):\n{tail}")
            try:
                client.wait_until_ready(model, turn_s)
            except NotReadyError as error:
                last = str(error)
            else:
                return
    raise ServeError(f"{last}; the server's log is {log}")
