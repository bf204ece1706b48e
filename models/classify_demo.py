"""From nothing to a classified photograph: fetch and convert a model, serve it, ask it, stop.

    python -m models.classify_demo [--repository build/zoo]

The two photographs are those that come with scikit-learn. The server runs as a process of its own, on free ports, and
everything goes through gRPC as with any client.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.resources
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc

from models.classify import MODEL, classify
from models.clients.inference import InferenceClient, NotReadyError
from models.zoo.errors import ConversionError
from models.zoo.fetch import FetchError
from models.zoo.publish import publish
from models.zoo.recipes import RECIPES, RecipeError, imagenet_labels
from models.zoo.torch_checkpoint import CheckpointError

# What the photographs show, by their names in scikit-learn.
EXPECTED = {"flower.jpg": "daisy", "china.jpg": "palace"}
HOST = "127.0.0.1"
# Loading and profiling the model takes seconds; a machine that is this slow cannot serve it anyway.
READY_TIMEOUT_S = 120.0
# The first request on a busy machine; the model's own objective still refuses what the server cannot do in time.
REQUEST_TIMEOUT_S = 10.0
# Beyond the server's own grace period, 30 s by default.
STOP_TIMEOUT_S = 40.0
LOG_LINES = 15


class DemoError(Exception):
    """A step failed; the message says which and why."""


def free_ports(count: int) -> list[int]:
    """Distinct ports nobody listens on at the moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(count)]
        return [int(held.getsockname()[1]) for held in sockets]


@contextlib.contextmanager
def running_server(repository: Path, log: Path) -> Iterator[str]:
    """Serve `repository` while the block runs; gives the gRPC address. Raises `DemoError` if it does not load."""
    grpc_port, metrics_port = free_ports(2)
    command = [sys.executable, "-m", "service", "serve", "--model-repository", str(repository), "--host", HOST]
    command += ["--grpc-port", str(grpc_port), "--metrics-port", str(metrics_port)]
    url = f"{HOST}:{grpc_port}"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as server:  # noqa: S603
        try:
            _wait_until_ready(server, url, log)
            yield url
        finally:
            server.terminate()
            try:
                server.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                server.kill()


def _wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Ask for readiness in short turns, so that a server that died is noticed at once. Raises `DemoError`."""
    turn_s = 1.0
    last = ""
    with InferenceClient(url) as client:
        for _ in range(round(READY_TIMEOUT_S / turn_s)):
            if server.poll() is not None:
                tail = "\n".join(log.read_text().splitlines()[-LOG_LINES:])
                raise DemoError(f"the server ended with status {server.returncode} ({log}):\n{tail}")
            try:
                client.wait_until_ready(MODEL, turn_s)
            except NotReadyError as error:
                last = str(error)
            else:
                return
    raise DemoError(f"{last}; the server's log is {log}")


def run(repository: Path, log: Path) -> None:
    """All steps. Raises `DemoError` when a photograph gets another label than it should."""
    print(f"1. fetch and convert {MODEL}", flush=True)
    for entry in RECIPES[MODEL].make():
        publish(entry, repository)
    labels = imagenet_labels()
    photos = Path(str(importlib.resources.files("sklearn.datasets") / "images"))
    print(f"2. serve {repository}", flush=True)
    with running_server(repository, log) as url, InferenceClient(url) as client:
        print(f"3. ask {url}", flush=True)
        for name, expected in EXPECTED.items():
            label = classify(client, photos / name, labels, 5, REQUEST_TIMEOUT_S)
            if label != expected:
                raise DemoError(f"{name} was classified as '{label}', expected '{expected}'")
            print(f"{name}: {label}", flush=True)
    print("4. server stopped")


def main() -> int:
    """Exit status 0: both photographs got their label; 1: a step failed, with the reason on standard error."""
    parser = argparse.ArgumentParser(description="Fetch, convert and serve a model, and classify two photographs.")
    parser.add_argument("--repository", type=Path, default=Path("build/zoo"), help="model repository [build/zoo]")
    parser.add_argument("--log", type=Path, default=Path("build/classify-server.log"), help="the server's log")
    arguments = parser.parse_args()
    try:
        run(arguments.repository, arguments.log)
    except (DemoError, FetchError, CheckpointError, ConversionError, RecipeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except grpc.RpcError as error:
        print(f"{error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
