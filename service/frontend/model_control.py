"""`RepositoryModelLoad` and `RepositoryModelUnload`, with `--model-control-mode explicit`."""

from __future__ import annotations

from typing import Any

from service.errors import InvalidRequest, ModelNotReady
from service.pb import grpc_service_pb2 as pb
from service.repository.changing import ModelControl
from service.repository.overrides import parse


class ModelControlRpcs:
    """Answers the two RPCs when the change is made. They may take as long as a model takes to load."""

    def __init__(self, control: ModelControl, allowed: bool) -> None:
        self._control = control
        self._allowed = allowed

    def load(self, request: Any) -> Any:
        """Load a model, or what has changed of it."""
        self._check(request)
        texts: dict[str, str] = {}
        blobs: dict[str, bytes] = {}
        for key in request.parameters:
            value = request.parameters[key]
            kind = value.WhichOneof("parameter_choice")
            if kind == "string_param":
                texts[key] = value.string_param
            elif kind == "bytes_param":
                blobs[key] = value.bytes_param
            else:
                raise InvalidRequest(f"load parameter '{key[:60]}' must be a string or bytes, got {kind or 'nothing'}")
        self._control.load(request.model_name, parse(request.model_name, texts, blobs))
        return pb.RepositoryModelLoadResponse()

    def unload(self, request: Any) -> Any:
        """Unload all versions of a model."""
        self._check(request)
        for key in request.parameters:
            kind = request.parameters[key].WhichOneof("parameter_choice")
            if key != "unload_dependents":
                raise InvalidRequest(f"unrecognized unload parameter '{key[:60]}'; known is unload_dependents")
            if kind != "bool_param":
                raise InvalidRequest(f"unload parameter '{key}' must be a bool, got {kind or 'nothing'}")
        self._control.unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    def _check(self, request: Any) -> None:
        if not self._allowed:
            raise ModelNotReady(
                "explicit model load / unload is not allowed if polling is enabled, or without --model-control-mode "
                "explicit"
            )
        if request.repository_name:
            raise InvalidRequest("'repository_name' is not supported: the server has one repository")
