"""One loaded version of a model: its queue, its session pools, its metrics, and the way of a request through them.

`submit` queues a request or answers it at once with the reason why not. A worker then hands the batch it rides in to
`execute`, which merges, runs, answers every request and leaves one `BatchRecord`. A batch that fails is run again in
halves until only what fails by itself is left: a poisoned request fails alone. A broken device is not tried again.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from service.batch import BatchRecord
from service.clock import NS_PER_MS, now_ns
from service.config.model import ModelConfig
from service.engine.buffers import batch_output
from service.engine.pool import Executed, Instance, SessionPool
from service.engine.runtime import Runtime
from service.errors import (
    Cancelled,
    DeviceFailed,
    Draining,
    ExecutionFailed,
    ModelNotReady,
    OutOfMemory,
    Overloaded,
    ServiceError,
)
from service.logs import IncidentLimiter
from service.metrics import ModelMetrics, ModelShard, ModelState
from service.metrics.saturation import row_ns
from service.request import BatchOutput, InferenceRequest, OutputPart, ShapeClass, halves, refusal_error
from service.scheduler import Dispatch, LatencyModel, ModelQueue, QueuePolicy, Refusal, RefusalReason, Segment
from service.telemetry import SpanTracer
from service.telemetry.spans import traced_request
from service.tensor import element_count
from service.tracing import Tracer

log = logging.getLogger(__name__)

# Shape classes kept. They only save comparing shapes; two objects of one shape merely do not share a batch, so
# emptying the table when clients choose very many shapes is harmless.
MAX_SHAPE_CLASSES = 4096


_SERIALS = itertools.count(1)

# A request of a head that its backbone has run: the request, the backbone's outputs, the first of its rows there.
Part = tuple[InferenceRequest, Sequence[BatchOutput], int]


class Model:
    """One loaded model version. `inputs` and `outputs` are in the order of the configuration."""

    stateful = False

    def __init__(
        self,
        config: ModelConfig,
        version: int,
        policy: QueuePolicy,
        latency: LatencyModel,
        pools: dict[str, SessionPool],
        runtime: Runtime,
        metrics: ModelMetrics,
        queue: ModelQueue | None = None,
    ) -> None:
        """`queue`: where requests wait; unset: one of the model's own."""
        self.config = config
        self.name = config.name
        self.version = version
        self.inputs = config.inputs
        self.outputs = config.outputs
        self.max_batch_size = config.max_batch_size
        self.policy = policy
        self.default_priority = policy.default_priority
        self.priority_levels = policy.priority_levels
        self.metrics = metrics
        metrics.devices = policy.devices
        metrics.row_ns = self.row_ns
        self.latency = latency
        self._pools = pools
        self._runtime = runtime
        self._shapes: dict[tuple[object, ...], ShapeClass] = {}
        self._open = True
        # Held to decide who answers a request, never while answering.
        self._claiming = threading.Lock()
        # One shard for each thread that records: shards have a single writer.
        self._shards: dict[int, ModelShard] = {}
        self._incidents = IncidentLimiter()
        self._incidents_lock = threading.Lock()
        self.load_ns: int | None = None
        self.tracer: Tracer | None = None
        self.spans: SpanTracer | None = None
        # Output -> the names of its classes, for the classification extension.
        self.labels: Mapping[str, Sequence[str]] = {}
        self.queue = queue or runtime.add(policy, latency)
        # Who builds on this one: heads, whose requests wait in its queue and ride in its batches, and those that load.
        self.heads: set[object] = set()
        self._building = threading.Lock()
        self._sealed = False
        # Tells this load of the version from any other.
        self.serial = next(_SERIALS)

    def __repr__(self) -> str:
        return f"Model({self.name}/{self.version}, {self.queue.pending_requests} queued)"

    def shape_class(self, shapes: tuple[tuple[int, ...] | None, ...], sides: tuple[bytes, ...]) -> ShapeClass:
        """The one `ShapeClass` object of these shapes and side values."""
        key = (shapes, sides)
        known = self._shapes.get(key)
        if known is None:
            if len(self._shapes) >= MAX_SHAPE_CLASSES:
                self._shapes.clear()
            cost = sum(element_count(shape) for shape in shapes if shape is not None)
            known = self._shapes[key] = ShapeClass(shapes, sides, max(1, cost))
        return known

    def adopt(self, shape: ShapeClass) -> None:
        """Use a shape class made elsewhere (the one the latency table was measured with) for its shapes."""
        self._shapes[shape.shapes, shape.sides] = shape

    def state(self) -> ModelState:
        """What the model is like right now, for a scrape."""
        return ModelState(
            ready=self._open,
            pending_requests=self.queue.pending_requests,
            pending_rows=self.queue.pending_rows,
            slo_ns=self.policy.slo_ns,
            load_ns=self.load_ns,
            scale=self.latency.scale,
            quantile=self.latency.quantile,
            prediction_cv=self.latency.prediction_cv,
            batch_rows_limit=self.queue.least_cap_rows,
            staging_bytes=sum(pool.staging_bytes for pool in self._pools.values()),
            cuda_graphs=sum(pool.graphs for pool in self._pools.values())
            if self.config.captures_graphs
            and (self.config.optimization.cuda_graphs or any(name != "cpu" for name in self.policy.devices))
            else None,
        )

    @property
    def instances(self) -> int:
        """Batches of it that can run at the same time, on all its devices."""
        return sum(len(pool.instances) for pool in self._pools.values())

    def row_ns(self) -> float:
        """Predicted time of a row within the objective, ns, of the shape that was measured at load or else was the
        first to come; 0 when nothing is known."""
        known = (latencies for latencies in self.latency.table().values() if any(latencies.values()))
        return row_ns(next(known, {}), self.policy.slo_ns)

    # ---------------------------------------------------------------- the way in

    def submit(self, request: InferenceRequest) -> None:
        """Queue a request. It is answered exactly once, perhaps before this returns, through its responder."""
        self._enqueue(request, request.arrival_ns)

    def _enqueue(self, request: InferenceRequest, at_ns: int) -> None:
        request.payload = self
        refusals = self._runtime.enqueue(self.queue, request, at_ns) if self._open else None
        if refusals is not None:
            if refusals:
                refuse_all(refusals)
        else:
            self._fail(request, ModelNotReady(f"model '{self.name}' version {self.version} is not at ready state"))

    def cancel(self, request: InferenceRequest) -> bool:
        """The client is gone: a request still queued leaves the queue at once; a running one is dropped when done.

        Whether it was queued.
        """
        if not self._runtime.cancel(request) or not self._claim(request):
            return False
        self._record_cancelled(request)
        return True

    def _record_cancelled(self, request: InferenceRequest) -> None:
        at_ns = now_ns()
        self._shard().record_cancelled(request.arrival_ns, at_ns, request.deadline_ns)
        if request.trace is not None and self.spans is not None:
            told = traced_request(request)
            self.spans.failed(self.name, self.version, told, "CANCELLED", Cancelled.reason, "", at_ns)
            request.trace = None

    def busy_ns(self, at_ns: int) -> int:
        """For how long, in all likelihood, nothing new can start on any of the model's devices; 0 when it can now."""
        return self._runtime.busy_ns(self.policy.devices, at_ns)

    def offered(self) -> tuple[int, int]:
        """Requests that came to the queue so far, and those of them refused for want of time."""
        queue = self.queue
        refused = sum(queue.refused.values())
        at_the_door = queue.refused[RefusalReason.QUEUE_FULL] + queue.refused[RefusalReason.UNREACHABLE]
        return queue.accepted + at_the_door, refused

    def record_unseen(self, count: int, at_ns: int) -> None:
        """Count requests that were refused before it was known for certain that they were for this model."""
        shard = self._shard()
        for _ in range(count):
            shard.record_refusal(Overloaded.reason, at_ns, at_ns)

    def refuse_all(self, refusals: Sequence[Refusal]) -> None:
        """See `refuse_all` below: for those who know models only as what runs their requests."""
        refuse_all(refusals)

    def refuse(self, refusal: Refusal) -> None:
        """Answer a request that will not be run, with the reason and when to try again."""
        request = refusal.request
        assert isinstance(request, InferenceRequest)
        if self._claim(request):  # else the rows of it that did run have failed already
            self._refuse(request, refusal)

    def _refuse(self, request: InferenceRequest, refusal: Refusal) -> None:
        error = refusal_error(f"model '{self.name}' version {self.version}", refusal)
        self._shard().record_refusal(error.reason, request.arrival_ns, now_ns())
        self._incident("refusing requests", reason=error.reason, detail=error)
        request.responder.fail(request, error)

    # ---------------------------------------------------------------- the batch

    def execute(self, dispatch: Dispatch) -> tuple[int | None, int]:
        """Run a batch and answer its requests: (duration in ns or None if it failed, rows answered late)."""
        pool = self._pools[dispatch.slot.device]
        instance = pool.acquire()
        try:
            return self._execute(dispatch, instance)
        except Exception as error:
            # The worker serves every model of the device: whatever went wrong ends here, with this batch.
            log.exception("a batch could not be answered", extra={"model": self.name, "version": self.version})
            for segment in dispatch.segments:
                self._give_up(segment, ExecutionFailed(f"unexpected {type(error).__name__}: {error}"))
            return None, 0
        finally:
            pool.release(instance)

    def _execute(self, dispatch: Dispatch, instance: Instance) -> tuple[int | None, int]:
        segments = dispatch.segments
        try:
            executed = instance.run(segments, dispatch.rows, dispatch.bucket)
        except DeviceFailed as error:
            self._device_failed(dispatch, error)
            return None, 0
        except ServiceError as error:
            try:
                self._retry_split(dispatch, segments, instance, error)
            except DeviceFailed as device_error:
                self._device_failed(dispatch, device_error)
            return None, 0
        if not self._begin_answering(dispatch):
            return None, 0
        answered = self._answer(segments, executed.outputs)
        done_ns = now_ns()
        record = BatchRecord(
            dispatch.slot.device,
            dispatch.rows,
            dispatch.bucket,
            len(segments),
            dispatch.reason,
            dispatch.dispatched_ns,
            executed.started_ns,
            executed.finished_ns,
            done_ns,
            dispatch.expected_ns,
            dispatch.slack_ns,
        )
        self._record(record, answered)
        late_rows = dispatch.late_rows(done_ns)
        if late_rows:
            self._incident(
                "answered late",
                late_rows=late_rows,
                expected_ms=dispatch.expected_ns / NS_PER_MS,
                actual_ms=(done_ns - dispatch.dispatched_ns) / NS_PER_MS,
            )
        return done_ns - dispatch.dispatched_ns, late_rows

    def _record(self, record: BatchRecord, answered: Sequence[InferenceRequest]) -> None:
        if self.heads or (answered and answered[0].payload is not self):
            by_head: dict[Model, list[InferenceRequest]] = {}
            for request in answered:
                by_head.setdefault(request.payload, []).append(request)
            answered = by_head.pop(self, [])
            for head, requests in by_head.items():
                rows = sum(request.rows for request in requests)
                head._record(replace(record, rows=rows, requests=len(requests)), requests)
        self._shard().record_batch(record, answered)
        tracer = self.tracer
        if tracer is not None and tracer.active:
            tracer.batch(self.name, self.version, record, answered)
        spans = self.spans
        if spans is not None:
            traced = spans.batch(self.name, self.version, record, answered)
            if traced:
                self._shard().record_exemplars(record, traced)

    def _answer(self, segments: Sequence[Segment], outputs: list[BatchOutput]) -> list[InferenceRequest]:
        """Answer the requests whose last rows these are; the requests that were answered."""
        answered: list[InferenceRequest] = []
        by_head: dict[Model, list[Part]] = {}
        first_row = 0
        responder = segments[0].request.responder  # type: ignore[attr-defined]
        responder.hold()
        try:
            for segment in segments:
                request = segment.request
                assert isinstance(request, InferenceRequest)
                whole, at = outputs, first_row
                first_row += segment.rows
                if segment.rows != request.rows:
                    collected = self._collect(request, segment, outputs, at)
                    if collected is None:
                        continue
                    whole, at = collected, 0
                if request.payload is not self:
                    by_head.setdefault(request.payload, []).append((request, whole, at))
                    continue
                request.responder.answer(request, whole, at)
                request.answered = True
                answered.append(request)
            for head, parts in by_head.items():
                answered += head.answer_parts(parts)
        finally:
            responder.flush()
        return answered

    def _begin_answering(self, dispatch: Dispatch) -> bool:
        """Whether the requests of a batch are still to be answered by who has run it."""
        with self._claiming:
            dispatch.answering = not dispatch.abandoned
            return dispatch.answering

    def answer_parts(self, parts: Sequence[Part]) -> list[InferenceRequest]:
        """Of a head: answer its requests of a batch of its backbone; those that were answered."""
        raise NotImplementedError(f"{self} is no head")

    def _collect(
        self, request: InferenceRequest, segment: Segment, outputs: list[BatchOutput], first_row: int
    ) -> list[BatchOutput] | None:
        """Keep the rows of one chunk of a request run in parts; the whole answer when all chunks are there."""
        for spec, output in zip(self.outputs, outputs, strict=True):
            if spec.batched and not output.spec.batched:
                reason = f"output '{spec.name}' has shape {list(output.shape)} for {segment.rows} rows"
                advice = f"send fewer than {request.rows} rows at a time, since the parts cannot be put together"
                self._give_up(segment, ExecutionFailed(f"{reason}; {advice}"))
                return None
        rows = slice(first_row, first_row + segment.rows)
        arrays = [o.array[rows].copy() if o.spec.batched else o.array.copy() for o in outputs]
        # Chunks of one request may end on several threads at once.
        with self._claiming:
            if request.answered:
                return None  # refused or failed while this chunk was running
            parts = request.parts = request.parts or []
            parts.append(OutputPart(segment.first_row, segment.rows, arrays))
            if sum(part.rows for part in parts) < request.rows:
                return None
            request.parts = None
        # All chunks are here: from now on nobody else touches the request.
        parts.sort(key=lambda part: part.first_row)
        whole: list[BatchOutput] = []
        for i, output in enumerate(outputs):
            pieces = [part.arrays[i] for part in parts]
            array = np.concatenate(pieces) if output.spec.batched else pieces[0]
            whole.append(batch_output(output.spec, array, request.rows))
        return whole

    # ---------------------------------------------------------------- when it fails

    def _retry_split(
        self, dispatch: Dispatch, segments: Sequence[Segment], instance: Instance, error: ServiceError
    ) -> None:
        """Run a failed batch again in halves, each half in halves again, until only what fails by itself is left.

        Raises `DeviceFailed`: what has no answer by then will have none from this device.
        """
        rows = sum(segment.rows for segment in segments)
        smaller = isinstance(error, OutOfMemory) and rows > 1 and self.config.joins_requests
        if len(segments) == 1 and not smaller:
            self._incident("execution failed", reason=error.reason, detail=error)
            self._give_up(segments[0], error)
            return
        if smaller:
            self._runtime.lower_cap(self.queue, segments[0].request, rows // 2)
            self._incident(
                "out of device memory: smaller batches from now on", rows=rows // 2, device=dispatch.slot.device
            )
        for half in halves(segments):
            if len(half) == 1 and half[0].request.answered:  # type: ignore[attr-defined]
                continue  # another part of it has failed
            rows = sum(segment.rows for segment in half)
            try:
                executed = instance.run(half, rows, rows)
            except DeviceFailed:
                raise
            except ServiceError as half_error:
                self._retry_split(dispatch, half, instance, half_error)
            else:
                self._record_retry(dispatch, half, rows, executed)

    def _record_retry(self, dispatch: Dispatch, half: Sequence[Segment], rows: int, executed: Executed) -> None:
        if not self._begin_answering(dispatch):
            return
        answered = self._answer(half, executed.outputs)
        # From here to the next answer the watchdog may give the rest up again.
        dispatch.answering = False
        record = BatchRecord(
            dispatch.slot.device,
            rows,
            rows,
            len(half),
            dispatch.reason,
            dispatch.dispatched_ns,
            executed.started_ns,
            executed.finished_ns,
            now_ns(),
            dispatch.expected_ns,
            dispatch.slack_ns,
        )
        self._record(record, answered)

    def abandon(self, dispatch: Dispatch, error: DeviceFailed) -> None:
        """Answer the requests of a batch that hangs; whatever comes of it later is dropped."""
        with self._claiming:
            if dispatch.answering:
                return
            dispatch.abandoned = True
        self._incident("a batch hangs", rows=dispatch.rows, device=dispatch.slot.device)
        for segment in dispatch.segments:
            self._give_up(segment, error)

    def _device_failed(self, dispatch: Dispatch, error: DeviceFailed) -> None:
        """The device is broken: nothing of the batch is tried again there, and the runtime is told."""
        for segment in dispatch.segments:
            self._give_up(segment, error)
        self._runtime.device_failed(dispatch.slot.device, str(error))

    def _give_up(self, segment: Segment, error: ServiceError) -> None:
        """Fail the request of a segment, unless it has its answer; its other parts are of no use any more."""
        request = segment.request
        assert isinstance(request, InferenceRequest)
        if self._claim(request):
            self._runtime.cancel(request)
            owner: Model = request.payload
            owner._fail(request, with_model(owner, error))

    def _claim(self, request: InferenceRequest) -> bool:
        """Whether the caller is the one to answer a request: the first who asks."""
        with self._claiming:
            first = not request.answered
            request.answered = True
        return first

    def _fail(self, request: InferenceRequest, error: ServiceError) -> None:
        request.answered = True
        self._shard().record_failure(error.reason, request.arrival_ns, now_ns())
        request.responder.fail(request, error)

    def _incident(self, message: str, **facts: object) -> None:
        """Warn of something that should not happen, at most once in ten seconds for each kind."""
        with self._incidents_lock:
            held_back = self._incidents.allow(message, now_ns())
        if held_back is not None:
            more = {"held_back": held_back} if held_back else {}
            log.warning(message, extra={"model": self.name, "version": self.version, **facts, **more})

    def _shard(self) -> ModelShard:
        ident = threading.get_ident()
        shard = self._shards.get(ident)
        if shard is None:
            shard = self._shards[ident] = self.metrics.shard()
        return shard

    # ---------------------------------------------------------------- the way out

    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return self._runtime.idle(self.queue)

    def replaces(self, before: Model) -> None:
        """Requests that went to `before` come here from now on."""

    def retiring(self) -> None:
        """The model serves no more and is to go when it has `finished`."""

    def build_on(self, head: object) -> bool:
        """Keep this model for as long as `head` needs it, until `build_on_no_more`; False when it is too late."""
        with self._building:
            if self._open and not self._sealed:
                self.heads.add(head)
                return True
        return False

    def build_on_no_more(self, head: object) -> None:
        """`head` is gone. Whoever is not known is ignored."""
        with self._building:
            self.heads.discard(head)

    def finished(self) -> bool:
        """Whether there is nothing left to do for a model that serves no more, and nobody builds on it."""
        return not self.heads and self.idle()

    def seal(self) -> bool:
        """From now on nobody can build on this model; False when somebody does already."""
        with self._building:
            self._sealed = not self.heads
        return self._sealed

    def close(self, error: ServiceError | None = None) -> None:
        """Accept nothing new and answer what is queued with `error` (unset: the model unloads); running batches
        finish."""
        self._open = False
        for request in self._runtime.remove(self.queue):
            assert isinstance(request, InferenceRequest)
            if self._claim(request):
                owner: Model = request.payload
                owner._fail(request, with_model(owner, error) if error is not None else owner._unloading())

    def _unloading(self) -> Draining:
        return Draining(f"model '{self.name}' version {self.version} is unloading", NS_PER_MS)

    def release(self) -> None:
        """Let go of sessions and buffers: nothing runs any more. What refers to the model in a circle is cut, since
        what was there at the start is never looked at by the garbage collector."""
        self._pools = {}
        self._shapes.clear()
        self.metrics.state = ModelState
        self.metrics.row_ns = float


def refuse_all(refusals: Sequence[Refusal]) -> None:
    """Answer requests, of one model or several, that will not be run; the answers leave together."""
    responder = refusals[0].request.responder  # type: ignore[attr-defined]
    responder.hold()
    try:
        for refusal in refusals:
            refusal.request.payload.refuse(refusal)
    finally:
        responder.flush()


def with_model(model: Model, error: ServiceError) -> ServiceError:
    """The engine's error, naming the model."""
    message = f"model '{model.name}' version {model.version} failed on this request: {error}"
    known = isinstance(error, (OutOfMemory, DeviceFailed))
    return type(error)(message) if known else ExecutionFailed(message)
