"""A client of docs/kubernetes.md, as it stands there, under steady load; run in a process of its own.

    python -m tests.container.rollout_client '{"target": ..., "root": ..., "model": ..., "threads": 4, "rate": 100}'

Prints "ready" when the first call was answered, then sends `rate` requests a second in all until its standard input
ends, and prints what became of them as JSON. `root` is the file of the authority that the server's certificate is from;
null: no TLS.
"""

from __future__ import annotations

import collections
import json
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from service.pb import grpc_service_pb2 as pb
from tests.support.client import request
from tests.support.server import ROOT

# A call that waits so long is a failure; the client of the page sets none.
TIMEOUT_S = 10.0
# Failures that are told in full.
MOST_TOLD = 20


def documented_channel(target: str, root: str | None) -> grpc.Channel:
    """The channel of the page, to `target` instead of the name that is written there."""
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (name,) = re.findall(r'"dns:///[^"]+"', code)
    code = code.replace(name, repr(target))
    space: dict[str, Any] = {}
    if root is not None:
        space["credentials"] = grpc.ssl_channel_credentials(Path(root).read_bytes())
        code, count = re.subn(r"grpc\.insecure_channel\(\s*(.*),\n", r"grpc.secure_channel(\1, credentials,\n", code)
        assert count == 1
    exec(code, space)  # what is documented is what is run
    channel: grpc.Channel = space["channel"]
    return channel


class Load:
    """Threads that each send at a steady pace, whatever becomes of what they sent."""

    def __init__(self, channel: grpc.Channel, model: str, threads: int, rate: float) -> None:
        self._infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        self._message = request(model, {"x": np.ones((1, 4), np.float32)})
        self._pause_s = threads / rate
        self._over = threading.Event()
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.failures: list[tuple[float, str, str]] = []
        self.slowest_s = 0.0
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._send) for _ in range(threads)]

    def first(self) -> None:
        """Waits for the server."""
        self._infer(self._message, timeout=60, wait_for_ready=True)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _send(self) -> None:
        due = time.monotonic()
        while not self._over.wait(max(0.0, due - time.monotonic())):
            began = time.monotonic()
            due = max(due + self._pause_s, began)
            outcome, told = "OK", ""
            try:
                answer = self._infer(self._message, timeout=TIMEOUT_S)
                assert answer.raw_output_contents[0] == np.ones((1, 4), np.float32).tobytes()
            except grpc.RpcError as error:
                outcome, told = error.code().name, error.details()
            with self._lock:
                self.outcomes[outcome] += 1
                self.slowest_s = max(self.slowest_s, time.monotonic() - began)
                if told and len(self.failures) < MOST_TOLD:
                    self.failures.append((time.time(), outcome, told))


def main() -> None:
    asked = json.loads(sys.argv[1])
    channel = documented_channel(asked["target"], asked["root"])
    load = Load(channel, asked["model"], asked["threads"], asked["rate"])
    load.first()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    load.start()
    sys.stdin.read()
    load.stop()
    json.dump({"outcomes": load.outcomes, "failures": load.failures, "slowest_s": load.slowest_s}, sys.stdout)
    channel.close()


if __name__ == "__main__":
    main()
