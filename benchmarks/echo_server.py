"""A bare threaded `grpc.server` that answers every `ModelInfer` with the request's own bytes.

It is the floor under any Python server on grpcio: the same method name, the same bytes both ways, identity
serializers, nothing between. `--threads` is the size of its pool; 80 by default, more than any closed loop of the
benchmarks has in flight (64), so that no request waits for a thread.
"""

from __future__ import annotations

import argparse
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc

SERVICE = "inference.GRPCInferenceService"


def answer(request: bytes, context: grpc.ServicerContext) -> bytes:  # noqa: ARG001
    """The request's own bytes."""
    return request


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=80)
    arguments = parser.parse_args()
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    echo = grpc.method_handlers_generic_handler(SERVICE, {"ModelInfer": grpc.unary_unary_rpc_method_handler(answer)})
    server = grpc.server(ThreadPoolExecutor(max_workers=arguments.threads), handlers=[echo], options=options)
    if server.add_insecure_port(f"127.0.0.1:{arguments.port}") == 0:
        raise SystemExit(f"cannot bind 127.0.0.1:{arguments.port}")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    server.start()
    print(f"echo on 127.0.0.1:{arguments.port}, {arguments.threads} threads", flush=True)
    stop.wait()
    server.stop(grace=1).wait()


if __name__ == "__main__":
    main()
