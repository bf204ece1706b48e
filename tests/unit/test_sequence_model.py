"""A stateful model: steps run in order on the states of their own sequence, and what fails fails alone."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from service.clock import NEVER_NS, NS_PER_S, now_ns
from service.config.sequences import Control, ControlKind, SequenceBatching, State
from service.errors import Draining, ExecutionFailed, InvalidRequest, QueueFull, SequenceAborted
from service.request import InferenceRequest, SequenceFlags
from service.sequence_model import SequenceModel
from service.tensor import Array, DataType, TensorSpec
from tests.unit.engine.served import POISON, Puppet, Served, X, Y, config_of
from tests.unit.engine.support import ANSWER_S, double_instance

TOTAL = TensorSpec("total", DataType.FP32, (2,), True)
TOTAL_OUT = TensorSpec("total_out", DataType.FP32, (2,), True)
WHO = Control(TensorSpec("who", DataType.UINT64, (1,), True), ControlKind.CORRID)
FIRST = Control(TensorSpec("first", DataType.FP32, (1,), True), ControlKind.START, -1.0, 2.0)
LAST = Control(TensorSpec("last", DataType.BOOL, (1,), True), ControlKind.END)
READY = Control(TensorSpec("ready", DataType.INT32, (1,), True), ControlKind.READY, 0, 7)
SEEN = TensorSpec("seen", DataType.FP32, (4,), True)


def summed(arrays: Mapping[str, Array]) -> Mapping[str, Array]:
    """y = total_out = total + x: the sum of all steps. `seen` are the controls of the row."""
    total = arrays["total"] + arrays["x"]
    seen = np.concatenate([arrays[n].astype(np.float32) for n in ("who", "first", "last", "ready")], axis=1)
    return {"y": total, "total_out": total, "seen": seen}


class Sequences(Served):
    """A stateful model over a puppet that adds up."""

    def __init__(self, sequences: SequenceBatching | None = None, max_batch_size: int = 16, **policy: Any) -> None:
        made = sequences or SequenceBatching(
            controls=(WHO, FIRST, LAST, READY), states=(State(TOTAL, TOTAL_OUT, (2,)),)
        )
        config = replace(config_of([X], [Y, SEEN], max_batch_size), sequences=made)
        self.puppet = Puppet(compute=summed)
        instance = double_instance(self.puppet, config.session_inputs, config.session_outputs, max(1, max_batch_size))
        super().__init__(config, [instance], **policy)

    def step(
        self, identity: int | str, value: float, start: bool = False, end: bool = False, deadline_ns: int = NEVER_NS
    ) -> InferenceRequest:
        x = np.full((1, 2), value, np.float32)
        request = self.requests.make(x, responder=self.answers, deadline_ns=deadline_ns)
        request.sequence = SequenceFlags(identity, start, end)
        self.model.submit(request)
        return request

    def sum_of(self, request: InferenceRequest) -> float:
        return float(self.answers.of(request)[0][0, 0])

    def seen_of(self, request: InferenceRequest) -> list[float]:
        return [float(v) for v in self.answers.of(request)[1][0]]

    @property
    def stateful(self) -> SequenceModel:
        assert isinstance(self.model, SequenceModel)
        return self.model


@pytest.fixture
def sequences() -> Iterator[Callable[..., Sequences]]:
    made: list[Sequences] = []

    def build(*args: Any, **kwargs: Any) -> Sequences:
        made.append(Sequences(*args, **kwargs))
        return made[-1]

    yield build
    for served in made:
        served.puppet.gate.set()
        served.runtime.stop(ANSWER_S)


def test_steps_sent_ahead_run_in_order_on_their_own_state(sequences: Any) -> None:
    """Ten steps of five sequences, all sent at once: each sees the sum of its own, and rows share batches."""
    served = sequences()
    sent = [
        (served.step(who, who * 10 + n, start=n == 0, end=n == 9), sum(who * 10 + m for m in range(n + 1)))
        for n in range(10)
        for who in range(1, 6)
    ]
    served.start()
    served.answers.wait(50)
    assert [served.sum_of(request) for request, _ in sent] == [total for _, total in sent]
    assert served.puppet.runs == [5] * 10, "one step of each sequence at a time, all together"
    served.settle()
    assert served.stateful.state().sequences == 0


def test_controls_say_what_the_request_says(sequences: Any) -> None:
    served = sequences()
    first, second, third = served.step(-5, 0, start=True), served.step(-5, 0), served.step(-5, 0, end=True)
    served.start()
    served.answers.wait(3)
    who = float(np.float32(2**64 - 5))
    assert served.seen_of(first) == [who, 2.0, 0.0, 7.0]
    assert served.seen_of(second) == [who, -1.0, 0.0, 7.0]
    assert served.seen_of(third) == [who, -1.0, 1.0, 7.0]


def test_a_model_that_takes_numbers_refuses_text_as_correlation_id(sequences: Any) -> None:
    served = sequences()
    served.start()
    text = served.step("five", 0, start=True)
    served.answers.wait(1)
    error = served.answers.error_of(text)
    assert isinstance(error, InvalidRequest)
    assert "'five'" in str(error)
    assert "'m'" in str(error)
    assert served.stateful.state().sequences == 0


def test_text_and_number_are_two_sequences(sequences: Any) -> None:
    served = sequences(SequenceBatching(states=(State(TOTAL, TOTAL_OUT, (2,)),), controls=(FIRST, LAST, READY)))
    served.puppet._healthy = lambda arrays: {
        "y": arrays["total"] + arrays["x"],
        "total_out": arrays["total"] + arrays["x"],
        "seen": np.zeros((len(arrays["x"]), 4), np.float32),
    }
    served.start()
    served.step(5, 1, start=True)
    served.step("5", 10, start=True)
    number, text = served.step(5, 1), served.step("5", 10)
    served.answers.wait(4)
    assert (served.sum_of(number), served.sum_of(text)) == (2, 20)


def test_the_first_step_must_say_so(sequences: Any) -> None:
    served = sequences()
    served.start()
    lost = served.step(7, 1)
    served.answers.wait(1)
    error = served.answers.error_of(lost)
    assert isinstance(error, InvalidRequest)
    assert "must specify the START flag on the first request of the sequence" in str(error)
    over = served.step(7, 1, start=True, end=True)
    served.answers.wait(2)
    assert served.sum_of(over) == 1
    assert "START flag" in str(served.answers.error_of(after(served, 7, 3)))


def after(served: Sequences, identity: int, count: int) -> InferenceRequest:
    request = served.step(identity, 1)
    served.answers.wait(count)
    return request


def test_a_start_begins_a_live_sequence_anew(sequences: Any) -> None:
    served = sequences()
    served.start()
    sent = [served.step(7, 1, start=True), served.step(7, 1), served.step(7, 5, start=True), served.step(7, 5)]
    served.answers.wait(4)
    assert [served.sum_of(request) for request in sent] == [1, 2, 5, 10]
    assert served.stateful.state().sequences == 1


def test_a_step_that_fails_takes_along_what_needs_it_and_no_more(sequences: Any) -> None:
    """Its followers are told; the next start runs; another sequence in the same batch is not touched; and the sequence
    is where it was before the failure."""
    served = sequences()
    begun, other = served.step(7, 1, start=True), served.step(8, 2, start=True)
    bad, beside = served.step(7, POISON - 1), served.step(8, 2)
    poison_total = served.step(7, 3)
    # The sum fails, not the input: the poison comes from the state.
    served.puppet._healthy = poisoned_sums
    anew, onward = served.step(7, 4, start=True), served.step(7, 4)
    served.start()
    served.answers.wait(7)
    assert [served.sum_of(r) for r in (begun, other, beside, anew, onward)] == [1, 2, 4, 4, 8]
    assert isinstance(served.answers.error_of(bad), ExecutionFailed)
    error = served.answers.error_of(poison_total)
    assert isinstance(error, SequenceAborted)
    assert "sequence 7 of model 'm'" in str(error)
    served.settle()
    assert served.failures == {"execution": 1, "sequence_aborted": 1}


def poisoned_sums(arrays: Mapping[str, Array]) -> Mapping[str, Array]:
    outputs = summed(arrays)
    if np.any(outputs["y"] == POISON):
        raise ExecutionFailed("poisoned")
    return outputs


def test_a_failed_step_can_be_sent_again(sequences: Any) -> None:
    served = sequences()
    served.start()
    served.step(7, 1, start=True)
    served.answers.wait(1)
    served.step(7, POISON)
    served.answers.wait(2)
    again = served.step(7, 2)
    served.answers.wait(3)
    assert served.sum_of(again) == 3


def test_a_refused_step_leaves_no_hole(sequences: Any) -> None:
    """A deadline that has passed when the step's turn comes: not run, and neither is what follows."""
    served = sequences()
    served.puppet.gate.clear()
    served.start()
    served.step(7, 1, start=True)
    served.puppet.begin()
    late = served.step(7, 2, deadline_ns=now_ns() + 1)
    behind = served.step(7, 3)
    served.puppet.gate.set()
    served.answers.wait(3)
    assert type(served.answers.error_of(late)).__name__ in ("Expired", "DeadlineUnreachable")
    assert isinstance(served.answers.error_of(behind), SequenceAborted)
    again = served.step(7, 2)
    served.answers.wait(4)
    assert served.sum_of(again) == 3


