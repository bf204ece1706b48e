"""The handler of `ModelInfer`: what becomes of a message, without a transport and without a device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from service.clock import NEVER_NS, NS_PER_MS, NS_PER_S, now_ns
from service.errors import Draining, ExecutionFailed, InvalidRequest, Overloaded, ServiceError
from service.frontend import inference as inference_module
from service.frontend.call import MAX_HAND_OVER_NS, MAX_LOOK_NS, NO_LULL, Lull
from service.frontend.codec import encode as encode_module
from service.frontend.inference import CLIENT_MARGIN_NS, InferenceHandler
from service.frontend.thinning import MIN_OFFERED, WINDOW_NS
from service.metrics import MetricsRegistry
from service.pb.grpc_service_pb2 import ModelInferResponse
from service.request import InferenceRequest
from service.scheduler import QueuePolicy
from tests.support.client import arrays, request
from tests.unit.frontend.served import FakeModel, FakeRepository, model, output

# Calls in a window of deep overload.
CALLS = 2 * MIN_OFFERED

X = np.arange(8, dtype=np.float32).reshape(2, 4)


class FakeCall:
    """A call that remembers its answer."""

    def __init__(self, deadline_ns: int = NEVER_NS) -> None:
        self.arrival_ns = now_ns()
        self.deadline_ns = deadline_ns
        self.on_cancel: Callable[[], object] | None = None
        self.answers: list[bytes | ServiceError] = []

    def reply(self, parts: Sequence[bytes | memoryview], /) -> None:
        self.answers.append(b"".join(parts))

    def fail(self, error: ServiceError, /) -> None:
        self.answers.append(error)


class SubmittingModel(FakeModel):
    """A model that keeps what is submitted and cancelled instead of running it."""

    policy: QueuePolicy
    submitted: list[InferenceRequest]
    cancelled: list[InferenceRequest]
    # What it says of itself: requests refused so far, how long its device is busy; calls it never saw.
    refused: int
    busy: int
    unseen: int

    __hash__ = object.__hash__

    def offered(self) -> tuple[int, int]:
        return len(self.submitted), self.refused

    def busy_ns(self, at_ns: int) -> int:
        return self.busy

    def record_unseen(self, count: int, at_ns: int) -> None:
        self.unseen += count

    def submit(self, submitted: InferenceRequest) -> None:
        self.submitted.append(submitted)

    def cancel(self, cancelled: InferenceRequest) -> None:
        self.cancelled.append(cancelled)


def serving(slo_ns: int | None = None) -> tuple[InferenceHandler, SubmittingModel, MetricsRegistry]:
    plain = model()
    served = SubmittingModel(plain.name, plain.inputs, plain.outputs)
    served.policy = QueuePolicy(name="m", devices=("cpu",), max_batch_rows=8, slo_ns=slo_ns)
    served.submitted, served.cancelled = [], []
    served.refused, served.busy, served.unseen = 0, 0, 0
    registry = MetricsRegistry()
    return InferenceHandler(FakeRepository(served), registry), served, registry  # type: ignore[arg-type]


def message(**more: Any) -> bytes:
    data: bytes = request("m", {"x": X}, **more).SerializeToString()
    return data


def test_a_request_is_submitted_with_its_tensors_and_times() -> None:
    """Rows, id, data and the way back are on the request; without any deadline it has none."""
    handler, served, _ = serving()
    before = now_ns()
    handler(message(request_id="7"), FakeCall())
    (submitted,) = served.submitted
    assert submitted.rows == 2
    assert submitted.request_id == b"7"
    assert before <= submitted.arrival_ns <= now_ns()
    assert submitted.deadline_ns == NEVER_NS
    assert bytes(submitted.inputs[0]) == X.tobytes()  # type: ignore[arg-type]


def test_the_soonest_deadline_counts() -> None:
    """The model's objective, the client's deadline less the way back, or the request's timeout."""
    second = now_ns() + NS_PER_S
    for slo_ns, call_ns, timeout_us, expected in (
        (20 * NS_PER_MS, NEVER_NS, None, lambda r: r.arrival_ns + 20 * NS_PER_MS),
        (None, second, None, lambda r: second - CLIENT_MARGIN_NS),
        (None, NEVER_NS, 3000, lambda r: r.arrival_ns + 3 * NS_PER_MS),
        (20 * NS_PER_MS, second, 3000, lambda r: r.arrival_ns + 3 * NS_PER_MS),
        (20 * NS_PER_MS, second, 900_000, lambda r: r.arrival_ns + 20 * NS_PER_MS),
    ):
        handler, served, _ = serving(slo_ns)
        parameters = {} if timeout_us is None else {"timeout": timeout_us}
        handler(message(parameters=parameters), FakeCall(call_ns))
        assert served.submitted[0].deadline_ns == expected(served.submitted[0])


