"""Heads: their requests ride with those of others, are counted as their own, and each is answered exactly once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from service.clock import NEVER_NS, now_ns
from service.engine.buffers import batch_output
from service.errors import (
    DeviceFailed,
    Draining,
    ExecutionFailed,
    ModelLoadError,
    ModelNotReady,
    OutOfMemory,
    ServiceError,
)
from service.head_model import HeadModel
from service.metrics import ModelMetrics
from service.request import BatchOutput, InferenceRequest
from service.scheduler import Refusal, RefusalReason
from service.tensor import Array, DataType, TensorSpec
from tests.unit.engine.served import POISON, Puppet, Served, X, Y, config_of, rows
from tests.unit.engine.support import ANSWER_S, double_instance

Z = TensorSpec("z", DataType.FP32, (1,), batched=True)
# A head refuses rows whose first feature (twice the input) is this.
SPOILT = 1000.0


class Times:
    """A head: z = factor * the first feature."""

    inputs = (Y,)

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.runs: list[int] = []

    def run(self, features: Sequence[Array], count: int) -> list[BatchOutput]:
        (y,) = features
        assert y.shape == (count, 2)
        self.runs.append(count)
        if np.any(y[:, 0] == 2 * SPOILT):
            raise ExecutionFailed("spoilt")
        return [batch_output(Z, (y[:, :1] * np.float32(self.factor)).astype(np.float32), count)]


class Family:
    """A backbone y = 2 x over a puppet, and heads on it."""

    def __init__(self, heads: int = 2, max_batch_size: int = 16, memory: int = 10**6, **policy: Any) -> None:
        self.puppet = Puppet(memory)
        self.backbone = Served(
            config_of([X], [Y], max_batch_size), [double_instance(self.puppet, (X,), (Y,), max_batch_size)], **policy
        )
        self.below = self.backbone.model
        self.answers = self.backbone.answers
        self.times = [Times(number + 1) for number in range(heads)]
        self.heads = [self.head(number, times) for number, times in enumerate(self.times)]

    def head(self, number: int, times: Times) -> HeadModel:
        config = config_of([X], [Z])
        metrics = ModelMetrics(f"h{number}", "1")
        return HeadModel(config, 1, self.below.policy, self.below, times, self.backbone.runtime, metrics)  # type: ignore[arg-type]

    def send(self, number: int, array: Array, deadline_ns: int = NEVER_NS) -> InferenceRequest:
        request = self.backbone.requests.make(array, responder=self.answers, deadline_ns=deadline_ns)
        request.shape = self.heads[number].shape_class((array.shape[1:],), ())
        self.heads[number].submit(request)
        return request

    def send_below(self, array: Array) -> InferenceRequest:
        request = self.backbone.requests.make(array, responder=self.answers)
        request.shape = self.below.shape_class((array.shape[1:],), ())
        self.below.submit(request)
        return request

    def settle(self) -> None:
        self.backbone.settle()
        assert all(head.idle() for head in self.heads)

    def error_of(self, request: InferenceRequest) -> ServiceError:
        return self.answers.error_of(request)


@pytest.fixture
def family() -> Iterator[Any]:
    made: list[Family] = []

    def build(**how: Any) -> Family:
        made.append(Family(**how))
        return made[-1]

    yield build
    for one in made:
        one.puppet.gate.set()
        one.backbone.runtime.stop(ANSWER_S)


def test_one_batch_for_the_backbone_and_its_heads(family: Any) -> None:
    """Each gets its own rows; each head runs once; statistics are each one's own."""
    mine = family()
    sent = [mine.send(0, rows(2, 1)), mine.send_below(rows(1, 5)), mine.send(1, rows(3, 7)), mine.send(0, rows(1, 20))]
    mine.backbone.start()
    mine.answers.wait(4)
    assert mine.puppet.runs == [7]
    assert [times.runs for times in mine.times] == [[3], [3]]
    assert np.array_equal(mine.answers.of(sent[0])[0], rows(2, 1)[:, :1] * 2)
    assert np.array_equal(mine.answers.of(sent[1])[0], rows(1, 5) * 2)
    assert np.array_equal(mine.answers.of(sent[2])[0], rows(3, 7)[:, :1] * 4)
    assert np.array_equal(mine.answers.of(sent[3])[0], rows(1, 20)[:, :1] * 2)
    mine.settle()
    counts = [m.statistics() for m in (mine.backbone.metrics, *(head.metrics for head in mine.heads))]
    assert [c.inference_count for c in counts] == [1, 3, 3]
    assert [c.execution_count for c in counts] == [1, 1, 1]
    assert [[b.batch_size for b in c.batch_stats] for c in counts] == [[7], [3], [3]]


def test_a_row_that_a_head_cannot_take_fails_alone(family: Any) -> None:
    mine = family()
    good, bad, other = mine.send(0, rows(1, 1)), mine.send(0, rows(1, SPOILT)), mine.send(1, rows(1, 2))
    mine.backbone.start()
    mine.answers.wait(3)
    assert mine.answers.of(good)[0].item() == 2
    assert mine.answers.of(other)[0].item() == 8
    error = mine.error_of(bad)
    assert isinstance(error, ExecutionFailed)
    assert "'m' version 1 failed on this request: spoilt" in str(error)
    mine.settle()


