"""Traces: which requests are taken, what a change does, and what is in the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import tracing
from service.batch import BatchRecord, CloseReason
from service.clock import NEVER_NS
from service.request import InferenceRequest, ShapeClass
from service.tracing import UNLIMITED, Sampler, TraceOverrides, Tracer, TraceSettings

SHAPE = ShapeClass(((4,),), (), 4)
RECORD = BatchRecord("cpu", 2, 2, 2, CloseReason.DRAINED, 20, 30, 40, 50, 25, NEVER_NS)


def request(arrival_ns: int, request_id: bytes = b"") -> InferenceRequest:
    responder: Any = None
    return InferenceRequest(1, arrival_ns, NEVER_NS, 1, SHAPE, [b""], responder, None, request_id)


def written(path: Path) -> list[dict[str, Any]]:
    traces: list[dict[str, Any]] = json.loads(path.read_text())
    return traces


@given(st.integers(1, 20), st.integers(-1, 10), st.integers(0, 200))
def test_the_first_of_every_rate_until_the_count(rate: int, count: int, requests: int) -> None:
    """Requests 0, rate, 2 * rate ... are taken, no more than `count` of them."""
    sampler = Sampler(TraceSettings(True, rate, count))
    taken = [i for i in range(requests) if sampler.takes()]
    due = list(range(0, requests, rate))
    assert taken == (due if count == UNLIMITED else due[:count])


def test_nothing_is_taken_while_off() -> None:
    """Whatever the rate."""
    sampler = Sampler(TraceSettings(False, 1))
    assert not any(sampler.takes() for _ in range(10))


def test_the_file_is_valid_after_every_trace(tmp_path: Path) -> None:
    """One JSON object per traced request, with the times of its batch; an older file is replaced."""
    path = tmp_path / "trace.json"
    path.write_text("something else")
    tracer = Tracer(path, TraceSettings(True, rate=1))
    tracer.batch("m", 3, RECORD, [request(10, b"one"), request(11)])
    tracer.batch("m", 3, RECORD, [request(12, "z\u00fc".encode())])
    tracer.close(5)
    first, second, third = written(path)
    assert (first["id"], first["model_name"], first["model_version"], first["request_id"]) == (1, "m", 3, "one")
    assert {t["name"]: t["ns"] for t in first["timestamps"]} == {
        "REQUEST_START": 10,
        "QUEUE_START": 10,
        "COMPUTE_START": 20,
        "COMPUTE_INPUT_END": 30,
        "COMPUTE_OUTPUT_START": 40,
        "COMPUTE_END": 50,
        "REQUEST_END": 50,
    }
    assert second["timestamps"][0]["ns"] == 11
    assert third["request_id"] == "z\u00fc"


def test_a_file_for_every_so_many_traces(tmp_path: Path) -> None:
    """Numbered, as Triton does with `log_frequency`."""
    path = tmp_path / "trace.json"
    tracer = Tracer(path, TraceSettings(True, rate=1, log_frequency=2))
    tracer.batch("m", 1, RECORD, [request(i) for i in range(5)])
    tracer.close(5)
    assert [len(written(tmp_path / f"trace.json.{i}")) for i in range(3)] == [2, 2, 1]
    assert not path.exists()


def test_a_model_with_settings_of_its_own(tmp_path: Path) -> None:
    """It keeps what it says itself when the server's change, and falls back when that is cleared."""
    tracer = Tracer(tmp_path / "t", TraceSettings(rate=7))
    assert not tracer.active
    assert tracer.change("m", [], TraceOverrides(timestamps=True, rate=2)) == TraceSettings(True, 2)
    assert tracer.active
    assert tracer.settings() == TraceSettings(False, 7)
    tracer.change("", [], TraceOverrides(rate=9, count=5))
    assert tracer.settings("m") == TraceSettings(True, 2, 5)
    assert tracer.settings("other") == TraceSettings(False, 9, 5)
    assert tracer.change("m", ["rate"], TraceOverrides()) == TraceSettings(True, 9, 5)
    assert tracer.change("m", ["timestamps"], TraceOverrides()) == tracer.settings()
    assert not tracer.active
    assert tracer.change("", ["rate", "count"], TraceOverrides()) == TraceSettings(rate=7)
    tracer.close(5)


def test_models_with_settings_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One too many is an error, a change of a known one is not."""
    monkeypatch.setattr(tracing, "MAX_MODELS", 1)
    tracer = Tracer(tmp_path / "t")
    tracer.change("m", [], TraceOverrides(rate=1))
    with pytest.raises(ValueError, match="1 models"):
        tracer.change("n", [], TraceOverrides(rate=1))
    tracer.change("m", [], TraceOverrides(rate=2))
    tracer.close(5)


def test_a_file_that_cannot_be_written_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Requests go on."""
    tracer = Tracer(tmp_path / "no" / "such" / "t", TraceSettings(True, rate=1))
    with caplog.at_level("ERROR", "service"):
        tracer.batch("m", 1, RECORD, [request(i) for i in range(3)])
        tracer.close(5)
    assert [r.message for r in caplog.records] == ["traces cannot be written"]


def test_without_a_file_nothing_is_traced() -> None:
    """Settings can still be read."""
    tracer = Tracer(None, TraceSettings(True))
    assert not tracer.active
    assert tracer.settings().timestamps
    tracer.close(1)