def test_a_client_that_goes_away_cancels_its_request() -> None:
    """The call's end reaches the model with exactly this request."""
    handler, served, _ = serving()
    call = FakeCall()
    handler(message(), call)
    assert call.on_cancel is not None
    call.on_cancel()
    assert served.cancelled == served.submitted


def test_a_bad_request_is_answered_and_counted() -> None:
    """It never reaches a model."""
    handler, served, _ = serving()
    call = FakeCall()
    handler(b"\xff", call)
    assert isinstance(call.answers[0], InvalidRequest)
    assert not served.submitted


def test_a_draining_server_accepts_nothing() -> None:
    """What arrives after the beginning of the end is refused with Triton's words and a hint to try elsewhere."""
    handler, served, _ = serving()
    handler.stopping = "no new requests are accepted"
    call = FakeCall()
    handler(message(), call)
    (error,) = call.answers
    assert isinstance(error, Draining)
    assert "Server is stopping" in str(error)
    assert error.retry_after_ns > 0
    assert not served.submitted


def test_answers_and_errors_find_their_call() -> None:
    """Each call gets the rows of its own request."""
    handler, served, _ = serving()
    calls = [FakeCall(), FakeCall(), FakeCall()]
    for call in calls:
        handler(message(), call)
    batch = np.arange(16, dtype=np.float32).reshape(4, 4)
    outputs = [output(served.outputs[0], batch, 4)]
    handler.answer(served.submitted[1], outputs, 2)
    handler.answer(served.submitted[0], outputs, 0)
    handler.fail(served.submitted[2], ExecutionFailed("poisoned"))
    for call, rows in zip(calls, (batch[:2], batch[2:]), strict=False):
        (answer,) = call.answers
        assert isinstance(answer, bytes)
        np.testing.assert_array_equal(arrays(ModelInferResponse.FromString(answer))["y"], rows)
    assert str(calls[2].answers[0]) == "poisoned"


def test_an_answer_that_cannot_be_sent_fails_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too large for the wire is an error for the client, not for the worker."""
    monkeypatch.setattr(encode_module, "MAX_MESSAGE", 10)
    handler, served, _ = serving()
    call = FakeCall()
    handler(message(), call)
    handler.answer(served.submitted[0], [output(served.outputs[0], X, 2)], 0)
    assert isinstance(call.answers[0], InvalidRequest)


def test_one_debug_line_per_request(caplog: pytest.LogCaptureFixture) -> None:
    """With debug logging on, each request leaves a line with how it went."""
    with caplog.at_level(logging.DEBUG, "service.frontend.inference"):
        handler, served, _ = serving()
        for identifier in ("a", "b"):
            handler(message(request_id=identifier), FakeCall())
        handler.answer(served.submitted[0], [output(served.outputs[0], X, 2)], 0)
        handler.fail(served.submitted[1], ExecutionFailed("poisoned"))
    lines = [(r.id, r.outcome, r.rows, getattr(r, "detail", None)) for r in caplog.records]  # type: ignore[attr-defined]
    assert lines == [("a", "ok", 2, None), ("b", "execution", 2, "poisoned")]


# The gate: refusing before reading


class Clock:
    """The time the handler is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ns = NS_PER_S
        monkeypatch.setattr(inference_module, "now_ns", lambda: self.ns)


def overload(clock: Clock, handler: InferenceHandler, served: SubmittingModel, windows: int) -> tuple[int, int]:
    """Windows of `CALLS` calls, nine in ten of the read ones refused: how many the gate turned away, of how many."""
    turned_away = 0
    for _ in range(windows):
        clock.ns += WINDOW_NS
        for number in range(CALLS):
            handler.lull()
            error = handler.gate()
            if error is None:
                handler(message(), FakeCall())
                served.refused += number % 10 != 0
            else:
                assert isinstance(error, Overloaded)
                assert error.retry_after_ns == WINDOW_NS
                turned_away += 1
    return turned_away, CALLS * windows


