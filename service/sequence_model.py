"""A stateful model: its requests are steps of sequences, and what a step leaves is kept here for the next one.

A step takes the way of any request through `Model`, with two differences: it enters the queue only when the step before
it is done, and it carries the controls and the states of its sequence as further inputs. Rows of different sequences
share batches like any others. Which step may run is decided by `service.scheduler.sequences`; how states are cut out of
a batch, by `service.engine.states`.

When a version of the model is replaced, sequences that are live go on where they began: the new one passes their steps
to the one before it, which goes when it has none left.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from service.clock import NS_PER_MS, NS_PER_S, now_ns
from service.config.model import ModelConfig
from service.engine.pool import SessionPool
from service.engine.runtime import Runtime
from service.engine.states import Shapes, States, StepTensors
from service.errors import ExecutionFailed, InvalidRequest, QueueFull, SequenceAborted, ServiceError
from service.metrics import ModelMetrics, ModelState
from service.model import MAX_SHAPE_CLASSES, Model, with_model
from service.request import BatchOutput, InferenceRequest, Responder, SequenceFlags, ShapeClass
from service.scheduler import LatencyModel, LiveSequence, Next, QueuePolicy, Segment, SequenceTable, Step, Verdict

log = logging.getLogger(__name__)

_Live = LiveSequence[InferenceRequest]
_Step = Step[InferenceRequest]


class SequenceModel(Model):
    """One loaded version of a stateful model. `tensors` are those that its sequences add."""

    stateful = True
    # Whether another model has taken its place, and passes it the steps of its sequences.
    replaced = False
    # Whether it takes no more steps.
    gone = False

    def __init__(
        self,
        config: ModelConfig,
        version: int,
        policy: QueuePolicy,
        latency: LatencyModel,
        pools: dict[str, SessionPool],
        runtime: Runtime,
        metrics: ModelMetrics,
        tensors: StepTensors,
    ) -> None:
        super().__init__(config, version, policy, latency, pools, runtime, metrics)
        assert config.sequences is not None
        self._tensors = tensors
        # Shape classes of the clients' tensors and states together, by the clients' and the states'.
        self._whole: dict[tuple[ShapeClass, Shapes], ShapeClass] = {}
        self._table: SequenceTable[InferenceRequest] = SequenceTable(
            config.sequences.max_sequences, config.sequences.max_idle_ns
        )
        # Guards the table and the states of its sequences; never held while a request is queued or answered.
        self._steps = threading.Lock()
        self._expired = 0
        # The model that this one has replaced, while it has live sequences.
        self._before: SequenceModel | None = None
        self._launching = threading.local()

    def submit(self, request: InferenceRequest) -> None:
        """Take a step in: it is queued now, or held until the one before it is done, or answered with the reason why
        not."""
        flags = request.sequence
        assert flags is not None
        before = self._before
        if before is not None and not flags.start and not self._goes_on(flags.identity):
            if before.gone:
                self._before = None
            elif before.continues(flags.identity):
                before.submit(request)
                return
        step: _Step = Step(flags.start, flags.end, request)
        with self._steps:
            verdict, sequence = self._table.arrive(flags.identity, step, request.arrival_ns)
            if verdict is Verdict.TOO_MANY and self._expire(request.arrival_ns):
                verdict, sequence = self._table.arrive(flags.identity, step, request.arrival_ns)
            if sequence is not None:
                request.step = (self, sequence, step)
        if before is not None and flags.start and verdict in (Verdict.RUN, Verdict.HELD):
            before.discard(flags.identity)
        if verdict is Verdict.RUN:
            assert sequence is not None
            self._launch(sequence, step)
        elif verdict is not Verdict.HELD:
            self._fail(request, self._refusal(verdict, flags))

    def cancel(self, request: InferenceRequest) -> bool:
        """The client is gone. A step that has not begun is not run, and those held behind it cannot follow; one that
        runs is dropped when done, and its sequence goes on."""
        if request.step is None:
            return False
        owner, sequence, step = cast("tuple[SequenceModel, _Live, _Step]", request.step)
        if owner is not self:
            return owner.cancel(request)
        with self._steps:
            gone = self._table.withdraw(sequence, step)
        if gone:
            request.step = None
            request.answered = True
            self._record_cancelled(request)
            self._drop(gone[1:], sequence)
            return True
        if not super().cancel(request):
            return False
        responder = request.responder
        assert isinstance(responder, _StepResponder)
        responder.withdrawn()
        return True

    def expire(self, at_ns: int) -> None:
        """Forget the sequences that were silent for too long."""
        with self._steps:
            self._expire(at_ns)

    def _expire(self, at_ns: int) -> int:
        gone = len(self._table.expire(at_ns))
        self._expired += gone
        return gone

    def replaces(self, before: Model) -> None:
        """Requests that went to `before` come here from now on. Its sequences go on there, if steps look the same."""
        ends = (before.config.inputs, before.config.outputs)
        if isinstance(before, SequenceModel) and ends == (self.config.inputs, self.config.outputs):
            self._before = before
            before.replaced = True

    def continues(self, identity: int | str) -> bool:
        """Whether a sequence is live here, or in what this one has replaced."""
        before = self._before
        return self._goes_on(identity) or (before is not None and before.continues(identity))

    def discard(self, identity: int | str) -> None:
        """The sequence has begun anew elsewhere: no further step of it is taken in, here or in what this one has
        replaced."""
        with self._steps:
            self._table.discard(identity)
        if self._before is not None:
            self._before.discard(identity)

    def _goes_on(self, identity: int | str) -> bool:
        with self._steps:
            return self._table.open(identity)

    def retiring(self) -> None:
        """See `Model.retiring`: unless another has taken its place, no step can come any more, neither here nor, by way
        of this one, to what it has replaced."""
        if not self.replaced and self._before is not None:
            self._before.replaced = False
            self._before.retiring()

    def finished(self) -> bool:
        """See `Model.finished`: once replaced, when its last sequence is over."""
        before = self._before
        if before is not None and not before.finished():
            return False
        if self.replaced:
            self.expire(now_ns())
        return self.idle() and not (self.replaced and len(self._table))

    def state(self) -> ModelState:
        """What the model is like right now, for a scrape."""
        with self._steps:
            live = self._table.live()
        states = [cast("States", sequence.state) for sequence in live if sequence.state is not None]
        return replace(
            super().state(),
            sequences=len(live),
            sequence_bytes=sum(state.nbytes for state in states),
            sequences_expired=self._expired,
        )

    def close(self, error: ServiceError | None = None) -> None:
        """See `Model.close`. Sequences are over; what they held is answered."""
        with self._steps:
            held = self._table.clear()
        self.gone = True
        self._before = None
        super().close(error)
        for step in held:
            self._fail(step.request, error or self._unloading())

    # ---------------------------------------------------------------- steps

    def _launch(self, sequence: _Live, step: _Step) -> None:
        """Queue a step. What follows from that at once (refused, so that the next start may run, which is refused...)
        is done here as well, one after the other."""
        waiting: deque[tuple[_Live, _Step]] | None = getattr(self._launching, "waiting", None)
        if waiting is not None:
            waiting.append((sequence, step))
            return
        waiting = self._launching.waiting = deque([(sequence, step)])
        try:
            while waiting:
                self._queue_step(*waiting.popleft())
        finally:
            self._launching.waiting = None

    def _queue_step(self, sequence: _Live, step: _Step) -> None:
        request = step.request
        flags = request.sequence
        assert flags is not None
        request.responder = _StepResponder(self, sequence, request.responder)
        states = self._tensors.initial if step.start else cast("States", sequence.state)
        try:
            shapes, data = self._tensors.before(flags.identity, step.start, step.end, states)
            request.inputs = [*request.inputs, *data]
            request.shape = self._whole_shape(request.shape, shapes)
            request.cost = request.shape.cost
            self._enqueue(request, now_ns())
        except InvalidRequest as error:
            self._fail(request, InvalidRequest(f"model '{self.name}': {error}"))
        except Exception as error:
            # Whose turn this is may have nothing to do with who answers what: it ends here, with this step.
            log.exception("a step could not be queued", extra={"model": self.name, "version": self.version})
            self._runtime.cancel(request)
            if self._claim(request):
                self._fail(request, ExecutionFailed(f"model '{self.name}': unexpected {type(error).__name__}: {error}"))

    def _whole_shape(self, given: ShapeClass, added: Shapes) -> ShapeClass:
        whole = self._whole.get((given, added))
        if whole is None:
            if len(self._whole) >= MAX_SHAPE_CLASSES:
                self._whole.clear()
            whole = self._whole[given, added] = self.shape_class((*given.shapes, *added), given.sides)
        return whole

    def keep(self, outputs: Sequence[BatchOutput], row: int) -> States:
        """Copies of the states that the step in a batch's row leaves. Raises `ExecutionFailed`."""
        return self._tensors.after(outputs, row)

    def _answer(self, segments: Sequence[Segment], outputs: list[BatchOutput]) -> list[InferenceRequest]:
        answered = super()._answer(segments, outputs)
        return [request for request in answered if cast("_StepResponder", request.responder).kept]

    def not_kept(self, request: InferenceRequest, error: ServiceError) -> None:
        """Fail a step that was run: the next one could not follow."""
        self._fail(request, with_model(self, error))

    def ended(self, sequence: _Live, states: States | None) -> Next[InferenceRequest]:
        """The running step is done and leaves `states`, or was not run (None): what follows, for `follow`."""
        with self._steps:
            if sequence.running is not None:
                sequence.running.request.step = None  # which refers back to the request
            if states is not None:
                sequence.state = states
            return self._table.finished(sequence, states is not None, now_ns())

    def follow(self, sequence: _Live, following: Next[InferenceRequest]) -> None:
        """Answer the steps that cannot be run, and queue the one that can."""
        self._drop(following.dropped, sequence)
        if following.run is not None:
            self._launch(sequence, following.run)

    def _drop(self, steps: Sequence[_Step], sequence: _Live) -> None:
        for step in steps:
            step.request.step = None
            error = SequenceAborted(
                f"sequence {sequence.key!r} of model '{self.name}': the step before this one was not run; "
                "go on from that one, or start the sequence anew"
            )
            self._fail(step.request, error)

    def _refusal(self, verdict: Verdict, flags: SequenceFlags) -> ServiceError:
        if verdict is Verdict.NOT_STARTED:
            return InvalidRequest(
                f"inference request for sequence {flags.identity} to model '{self.name}' must specify the START flag "
                "on the first request of the sequence"
            )
        if verdict is Verdict.TOO_MANY:
            return QueueFull(
                f"Exceeds maximum queue size: model '{self.name}' keeps {self._table.max_sequences} live sequences, "
                "and none has ended or is idle",
                NS_PER_S,
            )
        return QueueFull(
            f"Exceeds maximum queue size: too many requests of sequence {flags.identity} of model '{self.name}' wait "
            "for the one before them",
            NS_PER_MS,
        )


