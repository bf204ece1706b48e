"""The metrics of a running server: what a scrape says is what happened."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support import onnx_models
from tests.support.client import Client, request
from tests.support.onnx_models import write_model
from tests.support.server import RunningServer, running_server

X = np.arange(4, dtype=np.float32).reshape(1, 4)
WAIT_S = 20.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    directory = tmp_path_factory.mktemp("models")
    write_model(directory, "counted", onnx_models.identity())
    write_model(directory, "poison", onnx_models.poison())
    write_model(directory, "slow", onnx_models.slow_for(300), config="max_batch_size: 1\n")
    promised = 'parameters { key: "latency_slo_ms" value { string_value: "50" } }\n'
    write_model(directory, "promised", onnx_models.slow_for(5), config=promised)
    (directory / "broken" / "1").mkdir(parents=True)
    (directory / "broken" / "1" / "model.onnx").write_bytes(b"broken")
    with running_server(directory, "--metrics-port", "0") as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Client:
    return Client(server.channel())


class Scrape:
    """One page of metrics, by name and labels."""

    def __init__(self, server: RunningServer) -> None:
        with urllib.request.urlopen(server.metrics_url, timeout=10) as answer:
            self.content_type = answer.headers["Content-Type"]
            self.text = answer.read().decode()
        self.samples = [s for family in text_string_to_metric_families(self.text) for s in family.samples]

    def _found(self, name: str, labels: dict[str, str]) -> list[float]:
        # The parser calls every counter ..._total, whatever it is called on the wire.
        bare = name.removesuffix("_total")
        return [
            s.value
            for s in self.samples
            if s.name.removesuffix("_total") == bare and labels.items() <= s.labels.items()
        ]

    def value(self, name: str, **labels: str) -> float:
        """The one sample of that name with these labels (and perhaps others)."""
        found = self._found(name, labels)
        assert len(found) == 1, f"{name}{labels}: {found}"
        return found[0]

    def sum(self, name: str, **labels: str) -> float:
        """The sum of all samples of that name with these labels; 0 when there are none."""
        return sum(self._found(name, labels))


def eventually(server: RunningServer, reached: Callable[[Scrape], bool]) -> Scrape:
    """Scrape until it is so: metrics are counted when the answer has been sent."""
    end = time.monotonic() + WAIT_S
    while True:
        scrape = Scrape(server)
        if reached(scrape):
            return scrape
        assert time.monotonic() < end, scrape.text


def test_answers_are_counted(server: RunningServer, client: Client) -> None:
    """Requests, rows, runs and times of Triton's counters, and the same requests in our histograms."""
    before = Scrape(server)
    for rows in (1, 2, 5):
        client.infer(request("counted", {"x": np.concatenate([X] * rows)}))

    def grown(scrape: Scrape, name: str) -> float:
        return scrape.sum(name, model="counted", version="1") - before.sum(name, model="counted", version="1")

    after = eventually(server, lambda scrape: grown(scrape, "nv_inference_request_success") >= 3)
    assert grown(after, "nv_inference_count") == 8
    assert grown(after, "nv_inference_exec_count") == 3
    assert grown(after, "nv_inference_request_duration_us") > 0
    assert grown(after, "onclock_goodput_total") == 3
    assert grown(after, "onclock_request_duration_seconds_count") == 3
    assert grown(after, "onclock_batch_rows_sum") == 8
    assert grown(after, "onclock_batches_total") == 3
    # The same numbers as the protocol's own statistics.
    stats = client.statistics("counted")
    assert after.value("nv_inference_exec_count", model="counted") == stats.execution_count
    assert after.value("nv_inference_count", model="counted") == stats.inference_count


def test_failures_by_reason(server: RunningServer, client: Client) -> None:
    """A request that fails in the model is a BACKEND failure; one that reaches no model is unrouted."""
    before = Scrape(server)
    with pytest.raises(grpc.RpcError):
        client.infer(request("poison", {"index": np.array([[1000]])}))
    with pytest.raises(grpc.RpcError):
        client.infer(request("nobody", {"x": X}))
    with pytest.raises(grpc.RpcError):
        client.infer(request("counted", {"wrong": X}))
    with pytest.raises(grpc.RpcError):
        client.infer(request("broken", {"x": X}))

    def failed(scrape: Scrape) -> float:
        return scrape.sum("nv_inference_request_failure", model="poison", reason="BACKEND")

    after = eventually(server, lambda scrape: failed(scrape) == failed(before) + 1)
    assert after.value("onclock_failures_total", model="poison", reason="execution") >= 1
    for reason in ("unknown_model", "invalid", "not_ready"):
        name = "onclock_unrouted_requests_total"
        assert after.sum(name, reason=reason) == before.sum(name, reason=reason) + 1, reason


