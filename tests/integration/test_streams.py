"""`ModelStreamInfer` on a real server, through both ingresses: order, errors, cancelling, bounds, draining."""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from tests.support import onnx_models
from tests.support.client import TIMEOUT_S, Client, arrays, request
from tests.support.native import needs_native
from tests.support.onnx_models import write_model
from tests.support.server import RunningServer, running_server
from tests.support.stream import Stream, metric, wait_for

X = np.arange(8, dtype=np.float32).reshape(2, 4)
ROW = np.zeros((1, 4), np.float32)
STREAMS = 200


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    write_model(root, "identity", onnx_models.identity(), config="max_batch_size: 64\ndynamic_batching {}\n")
    write_model(root, "slow", onnx_models.slow_for(50), config="max_batch_size: 1\n")
    write_model(root, "large", onnx_models.image_identity())
    write_model(root, "poison", onnx_models.poison())
    return root


@pytest.fixture(scope="module", params=["native", "core"])
def server(request: pytest.FixtureRequest, repository: Path) -> Iterator[RunningServer]:
    if request.param == "native":
        needs_native()
    with running_server(repository, "--ingress", request.param, "--metrics-port", "0") as running:
        yield running


def ids(answers: list[Any]) -> list[str]:
    return [answer.infer_response.id for answer in answers]


def test_answers_come_in_the_order_of_the_requests(server: RunningServer) -> None:
    """Fast ones wait for slow ones before them; an error has its place among them; each is the last of its request."""
    stream = Stream(server)
    wrong = request("identity", {"nonsense": X}, request_id="wrong")
    unknown = request("nobody", {"x": X}, request_id="unknown")
    sent = [
        request("slow", {"x": ROW}, request_id="slow"),
        request("identity", {"x": X}, request_id="first"),
        wrong,
        request("poison", {"index": np.array([[1000]])}, request_id="poison"),
        unknown,
        request("identity", {"x": X * 2}, request_id="last"),
    ]
    stream.send(*sent)
    stream.done()
    answers = stream.rest()
    assert ids(answers) == [message.id for message in sent]
    assert [bool(answer.error_message) for answer in answers] == [False, False, True, True, True, False]
    assert "unexpected inference input 'nonsense'" in answers[2].error_message
    assert "poison" in answers[3].error_message
    assert "Request for unknown model: 'nobody' is not found" in answers[4].error_message
    assert not answers[2].infer_response.outputs
    assert np.array_equal(arrays(answers[1].infer_response)["y"], X)
    assert np.array_equal(arrays(answers[5].infer_response)["y"], X * 2)
    assert all(answer.infer_response.parameters["triton_final_response"].bool_param for answer in answers)
    assert stream.call.code() is grpc.StatusCode.OK


def test_messages_that_are_none(server: RunningServer) -> None:
    """Each is answered as an error, and the stream goes on."""
    stream = Stream(server)
    stream.send(b"\xff\xff\xff", b"", request("identity", {"x": X}, request_id="good"))
    stream.done()
    first, second, good = stream.rest()
    assert "not a valid ModelInferRequest" in first.error_message
    assert "unknown model" in second.error_message
    assert good.infer_response.id == "good"


def test_an_error_ends_the_stream_if_the_client_wants_that(server: RunningServer) -> None:
    """After what came before it, with its own status."""
    stream = Stream(server, (("triton_grpc_error", "true"),))
    stream.send(request("identity", {"x": X}, request_id="good"), request("identity", {"y": X}))
    assert stream.read().infer_response.id == "good"
    with pytest.raises(grpc.RpcError) as error:
        stream.rest()
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
    assert "unexpected inference input 'y'" in error.value.details()  # type: ignore[attr-defined]
    stream.done()


def test_a_conversation(server: RunningServer) -> None:
    """Answers come while the stream is open: the next request may depend on the last answer."""
    stream = Stream(server)
    x = np.ones((1, 4), np.float32)
    for step in range(20):
        stream.send(request("identity", {"x": x}, request_id=str(step)))
        answer = stream.read()
        assert answer.infer_response.id == str(step)
        x = arrays(answer.infer_response)["y"] + 1
    stream.done()
    assert stream.rest() == []
    assert x[0, 0] == 21


def test_a_cancelled_stream_takes_its_requests_with_it(server: RunningServer) -> None:
    """What it had queued is not run; others are served at once."""
    client = Client(server.channel())
    before = client.statistics("slow").execution_count
    stream = Stream(server)
    sent = [request("slow", {"x": ROW}, request_id=str(i)) for i in range(100)]
    stream.send(*sent)
    stream.read()
    stream.call.cancel()
    client.infer(request("slow", {"x": ROW}))
    wait_for(lambda: metric(server, "nv_inference_pending_request_count") == 0, "the queue is empty")
    wait_for(lambda: metric(server, "onclock_streams") == 0, "the stream is closed")
    assert client.statistics("slow").execution_count - before < 50
    stream.done()