def test_a_thousand_starts_that_are_refused_at_once(sequences: Any) -> None:
    """Each refusal lets the next start go, which is refused: one after the other, not one within the other."""
    served = sequences()
    served.puppet.gate.clear()
    served.start()
    served.step(7, 1, start=True)
    served.puppet.begin()
    late = [served.step(7, 2, start=True, deadline_ns=now_ns() + 1) for _ in range(1000)]
    last = served.step(7, 9, start=True)
    served.puppet.gate.set()
    served.answers.wait(1002)
    assert served.sum_of(last) == 9
    for request in late:
        served.answers.error_of(request)


def test_cancelled_steps(sequences: Any) -> None:
    """Held: gone with its followers. Queued: likewise. Running: dropped when done, the sequence goes on."""
    served = sequences()
    queued, held, behind = served.step(7, 1, start=True), served.step(7, 1), served.step(7, 1)
    served.model.cancel(held)
    served.answers.wait(1)
    assert isinstance(served.answers.error_of(behind), SequenceAborted)
    served.model.cancel(queued)
    assert served.stateful.state().sequences == 0, "its start was not run"
    served.puppet.gate.clear()
    served.start()
    running, onward = served.step(8, 1, start=True), served.step(8, 2)
    served.puppet.begin()
    served.model.cancel(running)
    served.puppet.gate.set()
    served.answers.wait(3)
    assert served.sum_of(onward) == 3
    served.settle()
    assert served.failures == {"cancelled": 2, "sequence_aborted": 1}


