"""The real perf_analyzer runs its modes to the end, and the server's statistics are those it expects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import onnx_models
from tests.support.client import Client
from tests.support.onnx_models import write_model
from tests.support.perf_analyzer import Measured, needs_perf_analyzer, perf_analyzer
from tests.support.server import RunningServer, running_server

# It ends at the first request that is refused, so there is no objective.
BATCHED = "max_batch_size: 16\ndynamic_batching {}\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    needs_perf_analyzer()
    repository = tmp_path_factory.mktemp("repository")
    write_model(repository, "mlp", onnx_models.mlp(), config=BATCHED)
    write_model(repository, "words", onnx_models.string_upper())
    write_model(repository, "probe", onnx_models.sequence_probe(), config=onnx_models.PROBE_CONFIG)
    write_model(repository, "picture", onnx_models.image_identity())
    with running_server(repository, "--metrics-port", "0", "--allow-client-shm", "true") as running:
        yield running


def consistent(measured: Measured) -> None:
    """Throughput as the client saw it, and every part of the server's time.

    What is left for the way it takes for 0 when its few requests make the server's mean larger than the client's.
    """
    assert measured.number("Inferences/Second") > 0
    parts = ("Server Queue", "Server Compute Input", "Server Compute Infer", "Server Compute Output")
    assert all(measured.number(part) >= 0 for part in parts), measured.columns
    assert measured.number("Server Compute Infer") > 0
    assert measured.number("Network+Server Send/Recv") >= 0, measured.columns


def test_concurrency(server: RunningServer, tmp_path: Path) -> None:
    """One request at a time, then several: a line of the table for each."""
    lines = perf_analyzer(server.address, "mlp", tmp_path, ["--concurrency-range", "1:5:4"])
    # The table is in the order of what was measured: on a busy machine five at a time may come out before one.
    assert sorted(line.columns["Concurrency"] for line in lines) == ["1", "5"]
    for line in lines:
        consistent(line)


def test_concurrency_of_asynchronous_batches(server: RunningServer, tmp_path: Path) -> None:
    """Four rows in each request."""
    (line,) = perf_analyzer(server.address, "mlp", tmp_path, ["--async", "-b", "4", "--concurrency-range", "3"])
    consistent(line)


@pytest.mark.parametrize("distribution", ["constant", "poisson"])
def test_request_rate(distribution: str, server: RunningServer, tmp_path: Path) -> None:
    """Open-loop, at a rate that any machine answers."""
    arguments = ["--request-rate-range", "100", "--request-distribution", distribution]
    (line,) = perf_analyzer(server.address, "mlp", tmp_path, arguments)
    consistent(line)
    assert 50 < line.number("Inferences/Second") < 200


def test_request_intervals(server: RunningServer, tmp_path: Path) -> None:
    """A schedule of its user's: microseconds between requests."""
    intervals = tmp_path / "intervals"
    intervals.write_text("5000\n10000\n15000\n")
    (line,) = perf_analyzer(server.address, "mlp", tmp_path, ["--request-intervals", str(intervals)])
    consistent(line)


def test_streaming(server: RunningServer, tmp_path: Path) -> None:
    """All requests on streams, four at a time."""
    arguments = ["--streaming", "--async", "--concurrency-range", "4"]
    (line,) = perf_analyzer(server.address, "mlp", tmp_path, arguments)
    consistent(line)


def test_system_shared_memory(server: RunningServer, tmp_path: Path) -> None:
    """Inputs and outputs of 600 kB in regions that it registers, and takes away again."""
    arguments = ["--shared-memory", "system", "--output-shared-memory-size", "700000", "--input-data", "zero"]
    (line,) = perf_analyzer(server.address, "picture", tmp_path, [*arguments, "--concurrency-range", "2"])
    consistent(line)
    assert not Client(server.channel()).call("SystemSharedMemoryStatus").regions


@pytest.mark.parametrize(
    "mode",
    [
        ["--concurrency-range", "4"],
        ["--async", "--concurrency-range", "4"],
        ["--streaming", "--async", "--concurrency-range", "4"],
        ["--request-rate-range", "200", "--num-of-sequences", "6"],
    ],
    ids=["sync", "async", "streaming", "rate"],
)
def test_sequences(mode: list[str], server: RunningServer, tmp_path: Path) -> None:
    """A stateful model: sequences of about ten requests, several at a time, with ids from a range of its own."""
    inputs = tmp_path / "inputs.json"
    inputs.write_text(json.dumps({"data": [{"x": [1.0, 2.0], "pick": [3]}]}))
    arguments = ["--sequence-length", "10", "--sequence-id-range", "1000:5000", "--input-data", str(inputs)]
    (line,) = perf_analyzer(server.address, "probe", tmp_path, [*arguments, *mode])
    consistent(line)


def test_text(server: RunningServer, tmp_path: Path) -> None:
    """A model whose shape is open and whose tensors are text."""
    arguments = ["--shape", "text:1,3", "--string-length", "5"]
    (line,) = perf_analyzer(server.address, "words", tmp_path, arguments)
    assert line.number("Inferences/Second") > 0


def test_large_tensors_compressed(server: RunningServer, tmp_path: Path) -> None:
    """600 kB each way, gzip on the way in."""
    arguments = ["--grpc-compression-algorithm", "gzip", "--input-data", "zero"]
    (line,) = perf_analyzer(server.address, "picture", tmp_path, arguments)
    consistent(line)


def test_metrics_of_the_server(server: RunningServer, tmp_path: Path) -> None:
    """It scrapes the metrics while it measures; without a GPU there is nothing in them that it looks for."""
    assert server.metrics_url
    arguments = ["--collect-metrics", "--metrics-url", server.metrics_url, "--metrics-interval", "200"]
    (line,) = perf_analyzer(server.address, "mlp", tmp_path, arguments)
    consistent(line)
    assert "Unable to query" not in line.printed
