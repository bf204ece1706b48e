"""Models that change while they serve: by a client's word, and by their files. Nobody else notices."""

from __future__ import annotations

import os
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import pytest
from onnx import helper

from service.pb import grpc_service_pb2 as pb
from tests.support import onnx_models
from tests.support.client import TIMEOUT_S, Client, arrays, request
from tests.support.onnx_models import write_model
from tests.support.server import RunningServer, running_server

X = np.ones((1, 4), np.float32)
BATCHED = "max_batch_size: 16\ndynamic_batching {}\n"
FLAGS = ("--metrics-port", "0", "--profile-budget-ms", "50", "--profile-cache", "none")


def times(factor: int) -> onnx.ModelProto:
    """`x` FP32 [N, 4] -> `y` = factor * x: the answer says which model gave it."""
    nodes = [helper.make_node("Sum", ["x"] * factor, ["y"])]
    tensors = [onnx_models.value(name, "FP32", ["N", 4]) for name in "xy"]
    return onnx_models.make_model("times", nodes, tensors[:1], tensors[1:])


def factor_of(client: Client, model: str = "m", version: str = "") -> float:
    answer = client.infer(request(model, {"x": X}, version=version))
    return float(arrays(answer)["y"][0, 0])


def load(client: Client, name: str, **parameters: str | bytes) -> None:
    message = pb.RepositoryModelLoadRequest(model_name=name)
    for key, value in parameters.items():
        key = key.replace("file_1", "file:1/model.onnx")
        if isinstance(value, bytes):
            message.parameters[key].bytes_param = value
        else:
            message.parameters[key].string_param = value
    client.method("RepositoryModelLoad")(message, timeout=TIMEOUT_S)


def unload(client: Client, name: str) -> None:
    client.call("RepositoryModelUnload", model_name=name)


