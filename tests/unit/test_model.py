"""A loaded model: every request is answered exactly once, whatever happens to its batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from service.clock import NEVER_NS, NS_PER_MS, NS_PER_S, now_ns
from service.config.model import ModelConfig
from service.engine.pool import Instance
from service.errors import (
    DeadlineUnreachable,
    DeviceFailed,
    Draining,
    ExecutionFailed,
    Expired,
    ModelNotReady,
    OutOfMemory,
    Overloaded,
    QueueFull,
)
from service.model import MAX_SHAPE_CLASSES
from service.request import InferenceRequest, OutputPart, ShapeClass, refusal_error
from service.scheduler import Dispatch, Refusal, RefusalReason, Segment, Slot
from service.tensor import Array, DataType, TensorSpec
from tests.support import onnx_models
from tests.unit.engine.served import POISON, Puppet, Served, X, Y, config_of, doubled, rows
from tests.unit.engine.support import ANSWER_S, Answers, Requests, double_instance, instance_of


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """Serves models until the test is over."""
    made: list[Served] = []

    def build(config: ModelConfig, instances: Sequence[Instance], **policy: Any) -> Served:
        made.append(Served(config, instances, **policy))
        return made[-1]

    yield build
    for served in made:
        served.runtime.stop(ANSWER_S)


def puppet_model(
    serve: Callable[..., Served], session: Puppet, slots: int = 1, max_batch_size: int = 16, **policy: Any
) -> Served:
    instances = [double_instance(session, (X,), (Y,), max_batch_size) for _ in range(slots)]
    return serve(config_of([X], [Y], max_batch_size), instances, **policy)


def real_model(
    serve: Callable[..., Served], directory: Path, model: onnx.ModelProto, text: str = "", **policy: Any
) -> Served:
    instance, config = instance_of(directory, model, text)
    return serve(config, [instance], **policy)


# Answers


def test_requests_that_wait_together_are_answered_from_one_batch(serve: Any, tmp_path: Path) -> None:
    """Several requests of several rows: one execution, each gets its own rows."""
    served = real_model(serve, tmp_path, onnx_models.identity("FP32", ("N", 2)))
    sent = [(served.send(rows(count, 10.0 * count)), rows(count, 10.0 * count)) for count in (1, 3, 2)]
    served.start()
    served.answers.wait(3)
    for request, wanted in sent:
        assert np.array_equal(served.answers.of(request)[0], wanted)
    served.settle()
    statistics = served.metrics.statistics()
    assert (statistics.execution_count, statistics.inference_count) == (1, 6)
    assert [batch.batch_size for batch in statistics.batch_stats] == [6]


def test_requests_of_different_shapes_do_not_meet(serve: Any, tmp_path: Path) -> None:
    """Text of different lengths goes into different batches."""
    served = real_model(serve, tmp_path, onnx_models.text_encoder())
    sent = []
    for length in (3, 5, 3, 5):
        ids = np.full((1, length), length, np.int64)
        sent.append((served.send(ids, np.ones_like(ids)), length))
    served.start()
    served.answers.wait(4)
    for request, length in sent:
        assert served.answers.of(request)[0].shape == (1, length, 8)
    served.settle()
    assert [(b.batch_size, b.compute_infer.count) for b in served.metrics.statistics().batch_stats] == [(2, 2)]


def test_a_poisoned_request_fails_alone(serve: Any, tmp_path: Path) -> None:
    """Sixteen share a batch, the model refuses one: fifteen right answers and one error, each exactly once."""
    served = real_model(serve, tmp_path, onnx_models.poison(rows=64))
    table = np.stack([row_of(served, index) for index in range(16)])
    sent = [served.send(np.array([[9999 if index == 11 else index]], np.int64)) for index in range(16)]
    served.start()
    served.answers.wait(16)
    served.settle()
    assert served.answers.count == 16
    for index, request in enumerate(sent):
        if index == 11:
            error = served.answers.error_of(request)
            assert isinstance(error, ExecutionFailed)
            assert str(error).startswith("model 'model' version 1 failed on this request: ")
        else:
            assert np.array_equal(served.answers.of(request)[0][0], table[index])
    assert served.failures == {"execution": 1}
    # 16 rows fail, then 8 + 8, 4 + 4, 2 + 2, 1 + 1: one of each pair succeeds, down to the neighbour of the poison.
    statistics = served.metrics.statistics()
    assert [(b.batch_size, b.compute_infer.count) for b in statistics.batch_stats] == [(1, 1), (2, 1), (4, 1), (8, 1)]
    assert statistics.inference_count == 15


def row_of(served: Served, index: int) -> Array:
    """What the model answers to one index, run directly."""
    instance = served.pool.instances[0]
    spec = served.model.inputs[0]
    return instance.session.run({"index": (spec, np.array([[index]], np.int64))}, served.model.outputs)[0][0]


def test_many_poisoned_requests(serve: Any) -> None:
    """Every second one: half are answered, half fail, nobody is forgotten."""
    served = puppet_model(serve, Puppet())
    sent = [served.send(rows(1) if index % 2 else np.full((1, 2), POISON, np.float32)) for index in range(16)]
    served.start()
    served.answers.wait(16)
    served.settle()
    for index, request in enumerate(sent):
        if index % 2:
            assert np.array_equal(served.answers.of(request)[0], rows(1) * 2)
        else:
            served.answers.error_of(request)
    assert served.failures == {"execution": 8}


# Memory


def test_a_batch_too_large_for_memory_is_halved_and_remembered(serve: Any) -> None:
    """Everybody is answered, and later batches are no larger than what fitted."""
    session = Puppet(memory=3)
    served = puppet_model(serve, session)
    sent = [served.send(rows(1, index)) for index in range(16)]
    served.start()
    served.answers.wait(16)
    for index, request in enumerate(sent):
        assert np.array_equal(served.answers.of(request)[0], rows(1, index) * 2)
    served.settle()
    assert max(session.runs) == 16
    session.runs.clear()
    session.gate.clear()
    more = [served.send(rows(1, index)) for index in range(12)]
    session.gate.set()
    served.answers.wait(28)
    assert [np.array_equal(served.answers.of(r)[0], rows(1, i) * 2) for i, r in enumerate(more)] == [True] * 12
    assert max(session.runs) <= 2
    assert served.failures == {}


def test_a_request_too_large_for_memory_is_run_in_parts(serve: Any) -> None:
    """One request of 13 rows where 4 fit: one answer, its rows in order, and smaller batches from then on."""
    session = Puppet(memory=4)
    served = puppet_model(serve, session)
    request = served.send(rows(13))
    served.start()
    served.answers.wait(1)
    assert np.array_equal(served.answers.of(request)[0], rows(13) * 2)
    served.settle()
    session.runs.clear()
    again = served.send(rows(13, 5.0))
    served.answers.wait(2)
    assert np.array_equal(served.answers.of(again)[0], rows(13, 5.0) * 2)
    assert max(session.runs) <= 4


def test_a_row_too_large_for_memory_fails_as_that(serve: Any) -> None:
    """Out of memory at one row is the request's own error, once, however many rows it has."""
    session = Puppet(memory=0)
    served = puppet_model(serve, session)
    sent = [served.send(rows(count)) for count in (1, 4, 1)]
    served.start()
    served.answers.wait(3)
    served.settle()
    assert [type(served.answers.error_of(request)) for request in sent] == [OutOfMemory] * 3
    assert served.failures == {"out_of_memory": 3}
    assert len(session.runs) <= 3 * 2 * 6


