"""What the harness reports is what happened: against a server whose answers take a known time, and which stalls."""

from __future__ import annotations

import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml

from loadtests.errors import LoadTestError
from loadtests.outcome import OK, latency_ns
from loadtests.plan import build_plan
from loadtests.records import Run, load, save
from loadtests.run import Prepared, execute, prepare
from loadtests.scenario import Scenario, parse_scenario
from loadtests.stats import PERCENTILES, analyse, percentile
from service.pb import grpc_service_pb2 as pb
from tests.support.delay_server import delay_s
from tests.support.server import ROOT

# Its own load must be the only one.
pytestmark = pytest.mark.timed

AGREEMENT = 0.02


@contextmanager
def delay_server(*arguments: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """The port and the process of a running server."""
    command = [sys.executable, "-m", "tests.support.delay_server", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline()), process
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with delay_server() as (port, _):
        yield port


def scenario(port: int, text: str, **more: Any) -> Scenario:
    return parse_scenario({"name": "t", "server": f"127.0.0.1:{port}", **yaml.safe_load(text), **more}, "t", Path())


def ask(port: int, method: str) -> bytes:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        answer: bytes = channel.unary_unary(method)(b"", timeout=30)
        return answer


def truth_ms(port: int, prepared: Prepared, run: Run) -> Any:
    """When the server answered each of the counted requests, by its own clock, after their intended time."""
    answered: dict[float, list[int]] = {}
    for u, at_ns in struct.iter_unpack("<fq", ask(port, "/test/Answered")):
        answered.setdefault(u, []).append(at_ns - run.info.start_ns)
    drawn = {t.variant: struct.unpack("<f", _raw(t.body))[0] for t in prepared.templates[0]}
    # Requests with the same payload take the same time: they are answered in the order in which they came.
    records = run.records
    assert sum(map(len, answered.values())) == len(records)
    times = np.array([answered[drawn[int(variant)]].pop(0) for variant in records["variant"]])
    late_enough = records["intended_ns"] >= run.info.warm_up_s * 1e9
    return ((times - records["intended_ns"]) / 1e6)[late_enough]


def _raw(body: bytes) -> bytes:
    raw: bytes = pb.ModelInferRequest.FromString(body[5:]).raw_input_contents[0]
    return raw


def agree(reported: Sequence[float | None], truth: Any) -> None:
    """Each reported percentile within 2 % of the true one."""
    for share, value in zip(PERCENTILES[:4], reported, strict=True):
        true = percentile(truth, share)
        assert value == pytest.approx(true, rel=AGREEMENT), f"p{share:g}: {value} ms, in truth {true} ms"


LOAD = """
duration: 12s
warm_up: 1s
workers: 1
arrivals: {kind: poisson, rate: 150}
load: [{model: delay, variants: 1000, slo: 400ms}]
"""


def test_percentiles_are_true(port: int) -> None:
    """Of thousands of answers after known delays; and every request is in exactly one column."""
    prepared = prepare(scenario(port, LOAD))
    ask(port, "/test/Answered")
    run = execute(prepared, None)
    truth = truth_ms(port, prepared, run)
    # It is what it was meant to be: a median of 200 ms, a p99 of 640 ms.
    assert percentile(truth, 50) == pytest.approx(delay_s(0.5) * 1e3, rel=0.1)
    analysis = analyse(run)
    latency = analysis.total.latency_ms
    agree((latency.p50, latency.p90, latency.p95, latency.p99), truth)
    plan = build_plan(prepared.scenario, prepared.counts, None)
    assert len(run.records) == len(plan)
    assert sum(analysis.total.outcomes.values()) == np.count_nonzero(plan.intended_ns >= plan.warm_up_ns)
    in_time = np.count_nonzero(latency_ns(run.counted) <= 400e6)
    assert analysis.total.outcomes["in_slo"] == in_time
    assert analysis.total.outcomes["late"] == len(run.counted) - in_time


def test_a_stall_is_seen_by_everybody_it_touched(port: int) -> None:
    """Two seconds in the middle of the run, in which a closed loop would have sent next to nothing."""
    prepared = prepare(scenario(port, LOAD))
    ask(port, "/test/Answered")
    timer = threading.Timer(6.0, ask, (port, "/test/Stall"))
    timer.start()
    run = execute(prepared, None)
    timer.join()
    truth = truth_ms(port, prepared, run)
    assert np.count_nonzero(truth > 1000) > 100, "the stall touched too few requests to tell"
    latency = analyse(run).total.latency_ms
    agree((latency.p50, latency.p90, latency.p95, latency.p99), truth)
    assert latency.count == len(run.counted)


def test_a_plan_does_not_depend_on_the_workers(port: int) -> None:
    """The same seed: the same times to the nanosecond and the same payloads, from one worker or four."""
    text = """
    duration: 2s
    warm_up: 0.5s
    arrivals: {kind: gamma, rate: 400, cv: 3}
    load:
      - {name: a, model: text, rows: {1: 0.5, 3: 0.5}, weight: 2}
      - {name: b, model: text, priority: {1: 0.3, 2: 0.7}}
    """
    runs = [execute(prepare(scenario(port, text, workers=workers)), None) for workers in (1, 4)]
    one, four = (run.records for run in runs)
    assert len(np.unique(four["worker"])) == 4
    for column in ("index", "intended_ns", "entry", "variant", "rows", "priority", "sent_bytes"):
        assert np.array_equal(one[column], four[column]), column
    assert runs[0].info.plan == runs[1].info.plan
    bodies = [[t.body for made in prepare(scenario(port, text)).templates for t in made] for _ in range(2)]
    assert bodies[0] == bodies[1]
    other = execute(prepare(scenario(port, text, seed=2)), None)
    assert other.info.plan != runs[0].info.plan


def test_every_ending_is_told_apart(port: int) -> None:
    """Refused, broken, out of time, given up, unanswered: each in its column, with the server's words."""
    text = """
    duration: 2s
    warm_up: 0s
    drain: 0.5s
    slo: 500ms
    arrivals: {kind: constant, rate: 200}
    load:
      - {name: refused, model: refuse}
      - {name: broken, model: broken}
      - {name: expired, model: hang, deadline: 100ms}
      - {name: cancelled, model: hang, cancel: {after: 20ms}}
      - {name: unanswered, model: hang}
      - {name: answered, model: text}
    """
    run = execute(prepare(scenario(port, text)), None)
    analysis = analyse(run)
    expected = {
        "refused": "refused_on_arrival",
        "broken": "error",
        "expired": "expired",
        "cancelled": "cancelled",
        "unanswered": "error",
        "answered": "in_slo",
    }
    for entry in analysis.entries:
        assert entry.offered > 30
        assert {k: v for k, v in entry.outcomes.items() if v} == {expected[entry.name]: entry.offered}, entry.name
    assert {entry.name: entry.errors for entry in analysis.entries if entry.errors} == {
        "broken": {"INTERNAL": analysis.entries[1].offered},
        "unanswered": {"unfinished": analysis.entries[4].offered},
    }
    assert run.info.messages == {"14": ["no room"], "13": ["it broke: 100 % of it"]}
    expired = run.records[run.records["entry"] == 2]
    waited = (expired["done_ns"] - expired["sent_ns"]) / 1e6
    assert percentile(waited, 50) == pytest.approx(100, rel=0.1)


def test_a_closed_loop_keeps_so_many_in_flight(port: int) -> None:
    """Never more than its concurrency, shared by the workers, until the time is over."""
    text = """
    duration: 2s
    warm_up: 0s
    arrivals: {kind: closed, concurrency: 10}
    load: [{model: delay}]
    """
    run = execute(prepare(scenario(port, text, workers=2)), None)
    records = run.records
    assert (records["status"] == OK).all()
    starts = np.stack([records["sent_ns"], np.ones(len(records))], 1)
    ends = np.stack([records["done_ns"], -np.ones(len(records))], 1)
    steps = np.concatenate([ends, starts])
    steps = steps[np.argsort(steps[:, 0], kind="stable")]
    assert np.cumsum(steps[:, 1]).max() == 10
    assert len(records) > 60
    assert any("closed loop" in note for note in analyse(run).notes)


def test_streams(port: int) -> None:
    """Messages of one long call, told apart by their ids; an error is of one message alone."""
    text = """
    duration: 2s
    warm_up: 0s
    arrivals: {kind: poisson, rate: 300}
    load:
      - {name: good, model: text, rpc: stream}
      - {name: bad, model: broken, rpc: stream}
    """
    analysis = analyse(execute(prepare(scenario(port, text)), None))
    good, bad = analysis.entries
    assert {k: v for k, v in good.outcomes.items() if v} == {"in_slo": good.offered}
    assert bad.errors == {"UNKNOWN": bad.offered}


def test_a_run_is_the_same_after_reading_it_again(port: int, tmp_path: Path) -> None:
    """Parquet and back: records and all that is known of the run."""
    text = """
    duration: 1s
    warm_up: 0.2s
    slo: 100ms
    arrivals: {kind: poisson, rate: 300}
    load: [{model: text, rows: {1: 0.5, 2: 0.5}}]
    pass: {attainment: 0.5}
    """
    given = scenario(port, text)
    run = execute(prepare(given), None)
    save(run, tmp_path / "t.parquet")
    again: Run = load(tmp_path)
    assert np.array_equal(again.records, run.records)
    assert again.info == run.info
    assert parse_scenario(again.info.scenario, "again", Path()) == given


def test_tls_and_tokens(tmp_path: Path) -> None:
    """A server certificate of a private authority, and a token that every request carries."""
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    text = """
    duration: 1s
    warm_up: 0s
    arrivals: {kind: poisson, rate: 200}
    metadata: {authorization: Bearer x}
    load: [{model: text}]
    """
    with delay_server(str(key), str(certificate)) as (port, _):
        trusted = {"server": f"localhost:{port}", "tls": {"ca": str(certificate)}}
        run = execute(prepare(scenario(port, text, **trusted)), None)
        assert (run.records["status"] == OK).all()
        with pytest.raises(LoadTestError, match="does not answer"):
            prepare(scenario(port, text, server=f"localhost:{port}", tls={}))


def test_a_server_that_is_not_there() -> None:
    """A message that names the address."""
    with pytest.raises(LoadTestError, match=r"127\.0\.0\.1:1 does not answer"):
        prepare(scenario(1, LOAD))


def test_a_model_that_is_not_there(port: int) -> None:
    """A message that names the model."""
    with pytest.raises(LoadTestError, match="no model nobody"):
        prepare(scenario(port, LOAD.replace("model: delay", "model: nobody")))


def test_a_server_that_dies() -> None:
    """What was out is lost, what comes later fails at once, and the run ends with every request accounted for."""
    text = """
    duration: 3s
    warm_up: 0s
    drain: 1s
    arrivals: {kind: constant, rate: 100}
    load: [{model: text}]
    """
    with delay_server() as (port, server):
        prepared = prepare(scenario(port, text))
        timer = threading.Timer(1.7, server.kill)
        timer.start()
        run = execute(prepared, None)
        timer.join()
    analysis = analyse(run)
    assert sum(analysis.total.outcomes.values()) == 300
    assert analysis.total.outcomes["in_slo"] > 50
    assert analysis.total.errors.get("connection_lost", 0) > 50
