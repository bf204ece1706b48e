"""From nothing to a classified photograph: fetch and convert a model, serve it, ask it, stop.

    python -m models.classify_demo [--repository build/zoo]

The two photographs are those that come with scikit-learn. The server runs as a process of its own, on free ports, and
everything goes through gRPC as with any client.
"""

from __future__ import annotations

import argparse
import importlib.resources
import sys
from pathlib import Path

import grpc

from models.classify import MODEL, classify
from models.clients.inference import InferenceClient
from models.serve import ServeError, running_server
from models.zoo.errors import ConversionError
from models.zoo.fetch import FetchError
from models.zoo.publish import publish
from models.zoo.recipes import RECIPES, RecipeError, imagenet_labels
from models.zoo.torch_checkpoint import CheckpointError

# What the photographs show, by their names in scikit-learn.
EXPECTED = {"flower.jpg": "daisy", "china.jpg": "palace"}
# The first request on a busy machine; the model's own objective still refuses what the server cannot do in time.
REQUEST_TIMEOUT_S = 10.0


class DemoError(Exception):
    """A step failed; the message says which and why."""


def run(repository: Path, log: Path) -> None:
    """All steps. Raises `DemoError` when a photograph gets another label than it should."""
    print(f"1. fetch and convert {MODEL}", flush=True)
    for entry in RECIPES[MODEL].make():
        publish(entry, repository)
    labels = imagenet_labels()
    photos = Path(str(importlib.resources.files("sklearn.datasets") / "images"))
    print(f"2. serve {repository}", flush=True)
    with running_server(repository, log, [MODEL]) as url, InferenceClient(url) as client:
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
    except (DemoError, ServeError, FetchError, CheckpointError, ConversionError, RecipeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except grpc.RpcError as error:
        print(f"{error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