# The device


def test_a_broken_device_is_not_tried_again(serve: Any) -> None:
    """The batch fails as a whole, once, without being split; the runtime is told, and runs nothing more there."""
    session = Puppet(compute=broken)
    served = puppet_model(serve, session)
    sent = [served.send(rows(1, index)) for index in range(16)]
    served.start()
    served.answers.wait(16)
    assert session.runs == [16]
    assert {type(served.answers.error_of(request)) for request in sent} == {DeviceFailed}
    assert served.failures == {"device_failed": 16}
    assert [device for device, _ in served.failed_devices] == ["cpu"]
    late = served.send(rows(1))
    served.model.close(DeviceFailed("device cpu has failed"))
    assert isinstance(served.answers.error_of(late), DeviceFailed)
    assert session.runs == [16]


def test_a_device_that_breaks_in_a_second_try(serve: Any) -> None:
    """A batch fails for a poisoned request, its first half breaks the device: everybody is told, nobody twice."""
    session = Puppet(compute=broken_when_small)
    served = puppet_model(serve, session)
    sent = [served.send(np.full((1, 2), POISON, np.float32) if index == 15 else rows(1)) for index in range(16)]
    served.start()
    served.answers.wait(16)
    assert served.answers.count == 16
    assert isinstance(served.answers.error_of(sent[0]), DeviceFailed)
    assert session.runs == [16, 8]
    assert [device for device, _ in served.failed_devices] == ["cpu"]


