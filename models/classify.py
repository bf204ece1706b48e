"""Classify a photograph by a served model: `python -m models.classify PHOTO --url localhost:8001`.

Prints the five most probable labels, and how long the answer took.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import grpc
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from models.clients.inference import InferenceClient
from models.zoo.fetch import FetchError
from models.zoo.preprocess import image_tensor, load_photo
from models.zoo.recipes import imagenet_labels

MODEL = "efficientnet-lite0"


def best(probabilities: npt.NDArray[np.float32], labels: Sequence[str], count: int) -> list[tuple[str, float]]:
    """The `count` most probable (label, probability), best first. Raises `ValueError` unless there is a label each."""
    if len(labels) != len(probabilities):
        raise ValueError(f"{len(labels)} labels for {len(probabilities)} probabilities; are they of another model?")
    order = np.argsort(-probabilities)[:count]
    return [(labels[index], float(probabilities[index])) for index in order]


def classify(client: InferenceClient, photo: Path, labels: Sequence[str], count: int, timeout_s: float) -> str:
    """Classify `photo`, print a table, return the best label. Raises `OSError` and `grpc.RpcError`."""
    tensor = image_tensor(load_photo(photo))
    began_ns = time.perf_counter_ns()
    answer = client.infer(MODEL, {"image": tensor}, ["probabilities"], timeout_s)
    took_ms = (time.perf_counter_ns() - began_ns) / 1e6
    table = Table("label", "probability")
    found = best(answer["probabilities"][0], labels, count)
    for label, probability in found:
        table.add_row(label, f"{probability:.1%}")
    console = Console()
    console.print(f"{photo.name}: answered in {took_ms:.1f} ms", highlight=False)
    console.print(table)
    return found[0][0]


def main() -> int:
    """Exit status 0: classified; 1: failed, with the reason on standard error."""
    parser = argparse.ArgumentParser(description="Classify photographs through gRPC.")
    parser.add_argument("photos", nargs="+", type=Path, metavar="PHOTO", help="image files")
    parser.add_argument("--url", default="localhost:8001", help="gRPC address of the server [localhost:8001]")
    parser.add_argument("--labels", type=Path, help="names of the classes, one a line [those of ImageNet]")
    parser.add_argument("--top", type=int, default=5, help="how many labels to print [5]")
    parser.add_argument("--timeout-ms", type=float, default=5000, help="deadline of each request [5000]")
    arguments = parser.parse_args()
    try:
        labels = arguments.labels.read_text().splitlines() if arguments.labels else imagenet_labels()
        with InferenceClient(arguments.url) as client:
            for photo in arguments.photos:
                classify(client, photo, labels, arguments.top, arguments.timeout_ms / 1000)
    except grpc.RpcError as error:
        print(f"{arguments.url}: {error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    except (OSError, ValueError, FetchError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
