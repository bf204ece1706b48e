"""The RPCs of the protocol on a `grpc.Server`: which handler serves which method.

`ModelInfer` is not here: it is served by the ingress.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from service.frontend.admin import Admin
from service.frontend.control import Control
from service.frontend.health import SERVICE as SERVICE_NAME
from service.frontend.model_control import ModelControlRpcs
from service.frontend.shared_memory import CudaRegions, Regions
from service.frontend.status import as_service_error, status_of
from service.frontend.stream import StreamService
from service.pb import grpc_service_pb2 as pb

_SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
INFER_METHOD = f"/{SERVICE_NAME}/ModelInfer"
HEALTH_SERVICE = "grpc.health.v1.Health"


def control_methods(control: Control, admin: Admin, regions: Regions) -> dict[str, Callable[[Any], Any]]:
    """Method name -> what answers it."""
    cuda = CudaRegions()
    return {
        "ServerLive": control.server_live,
        "ServerReady": control.server_ready,
        "ModelReady": control.model_ready,
        "ServerMetadata": control.server_metadata,
        "ModelMetadata": control.model_metadata,
        "ModelConfig": control.model_config,
        "ModelStatistics": control.model_statistics,
        "RepositoryIndex": control.repository_index,
        "TraceSetting": admin.trace_setting,
        "LogSettings": admin.log_settings,
        "SystemSharedMemoryStatus": regions.status,
        "SystemSharedMemoryRegister": regions.register,
        "SystemSharedMemoryUnregister": regions.unregister,
        "CudaSharedMemoryStatus": cuda.status,
        "CudaSharedMemoryRegister": cuda.register,
        "CudaSharedMemoryUnregister": cuda.unregister,
    }


def register(
    server: grpc.Server,
    control: Control,
    admin: Admin,
    regions: Regions,
    changes: ModelControlRpcs,
    change_threads: ThreadPoolExecutor,
    infer_streams: StreamService,
    streams: ThreadPoolExecutor,
) -> None:
    """Add the protocol's service (without `ModelInfer`) and reflection to `server`."""
    offered = control_methods(control, admin, regions)
    slow = {"RepositoryModelLoad": changes.load, "RepositoryModelUnload": changes.unload}
    handlers: dict[str, grpc.RpcMethodHandler] = {}
    for method in _SERVICE.methods:
        if method.name in offered:
            handlers[method.name] = _unary(method, offered[method.name])
        elif method.name in slow:
            handlers[method.name] = _unary(method, slow[method.name], change_threads)
        elif method.name == "ModelStreamInfer":
            handlers[method.name] = infer_streams.handler()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
    _register_reflection(server, streams)


def _message_class(descriptor: Any) -> Any:
    return getattr(pb, descriptor.name)


def _unary(
    method: Any, answer: Callable[[Any], Any], threads: ThreadPoolExecutor | None = None
) -> grpc.RpcMethodHandler:
    def handle(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return answer(request)
        except Exception as error:  # noqa: BLE001 - the boundary: the status table answers it
            code, details, trailers = status_of(as_service_error(error, f"serving {method.name}"))
            if trailers:
                context.set_trailing_metadata(trailers)
            return context.abort(code, details)

    if threads is not None:
        handle.experimental_thread_pool = threads  # type: ignore[attr-defined]
    return grpc.unary_unary_rpc_method_handler(
        handle,
        request_deserializer=_message_class(method.input_type).FromString,
        response_serializer=_message_class(method.output_type).SerializeToString,
    )


class _Symbols:
    """The default descriptor pool, which also finds methods: the reflection protocol lets clients (ghz, for one) ask
    for `package.Service.Method`, and protobuf's pool knows services only."""

    def __init__(self) -> None:
        self._pool: Any = descriptor_pool.Default()

    def FindFileContainingSymbol(self, name: str) -> Any:  # noqa: N802 - the pool's name
        try:
            return self._pool.FindFileContainingSymbol(name)
        except KeyError:
            service, _, method = name.rpartition(".")
            if method not in self._pool.FindServiceByName(service).methods_by_name:
                raise
            return self._pool.FindFileContainingSymbol(service)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)


def _register_reflection(server: grpc.Server, streams: ThreadPoolExecutor) -> None:
    class Reflection(reflection.ReflectionServicer):  # type: ignore[misc]
        """Reflection with threads of its own: a client that holds its stream open holds none of the control plane's."""

        def ServerReflectionInfo(self, requests: Any, context: Any) -> Any:  # noqa: N802 - the service's name
            return super().ServerReflectionInfo(requests, context)

    Reflection.ServerReflectionInfo.experimental_thread_pool = streams  # type: ignore[attr-defined]
    names = (SERVICE_NAME, HEALTH_SERVICE, reflection.SERVICE_NAME)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(Reflection(names, _Symbols()), server)
