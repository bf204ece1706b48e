"""The thread that sends spans, with a real receiver that is well, slow, broken or not there."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from service.clock import NEVER_NS, NS_PER_MS
from service.config.otlp import Destination, TelemetryError, find_destination
from service.telemetry.encoding import Encoder
from service.telemetry.exporter import Exporter
from service.telemetry.finished import TracedBatch, TracedRequest
from service.telemetry.sender import make_sender
from service.trace_context import RequestTrace
from tests.support.otlp import Collector, collector
from tests.unit.metrics.records import batch

# Far more than anything takes here, so that what is bounded shows.
LONG_S = 20.0
KINDS = ("http/protobuf", "grpc")


def traced(count: int = 1) -> TracedBatch:
    trace = RequestTrace(b"t" * 16, b"s" * 8, b"", "", "ModelInfer")
    request = TracedRequest(trace, 90 * NS_PER_MS, NEVER_NS, 1, 1, b"")
    return TracedBatch("m", 1, batch(100), [request] * count)


def destination(url: str, kind: str, **environment: str) -> Destination:
    found = find_destination(url, {"OTEL_EXPORTER_OTLP_PROTOCOL": kind, "OTEL_BSP_SCHEDULE_DELAY": "20", **environment})
    assert found is not None
    return found


@contextlib.contextmanager
def exporting(to: Destination) -> Iterator[Exporter]:
    exporter = Exporter(
        Encoder(to.resource).encode, make_sender(to), to.timeout_s, to.delay_s, to.queue_spans, to.batch_spans
    )
    exporter.start()
    try:
        yield exporter
    finally:
        exporter.close(0.2)


@pytest.fixture
def receiver() -> Iterator[Collector]:
    with collector() as running:
        yield running


def url_of(receiver: Collector, kind: str) -> str:
    return receiver.grpc if kind == "grpc" else receiver.http


def wait_until(exporter: Exporter, name: str, count: int) -> None:
    end = time.monotonic() + LONG_S
    while getattr(exporter.counts, name) < count:
        assert time.monotonic() < end, exporter.counts
        time.sleep(0.005)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_what_is_put_arrives(receiver: Collector, kind: str, compression: str) -> None:
    """With the headers that were asked for; over one connection, again and again."""
    to = destination(
        url_of(receiver, kind),
        kind,
        OTEL_EXPORTER_OTLP_HEADERS="x-tenant=t1",
        OTEL_EXPORTER_OTLP_COMPRESSION=compression,
        OTEL_SERVICE_NAME="called-so",
    )
    with exporting(to) as exporter:
        for number in range(1, 4):
            exporter.put(traced(2))
            spans = receiver.wait_for(lambda spans, number=number: len(spans) >= 8 * number)
        wait_until(exporter, "exported", 6)
    assert len(spans) == 24
    assert spans[0].resource["service.name"] == "called-so"
    assert {headers["x-tenant"] for headers in receiver.headers} == {"t1"}
    assert all("onclock/" in headers["user-agent"] for headers in receiver.headers)
    if kind != "grpc":
        assert {headers["path"] for headers in receiver.headers} == {"/v1/traces"}
        assert {headers["content-type"] for headers in receiver.headers} == {"application/x-protobuf"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_fails_for_now_is_tried_again(receiver: Collector, kind: str) -> None:
    """And arrives once."""
    receiver.statuses += [503]
    with exporting(destination(url_of(receiver, kind), kind)) as exporter:
        exporter.put(traced())
        assert len(receiver.wait_for(lambda spans: len(spans) >= 4)) == 4
        wait_until(exporter, "exported", 1)
    assert receiver.exports == 2


def test_what_is_not_accepted_is_not_tried_again(receiver: Collector) -> None:
    """It is counted, and the next is sent."""
    receiver.statuses += [400]
    with exporting(destination(receiver.http, "http/protobuf")) as exporter:
        exporter.put(traced())
        wait_until(exporter, "failed", 1)
        exporter.put(traced())
        wait_until(exporter, "exported", 1)
    assert receiver.exports == 2


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_rejected_is_counted(receiver: Collector, kind: str) -> None:
    """A collector that takes a part says so."""
    receiver.rejected = 5
    with exporting(destination(url_of(receiver, kind), kind)) as exporter:
        exporter.put(traced(3))
        wait_until(exporter, "rejected", 2)
        wait_until(exporter, "exported", 1)


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_is_there(kind: str) -> None:
    """What is put is dropped after the time for an export; nobody waits, and it ends in time."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        to = destination(f"http://127.0.0.1:{port}", kind, OTEL_EXPORTER_OTLP_TIMEOUT="100")
        with exporting(to) as exporter:
            exporter.put(traced(3))
            wait_until(exporter, "failed", 3)
            exporter.put(traced(4))
            before = time.monotonic()
            exporter.close(0.5)
            assert time.monotonic() - before < 2
    assert exporter.counts.failed + exporter.counts.shutdown == 7


