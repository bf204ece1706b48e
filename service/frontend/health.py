"""`grpc.health.v1`: Check and Watch for the server as a whole ("") and for each model by name.

Kubernetes probes and load balancers ask this service. A watch costs no thread; when the server drains, every name
becomes NOT_SERVING and stays so.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from grpc_health.v1 import health, health_pb2, health_pb2_grpc

SERVICE = "inference.GRPCInferenceService"
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """The health service and what it says."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._servicer = health.HealthServicer(experimental_non_blocking=True, experimental_thread_pool=pool)
        self.server(ready=False)

    def register(self, server: Any) -> None:
        """Add the service to a `grpc.Server`."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    def server(self, ready: bool) -> None:
        """State the server's health."""
        for name in ("", SERVICE):
            self._servicer.set(name, _SERVING if ready else _NOT_SERVING)

    def models(self, states: Iterable[tuple[str, bool]]) -> None:
        """State the health of models: (name, ready)."""
        for name, ready in states:
            self._servicer.set(name, _SERVING if ready else _NOT_SERVING)

    def drain(self) -> None:
        """NOT_SERVING for every name, for good."""
        self._servicer.enter_graceful_shutdown()
