"""Outputs of a batch to the bytes of one request's `ModelInferResponse`.

The answer always carries `raw_output_contents`, exactly one entry per output: clients index it without looking. Its
head (names, datatypes, shapes) is serialized by protobuf once per plan and shape and kept; the data is appended as wire
fields. The parts may be views of the outputs: whoever sends them makes the one copy.
"""

from __future__ import annotations

from collections.abc import Sequence

from service.errors import InvalidRequest
from service.frontend.codec.plan import RequestPlan
from service.frontend.codec.wire import delimited, delimiter
from service.pb.grpc_service_pb2 import ModelInferResponse
from service.request import BatchOutput
from service.tensor import encode_bytes

# Field numbers of ModelInferResponse.
_ID = 3
_RAW_OUTPUT_CONTENTS = 6
# A gRPC message cannot be larger: its length is checked against a signed 32-bit limit.
MAX_MESSAGE = 2**31 - 1


def encode(
    plan: RequestPlan, request_id: bytes, outputs: Sequence[BatchOutput], first_row: int, rows: int
) -> list[bytes | memoryview]:
    """The serialized answer, in parts, to a request of `plan`: its `rows` rows of the batch's `outputs`, from
    `first_row` on.

    Raises `InvalidRequest` when the answer exceeds what a gRPC message can carry.
    """
    if not plan.prefix:
        plan.prefix = ModelInferResponse(
            model_name=plan.model.name, model_version=str(plan.model.version)
        ).SerializeToString()
    parts: list[bytes | memoryview] = [plan.prefix]
    if request_id:
        parts.append(delimited(_ID, request_id))
    chosen = [outputs[index] for index in plan.outputs]
    parts.append(_head(plan, chosen, rows))
    for output in chosen:
        data: bytes | memoryview
        if output.view is None:
            array = output.array[first_row : first_row + rows] if output.spec.batched else output.array
            data = encode_bytes(array)
        elif output.spec.batched:
            data = output.view[first_row * output.row_bytes : (first_row + rows) * output.row_bytes]
        else:
            data = output.view
        parts.append(delimiter(_RAW_OUTPUT_CONTENTS, len(data)))
        parts.append(data)
    size = sum(map(len, parts))
    if size > MAX_MESSAGE:
        raise InvalidRequest(
            f"the outputs of model '{plan.model.name}' make an answer of {size} bytes, more than a gRPC message can "
            "carry; request fewer outputs or fewer rows"
        )
    return parts


def _head(plan: RequestPlan, outputs: Sequence[BatchOutput], rows: int) -> bytes:
    """The serialized `outputs` field. The last one is kept with the plan: shapes seldom change between requests."""
    shapes = tuple((rows, *o.shape[1:]) if o.spec.batched else o.shape for o in outputs)
    if plan.output_headers is not None and plan.output_headers[0] == shapes:
        return plan.output_headers[1]  # type: ignore[no-any-return]
    message = ModelInferResponse()
    for output, shape in zip(outputs, shapes, strict=True):
        message.outputs.add(name=output.spec.name, datatype=output.spec.datatype.wire_name, shape=shape)
    head: bytes = message.SerializeToString()
    plan.output_headers = (shapes, head)
    return head