def test_the_queue_is_seen_and_a_cancelled_one_is_not(server: RunningServer, client: Client) -> None:
    """Waiting requests are in the gauges while they wait, and gone when their client is."""
    waiting = 20
    running = client.infer_future(request("slow", {"x": X}))
    futures = [client.infer_future(request("slow", {"x": X}), timeout=60) for _ in range(waiting)]
    # What cannot be answered within the queue's bound is refused; the rest waits.
    seen = eventually(server, lambda scrape: scrape.value("onclock_queue_requests", model="slow") > 0)
    pending = seen.value("nv_inference_pending_request_count", model="slow")
    # The first is pending, too, when all are read before it is taken.
    assert 0 < pending <= waiting + 1
    before = Scrape(server).sum("nv_inference_request_failure", model="slow", reason="CANCELED")
    for future in futures:
        future.cancel()
    gone = eventually(server, lambda scrape: scrape.value("onclock_queue_requests", model="slow") == 0)
    assert gone.value("onclock_queue_rows", model="slow") == 0
    assert gone.sum("nv_inference_request_failure", model="slow", reason="CANCELED") > before
    running.result(30)


def test_an_objective_and_how_it_is_kept(server: RunningServer, client: Client) -> None:
    """The promise in seconds, the share kept, and who was refused for it."""
    futures = [client.infer_future(request("promised", {"x": X})) for _ in range(200)]
    codes = [future.code() for future in futures]
    answered = codes.count(grpc.StatusCode.OK)
    assert answered > 0
    labels = {"model": "promised"}

    def accounted(scrape: Scrape) -> bool:
        # Calls refused before they were read are counted when a later call ends their window.
        client.infer(request("counted", {"x": X}))
        in_time, late = (
            scrape.sum("onclock_goodput_total", **labels),
            scrape.sum("onclock_deadline_misses_total", **labels),
        )
        return in_time + late == answered and scrape.sum("onclock_refusals_total", **labels) + answered == len(codes)

    scrape = eventually(server, accounted)
    assert scrape.value("onclock_slo_seconds", **labels) == 0.05
    # Nothing else has been sent to this model, and it was less than 60 s ago.
    in_time = scrape.sum("onclock_goodput_total", **labels)
    assert scrape.value("onclock_slo_attainment", **labels) == pytest.approx(in_time / len(codes), abs=0.005)
    assert not [s for s in scrape.samples if s.name == "onclock_slo_seconds" and s.labels["model"] == "counted"]


def test_what_is_served_where(server: RunningServer) -> None:
    """Readiness and load time of each model, the device, the build, the process. A broken model has no metrics."""
    scrape = Scrape(server)
    for name in ("counted", "poison", "slow", "promised"):
        assert scrape.value("onclock_model_ready", model=name) == 1
        assert scrape.value("onclock_model_load_seconds", model=name) > 0
        assert scrape.value("onclock_model_load_failed", model=name) == 0
    broken = [sample for sample in scrape.samples if sample.labels.get("model") == "broken"]
    assert [(sample.name, sample.value) for sample in broken] == [("onclock_model_load_failed", 1)]
    assert scrape.value("onclock_device_info", device="cpu", provider="CPUExecutionProvider") == 1
    assert scrape.value("onclock_build_info") == 1
    assert scrape.value("process_resident_memory_bytes") > 1e7
    assert scrape.content_type.startswith("text/plain")


def test_nothing_else_is_served(server: RunningServer) -> None:
    """Another path is 404 and says where the metrics are."""
    with pytest.raises(urllib.error.HTTPError) as missing:
        urllib.request.urlopen(server.metrics_url.replace("/metrics", "/elsewhere"), timeout=10)
    assert missing.value.code == 404
    assert b"/metrics" in missing.value.read()


def test_the_port_is_there_before_the_models_and_can_be_off(tmp_path: Path) -> None:
    """A scrape while models are being loaded answers; `off` opens no port at all."""
    for number in range(10):
        write_model(tmp_path, f"m{number}", onnx_models.slow_for(10))
    with running_server(tmp_path, "--metrics-port", "0", ready=False) as server:
        assert Scrape(server).value("onclock_build_info") == 1
        server.wait_ready()
    with running_server(tmp_path, "--metrics-port", "off", "--profile-budget-ms", "0") as server:
        assert server.metrics_port == 0