def test_live_sequences_are_bounded_and_idle_ones_make_room(sequences: Any) -> None:
    states = (State(TOTAL, TOTAL_OUT, (2,)),)
    served = sequences(SequenceBatching(NS_PER_S, 2, (WHO, FIRST, LAST, READY), states))
    served.start()
    served.step(1, 1, start=True)
    served.step(2, 1, start=True)
    served.answers.wait(2)
    many = served.step(3, 1, start=True)
    served.answers.wait(3)
    error = served.answers.error_of(many)
    assert isinstance(error, QueueFull)
    assert error.retry_after_ns > 0
    assert "2 live sequences" in str(error)
    served.settle()
    assert served.stateful.state().sequence_bytes == 2 * 8
    served.stateful.expire(now_ns() + NS_PER_S)
    state = served.stateful.state()
    assert (state.sequences, state.sequence_bytes, state.sequences_expired) == (0, 0, 2)
    served.step(3, 1, start=True)
    served.answers.wait(4)
    assert len(served.answers.outputs) == 3


def test_a_state_that_cannot_be_fed_back_fails_the_step(sequences: Any) -> None:
    served = sequences()
    # The rows of this state cannot be told apart.
    served.pool.instances[0].undeclared_shapes = True
    served.puppet._healthy = lambda arrays: {**summed(arrays), "total_out": np.zeros((1, 3), np.float32)}
    served.start()
    wrong = served.step(7, 1, start=True)
    served.answers.wait(1)
    assert isinstance(served.answers.error_of(wrong), ExecutionFailed)
    assert "state 'total_out' has shape [3] after a step, expected [2]" in str(served.answers.error_of(wrong))
    served.settle()
    assert served.failures == {ExecutionFailed.reason: 1}
    assert served.metrics.sum().totals.requests == 0, "nobody has got an answer"


def test_unloading_answers_what_is_held(sequences: Any) -> None:
    served = sequences()
    sent = [served.step(7, 1, start=n == 0) for n in range(3)]
    served.model.close()
    served.answers.wait(3)
    for request in sent:
        assert isinstance(served.answers.error_of(request), Draining)
    assert served.model.idle()
    assert served.stateful.state().sequences == 0


def test_what_runs_when_the_model_unloads_is_answered(sequences: Any) -> None:
    served = sequences()
    served.puppet.gate.clear()
    served.start()
    running, held = served.step(7, 1, start=True), served.step(7, 1)
    served.puppet.begin()
    served.model.close()
    served.puppet.gate.set()
    served.answers.wait(2)
    assert served.sum_of(running) == 1
    assert isinstance(served.answers.error_of(held), Draining)


