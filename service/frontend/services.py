"""The RPCs of the protocol on a `grpc.Server`: which handler serves which method, and what is not offered.

`ModelInfer` is not here: it is served by the ingress. A method that this version does not offer answers UNIMPLEMENTED
and says so, so that a client learns more than "method not found".
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
from service.frontend.status import as_service_error, status_of
from service.frontend.stream import StreamService
from service.pb import grpc_service_pb2 as pb

_SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
INFER_METHOD = f"/{SERVICE_NAME}/ModelInfer"
HEALTH_SERVICE = "grpc.health.v1.Health"


def control_methods(control: Control, admin: Admin) -> dict[str, Callable[[Any], Any]]:
    """Method name -> what answers it."""
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
    }


def register(
    server: grpc.Server,
    control: Control,
    admin: Admin,
    changes: ModelControlRpcs,
    change_threads: ThreadPoolExecutor,
    infer_streams: StreamService,
    streams: ThreadPoolExecutor,
) -> None:
    """Add the protocol's service (without `ModelInfer`) and reflection to `server`."""
    offered = control_methods(control, admin)
    slow = {"RepositoryModelLoad": changes.load, "RepositoryModelUnload": changes.unload}
    handlers: dict[str, grpc.RpcMethodHandler] = {}
    for method in _SERVICE.methods:
        if method.name in offered:
            handlers[method.name] = _unary(method, offered[method.name])
        elif method.name in slow:
            handlers[method.name] = _unary(method, slow[method.name], change_threads)
        elif method.name == "ModelStreamInfer":
            handlers[method.name] = infer_streams.handler()
        elif method.name != "ModelInfer":
            handlers[method.name] = _not_offered(method)
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


def _not_offered(method: Any) -> grpc.RpcMethodHandler:
    def refuse(_request: Any, context: grpc.ServicerContext) -> Any:
        return context.abort(grpc.StatusCode.UNIMPLEMENTED, f"onclock does not offer {method.name}")

    if method.client_streaming:
        return grpc.stream_stream_rpc_method_handler(refuse)
    return grpc.unary_unary_rpc_method_handler(refuse)


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