def test_a_batch_that_was_given_up_answers_nobody(serve: Any) -> None:
    """It hangs, its clients are told, it ends after all: each has one answer, and the counts say so."""
    session = Puppet()
    session.gate.clear()
    served = puppet_model(serve, session)
    sent = [served.send(rows(1, index)) for index in range(4)]
    served.start()
    session.begin()
    (running,) = served.runtime._running()
    served.model.abandon(running.dispatch, DeviceFailed("device cpu hangs"))
    assert {type(served.answers.error_of(request)) for request in sent} == {DeviceFailed}
    session.gate.set()
    served.settle()
    assert served.answers.count == 4
    assert served.failures == {"device_failed": 4}
    assert served.metrics.statistics().success.count == 0


def test_a_batch_being_answered_cannot_be_given_up(serve: Any) -> None:
    """The watchdog comes too late: the answer counts."""
    served = puppet_model(serve, Puppet())
    request = served.send(rows(1))
    served.start()
    served.answers.wait(1)
    served.settle()
    dispatch = Dispatch(served.model.queue, Slot("cpu", 0), [Segment(request, 0, 1)], 1, 1, 0, None, 0, 0, ())  # type: ignore[arg-type]
    dispatch.answering = True
    served.model.abandon(dispatch, DeviceFailed("device cpu hangs"))
    assert np.array_equal(served.answers.of(request)[0], rows(1) * 2)


def broken(arrays: Mapping[str, Array]) -> Mapping[str, Array]:
    raise DeviceFailed("CUDA failure 700: an illegal memory access was encountered")


def broken_when_small(arrays: Mapping[str, Array]) -> Mapping[str, Array]:
    if len(arrays["x"]) < 16:
        raise DeviceFailed("CUDA failure 700: an illegal memory access was encountered")
    return doubled(arrays)


# Requests run in parts


def test_a_request_larger_than_a_batch_is_put_together_in_order(serve: Any, tmp_path: Path) -> None:
    """Several outputs, several batches, other requests in between: rows come back in their order."""
    served = real_model(serve, tmp_path, onnx_models.text_encoder(), max_batch_rows=3)
    rng = np.random.default_rng(0)
    sent = []
    for count in (8, 1, 7, 3):
        ids = rng.integers(0, 100, (count, 4))
        sent.append((served.send(ids, np.ones_like(ids)), ids))
    served.start()
    served.answers.wait(4)
    served.settle()
    assert served.answers.count == 4
    session = served.pool.instances[0].session
    for request, ids in sent:
        feeds = {s.name: (s, a) for s, a in zip(served.model.inputs, (ids, np.ones_like(ids)), strict=True)}
        for answer, wanted in zip(served.answers.of(request), session.run(feeds, served.model.outputs), strict=True):
            np.testing.assert_allclose(answer, wanted, rtol=1e-5, atol=1e-6)
    statistics = served.metrics.statistics()
    assert statistics.inference_count == 19
    assert max(batch.batch_size for batch in statistics.batch_stats) == 3


def test_text_is_put_together_too(serve: Any, tmp_path: Path) -> None:
    """Parts of BYTES are object arrays."""
    served = real_model(serve, tmp_path, onnx_models.string_labels(), max_batch_rows=2)
    names = np.array([["cat"], ["dog"], ["bird"], ["?"], ["dog"]], dtype=object)
    request = served.send(names)
    served.start()
    served.answers.wait(1)
    ids, echo = served.answers.of(request)
    assert ids.ravel().tolist() == [0, 1, 2, -1, 1]
    assert echo.ravel().tolist() == ["cat", "dog", "bird", "unknown", "dog"]


