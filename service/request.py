"""One inference request on its way through the server, and the outputs of the batch it rode in.

An `InferenceRequest` is a `QueuedRequest` of the scheduler with the tensors and the way back attached, so that a
request is one object from the wire to the answer. Tensors of fixed-size datatypes are kept as they came: views of the
message's bytes, little-endian, row-major. They become arrays where they are merged into a batch, so that nothing is
copied or built for a request that is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from service.clock import NS_PER_MS
from service.errors import DeadlineUnreachable, Expired, Overloaded, QueueFull, ServiceError
from service.scheduler import QueuedRequest, Refusal, RefusalReason, Segment
from service.tensor import Array, TensorSpec
from service.trace_context import RequestTrace

# What an input is kept as: raw bytes of a fixed-size datatype, or a flat object array of `str` for BYTES.
InputData = memoryview | bytes | Array


class ShapeClass:
    """What requests must have in common to share a batch. Made once per shape by the model and compared by identity.

    `shapes[i]` is the shape of the model's input i: of one row if that input is batched, else of the whole tensor; None
    if the (optional) input is absent. `sides` are the values of the inputs that have no batch dimension in a batched
    model. `cost` is the number of elements per row, from which the latency of a shape never seen is guessed.
    """

    __slots__ = ("cost", "shapes", "sides")

    def __init__(self, shapes: tuple[tuple[int, ...] | None, ...], sides: tuple[bytes, ...], cost: int) -> None:
        self.shapes = shapes
        self.sides = sides
        self.cost = cost

    def __repr__(self) -> str:
        return f"ShapeClass({self.shapes})"


@dataclass(slots=True)
class BatchOutput:
    """One output tensor of an executed batch.

    `shape` is the whole tensor's; when `spec.batched`, rows of it belong to different requests and one row is
    `row_bytes` long in `view`. `view` is None for BYTES, whose elements are in `array`, and for states whose batch
    dimension is not the first, which no client gets. Both are only valid until the next batch of the same instance:
    whoever keeps them copies them.
    """

    spec: TensorSpec
    shape: tuple[int, ...]
    array: Array
    view: memoryview | None
    row_bytes: int


@dataclass(frozen=True, slots=True)
class SequenceFlags:
    """Which sequence a request is a step of, and whether it begins or ends it. Ids 5 and "5" are two sequences."""

    identity: int | str
    start: bool
    end: bool


@dataclass(slots=True)
class OutputPart:
    """What a chunk of a request too large for one batch has brought: copies of its rows of every output."""

    first_row: int
    rows: int
    arrays: list[Array]


class Responder(Protocol):
    """Sends a request's answer on its way. Called once per request, from any thread."""

    def answer(self, request: InferenceRequest, outputs: Sequence[BatchOutput], first_row: int) -> None:
        """Answer with `request.rows` rows of `outputs` from `first_row` on (the whole of those not batched)."""

    def fail(self, request: InferenceRequest, error: ServiceError) -> None:
        """Answer with an error."""

    def hold(self) -> None:
        """More answers will follow shortly: they may be sent in one go. `flush` must follow."""

    def flush(self) -> None:
        """Send what was held."""


class InferenceRequest(QueuedRequest):
    """See the module's docstring. `context` belongs to the responder: the call and the plan of the answer. `parts` are
    the chunks already run of a request too large for one batch; `answered` is set once it has its answer or its error.
    `sequence` is set for stateful models, and `step` then belongs to the model. `trace` is set while the request is
    to be traced: whoever tells of its end takes it away."""

    __slots__ = ("answered", "context", "inputs", "parts", "request_id", "responder", "sequence", "step", "trace")

    shape: ShapeClass

    def __init__(
        self,
        rows: int,
        arrival_ns: int,
        deadline_ns: int,
        priority: int,
        shape: ShapeClass,
        inputs: Sequence[InputData | None],
        responder: Responder,
        context: Any,
        request_id: bytes,
    ) -> None:
        super().__init__(rows, arrival_ns, deadline_ns, priority, shape, shape.cost, None)
        self.inputs = inputs
        self.responder = responder
        self.context = context
        self.request_id = request_id
        self.answered = False
        self.trace: RequestTrace | None = None
        self.parts: list[OutputPart] | None = None
        self.sequence: SequenceFlags | None = None
        self.step: Any = None


def halves(segments: Sequence[Segment]) -> tuple[Sequence[Segment], Sequence[Segment]]:
    """The first and the second half of a batch: of its requests, or of the rows when there is only one."""
    middle = len(segments) // 2
    if middle:
        return segments[:middle], segments[middle:]
    (only,) = segments
    middle = only.rows // 2
    first = Segment(only.request, only.first_row, middle)
    return [first], [Segment(only.request, only.first_row + middle, only.rows - middle)]


def refusal_error(name: str, refusal: Refusal) -> ServiceError:
    """The error that tells a client of model `name` why it was refused, in numbers it can act on."""
    request = refusal.request
    wait_ms = refusal.predicted_wait_ns / NS_PER_MS
    budget_ms = (request.deadline_ns - request.arrival_ns) / NS_PER_MS
    if refusal.reason is RefusalReason.UNREACHABLE:
        return DeadlineUnreachable(
            f"{name}: {request.rows} rows need {wait_ms:.1f} ms even on an idle server, "
            f"the deadline leaves {budget_ms:.1f} ms"
        )
    if refusal.reason is RefusalReason.EXPIRED:
        return Expired(f"Request timeout expired: {name} did not reach the request within its {budget_ms:.1f} ms")
    if refusal.reason is RefusalReason.QUEUE_FULL:
        return QueueFull(f"Exceeds maximum queue size of {name}", refusal.retry_after_ns)
    return Overloaded(
        f"{name} is overloaded: the answer would take {wait_ms:.1f} ms, the deadline leaves {budget_ms:.1f} ms",
        refusal.retry_after_ns,
    )