class _StepResponder:
    """Stands between the model and who answers a step: keeps the states and lets the next step go."""

    __slots__ = ("_done", "_inner", "_model", "_sequence", "kept")

    def __init__(self, model: SequenceModel, sequence: _Live, inner: Responder) -> None:
        self._model = model
        self._sequence = sequence
        self._inner = inner
        self._done = False
        # Whether what the step has left, if it was run, is there for the next one.
        self.kept = True

    def answer(self, request: InferenceRequest, outputs: Sequence[BatchOutput], first_row: int) -> None:
        try:
            states = self._model.keep(outputs, first_row)
        except ServiceError as error:
            self.kept = False
            self._model.not_kept(request, error)
            return
        # The states first: who has the answer may send the next step.
        following = self._finish(states)
        try:
            self._inner.answer(request, outputs, first_row)
        finally:
            self._model.follow(self._sequence, following)

    def fail(self, request: InferenceRequest, error: ServiceError) -> None:
        following = self._finish(None)
        try:
            self._inner.fail(request, error)
        finally:
            self._model.follow(self._sequence, following)

    def withdrawn(self) -> None:
        """The step left the queue without an answer."""
        self._model.follow(self._sequence, self._finish(None))

    def hold(self) -> None:
        self._inner.hold()

    def flush(self) -> None:
        self._inner.flush()

    def _finish(self, states: States | None) -> Next[InferenceRequest]:
        if self._done:
            return Next()
        self._done = True
        return self._model.ended(self._sequence, states)
