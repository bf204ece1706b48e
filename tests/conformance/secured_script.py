"""The published client by mutual TLS and with an API key: run in an environment of its own.

python secured_script.py HOST:PORT ROOT_CERTIFICATES PRIVATE_KEY CERTIFICATE_CHAIN API_KEY
"""

# A script, not a pytest module: asserts are plain, any exception is a failure.
# ruff: noqa: T201

from __future__ import annotations

import asyncio
import queue
import sys

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

URL, ROOT, KEY, CHAIN, API_KEY = sys.argv[1:]
TLS = {"ssl": True, "root_certificates": ROOT, "private_key": KEY, "certificate_chain": CHAIN}
HEADERS = {"authorization": f"Bearer {API_KEY}"}


def tensor() -> triton.InferInput:
    """`x`."""
    made = triton.InferInput("x", [2, 4], "FP32")
    made.set_data_from_numpy(np.arange(8, dtype=np.float32).reshape(2, 4))
    return made


def right(result: triton.InferResult) -> None:
    """The model gives what it was given."""
    assert np.array_equal(result.as_numpy("y"), np.arange(8, dtype=np.float32).reshape(2, 4))


def status_of(call: object, **more: object) -> str:
    """The status of a call that fails."""
    try:
        call(**more)  # type: ignore[operator]
    except InferenceServerException as error:
        return str(error.status())
    return "OK"


def sync() -> None:
    """Unary, asynchronous, streaming; the control plane; what is refused."""
    with triton.InferenceServerClient(URL, **TLS) as client:
        assert client.is_server_live()
        right(client.infer("double", [tensor()], headers=HEADERS))
        assert client.get_model_metadata("double", headers=HEADERS).name == "double"
        assert status_of(client.infer, model_name="double", inputs=[tensor()]) == "StatusCode.UNAUTHENTICATED"
        other = status_of(client.infer, model_name="other", inputs=[tensor()], headers=HEADERS)
        assert other == "StatusCode.PERMISSION_DENIED", other
        assert status_of(client.get_server_metadata) == "StatusCode.UNAUTHENTICATED"
        answers: queue.Queue[tuple[object, object]] = queue.Queue()
        client.async_infer("double", [tensor()], lambda result, error: answers.put((result, error)), headers=HEADERS)
        result, error = answers.get(timeout=20)
        assert error is None, error
        right(result)  # type: ignore[arg-type]
        client.start_stream(lambda result, error: answers.put((result, error)), headers=HEADERS)
        client.async_stream_infer("double", [tensor()])
        result, error = answers.get(timeout=20)
        assert error is None, error
        right(result)  # type: ignore[arg-type]
        client.stop_stream()


async def aio() -> None:
    """The asyncio client."""
    async with triton_aio.InferenceServerClient(URL, **TLS) as client:
        assert await client.is_server_ready()
        right(await client.infer("double", [tensor()], headers=HEADERS))


sync()
asyncio.run(aio())
print("ok")
