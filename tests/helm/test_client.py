"""The client of docs/kubernetes.md, as it stands there, between two servers: balanced, and not harmed by an end."""

from __future__ import annotations

import collections
import re
import signal
import threading
import time
from typing import Any

import grpc
import numpy as np
import pytest

from service.pb import grpc_service_pb2 as pb
from tests.support import onnx_models
from tests.support.client import Client, request
from tests.support.native import needs_native
from tests.support.onnx_models import write_model
from tests.support.server import ROOT, RunningServer, running_server

REQUESTS = 200
# Sent whatever becomes of those before, so that there are always some on their way to the server that ends.
RATE, ENDS = 2000, 5


def documented_channel(servers: list[RunningServer]) -> grpc.Channel:
    """The channel of the page, with these servers in place of the name that DNS would know."""
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (target,) = re.findall(r'"dns:///[^"]+"', code)
    addresses = ",".join(server.address for server in servers)
    space: dict[str, Any] = {}
    exec(code.replace(target, repr(f"ipv4:{addresses}")), space)  # what is documented is what is run
    channel: grpc.Channel = space["channel"]
    return channel


def answered(server: RunningServer) -> int:
    """How many requests this one has answered."""
    count: int = Client(server.channel()).statistics("m").inference_stats.success.count
    return count


def test_calls_are_balanced_and_a_server_may_end(tmp_path_factory: Any) -> None:
    """Each of two servers gets its share; SIGTERM to one of them costs nothing."""
    failed: list[grpc.StatusCode] = []
    repository = tmp_path_factory.mktemp("models")
    write_model(repository, "m", onnx_models.identity())
    with running_server(repository, expect_exit=None) as going, running_server(repository) as staying:
        channel = documented_channel([going, staying])
        infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        message = request("m", {"x": np.zeros((1, 4), np.float32)})
        for number in range(REQUESTS):
            if number == REQUESTS // 2:
                assert min(answered(going), answered(staying)) >= number // 4
                going.process.send_signal(signal.SIGTERM)
            # The first one waits for both connections.
            try:
                infer(message, timeout=10, wait_for_ready=number == 0)
            except grpc.RpcError as error:
                failed.append(error.code())
        assert going.wait_exit() == 0
        assert answered(staying) > REQUESTS // 2
        assert not failed
        channel.close()


@pytest.mark.parametrize("ingress", ["native", "core"])
def test_an_end_costs_no_call(ingress: str, tmp_path_factory: Any) -> None:
    """At two thousand a second, whichever ingress serves: who watches health has left before anything is refused."""
    if ingress == "native":
        needs_native()
    repository = tmp_path_factory.mktemp("models")
    write_model(repository, "m", onnx_models.identity())
    outcomes: collections.Counter[str] = collections.Counter()
    with running_server(repository, "--ingress", ingress) as staying:
        for _ in range(ENDS):
            with running_server(repository, "--ingress", ingress, expect_exit=None) as going:
                outcomes.update(calls_during_an_end(going, staying))
    assert outcomes["OK"] > RATE
    assert set(outcomes) == {"OK"}, outcomes


def calls_during_an_end(going: RunningServer, staying: RunningServer) -> list[str]:
    """What becomes of calls that are sent all the while, before and after `going` is told to end."""
    channel = documented_channel([going, staying])
    infer = channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        request_serializer=pb.ModelInferRequest.SerializeToString,
        response_deserializer=pb.ModelInferResponse.FromString,
    )
    message = request("m", {"x": np.zeros((1, 4), np.float32)})
    for _ in range(REQUESTS):
        infer(message, timeout=10)
    calls: list[grpc.Future] = []
    over = threading.Event()

    def send() -> None:
        due = time.monotonic()
        while not over.wait(max(0.0, due - time.monotonic())):
            calls.append(infer.future(message, timeout=10))
            due += 1 / RATE

    sender = threading.Thread(target=send)
    sender.start()
    while len(calls) < RATE // 2:
        time.sleep(0.01)
    going.process.send_signal(signal.SIGTERM)
    assert going.wait_exit() == 0
    over.set()
    sender.join()
    found = [call.code().name for call in calls]
    channel.close()
    return found