def test_an_output_without_rows_is_given_once(serve: Any) -> None:
    """An output declared without the batch is the same for every part: the first one's is the answer's."""
    scale = TensorSpec("scale", DataType.FP32, (1,), batched=False)
    session = Puppet(compute=lambda arrays: {"y": arrays["x"], "scale": np.array([7], np.float32)})
    config = config_of([X], [Y, scale])
    served = serve(config, [double_instance(session, (X,), (Y, scale), 16)], max_batch_rows=2)
    served.pool.instances[0].undeclared_shapes = True
    request = served.send(rows(5))
    served.start()
    served.answers.wait(1)
    y, one = served.answers.of(request)
    assert np.array_equal(y, rows(5))
    assert one.tolist() == [7]


def test_parts_that_cannot_be_put_together_are_an_error(serve: Any) -> None:
    """An output that does not follow the rows: the sum of a part is not the sum of the request. Said, not guessed."""
    total = TensorSpec("total", DataType.FP32, (2,), batched=True)
    session = Puppet(compute=lambda arrays: {"total": arrays["x"].sum(axis=0, keepdims=True)})
    served = serve(config_of([X], [total]), [double_instance(session, (X,), (total,), 16)], max_batch_rows=2)
    served.pool.instances[0].undeclared_shapes = True
    request = served.send(rows(5))
    whole = served.send(rows(2))
    served.start()
    served.answers.wait(2)
    served.settle()
    assert "output 'total' has shape [1, 2] for 2 rows" in str(served.answers.error_of(request))
    assert np.array_equal(served.answers.of(whole)[0], rows(2).sum(axis=0, keepdims=True))
    assert served.failures == {"execution": 1}


def test_a_failing_part_fails_the_request_once(serve: Any) -> None:
    """The parts behind it are not run any more."""
    session = Puppet()
    served = puppet_model(serve, session, max_batch_rows=2)
    bad = rows(12)
    bad[3] = POISON
    request = served.send(bad)
    good = served.send(rows(2))
    served.start()
    served.answers.wait(2)
    served.settle()
    assert isinstance(served.answers.error_of(request), ExecutionFailed)
    assert np.array_equal(served.answers.of(good)[0], rows(2) * 2)
    assert served.answers.count == 2
    assert len(session.runs) <= 4
    assert served.failures == {"execution": 1}
    assert served.model.queue.pending_rows == 0


def test_parts_that_end_at_the_same_moment_are_both_kept(serve: Any) -> None:
    """Two slots finish the two halves of a request together: it is answered, and once."""
    met = threading.Barrier(2)

    class Watched(InferenceRequest):
        """Lets the two threads see the state of the parts at the same moment, where they can."""

        __slots__ = ("kept",)

        @property
        def parts(self) -> list[OutputPart] | None:
            seen = self.kept
            try:
                met.wait(0.2)
            except threading.BrokenBarrierError:
                met.reset()
            return seen

        @parts.setter
        def parts(self, parts: list[OutputPart] | None) -> None:
            self.kept = parts

    session = Puppet()
    served = puppet_model(serve, session, slots=2, max_batch_rows=2)
    shape = served.requests.shape(rows(4))
    request = Watched(4, now_ns(), NEVER_NS, 1, shape, [rows(4).tobytes()], served.answers, None, b"")
    session.gate.clear()
    served.model.submit(request)
    served.start()
    session.begin()
    session.begin()
    session.gate.set()
    served.answers.wait(1)
    served.settle()
    assert served.answers.count == 1
    assert np.array_equal(served.answers.of(request)[0], rows(4) * 2)


# The way in, and out


def test_a_refused_request_is_answered_before_submit_returns(serve: Any) -> None:
    """A full queue says so at once, with when to try again."""
    served = puppet_model(serve, Puppet(), max_queue_rows=2)
    sent = [served.send(rows(1)) for _ in range(3)]
    error = served.answers.error_of(sent[2])
    assert isinstance(error, QueueFull)
    assert error.retry_after_ns > 0
    assert served.refusals == {"queue_full": 1}


