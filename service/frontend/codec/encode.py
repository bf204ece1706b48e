"""Outputs of a batch to the bytes of one request's `ModelInferResponse`.

The answer always carries `raw_output_contents`, exactly one entry per output: clients index it without looking. Its
head (names, datatypes, shapes) is serialized by protobuf once per plan and shape and kept; the data is appended as wire
fields. The parts may be views of the outputs: whoever sends them makes the one copy.
"""

from __future__ import annotations

from collections.abc import Sequence

from service.errors import InvalidRequest
from service.frontend.codec.destination import Memory, classify
from service.frontend.codec.plan import RequestPlan
from service.frontend.codec.wire import delimited, delimiter
from service.pb.grpc_service_pb2 import ModelInferResponse
from service.request import BatchOutput
from service.tensor import DataType, encode_bytes

# Field numbers of ModelInferResponse.
_ID = 3
_RAW_OUTPUT_CONTENTS = 6
# A gRPC message cannot be larger: its length is checked against a signed 32-bit limit.
MAX_MESSAGE = 2**31 - 1


def encode(
    plan: RequestPlan,
    request_id: bytes,
    outputs: Sequence[BatchOutput],
    first_row: int,
    rows: int,
    regions: Sequence[Memory | None] = (),
) -> list[bytes | memoryview]:
    """The serialized answer, in parts, to a request of `plan`: its `rows` rows of the batch's `outputs`, from
    `first_row` on. What goes into shared memory is written to `regions`, those of the plan's destinations.

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
    if plan.destinations:
        parts += _placed(plan, chosen, first_row, rows, regions)
        return _checked_size(parts, plan)
    parts.append(_head(plan, chosen, rows))
    for output in chosen:
        data = _data(output, first_row, rows)
        parts.append(delimiter(_RAW_OUTPUT_CONTENTS, len(data)))
        parts.append(data)
    return _checked_size(parts, plan)


def _checked_size(parts: list[bytes | memoryview], plan: RequestPlan) -> list[bytes | memoryview]:
    size = sum(map(len, parts))
    if size > MAX_MESSAGE:
        raise InvalidRequest(
            f"the outputs of model '{plan.model.name}' make an answer of {size} bytes, more than a gRPC message can "
            "carry; request fewer outputs or fewer rows"
        )
    return parts


def _data(output: BatchOutput, first_row: int, rows: int) -> bytes | memoryview:
    if output.view is None:
        return encode_bytes(output.array[first_row : first_row + rows] if output.spec.batched else output.array)
    if output.spec.batched:
        return output.view[first_row * output.row_bytes : (first_row + rows) * output.row_bytes]
    return output.view


def _placed(
    plan: RequestPlan, outputs: Sequence[BatchOutput], first_row: int, rows: int, regions: Sequence[Memory | None]
) -> list[bytes | memoryview]:
    """The outputs of a request that wants some of them elsewhere or as classes."""
    message = ModelInferResponse()
    raws: list[bytes | memoryview] = []
    for output, destination, region in zip(outputs, plan.destinations, regions, strict=True):
        shape = (rows, *output.shape[1:]) if output.spec.batched else output.shape
        datatype = output.spec.datatype
        data: bytes | memoryview
        if destination.top:
            array = output.array[first_row : first_row + rows] if output.spec.batched else output.array
            batched = plan.model.max_batch_size > 0 and output.spec.batched
            classes = classify(
                array.reshape(rows if batched else 1, -1), destination.top, plan.model.labels.get(output.spec.name, ())
            )
            shape = classes.shape if batched else classes.shape[1:]
            datatype, data = DataType.BYTES, encode_bytes(classes)
        else:
            data = _data(output, first_row, rows)
        tensor = message.outputs.add(name=output.spec.name, datatype=datatype.wire_name, shape=shape)
        if destination.place is not None and region is not None:
            place = destination.place
            if len(data) > place.byte_size:
                raise InvalidRequest(
                    f"shared memory size specified with the request for output '{output.spec.name}' ({place.byte_size} "
                    f"bytes) should be at least {len(data)} bytes to hold the results of model '{plan.model.name}'"
                )
            region.write(place.offset, data)
            tensor.parameters["shared_memory_region"].string_param = place.region
            tensor.parameters["shared_memory_byte_size"].int64_param = len(data)
            if place.offset:
                tensor.parameters["shared_memory_offset"].int64_param = place.offset
            # Clients look for an entry of each output all the same.
            data = b""
        raws += [delimiter(_RAW_OUTPUT_CONTENTS, len(data)), data]
    return [message.SerializeToString(), *raws]


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
