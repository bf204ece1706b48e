"""What the server says of a model: inputs and whether it batches. The only calls that are made with gRPC's own
client."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from loadtests.connection import Tls
from loadtests.errors import LoadTestError
from service.pb import grpc_service_pb2 as pb

_SERVICE = "/inference.GRPCInferenceService/"
CALL_S = 10.0


@dataclass(frozen=True, slots=True)
class Input:
    """One input: its datatype in the protocol's words, and its shape with -1 for open dimensions, batch included."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model as served. `batched`: the first dimension of every input is the rows of a request."""

    name: str
    version: str
    inputs: tuple[Input, ...]
    batched: bool
    max_batch_size: int


class Server:
    """Questions to a server, one at a time. Raises `LoadTestError` when it does not answer them."""

    def __init__(self, address: str, tls: Tls | None = None, metadata: Mapping[str, str] | None = None) -> None:
        self.address = address
        self._metadata = tuple((metadata or {}).items())
        # A connection of its own, closed with it: gRPC otherwise keeps it for other channels to the same address.
        options: list[tuple[str, object]] = [("grpc.use_local_subchannel_pool", 1)]
        if tls is None:
            self._channel = grpc.insecure_channel(address, options=options)
        else:
            if tls.name:
                options.append(("grpc.ssl_target_name_override", tls.name))
            credentials = grpc.ssl_channel_credentials(_pem(tls.ca), _pem(tls.key), _pem(tls.certificate))
            self._channel = grpc.secure_channel(address, credentials, options=options)

    def close(self) -> None:
        self._channel.close()

    def name_and_version(self) -> str:
        """`onclock 0.1.0`, for the report."""
        answer = self._call("ServerMetadata", pb.ServerMetadataRequest(), pb.ServerMetadataResponse)
        return f"{answer.name} {answer.version}".strip()

    def model(self, name: str, version: str = "") -> ModelInfo:
        """A model's inputs. Whether it batches comes from its configuration, where the server has that call."""
        asked = pb.ModelMetadataRequest(name=name, version=version)
        answer = self._call("ModelMetadata", asked, pb.ModelMetadataResponse)
        inputs = tuple(Input(tensor.name, tensor.datatype, tuple(tensor.shape)) for tensor in answer.inputs)
        open_first = bool(inputs) and all(tensor.shape and tensor.shape[0] == -1 for tensor in inputs)
        try:
            config = self._call(
                "ModelConfig", pb.ModelConfigRequest(name=name, version=version), pb.ModelConfigResponse
            )
            most = int(config.config.max_batch_size)
            return ModelInfo(name, version, inputs, most > 0 and open_first, most)
        except LoadTestError:
            return ModelInfo(name, version, inputs, open_first, 0)

    def _call(self, method: str, request: Any, answer: Any) -> Any:
        call = self._channel.unary_unary(
            _SERVICE + method,
            request_serializer=type(request).SerializeToString,
            response_deserializer=answer.FromString,
        )
        try:
            return call(request, timeout=CALL_S, metadata=self._metadata)
        except grpc.RpcError as error:
            raise LoadTestError(
                f"{self.address} does not answer {method}: {error.code().name}: {error.details()}"
            ) from error


@contextlib.contextmanager
def asked(address: str, tls: Tls | None = None, metadata: Mapping[str, str] | None = None) -> Iterator[Server]:
    """A `Server`, closed at the end of the block."""
    server = Server(address, tls, metadata)
    try:
        yield server
    finally:
        server.close()


def _pem(path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise LoadTestError(f"{path}: cannot be read: {error.strerror}") from error
