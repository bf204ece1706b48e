"""The client of docs/kubernetes.md, as it stands there, between two servers: balanced, and hardly harmed by an end."""

from __future__ import annotations

import re
import signal
from typing import Any

import grpc
import numpy as np

from service.pb import grpc_service_pb2 as pb
from tests.support import onnx_models
from tests.support.client import Client, request
from tests.support.onnx_models import write_model
from tests.support.server import ROOT, RunningServer, running_server

REQUESTS = 200


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
    """Each of two servers gets its share; SIGTERM to one of them costs at most the call that meets its very end."""
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
        assert len(failed) <= 1
        assert set(failed) <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
        channel.close()
