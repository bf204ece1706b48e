"""A model on a runtime of its own, over real sessions or a puppet: for tests of what becomes of requests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from service.clock import NEVER_NS
from service.config.model import DynamicBatching, InstanceGroup, ModelConfig
from service.engine.devices import Device
from service.engine.pool import Instance, SessionPool
from service.engine.runtime import Runtime
from service.engine.states import StepTensors
from service.errors import ExecutionFailed, OutOfMemory
from service.metrics import ModelMetrics
from service.model import Model
from service.request import InferenceRequest
from service.scheduler import LatencyModel, QueuePolicy
from service.sequence_model import SequenceModel
from service.tensor import Array, DataType, TensorSpec
from tests.unit.engine.support import ANSWER_S, Answers, Requests, SessionDouble

X = TensorSpec("x", DataType.FP32, (2,), batched=True)
Y = TensorSpec("y", DataType.FP32, (2,), batched=True)
POISON = 666.0


def config_of(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], max_batch_size: int = 16) -> ModelConfig:
    return ModelConfig(
        "m",
        max_batch_size,
        tuple(inputs),
        tuple(outputs),
        (InstanceGroup("g", count=1),),
        dynamic_batching=DynamicBatching() if max_batch_size > 1 else None,
    )


class Served:
    """A model on a runtime of its own. Requests queue up until `start`; then they are run and answered."""

    def __init__(self, config: ModelConfig, instances: Sequence[Instance], **policy: Any) -> None:
        slots = len(instances)
        self.failed_devices: list[tuple[str, str]] = []
        self.runtime = Runtime(
            [Device("cpu", "cpu", 0, slots)], lambda device, reason: self.failed_devices.append((device, reason))
        )
        rows = config.max_batch_size if config.joins_requests else 1
        made = QueuePolicy(
            **{"name": "m", "devices": ("cpu",), "max_batch_rows": rows, "max_concurrent": slots, **policy}
        )
        latency = LatencyModel({}, made.buckets)
        self.metrics = ModelMetrics("m", "1")
        self.pool = SessionPool(instances)
        parts = (config, 1, made, latency, {"cpu": self.pool}, self.runtime, self.metrics)
        if config.sequences is None:
            self.model = Model(*parts)
        else:
            self.model = SequenceModel(*parts, StepTensors(config, Path()))
        self.requests = Requests(config.inputs, config.batched)
        self.answers = Answers()

    def send(self, *arrays: Array, deadline_ns: int = NEVER_NS, priority: int = 1) -> InferenceRequest:
        request = self.requests.make(*arrays, responder=self.answers, deadline_ns=deadline_ns, priority=priority)
        self.model.submit(request)
        return request

    def start(self) -> None:
        self.runtime.start()

    def settle(self) -> None:
        """Until nothing waits or runs. Fails the test when that takes too long."""
        pause = threading.Event()
        for _ in range(int(ANSWER_S * 1000)):
            if self.model.idle():
                return
            pause.wait(0.001)
        raise AssertionError(f"{self.model} does not come to rest")

    @property
    def failures(self) -> dict[str, int]:
        return {reason: tally.requests for reason, tally in self.metrics.sum().failures.items()}

    @property
    def refusals(self) -> dict[str, int]:
        return {reason: tally.requests for reason, tally in self.metrics.sum().refusals.items()}


def doubled(arrays: Mapping[str, Array]) -> Mapping[str, Array]:
    """What the double computes when it is healthy: y = 2 x."""
    return {"y": arrays["x"] * 2}


class Puppet(SessionDouble):
    """A double that poison fails, that has memory for `memory` rows, and that waits for `gate` before it runs."""

    def __init__(
        self, memory: int = 10**6, compute: Callable[[Mapping[str, Array]], Mapping[str, Array]] = doubled
    ) -> None:
        super().__init__(self._faulty)
        self._healthy = compute
        self.memory = memory
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Semaphore(0)

    def _faulty(self, arrays: Mapping[str, Array]) -> Mapping[str, Array]:
        self.begun.release()
        assert self.gate.wait(ANSWER_S)
        x = arrays["x"]
        if len(x) > self.memory:
            raise OutOfMemory(f"no memory for {len(x)} rows")
        if np.any(x == POISON):
            raise ExecutionFailed("poisoned")
        return self._healthy(arrays)

    def begin(self) -> None:
        """Until the next execution has begun."""
        assert self.begun.acquire(timeout=ANSWER_S)


def rows(count: int, first: float = 0.0) -> np.ndarray:
    return (np.arange(count * 2, dtype=np.float32) + np.float32(first)).reshape(count, 2)
