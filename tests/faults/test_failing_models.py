"""A model that fails whenever it is run: its clients are told, the worker lives on, and its neighbours are served."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from onnx import helper

from tests.support import onnx_models
from tests.support.client import Client, arrays, request
from tests.support.onnx_models import make_model, value, write_model
from tests.support.server import RunningServer, running_server

X = np.arange(4, dtype=np.float32).reshape(1, 4)
TRIES = 100


def always_failing() -> Any:
    """`x` FP32 [N, 4] -> an element that is not there, found out only when it is run."""
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Mul", ["sum", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "far"], ["where"]),
        helper.make_node("Cast", ["where"], ["index"], to=onnx_models.ELEMENT_TYPES["INT64"]),
        helper.make_node("Gather", ["x", "index"], ["y"], axis=1),
    ]
    constants = {"zero": np.array(0, np.float32), "far": np.array(1000, np.float32)}
    return make_model("failing", nodes, [value("x", "FP32", ["N", 4])], [value("y", "FP32", ["N"])], constants)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    directory = tmp_path_factory.mktemp("models")
    write_model(directory, "failing", always_failing())
    write_model(directory, "good", onnx_models.identity())
    with running_server(directory) as running:
        yield running


def test_it_is_told_at_load(server: RunningServer) -> None:
    """The warm-up fails, which may be the fault of its input: the model is served, with a note that says so."""
    notes = [line["note"] for line in server.log_lines("model note") if line["model"] == "failing"]
    assert any("warm-up failed" in note and "Gather" in note for note in notes), notes


def test_every_request_fails_and_the_neighbours_do_not(server: RunningServer) -> None:
    """Many failing requests among good ones, sent together: INTERNAL for the ones, the right answer for the others."""
    client = Client(server.channel())
    failing = [client.infer_future(request("failing", {"x": X})) for _ in range(TRIES)]
    good = [client.infer_future(request("good", {"x": X + number})) for number in range(TRIES)]
    for number, future in enumerate(good):
        assert np.array_equal(arrays(future.result(30))["y"], X + number)
    for future in failing:
        error = future.exception(30)
        assert error.code() is grpc.StatusCode.INTERNAL
        assert "'failing'" in error.details()
        assert "Gather" in error.details()
    # The one worker of the device has survived them all.
    assert np.array_equal(arrays(client.infer(request("good", {"x": X})))["y"], X)
    assert client.call("ServerReady").ready


def test_failures_do_not_fill_the_log(server: RunningServer) -> None:
    """A client that sends what fails, over and over, costs a few lines."""
    client = Client(server.channel())
    before = len(server.log_lines())
    for _ in range(TRIES):
        with pytest.raises(grpc.RpcError):
            client.infer(request("failing", {"x": X}))
    assert len(server.log_lines()) - before < TRIES // 10


def test_failures_are_counted_as_such(server: RunningServer, tmp_path: Path) -> None:
    """In the model's statistics: failed, not answered, never half of each."""
    client = Client(server.channel())
    with pytest.raises(grpc.RpcError):
        client.infer(request("failing", {"x": X}))
    stats = client.statistics("failing")
    assert stats.inference_stats.success.count == 0
    assert stats.inference_count == 0
    assert stats.inference_stats.fail.count >= 1
