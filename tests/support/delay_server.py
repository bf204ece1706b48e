"""A server that answers after a known time: what a load generator reports can be held against the truth.

    python -m tests.support.delay_server

It prints its port. Model `delay` takes `u` FP32 [N, 1] in [0, 1) and answers after `delay_s(u)` seconds; `/test/Stall`
blocks the whole server for two seconds, `/test/Answered` tells what was answered since it was last asked, and when (ns,
monotonic clock, as is all of it): that is the truth. `refuse` is
UNAVAILABLE at once, `hang` never answers, `broken` is INTERNAL, and `ModelStreamInfer` answers each message at once.
"""

from __future__ import annotations

import asyncio
import math
import struct
import sys
import time
from collections.abc import AsyncIterator
from statistics import NormalDist
from typing import Any

import grpc

from service.pb import grpc_service_pb2 as pb

SERVICE = "inference.GRPCInferenceService"
STALL_S = 2.0
# Lognormal: median 200 ms, p99 640 ms. Long beside what the machine adds, which is a millisecond or two.
MEDIAN_S, SIGMA = 0.200, 0.5
# What was answered and when, ns of the monotonic clock.
ANSWERED: list[tuple[float, int]] = []
MODELS = ("delay", "refuse", "hang", "broken", "text")


def delay_s(u: float) -> float:
    """The quantile function of the delays."""
    return MEDIAN_S * math.exp(SIGMA * NormalDist().inv_cdf(min(max(u, 1e-6), 1 - 1e-6)))


async def infer(request: Any, context: Any) -> Any:
    if request.model_name == "refuse":
        await context.abort(grpc.StatusCode.UNAVAILABLE, "no room")
    if request.model_name == "broken":
        await context.abort(grpc.StatusCode.INTERNAL, "it broke: 100 % of it")
    if request.model_name == "hang":
        await asyncio.sleep(3600)
    if request.model_name == "delay":
        (u,) = struct.unpack_from("<f", request.raw_input_contents[0])
        await asyncio.sleep(delay_s(u))
        ANSWERED.append((u, time.monotonic_ns()))
    return pb.ModelInferResponse(model_name=request.model_name, id=request.id)


async def stream(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
    async for request in requests:
        answer = pb.ModelStreamInferResponse()
        if request.model_name == "broken":
            answer.error_message = "it broke"
            answer.infer_response.id = request.id
        else:
            answer.infer_response.model_name = request.model_name
            answer.infer_response.id = request.id
        yield answer


async def metadata(request: Any, context: Any) -> Any:
    if request.name not in MODELS:
        await context.abort(grpc.StatusCode.NOT_FOUND, f"no model {request.name}")
    answer = pb.ModelMetadataResponse(name=request.name)
    answer.inputs.add(name="u", datatype="BYTES" if request.name == "text" else "FP32", shape=[-1, 1])
    return answer


async def server_metadata(request: Any, context: Any) -> Any:
    return pb.ServerMetadataResponse(name="delay", version="1")


async def stall(request: bytes, context: Any) -> bytes:
    begin = time.monotonic_ns()
    time.sleep(STALL_S)
    return struct.pack("<qq", begin, time.monotonic_ns())


async def answered(request: bytes, context: Any) -> bytes:
    packed = b"".join(struct.pack("<fq", u, at) for u, at in ANSWERED)
    ANSWERED.clear()
    return packed


async def serve(credentials: Any = None) -> None:
    def unary(function: Any, kind: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(
            function,
            request_deserializer=kind.FromString,
            response_serializer=lambda answer: answer.SerializeToString(),
        )

    server = grpc.aio.server()
    methods = {
        "ModelInfer": unary(infer, pb.ModelInferRequest),
        "ModelMetadata": unary(metadata, pb.ModelMetadataRequest),
        "ServerMetadata": unary(server_metadata, pb.ServerMetadataRequest),
        "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(
            stream,
            request_deserializer=pb.ModelInferRequest.FromString,
            response_serializer=lambda answer: answer.SerializeToString(),
        ),
    }
    handlers = grpc.method_handlers_generic_handler(SERVICE, methods)
    stalls = grpc.method_handlers_generic_handler(
        "test",
        {
            "Stall": grpc.unary_unary_rpc_method_handler(stall),
            "Answered": grpc.unary_unary_rpc_method_handler(answered),
        },
    )
    server.add_generic_rpc_handlers((handlers, stalls))
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("localhost:0", credentials)
    await server.start()
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    await server.wait_for_termination()


def main() -> None:
    """Serve; with two arguments (key and certificate, PEM files) over TLS."""
    credentials = None
    if len(sys.argv) == 3:
        key, certificate = (open(path, "rb").read() for path in sys.argv[1:])  # noqa: PTH123, SIM115
        credentials = grpc.ssl_server_credentials([(key, certificate)])
    asyncio.run(serve(credentials))


if __name__ == "__main__":
    main()