def test_a_doomed_request_is_refused_by_the_worker(serve: Any) -> None:
    """Its deadline passed in the queue: Expired, in Triton's words, and not run."""
    session = Puppet()
    served = puppet_model(serve, session, max_batch_rows=1)
    session.gate.clear()
    served.start()
    first = served.send(rows(1))
    session.begin()
    deadline_ns = now_ns() + 10 * NS_PER_MS
    doomed = served.send(rows(1), deadline_ns=deadline_ns)
    while now_ns() < deadline_ns:
        threading.Event().wait(0.002)
    session.gate.set()
    served.answers.wait(2)
    served.answers.of(first)
    assert str(served.answers.error_of(doomed)).startswith("Request timeout expired: model 'm' version 1")
    assert served.refusals == {"expired": 1}
    assert session.runs == [1]


@pytest.mark.parametrize(
    ("reason", "expected", "text"),
    [
        (RefusalReason.UNREACHABLE, DeadlineUnreachable, "3 rows need 20.0 ms even on an idle server"),
        (RefusalReason.EXPIRED, Expired, "within its 5.0 ms"),
        (RefusalReason.QUEUE_FULL, QueueFull, "Exceeds maximum queue size of model 'm' version 1"),
        (RefusalReason.OVERLOADED, Overloaded, "the answer would take 20.0 ms, the deadline leaves 5.0 ms"),
    ],
)
def test_refusals_in_words(reason: RefusalReason, expected: type[Exception], text: str) -> None:
    """The predicted wait and the budget in milliseconds; the hint when to try again where that may help."""
    request = Requests([X]).make(rows(3), deadline_ns=0)
    request.arrival_ns, request.deadline_ns = NS_PER_S, NS_PER_S + 5 * NS_PER_MS
    error = refusal_error("model 'm' version 1", Refusal(request, reason, 20 * NS_PER_MS, 7))
    assert type(error) is expected
    assert text in str(error)
    if reason in (RefusalReason.QUEUE_FULL, RefusalReason.OVERLOADED):
        assert error.retry_after_ns == 7  # type: ignore[attr-defined]


def test_a_request_cancelled_in_the_queue_is_not_run(serve: Any) -> None:
    """Nobody is told: the client is gone. Its neighbours are answered."""
    session = Puppet()
    served = puppet_model(serve, session)
    gone, kept = served.send(rows(3)), served.send(rows(1))
    served.model.cancel(gone)
    served.model.cancel(gone)
    served.start()
    served.answers.wait(1)
    served.settle()
    assert session.runs == [1]
    assert served.answers.count == 1
    served.answers.of(kept)
    assert served.failures == {"cancelled": 1}


def test_a_request_cancelled_while_it_runs_is_answered_into_the_void(serve: Any) -> None:
    """Too late to leave: the responder is told as usual, and nothing is counted as cancelled."""
    session = Puppet()
    served = puppet_model(serve, session)
    session.gate.clear()
    request = served.send(rows(2))
    served.start()
    session.begin()
    served.model.cancel(request)
    session.gate.set()
    served.answers.wait(1)
    served.answers.of(request)
    assert served.failures == {}


def test_a_request_cancelled_between_its_parts(serve: Any) -> None:
    """The part that runs is dropped, the rest is not run, and the next request finds a clean queue."""
    session = Puppet()
    served = puppet_model(serve, session, max_batch_rows=2)
    session.gate.clear()
    request = served.send(rows(6))
    served.start()
    session.begin()
    served.model.cancel(request)
    after = served.send(rows(2))
    session.gate.set()
    served.answers.wait(1)
    served.settle()
    served.answers.of(after)
    assert served.answers.count == 1
    assert session.runs == [2, 2]
    assert served.failures == {"cancelled": 1}


def test_close_answers_what_waits(serve: Any) -> None:
    """Queued requests are told that the model is going, the running one is answered, new ones are not ready."""
    session = Puppet()
    served = puppet_model(serve, session, max_batch_rows=1)
    session.gate.clear()
    served.start()
    running = served.send(rows(1))
    session.begin()
    waiting = [served.send(rows(1)) for _ in range(3)]
    served.model.close()
    assert [type(served.answers.error_of(request)) for request in waiting] == [Draining] * 3
    late = served.send(rows(1))
    assert isinstance(served.answers.error_of(late), ModelNotReady)
    assert not served.model.state().ready
    session.gate.set()
    served.answers.wait(5)
    served.answers.of(running)
    assert served.answers.count == 5
    assert session.runs == [1]