def refusal(act: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        act()
    error: Any = caught.value
    return error.code(), error.details()


def index(client: Client) -> dict[str, tuple[str, str]]:
    return {f"{m.name}/{m.version}": (m.state, m.reason) for m in client.call("RepositoryIndex").models}


def wait_for(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end, what


def metrics(server: RunningServer) -> str:
    return str(urllib.request.urlopen(server.metrics_url, timeout=10).read().decode())


class Load:
    """Clients that ask without pause; what they were answered."""

    def __init__(self, server: RunningServer, model: str = "m", clients: int = 3) -> None:
        self.answers: list[float] = []
        self.failures: list[str] = []
        self._stop = threading.Event()
        channels = [Client(server.channel()) for _ in range(clients)]
        self._threads = [threading.Thread(target=self._ask, args=(client, model)) for client in channels]

    def _ask(self, client: Client, model: str) -> None:
        while not self._stop.is_set():
            try:
                self.answers.append(factor_of(client, model))
            except grpc.RpcError as error:
                self.failures.append(str(error))

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(TIMEOUT_S)


@contextmanager
def explicit(root: Path, *flags: str) -> Iterator[tuple[RunningServer, Client]]:
    with running_server(root, "--model-control-mode", "explicit", *FLAGS, *flags) as server:
        yield server, Client(server.channel())


def test_load_and_unload(tmp_path: Path) -> None:
    """Nothing is served until it is asked for; what is unloaded says so; both can be done again."""
    write_model(tmp_path, "m", times(2), config=BATCHED)
    write_model(tmp_path, "other", times(5), config=BATCHED)
    with explicit(tmp_path, "--load-model", "other") as (server, client):
        assert factor_of(client, "other") == 5
        assert index(client) == {"m/1": ("UNAVAILABLE", ""), "other/1": ("READY", "")}
        code, details = refusal(lambda: factor_of(client))
        assert (code, "it is not loaded" in details) == (grpc.StatusCode.UNAVAILABLE, True)
        for _ in range(3):
            load(client, "m")
            assert factor_of(client) == 2
            load(client, "m")
            unload(client, "m")
            assert refusal(lambda: factor_of(client))[0] is grpc.StatusCode.UNAVAILABLE
        wait_for(lambda: index(client)["m/1"] == ("UNAVAILABLE", ""), "it is gone")
        assert 'onclock_model_changes_total{model="m",result="loaded"} 3\n' in metrics(server)
        assert refusal(lambda: load(client, "nobody")) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "failed to load 'nobody', failed to poll from model repository: there is no such model",
        )
        assert refusal(lambda: unload(client, "nobody"))[0] is grpc.StatusCode.INVALID_ARGUMENT
        assert refusal(lambda: load(client, "../m"))[0] is grpc.StatusCode.INVALID_ARGUMENT
        extensions = client.call("ServerMetadata").extensions
        assert {"model_repository", "model_repository(unload_dependents)"} <= set(extensions)


def test_new_files_under_load(tmp_path: Path) -> None:
    """Old answers until the new model answers, then new ones; not one request fails, and the old model is let go."""
    write_model(tmp_path, "m", times(2), config=BATCHED)
    with explicit(tmp_path, "--load-model", "m") as (server, client), Load(server) as asked:
        for factor in range(3, 9):
            write_model(tmp_path, "m", times(factor), config=BATCHED)
            load(client, "m")
            assert factor_of(client) == factor
        wait_for(lambda: len(asked.answers) > 100, "requests were answered")
    assert not asked.failures, asked.failures[0]
    assert set(asked.answers) <= {2, 3, 4, 5, 6, 7, 8}
    assert {2.0, 8.0} <= set(asked.answers)


def test_a_broken_change_leaves_what_serves(tmp_path: Path) -> None:
    """It never answers, the index and a metric say why, and the next good one replaces it."""
    write_model(tmp_path, "m", times(2), config=BATCHED)
    with explicit(tmp_path, "--load-model", "*") as (server, client), Load(server) as asked:
        model = tmp_path / "m" / "1" / "model.onnx"
        whole = times(3).SerializeToString()
        for broken in (whole[: len(whole) // 2], b"", b"nonsense"):
            model.write_bytes(broken)
            code, details = refusal(lambda: load(client, "m"))
            assert code is grpc.StatusCode.UNAVAILABLE
            assert details.startswith("failed to load 'm', ")
            state, reason = index(client)["m/1"]
            assert state == "READY"
            assert reason.startswith("serves on as before, since a change failed to load: ")
            assert factor_of(client) == 2
        write_model(tmp_path, "m", times(2), config="max_batch_size: -3\n")
        assert refusal(lambda: load(client, "m"))[0] is grpc.StatusCode.UNAVAILABLE
        write_model(tmp_path, "m", times(2), config="max_batch_size {\n")
        assert refusal(lambda: load(client, "m"))[0] is grpc.StatusCode.UNAVAILABLE
        assert "config.pbtxt" in index(client)["m/1"][1]
        write_model(tmp_path, "m", times(3), config=BATCHED)
        load(client, "m")
        assert factor_of(client) == 3
        assert index(client)["m/1"] == ("READY", "")
        assert 'onclock_model_changes_total{model="m",result="failed"} 5\n' in metrics(server)
    assert not asked.failures, asked.failures[0]
    assert set(asked.answers) == {2.0, 3.0}


def test_configurations_and_files_of_the_client(tmp_path: Path) -> None:
    """They hold until the model is loaded without them, or unloaded."""
    write_model(tmp_path, "m", times(2), config=BATCHED)
    with explicit(tmp_path, "--load-model", "m") as (_, client):
        load(client, "m", config='{"max_batch_size": 3}')
        assert client.call("ModelConfig", name="m").config.max_batch_size == 3
        load(client, "m")
        assert client.call("ModelConfig", name="m").config.max_batch_size == 16
        load(client, "m", config='{"max_batch_size": 5}', file_1=times(9).SerializeToString())
        assert factor_of(client) == 9
        assert client.call("ModelConfig", name="m").config.max_batch_size == 5
        load(client, "new", config="{}", file_1=times(7).SerializeToString())
        assert factor_of(client, "new") == 7
        code, details = refusal(lambda: load(client, "new", config="{}", file_1=b"nonsense"))
        assert code is grpc.StatusCode.UNAVAILABLE, details
        assert factor_of(client, "new") == 7
        load(client, "m")
        assert factor_of(client) == 2
        assert refusal(lambda: load(client, "m", config="{"))[0] is grpc.StatusCode.INVALID_ARGUMENT
        assert refusal(lambda: load(client, "m", colour="red"))[0] is grpc.StatusCode.INVALID_ARGUMENT


def test_versions_come_and_go(tmp_path: Path) -> None:
    """The newest serves; the one before goes when the newer one is ready, and comes back when that is removed."""
    write_model(tmp_path, "m", times(2), 1, BATCHED)
    with explicit(tmp_path, "--load-model", "m") as (_, client):
        write_model(tmp_path, "m", times(3), 2)
        load(client, "m")
        assert factor_of(client) == factor_of(client, version="2") == 3
        assert refusal(lambda: factor_of(client, version="1"))[0] is grpc.StatusCode.UNAVAILABLE
        shutil.rmtree(tmp_path / "m" / "2")
        load(client, "m")
        assert factor_of(client) == factor_of(client, version="1") == 2


def test_two_clients_at_once(tmp_path: Path) -> None:
    """Loads and unloads of one model are made one after the other; whatever the order, it ends as the last one says."""
    write_model(tmp_path, "m", times(2), config=BATCHED)
    with explicit(tmp_path) as (server, client):
        clients = [Client(server.channel()) for _ in range(4)]

        def churn(mine: Client, number: int) -> None:
            for turn in range(4):
                load(mine, "m") if (turn + number) % 2 else unload(mine, "m")

        load(client, "m")
        threads = [threading.Thread(target=churn, args=(mine, i)) for i, mine in enumerate(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT_S)
        load(client, "m")
        assert factor_of(client) == 2
        unload(client, "m")
        assert refusal(lambda: factor_of(client))[0] is grpc.StatusCode.UNAVAILABLE


def test_memory_stays_where_it_is(tmp_path: Path) -> None:
    """Thirty replacements of a model of 16 MiB leave no more than a few of them behind."""
    write_model(tmp_path, "m", onnx_models.matmul_stack(1, 2048), config=BATCHED)
    with explicit(tmp_path, "--load-model", "m") as (server, client):

        def resident() -> int:
            return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        def replace(seed: int) -> None:
            write_model(tmp_path, "m", onnx_models.matmul_stack(1, 2048, seed), config=BATCHED)
            load(client, "m")

        for seed in range(5):
            replace(seed)
        before = resident()
        for seed in range(5, 35):
            replace(seed)
        wait_for(lambda: resident() - before < 80 << 20, f"{(resident() - before) >> 20} MiB more than before")


def test_control_is_refused_where_it_is_not_wanted(tmp_path: Path) -> None:
    """By a server whose models are those of its start."""
    write_model(tmp_path, "m", times(2), config=BATCHED)
    with running_server(tmp_path, *FLAGS) as server:
        client = Client(server.channel())
        for act in (lambda: load(client, "m"), lambda: unload(client, "m")):
            code, details = refusal(act)
            assert code is grpc.StatusCode.UNAVAILABLE
            assert "explicit model load / unload is not allowed" in details
        assert "model_repository" not in client.call("ServerMetadata").extensions


def test_files_are_followed(tmp_path: Path) -> None:
    """New models, changed ones, broken ones, ones written in pieces, and ones that go; not one request fails."""
    write_model(tmp_path, "m", times(2), config=BATCHED)
    polled = ("--model-control-mode", "poll", "--repository-poll-secs", "0.2")
    with running_server(tmp_path, *polled, *FLAGS) as server:
        client = Client(server.channel())

        def answers(model: str, factor: float) -> Callable[[], bool]:
            def ask() -> bool:
                try:
                    return factor_of(client, model) == factor
                except grpc.RpcError:
                    return False

            return ask

        with Load(server) as asked:
            write_model(tmp_path, "new", times(7), config=BATCHED)
            wait_for(answers("new", 7), "a new model is served")
            # Written slowly, in pieces: no half of it is ever served.
            path, whole = tmp_path / "m" / "1" / "model.onnx", times(3).SerializeToString()
            with path.open("wb") as file:
                for piece in _pieces(whole, 20):
                    file.write(piece)
                    file.flush()
                    time.sleep(0.3)
            wait_for(answers("m", 3), "the changed model is served")
            path.write_bytes(b"nonsense")
            wait_for(lambda: "serves on as before" in index(client)["m/1"][1], "the index says why")
            assert index(client)["m/1"][0] == "READY"
            path.write_bytes(times(4).SerializeToString())
            wait_for(answers("m", 4), "the next one is served")
            shutil.rmtree(tmp_path / "new")
            wait_for(lambda: "new/1" not in index(client), "a model that is gone is not listed")
        assert not asked.failures, asked.failures[0]
        assert set(asked.answers) == {2.0, 3.0, 4.0}
        code, details = refusal(lambda: factor_of(client, "new"))
        assert code is grpc.StatusCode.INVALID_ARGUMENT, details
        assert "polling" in refusal(lambda: load(client, "m"))[1]


def _pieces(whole: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(whole), size):
        yield whole[start : start + size]