def test_many_streams_at_once(server: RunningServer) -> None:
    """Two hundred, each with a conversation of its own, share batches; none is left over."""
    client = Client(server.channel())
    before = client.statistics("identity")
    failures: list[Any] = []
    together = threading.Barrier(STREAMS)

    def talk(number: int) -> None:
        try:
            stream = Stream(server)
            together.wait(TIMEOUT_S)
            for step in range(5):
                x = np.full((1, 4), number * 10 + step, np.float32)
                stream.send(request("identity", {"x": x}, request_id=f"{number}/{step}"))
                answer = stream.read()
                assert answer.infer_response.id == f"{number}/{step}", answer
                assert np.array_equal(arrays(answer.infer_response)["y"], x)
            stream.done()
            assert stream.rest() == []
        except BaseException as error:  # noqa: BLE001 - reported by the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(STREAMS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert not failures, failures[0]
    after = client.statistics("identity")
    assert after.inference_count - before.inference_count == STREAMS * 5
    assert after.execution_count - before.execution_count < STREAMS * 5
    wait_for(lambda: metric(server, "onclock_streams") == 0, "every stream is closed")


def test_a_client_that_does_not_read_holds_nobody_else_up(server: RunningServer) -> None:
    """Its answers are large and stay unread; others are served meanwhile, and what it sent is answered in the end."""
    picture = np.ones((1, 3, 224, 224), np.float32)
    stream = Stream(server)
    stream.send(*(request("large", {"x": picture * i}, request_id=str(i)) for i in range(60)))
    stream.done()
    client = Client(server.channel())
    for _ in range(50):
        assert np.array_equal(arrays(client.infer(request("identity", {"x": X})))["y"], X)
    answers = stream.rest()
    assert ids(answers) == [str(i) for i in range(60)]
    assert all(float(arrays(a.infer_response)["y"][0, 0, 0, 0]) == i for i, a in enumerate(answers))


def test_more_than_may_be_in_flight(server: RunningServer) -> None:
    """The stream is read as its answers leave: all are answered, in order."""
    stream = Stream(server)
    sent = [request("identity", {"x": np.full((1, 4), i, np.float32)}, request_id=str(i)) for i in range(3000)]
    stream.send(*sent)
    stream.done()
    assert ids(stream.rest()) == [str(i) for i in range(3000)]


def test_the_deadline_of_the_stream(server: RunningServer) -> None:
    """It ends with the client's own status, and what waited is not run."""
    stream = Stream(server, timeout=0.3)
    stream.send(*(request("slow", {"x": ROW}) for _ in range(50)))
    with pytest.raises(grpc.RpcError) as error:
        stream.rest()
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
    wait_for(lambda: metric(server, "nv_inference_pending_request_count") == 0, "the queue is empty")
    stream.done()


def test_parameters_of_a_request(server: RunningServer) -> None:
    """`timeout` counts as in a unary call; the C++ client's flag is accepted."""
    stream = Stream(server)
    flag = {"triton_enable_empty_final_response": True}
    stream.send(
        request("slow", {"x": ROW}, request_id="a"),
        # One of them may be run all the same, to find out whether the model is still as slow.
        *(request("slow", {"x": ROW}, request_id="b", parameters={"timeout": 1000}) for _ in range(5)),
        request("identity", {"x": X}, request_id="c", parameters=flag),
    )
    stream.done()
    first, *hurried, third = stream.rest()
    assert not first.error_message
    assert ids(hurried) == ["b"] * 5
    assert any(answer.error_message for answer in hurried)
    assert not third.error_message


def test_too_many_streams(repository: Path) -> None:
    """One more is refused, with a status that says why; when one ends there is room again."""
    with running_server(repository, "--max-streams", "2") as server:
        held = [Stream(server), Stream(server)]
        for stream in held:
            stream.send(request("identity", {"x": X}))
            assert not stream.read().error_message
        extra = Stream(server)
        with pytest.raises(grpc.RpcError) as error:
            extra.read()
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
        assert "2 streams are open" in error.value.details()  # type: ignore[attr-defined]
        extra.done()
        held[0].done()
        assert held[0].rest() == []
        for attempt in itertools.count():
            again = Stream(server)
            again.send(request("identity", {"x": X}))
            try:
                assert not again.read().error_message
                break
            except grpc.RpcError:
                assert attempt < 100
        again.done()
        held[1].done()


@pytest.mark.parametrize("ingress", ["native", "core"])
def test_draining(ingress: str, repository: Path) -> None:
    """What was accepted is answered, what comes after is refused within the stream, which then ends."""
    if ingress == "native":
        needs_native()
    with running_server(repository, "--ingress", ingress) as server:
        stream = Stream(server)
        stream.send(*(request("slow", {"x": ROW}, request_id=str(i)) for i in range(10)))
        first = stream.read()
        server.process.send_signal(signal.SIGTERM)
        answers = [first, *(stream.read() for _ in range(9))]
        assert ids(answers) == [str(i) for i in range(10)]
        assert not any(answer.error_message for answer in answers)
        with pytest.raises(grpc.RpcError) as error:
            stream.rest()
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
        stream.done()
        assert server.wait_exit() == 0
