"""A request that makes its batch fail fails alone: its neighbours are answered, and rightly."""

from __future__ import annotations

import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from tests.support import onnx_models
from tests.support.client import Client, arrays, request, settled
from tests.support.corpus import model_file, open_session, run_directly
from tests.support.server import RunningServer, running_server

REQUESTS = 16
# The device is kept busy for as long as the requests of a test need to arrive, a hundred times over.
BUSY_S = 1.0
TRIES = 4
PENDING = 'nv_inference_pending_request_count{model="poison",version="1"}'


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("repository")
    onnx_models.write_model(directory, "poison", onnx_models.poison(rows=64))
    # How long it runs is in the request: a loop of as many turns as asked for.
    onnx_models.write_model(directory, "busy", onnx_models.looping())
    return directory


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[RunningServer]:
    with running_server(repository, "--metrics-port", "0") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Client:
    return Client(server.channel())


def busy(turns: int) -> Any:
    return request("busy", {"x": np.ones((1, 4), np.float32), "times": np.array(turns, np.int64)})


@pytest.fixture(scope="module")
def turns(client: Client) -> int:
    """Turns of the loop that take about `BUSY_S`."""
    sample = 20_000
    start = time.monotonic()
    client.infer(busy(sample))
    return int(sample * BUSY_S / (time.monotonic() - start))


def pending(server: RunningServer) -> int:
    with urllib.request.urlopen(server.metrics_url, timeout=10) as page:
        for line in page.read().decode().splitlines():
            if line.startswith(PENDING):
                return int(float(line.rsplit(" ", 1)[1]))
    raise AssertionError(f"{PENDING} is not on the page of metrics")


def batch_counts(statistics: Any) -> dict[int, int]:
    """Executions of the model by batch size."""
    return {b.batch_size: b.compute_infer.count for b in statistics.batch_stats}


def send_together(server: RunningServer, client: Client, turns: int, indices: list[list[int]]) -> tuple[Any, list[Any]]:
    """Send requests of these rows while the device is busy, so that they wait together; the statistics before they
    run, and their futures, in order. A machine that is slow now gets more time in another try."""
    for attempt in range(TRIES):
        blocker = client.infer_future(busy(turns << attempt))
        futures = [
            client.infer_future(request("poison", {"index": np.array(rows, np.int64).reshape(-1, 1)}))
            for rows in indices
        ]
        while pending(server) < len(indices) and not blocker.done():
            pass
        # The worker is busy: everything that ran before has been counted.
        before = client.statistics("poison")
        waiting = pending(server) == len(indices)
        if waiting and not blocker.done():
            return before, futures
        blocker.result()
        outcomes(futures)
    raise AssertionError(f"the device was not busy for long enough in {TRIES} tries")


def outcomes(futures: list[Any]) -> list[Any]:
    """The rows each request was answered with, or its error."""
    results: list[Any] = []
    for future in futures:
        try:
            results.append(arrays(future.result())["row"])
        except grpc.RpcError as error:
            results.append(error)
    return results


@pytest.mark.parametrize("position", [0, 7, 15])
def test_one_poisoned_request_of_sixteen_fails_alone(
    server: RunningServer, client: Client, repository: Path, turns: int, position: int
) -> None:
    """Sixteen requests share a batch, one is poisoned: fifteen right answers, one error, and the batch was halved until
    only the poisoned one was left."""
    indices = [[i] for i in range(REQUESTS)]
    indices[position] = [1000]
    before, futures = send_together(server, client, turns, indices)
    results = outcomes(futures)
    session = open_session(model_file(repository / "poison"))
    for i, result in enumerate(results):
        if i == position:
            assert isinstance(result, grpc.RpcError)
            assert result.code() is grpc.StatusCode.INTERNAL
            assert "model 'poison' version 1 failed on this request" in result.details()
            assert "1000" in result.details()
        else:
            expected = run_directly(session, {"index": np.array([[i]], np.int64)})["row"]
            np.testing.assert_array_equal(result, expected)
    after = settled(client, "poison", before.execution_count + 4)
    # Only a batch of 16 that was halved again and again leaves exactly these.
    assert Counter(batch_counts(after)) - Counter(batch_counts(before)) == {8: 1, 4: 1, 2: 1, 1: 1}
    assert after.execution_count == before.execution_count + 4
    assert after.inference_stats.fail.count == before.inference_stats.fail.count + 1


def test_two_poisoned_requests_fail_and_their_neighbours_do_not(
    server: RunningServer, client: Client, repository: Path, turns: int
) -> None:
    """Poison in both halves, in requests of several rows."""
    indices = [[i, i + 1, i + 2] for i in range(10)]
    indices[2][1] = 64
    indices[9][2] = -65
    results = outcomes(send_together(server, client, turns, indices)[1])
    session = open_session(model_file(repository / "poison"))
    for i, result in enumerate(results):
        if i in (2, 9):
            assert isinstance(result, grpc.RpcError)
            assert result.code() is grpc.StatusCode.INTERNAL
        else:
            rows = np.array(indices[i], np.int64).reshape(-1, 1)
            np.testing.assert_array_equal(result, run_directly(session, {"index": rows})["row"])


def test_a_batch_of_poison_fails_whole_and_the_server_goes_on(
    server: RunningServer, client: Client, turns: int
) -> None:
    """Each gets its own error; the next request is answered as if nothing had been."""
    _, futures = send_together(server, client, turns, [[100 + i] for i in range(REQUESTS)])
    results = outcomes(futures)
    for i, result in enumerate(results):
        assert isinstance(result, grpc.RpcError)
        assert str(100 + i) in result.details()
    answer = client.infer(request("poison", {"index": np.array([[3]], np.int64)}))
    assert arrays(answer)["row"].shape == (1, 4)
    assert client.call("ModelReady", name="poison").ready


def test_a_poisoned_request_alone(client: Client) -> None:
    """Without neighbours there is nothing to split: it fails once."""
    with pytest.raises(grpc.RpcError) as caught:
        client.infer(request("poison", {"index": np.array([[64]], np.int64)}))
    assert caught.value.code() is grpc.StatusCode.INTERNAL  # type: ignore[attr-defined]
