"""A model that is only a head on another one, its backbone: its requests ride in the backbone's batches.

Requests for a backbone and for all its heads wait in one queue and run in one batch; then each head runs once on the
rows that are its own. A head has its own name, versions, objective, labels, statistics and metrics; it costs kilobytes.
(The idea is prefix batching: H. Shen et al., Nexus, SOSP 2019.)

A head that fails on a row fails that request alone.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from service.config.model import ModelConfig
from service.engine.head import Head
from service.engine.runtime import Runtime
from service.errors import DeviceFailed, ModelLoadError, ServiceError
from service.metrics import ModelMetrics, ModelState
from service.model import Model, Part, with_model
from service.request import BatchOutput, InferenceRequest, ShapeClass
from service.scheduler import Dispatch, QueuePolicy, Refusal
from service.tensor import Array

log = logging.getLogger(__name__)


class HeadModel(Model):
    """One loaded version of a head. `policy` is what it promises; how it is queued is its backbone's."""

    def __init__(
        self,
        config: ModelConfig,
        version: int,
        policy: QueuePolicy,
        backbone: Model,
        head: Head,
        runtime: Runtime,
        metrics: ModelMetrics,
    ) -> None:
        """Raises `ModelLoadError` when the backbone is on its way out."""
        super().__init__(config, version, policy, backbone.latency, {}, runtime, metrics, backbone.queue)
        self._backbone = backbone
        self._head = head
        # Who answers a request is decided for all of the backbone's together.
        self._claiming = backbone._claiming
        self._counting = threading.Lock()
        self._present = 0
        self._present_rows = 0
        self._offered = 0
        self._refused = 0
        positions = {spec.name: at for at, spec in enumerate(backbone.outputs)}
        self._positions = [positions[spec.name] for spec in head.inputs]
        if not backbone.build_on(self):
            raise ModelLoadError(f"model '{backbone.name}' version {backbone.version} is being unloaded")

    def shape_class(self, shapes: tuple[tuple[int, ...] | None, ...], sides: tuple[bytes, ...]) -> ShapeClass:
        """The backbone's: what has one shape shares a batch, whatever its head."""
        return self._backbone.shape_class(shapes, sides)

    def adopt(self, shape: ShapeClass) -> None:
        """Nothing: shape classes are the backbone's."""

    def state(self) -> ModelState:
        """What the model is like right now. Requests that wait are those of this head that are not answered."""
        state = super().state()
        present, rows = self._present, self._present_rows
        return replace(state, pending_requests=present, pending_rows=rows, staging_bytes=None)

    @property
    def instances(self) -> int:
        """Its backbone's."""
        return self._backbone.instances

    def offered(self) -> tuple[int, int]:
        """See `Model.offered`: of this head alone."""
        return self._offered, self._refused

    def submit(self, request: InferenceRequest) -> None:
        """Queue a request for the backbone, and for this head after it."""
        with self._counting:
            self._offered += 1
            self._present += 1
            self._present_rows += request.rows
        super().submit(request)

    def cancel(self, request: InferenceRequest) -> bool:
        """See `Model.cancel`."""
        queued = super().cancel(request)
        if queued:
            self._gone(request)
        return queued

    def _refuse(self, request: InferenceRequest, refusal: Refusal) -> None:
        super()._refuse(request, refusal)
        with self._counting:
            self._refused += 1
        self._gone(request)

    def execute(self, dispatch: Dispatch) -> tuple[int | None, int]:
        """The batch is the backbone's, whoever is first in it."""
        return self._backbone.execute(dispatch)

    def abandon(self, dispatch: Dispatch, error: DeviceFailed) -> None:
        """See `execute`."""
        self._backbone.abandon(dispatch, error)

    # ---------------------------------------------------------------- after the backbone

    def answer_parts(self, parts: Sequence[Part]) -> list[InferenceRequest]:
        """Run the head on the rows of its requests in a batch and answer them; those that were answered."""
        try:
            outputs = self._run(parts)
        except ServiceError as error:
            if len(parts) == 1:
                self._failed(parts[0][0], error)
                return []
            # Each by itself: only those that fail alone fail.
            return [request for part in parts for request in self.answer_parts([part])]
        answered = []
        row = 0
        for request, _, _ in parts:
            request.responder.answer(request, outputs, row)
            request.answered = True
            answered.append(request)
            self._gone(request)
            row += request.rows
        return answered

    def _run(self, parts: Sequence[Part]) -> list[BatchOutput]:
        features: list[Array] = []
        for position in self._positions:
            rows = [outputs[position].array[first : first + request.rows] for request, outputs, first in parts]
            features.append(rows[0] if len(rows) == 1 else np.concatenate(rows))
        return self._head.run(features, sum(request.rows for request, _, _ in parts))

    def _failed(self, request: InferenceRequest, error: ServiceError) -> None:
        self._incident("execution failed", reason=error.reason, detail=error)
        if self._claim(request):
            self._fail(request, with_model(self, error))

    def _fail(self, request: InferenceRequest, error: ServiceError) -> None:
        super()._fail(request, error)
        self._gone(request)

    def _gone(self, request: InferenceRequest) -> None:
        with self._counting:
            self._present -= 1
            self._present_rows -= request.rows

    # ---------------------------------------------------------------- the way out

    def idle(self) -> bool:
        """Whether every request of this head has its answer."""
        return self._present == 0

    def close(self, error: ServiceError | None = None) -> None:
        """Accept nothing new and answer what is queued."""
        self._open = False
        for request in self._runtime.withdraw(self.queue, self):
            assert isinstance(request, InferenceRequest)
            if self._claim(request):
                self._fail(request, with_model(self, error) if error is not None else self._unloading())

    def release(self) -> None:
        """Let go of the head, and of the backbone if it waits for that."""
        super().release()
        self._backbone.build_on_no_more(self)
