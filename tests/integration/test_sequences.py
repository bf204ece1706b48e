"""Stateful models on a real server, through both ingresses and on streams: order, states, failures, bounds."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from service.pb import grpc_service_pb2 as pb
from tests.support import onnx_models
from tests.support.client import Client, arrays, request
from tests.support.native import needs_native
from tests.support.onnx_models import PROBE_CONFIG, write_model
from tests.support.server import RunningServer, running_server
from tests.support.stream import Stream, metric, wait_for

SLOW_CONFIG = """
max_batch_size: 1
sequence_batching { max_sequence_idle_microseconds: 60000000 }
"""
RECURRENT_CONFIG = """
max_batch_size: 32
sequence_batching {
  max_sequence_idle_microseconds: 60000000
  oldest { max_candidate_sequences: 8 }
  state { input_name: "state" output_name: "state_out" dims: [ 2, 4 ] initial_state { data_file: "start.bin" } }
}
"""
GROWING_CONFIG = """
max_batch_size: 8
output { name: "present" }
sequence_batching {
  state { input_name: "past" output_name: "present" dims: [ -1, 4 ] initial_state { dims: [ 0, 4 ] zero_data: true } }
}
"""
START = np.arange(8, dtype=np.float32)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    write_model(root, "probe", onnx_models.sequence_probe(), config=PROBE_CONFIG)
    bounded = 'parameters { key: "max_sequences" value { string_value: "3" } }'
    write_model(root, "bounded", onnx_models.sequence_probe(), config=PROBE_CONFIG + bounded)
    write_model(root, "slow", onnx_models.slow_for(50), config=SLOW_CONFIG)
    recurrent = write_model(root, "recurrent", onnx_models.recurrent(), config=RECURRENT_CONFIG)
    (recurrent / "initial_state").mkdir()
    (recurrent / "initial_state" / "start.bin").write_bytes(START.tobytes())
    write_model(root, "growing", onnx_models.growing_cache(), config=GROWING_CONFIG)
    write_model(root, "named", onnx_models.named_sequences(), config=onnx_models.NAMED_CONFIG)
    return root


@pytest.fixture(scope="module", params=["native", "core"])
def server(request: pytest.FixtureRequest, repository: Path) -> Iterator[RunningServer]:
    if request.param == "native":
        needs_native()
    with running_server(repository, "--ingress", request.param, "--metrics-port", "0") as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Client:
    return Client(server.channel())


def step(
    identity: int | str, value: float, start: bool = False, end: bool = False, pick: int = 0, model: str = "probe"
) -> Any:
    """One step of the probe."""
    return request(
        model,
        {"x": np.full((1, 2), value, np.float32), "pick": np.array([[pick]])},
        request_id=f"{identity}:{value:g}",
        parameters={"sequence_id": identity, "sequence_start": start, "sequence_end": end},
    )


def total(answer: Any) -> float:
    return float(arrays(answer)["sum"][0, 0])


def said(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    return error.code(), error.details()


def test_states_stay_on_the_server(client: Client) -> None:
    """Two sequences in turns: each adds up its own."""
    for number in range(5):
        first, last = number == 0, number == 4
        assert total(client.infer(step(11, 1, first, last))) == number + 1
        assert total(client.infer(step(12, 10, first, last))) == 10 * (number + 1)


def test_the_model_is_told_which_step_it_is(client: Client) -> None:
    answers = [
        arrays(client.infer(step(2**63 - 1, 0, start, end)))
        for start, end in ((True, False), (False, False), (False, True), (True, True))
    ]
    assert [float(a["was_first"].item()) for a in answers] == [1, 0, 0, 1]
    assert [int(a["was_last"].item()) for a in answers] == [0, 0, 1, 1]
    assert all(bool(a["was_ready"].item()) for a in answers)
    assert {int(a["was_who"].item()) for a in answers} == {2**63 - 1}


def test_states_are_neither_told_nor_given(client: Client, server: RunningServer) -> None:
    metadata = client.method("ModelMetadata")(pb.ModelMetadataRequest(name="probe"))
    assert [tensor.name for tensor in metadata.inputs] == ["x", "pick"]
    assert "total_out" not in [tensor.name for tensor in metadata.outputs]
    config = client.method("ModelConfig")(pb.ModelConfigRequest(name="probe")).config
    assert config.HasField("sequence_batching")
    assert not config.HasField("dynamic_batching")
    message = step(13, 1, True)
    message.outputs.add(name="total_out")
    with pytest.raises(grpc.RpcError) as caught:
        client.infer(message)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "sequence" in client.method("ServerMetadata")(pb.ServerMetadataRequest()).extensions


@pytest.mark.parametrize(
    ("message", "code", "words"),
    [
        (step(21, 1), "INVALID_ARGUMENT", "must specify the START flag on the first request of the sequence"),
        (step(0, 1, True), "INVALID_ARGUMENT", "must specify a non-zero or non-empty correlation ID"),
        (step("", 1, True), "INVALID_ARGUMENT", "must specify a non-zero or non-empty correlation ID"),
        (step("text", 1, True), "INVALID_ARGUMENT", "takes numbers as correlation ids, got the text 'text'"),
        (
            request("probe", {"x": np.zeros((2, 2), np.float32), "pick": np.zeros((2, 1), np.int64)}),
            "INVALID_ARGUMENT",
            "must specify batch-size 1",
        ),
    ],
)
def test_what_is_no_step_is_refused(client: Client, message: Any, code: str, words: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.infer(message)
    status, details = said(caught.value)
    assert status.name == code
    assert words in details
    assert "probe" in details


def test_an_id_that_is_text(client: Client) -> None:
    message = request(
        "named", {"x": np.zeros((1, 1), np.float32)}, parameters={"sequence_id": "Zoë", "sequence_start": True}
    )
    assert arrays(client.infer(message))["who"].tolist() == [["Zoë".encode()]]
    message.parameters["sequence_id"].int64_param = -3
    assert arrays(client.infer(message))["who"].tolist() == [[b"-3"]]


def test_steps_sent_ahead_on_a_stream(server: RunningServer) -> None:
    """A whole sequence at once, another among it, and one that begins anew: answers in the order of the requests."""
    stream = Stream(server)
    sent, wanted = [], []
    for number in range(40):
        sent += [step(31, 1, number == 0, number == 39), step(32, 2, number in (0, 20))]
        wanted += [number + 1, 2 * (number % 20 + 1)]
    stream.send(*sent)
    stream.done()
    answers = stream.rest()
    assert [answer.error_message for answer in answers] == [""] * 80
    assert [total(answer.infer_response) for answer in answers] == wanted


def test_a_step_that_fails_on_a_stream(server: RunningServer) -> None:
    """The steps held behind it are told so; what comes only after the failure goes on from before it. The others in its
    batches, the next start and a second try are answered."""
    stream = Stream(server)
    sent = [step(41, 1, True), step(41, 2, pick=99), step(41, 3), step(41, 4), step(41, 5, True), step(41, 6)]
    for at in range(6):
        stream.send(sent[at], step(50 + at, 1, True))
    answers = [stream.read() for _ in range(12)]
    mine, others = answers[::2], answers[1::2]
    assert [answer.error_message for answer in others] == [""] * 6
    assert "out of" in mine[1].error_message or "indices" in mine[1].error_message, mine[1].error_message
    reached = 1.0
    for answer, value in zip(mine[2:4], (3, 4), strict=True):
        if answer.error_message:
            assert "the step before this one was not run" in answer.error_message
        else:
            reached += value
            assert total(answer.infer_response) == reached
    assert [total(mine[at].infer_response) for at in (0, 4, 5)] == [1, 5, 11]
    stream.send(step(41, 7, pick=99))
    assert stream.read().error_message
    stream.send(step(41, 8, end=True))
    assert total(stream.read().infer_response) == 19
    stream.done()
    assert stream.rest() == []


def test_steps_held_behind_one_that_is_cancelled(server: RunningServer) -> None:
    """Twenty calls at once for one sequence, one of them cancelled while it is held: those behind it are aborted, those
    before it answered, and the sequence goes on."""
    client = Client(server.channel())
    client.infer(slow_step(61, True))
    infer = client.method("ModelInfer")
    calls = [infer.future(slow_step(61), timeout=30) for _ in range(20)]
    wait_for(lambda: any(call.done() for call in calls), "one is answered")
    cancelled = next(call for call in calls if not call.done())
    cancelled.cancel()
    codes = [call.code() for call in calls if call is not cancelled]
    assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.ABORTED}, codes
    client.infer(slow_step(61, end=True))


def slow_step(identity: int, start: bool = False, end: bool = False) -> Any:
    return request(
        "slow",
        {"x": np.zeros((1, 4), np.float32)},
        parameters={"sequence_id": identity, "sequence_start": start, "sequence_end": end},
    )


def test_rows_of_different_sequences_share_batches(server: RunningServer, client: Client) -> None:
    """A state with its batch on axis 1 that begins with the file's values, in eight sequences at once: each as if
    alone."""
    rng = np.random.default_rng(3)
    steps, clients = 40, 8
    xs = rng.standard_normal((clients, steps, 1, 4)).astype(np.float32)
    before = client.statistics("recurrent")
    together = threading.Barrier(clients)
    failures: list[BaseException] = []

    def talk(number: int) -> None:
        try:
            stream = Stream(server)
            together.wait(30)
            state = START.reshape(2, 4)
            for at in range(steps):
                flags = {"sequence_id": 70 + number, "sequence_start": at == 0, "sequence_end": at == steps - 1}
                stream.send(request("recurrent", {"x": xs[number, at]}, parameters=flags))
                answer = stream.read()
                assert not answer.error_message, answer.error_message
                state = state / 2 + xs[number, at]
                assert np.array_equal(arrays(answer.infer_response)["y"][0], state.sum(axis=0)), (number, at)
            stream.done()
            assert stream.rest() == []
        except BaseException as error:  # noqa: BLE001 - reported by the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures, failures[0]
    after = client.statistics("recurrent")
    rows = after.inference_count - before.inference_count
    assert rows == steps * clients
    assert after.execution_count - before.execution_count < rows


def test_a_state_that_grows(client: Client) -> None:
    """From no element to ten, each step one more; another sequence is shorter meanwhile."""

    def grow(identity: int, value: float, start: bool) -> Any:
        message = request(
            "growing",
            {"x": np.full((1, 1, 4), value, np.float32)},
            parameters={"sequence_id": identity, "sequence_start": start},
        )
        return arrays(client.infer(message))["present"]

    for length in range(1, 11):
        present = grow(81, length, length == 1)
        assert present.shape == (1, length, 4)
        assert present[0, :, 0].tolist() == list(range(1, length + 1))
        assert grow(82, 7, length % 3 == 1).shape == (1, (length - 1) % 3 + 1, 4)


def test_live_sequences_are_bounded(server: RunningServer, client: Client) -> None:
    """One more than the bound is refused with a hint when to come again; it may come when another has ended."""
    for identity in (1, 2, 3):
        client.infer(step(identity, 1, True, model="bounded"))
    with pytest.raises(grpc.RpcError) as caught:
        client.infer(step(4, 1, True, model="bounded"))
    code, details = said(caught.value)
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "'bounded' keeps 3 live sequences" in details
    assert dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"]
    assert total(client.infer(step(2, 1, end=True, model="bounded"))) == 2
    assert total(client.infer(step(4, 5, True, model="bounded"))) == 5
    for identity in (1, 3, 4):
        client.infer(step(identity, 1, end=True, model="bounded"))


def test_sequences_of_dead_clients_go(server: RunningServer) -> None:
    """Cut off in the middle: after the idle timeout nothing of them is there, and their ids can begin anew only."""
    streams = [Stream(server) for _ in range(20)]
    for number, stream in enumerate(streams):
        stream.send(step(100 + number, 1, True))
        assert not stream.read().error_message
    assert metric(server, 'onclock_sequences{model="probe"') >= 20
    assert metric(server, 'onclock_sequence_state_bytes{model="probe"') >= 20 * 8
    expired = metric(server, 'onclock_sequences_expired_total{model="probe"')
    for stream in streams:
        stream.call.cancel()
    wait_for(lambda: metric(server, 'onclock_sequences{model="probe"') == 0, "they are gone")
    assert metric(server, 'onclock_sequences_expired_total{model="probe"') >= expired + 20
    assert metric(server, 'onclock_sequence_state_bytes{model="probe"') == 0
    with pytest.raises(grpc.RpcError, match="START"):
        Client(server.channel()).infer(step(100, 1))


def test_memory_is_flat_over_ten_thousand_sequences(server: RunningServer) -> None:
    """Three steps each, a tenth of them left open for the timeout."""

    def resident() -> int:
        return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    stream = Stream(server, timeout=300)

    def run(first: int, count: int) -> None:
        for identity in range(first, first + count, 100):
            chunk = range(identity, identity + 100)
            for at in range(3):
                stream.send(*(step(one, 1, at == 0, at == 2 and one % 10 != 0) for one in chunk))
            for at in range(300):
                answer = stream.read()
                assert not answer.error_message, answer.error_message
                assert total(answer.infer_response) == at // 100 + 1

    run(10_000, 1_000)
    wait_for(lambda: metric(server, 'onclock_sequences{model="probe"') == 0, "they are gone")
    before = resident()
    run(20_000, 10_000)
    wait_for(lambda: metric(server, 'onclock_sequences{model="probe"') == 0, "they are gone")
    grown = resident() - before
    stream.done()
    assert grown < 4 << 20, f"{grown / 2**20:.1f} MiB more after 10,000 sequences"


def test_a_stateful_model_is_replaced_while_its_sequences_go_on(tmp_path: Path) -> None:
    """Twenty sequences in steps all the while, each begun on one of ten models: none fails, each is added up by the
    model that it began with, and those that are replaced go when their sequences have ended."""
    write_model(tmp_path, "probe", onnx_models.sequence_probe(1), config=PROBE_CONFIG)
    failures: list[BaseException] = []
    factors: set[int] = set()
    over = threading.Event()

    def talk(server: RunningServer, number: int) -> None:
        try:
            client = Client(server.channel())
            while not over.is_set():
                factor = round(total(client.infer(step(number, 1, True))))
                factors.add(factor)
                for at in range(2, 60):
                    assert total(client.infer(step(number, 1, end=at == 59))) == factor * at
        except BaseException as error:  # noqa: BLE001 - reported by the test's own thread
            failures.append(error)

    flags = ("--model-control-mode", "explicit", "--load-model", "*", "--metrics-port", "0")
    with running_server(tmp_path, *flags) as server:
        threads = [threading.Thread(target=talk, args=(server, number)) for number in range(1, 21)]
        for thread in threads:
            thread.start()
        wait_for(lambda: bool(factors or failures), "the first model serves")
        control = Client(server.channel())
        for factor in range(2, 11):
            write_model(tmp_path, "probe", onnx_models.sequence_probe(factor), config=PROBE_CONFIG)
            control.call("RepositoryModelLoad", model_name="probe")
            wait_for(lambda at=factor: at in factors or bool(failures), f"model {factor} serves")  # type: ignore[misc]
        over.set()
        for thread in threads:
            thread.join(60)
        assert not failures, failures[0]
        # Each had ended its sequences before it went.
        wait_for(lambda: metric(server, "onclock_sequences{") == 0, "every sequence has ended")
        assert metric(server, "onclock_failures_total") == 0
        assert metric(server, "onclock_refusals_total") == 0
    assert factors == set(range(1, 11))
