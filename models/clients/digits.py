"""Ask a server which digits these are: `python -m models.clients.digits --url localhost:8001`.

Sends scanned digits of scikit-learn to the example model `digits` and draws each beside the answer.
"""

from __future__ import annotations

import argparse
import sys
import time

import grpc
import numpy as np
import numpy.typing as npt

from models.clients.inference import InferenceClient

# From paper (0) to ink (16).
SHADES = " .:-=+*#@"
SIDE = 8


def draw(pixels: npt.NDArray[np.float32]) -> str:
    """Eight lines of characters, two per pixel, of the 64 `pixels` 0 to 16."""
    levels = np.clip(pixels / 16 * (len(SHADES) - 1), 0, len(SHADES) - 1).round().astype(int)
    return "\n".join("".join(SHADES[level] * 2 for level in row) for row in levels.reshape(SIDE, SIDE))


def main() -> int:
    """Exit status 0: answered; 1: the server refused or failed, with its reason on standard error."""
    from sklearn.datasets import load_digits

    parser = argparse.ArgumentParser(description="Send handwritten digits to the example model and print what it saw.")
    parser.add_argument("--url", default="localhost:8001", help="gRPC address of the server [localhost:8001]")
    parser.add_argument("--count", type=int, default=3, help="how many digits to send [3]")
    parser.add_argument("--seed", type=int, default=0, help="which digits to choose [0]")
    parser.add_argument("--timeout-ms", type=float, default=1000, help="deadline of each request [1000]")
    arguments = parser.parse_args()
    digits = load_digits()
    chosen = np.random.default_rng(arguments.seed).choice(len(digits.data), arguments.count, replace=False)
    with InferenceClient(arguments.url) as client:
        for index in chosen:
            pixels = digits.data[index].astype(np.float32)
            began_ns = time.perf_counter_ns()
            try:
                answer = client.infer("digits", {"pixels": pixels[None]}, timeout_s=arguments.timeout_ms / 1000)
            except grpc.RpcError as error:
                print(f"{arguments.url}: {error.code().name}: {error.details()}", file=sys.stderr)
                return 1
            took_ms = (time.perf_counter_ns() - began_ns) / 1e6
            label = int(answer["label"][0, 0])
            confidence = float(answer["probabilities"][0, label])
            print(f"{draw(pixels)}\nsaw {label} ({confidence:.1%}) in {took_ms:.2f} ms; it is {digits.target[index]}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