@pytest.mark.parametrize("kind", KINDS)
def test_a_collector_that_hangs(receiver: Collector, kind: str) -> None:
    """The queue fills, what is too much is dropped at once and counted; the end comes in time all the same."""
    receiver.answering.clear()
    to = destination(url_of(receiver, kind), kind, OTEL_BSP_MAX_QUEUE_SIZE="400", OTEL_BSP_MAX_EXPORT_BATCH_SIZE="40")
    with exporting(to) as exporter:
        exporter.put(traced(10))
        receiver.wait_exports(1)
        before = time.monotonic()
        for _ in range(1000):
            exporter.put(traced())
        assert time.monotonic() - before < 2
        assert exporter.counts.queue_full == 900
        before = time.monotonic()
        exporter.close(0.3)
        assert time.monotonic() - before < 3
    assert exporter.counts.exported == 0
    assert exporter.counts.shutdown >= 90


@pytest.mark.parametrize("kind", KINDS)
def test_what_waits_is_sent_at_the_end(receiver: Collector, kind: str) -> None:
    """In several exports, though it was not yet time to send; what is put afterwards is dropped."""
    to = destination(
        url_of(receiver, kind), kind, OTEL_BSP_SCHEDULE_DELAY="3600000", OTEL_BSP_MAX_EXPORT_BATCH_SIZE="512"
    )
    with exporting(to) as exporter:
        for _ in range(100):
            exporter.put(traced())
        exporter.close(LONG_S)
        exporter.put(traced())
    assert len(receiver.spans) == 400
    assert exporter.counts.exported == 100
    assert exporter.counts.shutdown == 1
    assert not any(thread.name == "spans" for thread in threading.enumerate())


def test_enough_is_sent_before_its_time(receiver: Collector) -> None:
    """A full export does not wait for the delay."""
    to = destination(receiver.http, KINDS[0], OTEL_BSP_SCHEDULE_DELAY="3600000", OTEL_BSP_MAX_EXPORT_BATCH_SIZE="40")
    with exporting(to) as exporter:
        exporter.put(traced(10))
        receiver.wait_for(lambda spans: len(spans) == 40)


def test_a_batch_larger_than_the_queue_is_sent(receiver: Collector) -> None:
    """Alone."""
    to = destination(receiver.http, KINDS[0], OTEL_BSP_MAX_QUEUE_SIZE="4", OTEL_BSP_MAX_EXPORT_BATCH_SIZE="4")
    with exporting(to) as exporter:
        exporter.put(traced(50))
        receiver.wait_for(lambda spans: len(spans) == 200)


def test_certificates_that_cannot_be_used(tmp_path: Path) -> None:
    """Are told of at the start."""
    (tmp_path / "ca.pem").write_text("nonsense")
    to = destination("https://127.0.0.1:1", KINDS[0], OTEL_EXPORTER_OTLP_CERTIFICATE=str(tmp_path / "ca.pem"))
    with pytest.raises(TelemetryError, match="certificates"):
        make_sender(to)


def test_by_tls(tmp_path: Path) -> None:
    """To a collector of an authority that is named; not to one of another."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    with collector(authority.issue_cert("127.0.0.1")) as receiver:
        for kind in KINDS:
            url = url_of(receiver, kind).replace("http:", "https:")
            for name, result in (("ca.pem", "exported"), ("other.pem", "failed")):
                to = destination(
                    url,
                    kind,
                    OTEL_EXPORTER_OTLP_CERTIFICATE=str(tmp_path / name),
                    OTEL_EXPORTER_OTLP_TIMEOUT="3000" if result == "exported" else "300",
                )
                with exporting(to) as exporter:
                    exporter.put(traced())
                    wait_until(exporter, result, 1)