def test_a_request_that_meets_the_closing_is_answered(serve: Any) -> None:
    """It saw the model open, but the queue is gone when it gets there: not ready, not an exception."""
    served = puppet_model(serve, Puppet())
    served.runtime.remove(served.model.queue)
    late = served.send(rows(1))
    assert isinstance(served.answers.error_of(late), ModelNotReady)


def test_close_between_the_parts_of_a_request(serve: Any) -> None:
    """Half run, half queued: one answer, the refusal."""
    session = Puppet()
    served = puppet_model(serve, session, max_batch_rows=2)
    session.gate.clear()
    request = served.send(rows(4))
    served.start()
    session.begin()
    served.model.close()
    session.gate.set()
    served.runtime.stop(ANSWER_S)
    assert isinstance(served.answers.error_of(request), Draining)
    assert served.answers.count == 1


# Defects


def test_a_defect_ends_with_its_batch(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever is raised where nothing should be: the batch's requests fail, it is logged, the worker goes on."""

    def broken(arrays: Mapping[str, Array]) -> Mapping[str, Array]:
        if arrays["x"][0, 0] == 1.0:
            raise ZeroDivisionError("a defect")
        return doubled(arrays)

    served = puppet_model(serve, Puppet(compute=broken))
    sent = [served.send(np.ones((1, 2), np.float32)), served.send(rows(1))]
    served.start()
    served.answers.wait(2)
    for request in sent:
        assert "ZeroDivisionError: a defect" in str(served.answers.error_of(request))
    healthy = served.send(rows(2))
    served.answers.wait(3)
    assert np.array_equal(served.answers.of(healthy)[0], rows(2) * 2)
    assert "a batch could not be answered" in caplog.text


def test_an_answer_that_cannot_be_sent_does_not_cost_the_others_theirs(serve: Any) -> None:
    """A responder that raises: its own request and those behind it in the batch get an error instead of silence."""

    class Raising(Answers):
        def answer(self, request: InferenceRequest, outputs: Any, first_row: int) -> None:
            raise ValueError("cannot be encoded")

    served = puppet_model(serve, Puppet())
    first = served.send(rows(1))
    raising = Raising()
    second = served.requests.make(rows(1), responder=raising)
    served.model.submit(second)
    third = served.send(rows(1))
    served.start()
    served.answers.wait(2)
    served.answers.of(first)
    served.answers.error_of(third)
    assert "cannot be encoded" in str(raising.error_of(second))
    again = served.send(rows(1))
    served.answers.wait(3)
    served.answers.of(again)


# The nouns


def test_equal_shapes_are_one_object(serve: Any) -> None:
    """The table of shapes is bounded, and emptying it only makes new objects."""
    model = puppet_model(serve, Puppet()).model
    one = model.shape_class(((2,),), ())
    assert model.shape_class(((2,),), ()) is one
    assert one.cost == 2
    assert model.shape_class(((2,),), (b"1",)) is not one
    assert model.shape_class(((0,), None), ()).cost == 1
    adopted = ShapeClass(((3,),), (), 3)
    model.adopt(adopted)
    assert model.shape_class(((3,),), ()) is adopted
    for size in range(MAX_SHAPE_CLASSES + 10):
        model.shape_class(((4, size),), ())
        assert len(model._shapes) <= MAX_SHAPE_CLASSES


def test_the_state_tells_what_waits(serve: Any) -> None:
    """What a scrape reads: pending requests and rows, and whether it is ready."""
    served = puppet_model(serve, Puppet(), slo_ns=None)
    served.send(rows(3))
    served.send(rows(1))
    state = served.model.state()
    assert (state.ready, state.pending_requests, state.pending_rows, state.slo_ns) == (True, 2, 4, None)
    assert "m/1, 2 queued" in repr(served.model)
    served.start()
    served.answers.wait(2)
    served.settle()
    assert served.model.state().pending_rows == 0
