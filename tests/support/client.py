"""A thin client: the protocol's own messages on a channel, nothing between a test and the wire.

    client = Client(server.channel())
    answer = client.infer(request("digits", {"image": array}))
    probabilities = arrays(answer)["probabilities"]

Arrays are NumPy arrays of the datatype's own type; BF16 elements are uint16 bit patterns, BYTES elements `bytes` or
`str` in an object array.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from service.pb import grpc_service_pb2 as pb
from service.tensor import BY_WIRE_NAME, DataType, decode_bytes, encode_bytes

Array = npt.NDArray[Any]
Parameter = bool | int | float | str

SERVICE = "inference.GRPCInferenceService"
# No call of a test waits longer than this for an answer.
TIMEOUT_S = 30.0

_METHODS = {method.name: method for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods}
# The datatype of a NumPy type. uint16 is UINT16: name BF16 where it is meant.
_BY_DTYPE = {datatype.dtype: datatype for datatype in DataType if datatype is not DataType.BF16}
_TYPED_FIELD = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


class Client:
    """The protocol's RPCs on `channel`. A failed call raises `grpc.RpcError`, as it came."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._methods: dict[str, grpc.UnaryUnaryMultiCallable] = {}
        self._raw = channel.unary_unary(f"/{SERVICE}/ModelInfer", request_serializer=None, response_deserializer=None)

    def method(self, name: str) -> grpc.UnaryUnaryMultiCallable:
        """The unary RPC `name` with its own messages; may be called, or have `future` and `with_call` called on it."""
        known = self._methods.get(name)
        if known is None:
            method = _METHODS[name]
            known = self._methods[name] = self._channel.unary_unary(
                f"/{SERVICE}/{name}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=getattr(pb, method.output_type.name).FromString,
            )
        return known

    def call(self, name: str, /, timeout: float | None = TIMEOUT_S, **fields: Any) -> Any:
        """Call the unary RPC `name` with a request message of these `fields`; its response message."""
        return self.method(name)(getattr(pb, _METHODS[name].input_type.name)(**fields), timeout=timeout)

    def infer(self, message: Any, timeout: float | None = TIMEOUT_S, **options: Any) -> Any:
        """`ModelInfer` with a `ModelInferRequest`; the `ModelInferResponse`."""
        return self.method("ModelInfer")(message, timeout=timeout, **options)

    def infer_future(self, message: Any, timeout: float | None = TIMEOUT_S, **options: Any) -> Any:
        """As `infer`, without waiting: a `grpc.Future` that is also a `grpc.Call`."""
        return self.method("ModelInfer").future(message, timeout=timeout, **options)

    def infer_bytes(self, message: bytes, timeout: float | None = TIMEOUT_S) -> bytes:
        """`ModelInfer` with bytes that need not be a message at all; the answer's bytes."""
        answer: bytes = self._raw(message, timeout=timeout)
        return answer

    def statistics(self, name: str = "", version: str = "") -> Any:
        """The `ModelStatistics` message of the first model version found."""
        return self.call("ModelStatistics", name=name, version=version).model_stats[0]


def settled(client: Client, model: str, executions: int) -> Any:
    """The statistics of `model` once they count this many executions: a batch is counted after it is answered."""
    end = time.monotonic() + TIMEOUT_S
    while (statistics := client.statistics(model)).execution_count < executions:
        assert time.monotonic() < end, f"{statistics.execution_count} executions of '{model}', not {executions}"
    return statistics


def request(
    model: str,
    inputs: Mapping[str, Array],
    *,
    version: str = "",
    request_id: str = "",
    outputs: Iterable[str] = (),
    parameters: Mapping[str, Parameter] | None = None,
    datatypes: Mapping[str, str] | None = None,
    typed: bool = False,
) -> Any:
    """A `ModelInferRequest`: raw tensors, or typed contents when `typed`.

    `datatypes` names the datatype of inputs whose NumPy type does not tell it (BF16). A parameter's Python type decides
    its field: bool, int (`int64_param`), float (`double_param`), str.
    """
    message = pb.ModelInferRequest(model_name=model, model_version=version, id=request_id)
    for name, array in inputs.items():
        datatype = (datatypes or {}).get(name) or datatype_of(array)
        tensor = message.inputs.add(name=name, datatype=datatype, shape=array.shape)
        if typed:
            getattr(tensor.contents, _TYPED_FIELD[datatype]).extend(_elements(array))
        else:
            message.raw_input_contents.append(raw(array))
    for name in outputs:
        message.outputs.add(name=name)
    for name, value in (parameters or {}).items():
        set_parameter(message.parameters[name], value)
    return message


def set_parameter(parameter: Any, value: Parameter) -> None:
    """Set an `InferParameter` message by the Python type of `value`."""
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, int):
        parameter.int64_param = value
    elif isinstance(value, float):
        parameter.double_param = value
    else:
        parameter.string_param = value


def arrays(answer: Any) -> dict[str, Array]:
    """The outputs of a `ModelInferResponse` by name; BYTES elements are `bytes`."""
    assert len(answer.outputs) == len(answer.raw_output_contents), "one raw entry per output"
    return {
        tensor.name: from_raw(data, tensor.datatype, tuple(tensor.shape))
        for tensor, data in zip(answer.outputs, answer.raw_output_contents, strict=True)
    }


def words(*elements: str | bytes, shape: Sequence[int] | None = None) -> Array:
    """An object array of these elements, for a BYTES tensor."""
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array if shape is None else array.reshape(shape)


def raw(array: Array) -> bytes:
    """The wire form of an array's elements."""
    return encode_bytes(array) if array.dtype == object else np.ascontiguousarray(array).tobytes()


def from_raw(data: bytes, datatype: str, shape: Sequence[int]) -> Array:
    """The array of this `datatype` and `shape` from its wire form."""
    kind = BY_WIRE_NAME[datatype]
    if kind is DataType.BYTES:
        return decode_bytes(data, int(np.prod(shape, dtype=np.int64)), "answer").reshape(shape)
    return np.frombuffer(data, kind.dtype).reshape(shape)


def datatype_of(array: Array) -> str:
    """The protocol's name for the elements of `array`. Raises `KeyError` for a type that has none."""
    return _BY_DTYPE[array.dtype].wire_name


def _elements(array: Array) -> list[Any]:
    if array.dtype == object:
        return [element.encode() if isinstance(element, str) else element for element in array.ravel().tolist()]
    elements: list[Any] = array.ravel().tolist()
    return elements
