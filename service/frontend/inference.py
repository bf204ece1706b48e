"""`ModelInfer`: a request's bytes in, a queued request out; a batch's outputs in, an answer's bytes out.

The handler runs on the ingress thread, the responder on whatever thread ran the batch. Neither waits for anything.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

from service.clock import NEVER_NS, NS_PER_MS, now_ns
from service.errors import Draining, Overloaded, ServiceError
from service.frontend.access import Access
from service.frontend.call import NO_LULL, Call, Lull, Outbox
from service.frontend.codec.decode import Decoder
from service.frontend.codec.destination import Memory
from service.frontend.codec.encode import encode
from service.frontend.status import status_of
from service.frontend.thinning import WINDOW_NS, ModelLoad, Thinning, shares_of, window_ns
from service.metrics import MetricsRegistry
from service.model import Model
from service.repository.repository import ModelRepository
from service.request import BatchOutput, InferenceRequest
from service.telemetry import SpanTracer
from service.telemetry.finished import TracedRequest
from service.telemetry.spans import traced_request

log = logging.getLogger(__name__)

# A client's deadline covers the way back, too, and gRPC's core rounds deadlines to whole milliseconds: an answer that
# leaves this much before the deadline arrives in time.
CLIENT_MARGIN_NS = NS_PER_MS


class InferenceHandler:
    """Serves `ModelInfer`. `stopping` not empty: every new request is refused, and this is what it is told."""

    def __init__(
        self,
        repository: ModelRepository,
        registry: MetricsRegistry,
        gated: bool = True,
        find_region: Callable[[str], Memory] | None = None,
        access: Access | None = None,
        spans: SpanTracer | None = None,
        method: str = "ModelInfer",
    ) -> None:
        """`gated`: calls pass the gate (`gate` or `share`) before their messages are read. `find_region`: see
        `Decoder`. `access` says who may have which model infer; None: everybody all of them. `spans` decides which
        requests are traced, as calls of `method`; None: none."""
        self._access = access
        self._spans = spans
        self._method = method
        self._decoder = Decoder(repository, find_region)
        self._registry = registry
        self.stopping = ""
        # Whose answers are to be sent in one go; set when there is one.
        self.outbox: Outbox | None = None
        self._gated = gated
        self._thinning = Thinning()
        self._window_end_ns = 0
        self._thinned = 0
        # Whether nothing that comes can start at once.
        self._busy = False
        # Models that had requests in this window, and what had become of their requests when it began.
        self._seen: dict[Model, tuple[int, int]] = {}

    def gate(self) -> ServiceError | None:
        """Why to refuse the next call before its message is read; None to read it. Called on the ingress thread."""
        at_ns = now_ns()
        if at_ns >= self._window_end_ns:
            self._next_window(at_ns)
        if self._thinning.share and self._busy and self._thinning.refuses():
            self._thinned += 1
            return unseen()
        return None

    def share(self, unseen: int) -> float:
        """Which share of the next calls to refuse before their message is read, now that `unseen` were refused so since
        the last time this was asked. For an ingress that refuses by itself; called on its thread."""
        self._thinned += unseen
        at_ns = now_ns()
        if at_ns >= self._window_end_ns:
            self._next_window(at_ns)
        return self._thinning.share if self._busy else 0.0

    def lull(self) -> Lull:
        """How much the ingress may leave for later: see `call.Lull`. Called on its thread."""
        at_ns = now_ns()
        busy_ns = min((model.busy_ns(at_ns) for model in self._seen), default=0)
        self._busy = busy_ns > 0
        slos_ns = [model.policy.slo_ns for model in self._seen if model.policy.slo_ns is not None]
        if not self._busy or len(slos_ns) < len(self._seen):
            return NO_LULL
        return Lull(busy_ns, min(slos_ns))

    def _next_window(self, at_ns: int) -> None:
        slos_ns = [model.policy.slo_ns for model in self._seen if model.policy.slo_ns is not None]
        self._window_end_ns = at_ns + window_ns(min(slos_ns, default=0))
        if not self._seen and not self._thinned:
            return
        loads = []
        for model, (offered, refused) in self._seen.items():
            offered_now, refused_now = model.offered()
            loads.append(ModelLoad(offered_now - offered, refused_now - refused, model.priority_levels > 1))
        self._thinning.window(self._thinned, loads)
        if self._thinned and self._seen:
            for model, count in zip(self._seen, shares_of(self._thinned, loads), strict=True):
                model.record_unseen(count, at_ns)
            self._thinned = 0
        # A model without requests in the last window is no longer in demand.
        self._seen = {
            model: model.offered()
            for model, load in zip(self._seen, loads, strict=True)
            if load.arrived or load.refused
        }

    def __call__(self, message: bytes | memoryview, call: Call) -> None:
        arrival_ns = call.arrival_ns
        try:
            if self.stopping:
                raise Draining(f"Server is stopping: {self.stopping}", NS_PER_MS)
            decoded = self._decoder.decode(message)
            if self._access is not None:
                self._access.check_infer(call.caller, decoded.plan.model.name, decoded.plan.uses_shared_memory())
        except ServiceError as error:
            self._registry.record_unrouted(error.reason)
            call.fail(error)
            if self._spans is not None:
                self._trace_unrouted(self._spans, call, error)
            return
        plan = decoded.plan
        model = plan.model
        client_ns = call.deadline_ns
        if client_ns != NEVER_NS:
            client_ns -= CLIENT_MARGIN_NS
        request = InferenceRequest(
            plan.rows,
            arrival_ns,
            model.policy.deadline_ns(arrival_ns, plan.priority, plan.timeout_ns, client_ns),
            plan.priority,
            decoded.shape,
            decoded.inputs,
            self,
            (plan, call, decoded.regions),
            decoded.request_id,
        )
        request.sequence = plan.sequence
        if self._spans is not None:
            parent, state = (plan.traceparent, None) if plan.traceparent else (call.traceparent, call.tracestate)
            request.trace = self._spans.begin(parent, state, self._method, arrival_ns)
        call.on_cancel = partial(model.cancel, request)
        if self._gated and model not in self._seen:
            self._seen[model] = model.offered()
        model.submit(request)

    def answer(self, request: InferenceRequest, outputs: Sequence[BatchOutput], first_row: int) -> None:
        """Answer with the request's rows of a batch."""
        plan, call, regions = request.context
        try:
            parts = encode(plan, request.request_id, outputs, first_row, request.rows, regions)
        except ServiceError as error:
            self.fail(request, error)
            return
        call.reply(parts)
        if log.isEnabledFor(logging.DEBUG):
            self._log(request, "ok", "")

    def fail(self, request: InferenceRequest, error: ServiceError) -> None:
        """Answer with an error."""
        plan, call, _ = request.context
        call.fail(error)
        if request.trace is not None and self._spans is not None:
            model, told = plan.model, traced_request(request)
            # Nobody tells of its end again: an answer that cannot be encoded is one of a batch that was run.
            request.trace = None
            code, details, _ = status_of(error)
            self._spans.failed(model.name, model.version, told, code.name, error.reason, details, now_ns())
        if log.isEnabledFor(logging.DEBUG):
            self._log(request, error.reason, str(error))

    def hold(self) -> None:
        """More answers will follow shortly: they may be sent in one go."""
        if self.outbox is not None:
            self.outbox.hold()

    def flush(self) -> None:
        """Send what was held."""
        if self.outbox is not None:
            self.outbox.flush()

    def _trace_unrouted(self, spans: SpanTracer, call: Call, error: ServiceError) -> None:
        """Tell of a request that reached no model."""
        arrival_ns = call.arrival_ns
        trace = spans.begin(call.traceparent, call.tracestate, self._method, arrival_ns)
        if trace is not None:
            told = TracedRequest(trace, arrival_ns, call.deadline_ns, 0, 0, b"")
            code, details, _ = status_of(error)
            spans.failed("", 0, told, code.name, error.reason, details, now_ns())

    def _log(self, request: InferenceRequest, outcome: str, detail: str) -> None:
        model = request.context[0].model
        fields = {
            "model": model.name,
            "version": model.version,
            "id": request.request_id.decode(errors="replace"),
            "rows": request.rows,
            "outcome": outcome,
            "latency_ms": round((now_ns() - request.arrival_ns) / NS_PER_MS, 3),
        }
        if detail:
            fields["detail"] = detail
        log.debug("request", extra=fields)


def unseen() -> ServiceError:
    """What a call is told that is refused before its message is read."""
    return Overloaded("the server is overloaded: the models asked for refuse most requests", WINDOW_NS)