def test_sequences_go_on_where_they_began_when_the_model_is_replaced(sequences: Any) -> None:
    """New ones begin with the new model, also under a known id; when the last is over, the old model may go."""
    old, new = sequences(), sequences()
    new.puppet._healthy = lambda arrays: {**summed(arrays), "y": -summed(arrays)["y"]}
    old.start()
    new.start()
    old.step(1, 1, start=True)
    old.step(2, 1, start=True)
    old.answers.wait(2)
    new.model.replaces(old.model)
    assert not old.model.finished()
    onward = new.step(1, 2)
    begun, anew = new.step(3, 5, start=True), new.step(2, 7, start=True)
    after, last = new.step(2, 1), new.step(1, 1, end=True)
    new.answers.wait(5)
    assert new.sum_of(onward) == 3
    assert [new.sum_of(r) for r in (begun, anew, after)] == [-5, -7, -8]
    assert new.sum_of(last) == 4
    assert old.stateful.state().sequences == 0, "one has ended, one has begun anew elsewhere"
    over = new.step(2, 1, end=True)
    new.answers.wait(6)
    assert new.sum_of(over) == -9
    lost = new.step(2, 1)
    new.answers.wait(7)
    assert "START flag" in str(new.answers.error_of(lost)), "not on its state of before"
    assert not new.model.continues(1)
    old.model.expire(now_ns() + 2 * NS_PER_S)
    old.settle()
    assert old.model.finished()
    old.model.close()
    assert new.model.continues(3)
    assert not new.model.continues(1)


def test_what_is_unloaded_does_not_wait_for_the_sequences_of_what_it_has_replaced(sequences: Any) -> None:
    """Nobody can send their steps any more."""
    oldest, old, new = sequences(), sequences(), sequences()
    for served in (oldest, old, new):
        served.start()
    oldest.step(1, 1, start=True)
    old.step(2, 1, start=True)
    for served, count in ((oldest, 1), (old, 1)):
        served.answers.wait(count)
        served.settle()
    old.model.replaces(oldest.model)
    new.model.replaces(old.model)
    for served in (oldest, old):
        served.model.retiring()
        assert not served.model.finished(), "their sequences may go on"
    new.model.retiring()
    for served in (oldest, old, new):
        assert served.model.finished()


def test_a_step_that_went_to_the_old_model_is_cancelled_there(sequences: Any) -> None:
    old, new = sequences(), sequences()
    new.start()
    old.step(1, 1, start=True)
    new.model.replaces(old.model)
    held, behind = new.step(1, 2), new.step(1, 3)
    assert new.model.cancel(held)
    new.answers.wait(1)
    assert isinstance(new.answers.error_of(behind), SequenceAborted)


def test_what_goes_wrong_while_a_step_is_queued_does_not_hold_its_sequence(
    sequences: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step itself is answered, and the next one runs."""
    served = sequences()
    served.start()
    served.step(7, 1, start=True)
    served.answers.wait(1)
    enqueue = served.runtime.enqueue

    def fails(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(served.runtime, "enqueue", fails)
    lost = served.step(7, 1)
    monkeypatch.setattr(served.runtime, "enqueue", enqueue)
    again = served.step(7, 2)
    served.answers.wait(3)
    assert "unexpected RuntimeError: a bug" in str(served.answers.error_of(lost))
    assert served.sum_of(again) == 3


def test_what_goes_wrong_while_a_held_step_is_let_go_is_that_steps_alone(
    sequences: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that lets it go is answering other requests of the batch before it."""
    served = sequences()
    served.puppet.gate.clear()
    served.start()
    sent = [served.step(who, who, start=True) for who in (1, 2)]
    served.puppet.begin()
    held = served.step(1, 5)
    behind = served.step(1, 6)
    anew = served.step(1, 7, start=True)
    tensors, others = served.stateful._tensors, served.stateful._tensors.before

    def fails(identity: int, start: bool, end: bool, states: Any) -> Any:
        if identity == 1 and not start:
            raise RuntimeError("a bug")
        return others(identity, start, end, states)

    monkeypatch.setattr(tensors, "before", fails)
    served.puppet.gate.set()
    served.answers.wait(5)
    served.settle()
    assert [served.sum_of(request) for request in (*sent, anew)] == [1, 2, 7]
    assert "unexpected RuntimeError: a bug" in str(served.answers.error_of(held))
    assert isinstance(served.answers.error_of(behind), SequenceAborted)
    assert served.metrics.sum().totals.requests == 3


def test_a_step_leaves_no_cycle_behind(sequences: Any) -> None:
    """Ten thousand steps a second must not wait for the garbage collector."""
    served = sequences()
    served.start()
    gc.collect()
    before = {id(thing) for thing in gc.get_objects() if isinstance(thing, InferenceRequest)}
    gc.disable()
    try:
        for number in range(50):
            served.step(7, 1, start=number == 0, end=number == 49)
            served.answers.wait(1)
            served.answers.outputs.clear()
        served.settle()
        left = [t for t in gc.get_objects() if isinstance(t, InferenceRequest) and id(t) not in before]
    finally:
        gc.enable()
    # The worker keeps its last batch until the next.
    assert len(left) <= 2