def test_a_row_that_the_backbone_cannot_take_fails_alone(family: Any) -> None:
    """Found by halves, as ever; the error is counted by the head that was asked."""
    mine = family()
    poisoned = np.array([[POISON, 0]], np.float32)
    sent = [mine.send(at % 2, rows(1, at + 1)) for at in range(7)]
    bad = mine.send(1, poisoned)
    mine.backbone.start()
    mine.answers.wait(8)
    for at, request in enumerate(sent):
        assert mine.answers.of(request)[0].item() == 2 * (at + 1) * (at % 2 + 1)
    assert isinstance(mine.error_of(bad), ExecutionFailed)
    mine.settle()
    assert {r: t.requests for r, t in mine.heads[1].metrics.sum().failures.items()} == {"execution": 1}
    assert not mine.backbone.failures


def test_a_request_larger_than_a_batch_is_put_together_before_its_head(family: Any) -> None:
    mine = family(memory=4)
    large = mine.send(1, rows(10, 1))
    beside = mine.send(0, rows(3, 50))
    mine.backbone.start()
    mine.answers.wait(2)
    assert np.array_equal(mine.answers.of(large)[0], rows(10, 1)[:, :1] * 4)
    assert np.array_equal(mine.answers.of(beside)[0], rows(3, 50)[:, :1] * 2)
    assert mine.times[1].runs == [10]
    mine.settle()


def test_too_little_memory_for_one_row_is_the_requests_error(family: Any) -> None:
    mine = family(memory=0)
    request = mine.send(0, rows(1))
    mine.backbone.start()
    mine.answers.wait(1)
    assert isinstance(mine.error_of(request), OutOfMemory)
    mine.settle()


def test_cancelled_and_refused_requests_are_no_longer_counted(family: Any) -> None:
    mine = family()
    gone, late = mine.send(0, rows(1)), mine.send(0, rows(1), deadline_ns=now_ns() + 1)
    assert mine.heads[0].cancel(gone)
    assert not mine.heads[0].cancel(gone)
    mine.backbone.start()
    mine.answers.wait(1)
    mine.settle()
    assert mine.heads[0].state().pending_requests == 0
    assert type(mine.error_of(late)).__name__ in ("Expired", "DeadlineUnreachable")
    assert mine.heads[0].metrics.sum().refusals


def test_a_head_that_unloads_leaves_the_others_alone(family: Any) -> None:
    """What is queued for it is answered; the queue, the backbone and the other head go on."""
    mine = family()
    queued, other = mine.send(0, rows(1, 1)), mine.send(1, rows(1, 1))
    mine.heads[0].close()
    assert isinstance(mine.error_of(queued), Draining)
    assert isinstance(mine.error_of(mine.send(0, rows(1))), ModelNotReady)
    mine.backbone.start()
    mine.answers.wait(3)
    assert mine.answers.of(other)[0].item() == 4
    assert not mine.below.finished()
    for head in mine.heads:
        head.close()
        head.release()
    mine.settle()
    assert mine.below.finished()


def test_a_backbone_that_closes_answers_for_its_heads(family: Any) -> None:
    mine = family()
    waiting, own = mine.send(0, rows(1)), mine.send_below(rows(1))
    mine.below.close(DeviceFailed("it is gone"))
    for request in (waiting, own):
        assert isinstance(mine.error_of(request), DeviceFailed)
    assert isinstance(mine.error_of(mine.send(1, rows(1))), ModelNotReady)
    assert all(head.idle() for head in mine.heads)


def test_what_waits_and_what_came_is_each_heads_own(family: Any) -> None:
    """In requests and in rows; what another head is asked is nothing to it."""
    mine = family()
    mine.send(0, rows(3))
    mine.send(1, rows(2))
    mine.send(1, rows(5))
    mine.send(1, rows(5), deadline_ns=now_ns() + 1)
    states = [head.state() for head in mine.heads]
    assert [(state.pending_requests, state.pending_rows) for state in states] == [(1, 3), (2, 7)]
    assert [head.offered() for head in mine.heads] == [(1, 0), (3, 1)]
    mine.backbone.start()
    mine.answers.wait(4)
    mine.settle()
    assert [head.offered() for head in mine.heads] == [(1, 0), (3, 1)]
    assert [head.state().pending_rows for head in mine.heads] == [0, 0]


def test_what_has_failed_already_is_not_counted_again_when_it_is_refused(family: Any) -> None:
    """A request in parts: one has failed while another is being refused."""
    mine = family()
    request = mine.send(0, rows(1))
    mine.backbone.runtime.withdraw(mine.below.queue, mine.heads[0])
    refusal = Refusal(request, RefusalReason.EXPIRED, 0, 0)
    assert mine.heads[0]._claim(request)
    mine.heads[0]._fail(request, ExecutionFailed("the first part"))
    mine.heads[0].refuse(refusal)
    assert mine.heads[0].idle()
    assert mine.heads[0].offered() == (1, 0)


def test_a_backbone_that_is_sealed_takes_no_more_heads(family: Any) -> None:
    """From then on it goes; as long as somebody builds on it, it cannot be sealed."""
    mine = family(heads=1)
    assert not mine.below.seal()
    mine.heads[0].release()
    loading = object()
    assert mine.below.build_on(loading)
    assert not mine.below.seal()
    mine.below.build_on_no_more(loading)
    assert mine.below.seal()
    assert not mine.below.build_on(loading)
    with pytest.raises(ModelLoadError, match="is being unloaded"):
        mine.head(0, Times(1))
