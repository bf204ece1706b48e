"""`ModelInfer`: a request's bytes in, a queued request out; a batch's outputs in, an answer's bytes out.

The handler runs on the ingress thread, the responder on whatever thread ran the batch. Neither waits for anything.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from service.clock import NEVER_NS, NS_PER_MS, now_ns
from service.errors import Draining, ServiceError
from service.frontend.call import Call
from service.frontend.codec.decode import Decoder
from service.frontend.codec.encode import encode
from service.metrics import MetricsRegistry
from service.repository.repository import ModelRepository
from service.request import BatchOutput, InferenceRequest

log = logging.getLogger(__name__)

# A client's deadline covers the way back, too, and gRPC's core rounds deadlines to whole milliseconds: an answer that
# leaves this much before the deadline arrives in time.
CLIENT_MARGIN_NS = NS_PER_MS


class InferenceHandler:
    """Serves `ModelInfer`. `accepting` False: the server drains, and every new request is refused."""

    def __init__(self, repository: ModelRepository, registry: MetricsRegistry) -> None:
        self._decoder = Decoder(repository)
        self._registry = registry
        self._trace = log.isEnabledFor(logging.DEBUG)
        self.accepting = True

    def __call__(self, message: bytes, call: Call) -> None:
        arrival_ns = now_ns()
        try:
            if not self.accepting:
                raise Draining("Server is stopping: no new requests are accepted", NS_PER_MS)
            decoded = self._decoder.decode(message)
        except ServiceError as error:
            self._registry.record_unrouted(error.reason)
            call.fail(error)
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
            (plan, call),
            decoded.request_id,
        )
        call.on_cancel = partial(model.cancel, request)
        model.submit(request)

    def answer(self, request: InferenceRequest, outputs: Sequence[BatchOutput], first_row: int) -> None:
        """Answer with the request's rows of a batch."""
        plan, call = request.context
        try:
            message = encode(plan, request.request_id, outputs, first_row, request.rows)
        except ServiceError as error:
            self.fail(request, error)
            return
        call.reply(message)
        if self._trace:
            self._log(request, "ok", "")

    def fail(self, request: InferenceRequest, error: ServiceError) -> None:
        """Answer with an error."""
        call = request.context[1]
        call.fail(error)
        if self._trace:
            self._log(request, error.reason, str(error))

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