def test_the_gate_is_open_while_requests_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the device is: without refusals every call is read."""
    clock = Clock(monkeypatch)
    handler, served, _ = serving()
    served.busy = NS_PER_S
    for _ in range(100):
        clock.ns += WINDOW_NS // 3
        assert handler.gate() is None
        handler(message(), FakeCall())
    assert served.unseen == 0


def test_the_gate_turns_calls_away_in_deep_overload(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most, never all; each is counted as a refusal of the model it was meant for."""
    clock = Clock(monkeypatch)
    handler, served, _ = serving()
    served.busy = NS_PER_S
    turned_away, calls = overload(clock, handler, served, 20)
    assert calls // 4 < turned_away < calls
    assert len(served.submitted) == calls - turned_away
    clock.ns += WINDOW_NS
    handler.gate()
    assert served.unseen == turned_away


def test_the_gate_is_open_while_a_model_in_demand_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that has nothing to do can take the next call, however much was refused before."""
    clock = Clock(monkeypatch)
    handler, served, _ = serving()
    served.busy = 0
    assert overload(clock, handler, served, 20)[0] == 0


def test_the_gate_forgets_a_model_that_nobody_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """After windows without requests the gate is open again, and the model is not asked any more."""
    clock = Clock(monkeypatch)
    handler, served, _ = serving()
    served.busy = NS_PER_S
    overload(clock, handler, served, 10)
    clock.ns += WINDOW_NS
    handler.gate()
    for _ in range(3):
        clock.ns += WINDOW_NS
        assert handler.gate() is None
    unseen = served.unseen
    served.refused += 1_000_000
    clock.ns += WINDOW_NS
    assert all(handler.gate() is None for _ in range(50))
    assert served.unseen == unseen


def test_a_share_is_refused_by_an_ingress_that_refuses_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """In deep overload a share of the next calls, which it then reports; each is a refusal of the model it was for."""
    clock = Clock(monkeypatch)
    handler, served, _ = serving()
    served.busy = NS_PER_S
    unseen = reported = 0
    share = 0.0
    for _ in range(20):
        clock.ns += WINDOW_NS
        for number in range(round(CALLS * (1 - share))):
            handler(message(), FakeCall())
            served.refused += number % 10 != 0
        unseen = CALLS - round(CALLS * (1 - share))
        reported += unseen
        handler.lull()
        share = handler.share(unseen)
    assert 0.3 < share < 1
    clock.ns += WINDOW_NS
    handler.share(0)
    assert served.unseen == reported


def test_no_share_is_refused_while_a_model_in_demand_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that has nothing to do can take the next call, however much was refused before."""
    clock = Clock(monkeypatch)
    handler, served, _ = serving()
    served.busy = NS_PER_S
    overload(clock, handler, served, 20)
    handler.lull()
    assert handler.share(0) > 0
    served.busy = 0
    handler.lull()
    assert handler.share(0) == 0


def test_a_lull_is_as_long_as_all_in_demand_are_busy() -> None:
    """Nothing is put off while a device in demand is free, nobody asked for anything, or nobody stated an objective."""
    handler, served, _ = serving(slo_ns=100 * NS_PER_MS)
    served.busy = NS_PER_S
    assert handler.lull() == NO_LULL
    handler(message(), FakeCall())
    assert handler.lull() == Lull(NS_PER_S, 100 * NS_PER_MS)
    served.busy = 0
    assert handler.lull() == NO_LULL
    handler, served, _ = serving()
    served.busy = NS_PER_S
    handler(message(), FakeCall())
    assert handler.lull() == NO_LULL


def test_what_a_lull_allows() -> None:
    """A part of the objective, never so long that a cancellation waits; nothing when the device is nearly free."""
    usual = Lull(NS_PER_S, 50 * NS_PER_MS)
    assert (usual.look_ns, usual.hand_over_ns) == (2 * NS_PER_MS, 10 * NS_PER_MS)
    patient = Lull(NS_PER_S, 60 * NS_PER_S)
    assert (patient.look_ns, patient.hand_over_ns) == (MAX_LOOK_NS, MAX_HAND_OVER_NS)
    assert MAX_LOOK_NS < 10 * NS_PER_MS
    for short in (Lull(NS_PER_MS // 100, 50 * NS_PER_MS), NO_LULL):
        assert (short.look_ns, short.hand_over_ns) == (0, 0)
