"""A small client of the Open Inference Protocol: arrays in, arrays out.

It needs `grpc`, NumPy and the generated messages only, and does what any client does: name the tensors, send their
bytes raw, set a deadline.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
import numpy.typing as npt

from service.pb import grpc_service_pb2 as pb
from service.tensor import BY_WIRE_NAME, DataType, decode_bytes, encode_bytes

Array = npt.NDArray[Any]

SERVICE = "/inference.GRPCInferenceService"
# Answers may be larger than gRPC's default of 4 MB, e.g. a batch of image features.
MAX_MESSAGE_BYTES = 256 << 20
# How often readiness is asked for, and how long one such question may take.
POLL_S = 0.1
PROBE_TIMEOUT_S = 2.0

# bfloat16 has no NumPy type of its own: a uint16 array is sent as UINT16.
_BY_DTYPE = {datatype.dtype: datatype for datatype in DataType if datatype is not DataType.BF16}


class NotReadyError(Exception):
    """The server or model did not become ready in time. The message says which, and what the last answer was."""


class InferenceClient:
    """One connection to a server. Use it as a context manager; safe for several threads."""

    def __init__(self, url: str) -> None:
        """Connect to `host:port`; nothing is sent before the first call."""
        self.url = url
        self._channel = grpc.insecure_channel(url, options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)])
        self._infer = self._channel.unary_unary(
            f"{SERVICE}/ModelInfer", pb.ModelInferRequest.SerializeToString, pb.ModelInferResponse.FromString
        )
        self._model_ready = self._channel.unary_unary(
            f"{SERVICE}/ModelReady", pb.ModelReadyRequest.SerializeToString, pb.ModelReadyResponse.FromString
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def infer(
        self,
        model: str,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] = (),
        timeout_s: float = 10.0,
        parameters: Mapping[str, bool | int | str] | None = None,
    ) -> dict[str, Array]:
        """Run `model` on `inputs` and return the named outputs (all when none is named). `parameters` are those of the
        protocol: `sequence_id`, `sequence_start`, `priority`...

        `timeout_s` is the deadline the server sees: it refuses at once what it cannot answer by then. Object arrays of
        `bytes` or `str` travel as BYTES. Raises `grpc.RpcError` with the server's status.
        """
        request = pb.ModelInferRequest(model_name=model)
        for name, array in inputs.items():
            tensor = request.inputs.add(name=name, datatype=_BY_DTYPE[array.dtype].wire_name, shape=array.shape)
            raw = encode_bytes(array) if tensor.datatype == "BYTES" else np.ascontiguousarray(array).tobytes()
            request.raw_input_contents.append(raw)
        for name in outputs:
            request.outputs.add(name=name)
        for name, value in (parameters or {}).items():
            kind = (
                "bool_param" if isinstance(value, bool) else "int64_param" if isinstance(value, int) else "string_param"
            )
            setattr(request.parameters[name], kind, value)
        response = self._infer(request, timeout=timeout_s)
        tensors = zip(response.outputs, response.raw_output_contents, strict=True)
        return {tensor.name: _array(tensor, raw) for tensor, raw in tensors}

    def wait_until_ready(self, model: str, timeout_s: float) -> None:
        """Ask until `model` is ready. Raises `NotReadyError` after `timeout_s` seconds."""
        give_up = time.monotonic() + timeout_s
        last = "no answer"
        while time.monotonic() < give_up:
            try:
                answer = self._model_ready(pb.ModelReadyRequest(name=model), timeout=PROBE_TIMEOUT_S)
            except grpc.RpcError as error:
                last = f"{error.code().name}: {error.details()}"
            else:
                if answer.ready:
                    return
                last = "not ready"
            time.sleep(POLL_S)
        raise NotReadyError(f"model '{model}' on {self.url} is not ready after {timeout_s:g} s; last answer: {last}")


def _array(tensor: pb.ModelInferResponse.InferOutputTensor, raw: bytes) -> Array:
    shape = tuple(tensor.shape)
    datatype = BY_WIRE_NAME[tensor.datatype]
    if datatype is DataType.BYTES:
        return decode_bytes(raw, math.prod(shape), tensor.name).reshape(shape)
    return np.frombuffer(raw, datatype.dtype).reshape(shape)
