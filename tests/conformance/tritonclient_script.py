"""What users of the published Python client do, done with that client: run in an environment of its own.

    python tritonclient_script.py HOST:PORT TRACE_FILE EXPLICIT_HOST:PORT REPOSITORY

The second server has the same repository and loads models when it is told to.

Every `check_*` function is one check; for each one JSON line is printed, with the traceback when it failed. The models
it expects are written by `test_tritonclient.py`. Nothing here imports from the project: only what a user has.
"""

# A script, not a pytest module: asserts are plain, the output is the report, any exception is a failed check.
# ruff: noqa: BLE001, PT017, PT018, T201

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

URL = sys.argv[1]
TRACE_FILE = Path(sys.argv[2])
EXPLICIT_URL = sys.argv[3]
PID = os.getpid()
# No check waits longer than this for anything.
WAIT_S = 20.0

NUMERIC = {
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}
# The typed field of each datatype that has one, with values at the ends of its range.
TYPED = {
    "BOOL": ("bool_contents", [True, False, False, True]),
    "INT8": ("int_contents", [-128, 127, 0, -1]),
    "INT16": ("int_contents", [-32768, 32767, 0, -1]),
    "INT32": ("int_contents", [-(2**31), 2**31 - 1, 0, -1]),
    "INT64": ("int64_contents", [-(2**63), 2**63 - 1, 0, -1]),
    "UINT8": ("uint_contents", [0, 255, 1, 128]),
    "UINT16": ("uint_contents", [0, 65535, 1, 32768]),
    "UINT32": ("uint_contents", [0, 2**32 - 1, 1, 2**31]),
    "UINT64": ("uint64_contents", [0, 2**64 - 1, 1, 2**63]),
    "FP32": ("fp32_contents", [0.0, -1.5, 3.25, 1e30]),
    "FP64": ("fp64_contents", [0.0, -1.5, 1 / 3, 1e300]),
    "BYTES": ("bytes_contents", [b"", b"one", "zwei \u00fc".encode(), b"x" * 300]),
}


def tensor(name: str, array: Any) -> triton.InferInput:
    # In two steps: older clients' `set_data_from_numpy` returns nothing.
    given = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    given.set_data_from_numpy(array)
    return given


def rows(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((count, 4)).astype(np.float32)


def refused(status: str, fragment: str, act: Callable[[], Any]) -> InferenceServerException:
    """`act` must raise the client's exception with this status code and text."""
    try:
        act()
    except InferenceServerException as error:
        assert error.status() == f"StatusCode.{status}", f"status {error.status()}: {error.message()}"
        assert fragment in error.message(), error.message()
        return error
    raise AssertionError(f"no {status}: the call succeeded")


def echo(client: triton.InferenceServerClient, datatype: str, array: Any) -> Any:
    """`array` through the model that answers what it is sent."""
    result = client.infer(f"identity_{datatype.lower()}", [tensor("x", array)])
    described = result.get_output("y")
    assert described.datatype == datatype, described.datatype
    assert list(described.shape) == list(array.shape), described.shape
    return result.as_numpy("y")


# Health


def check_server_is_live_and_ready(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live() is True
    assert client.is_server_ready() is True


def check_model_ready(client: triton.InferenceServerClient) -> None:
    assert client.is_model_ready("double") is True
    assert client.is_model_ready("double", "2") is True
    assert client.is_model_ready("broken") is False


def check_unknown_model_is_an_error(client: triton.InferenceServerClient) -> None:
    refused("INVALID_ARGUMENT", "Request for unknown model", lambda: client.is_model_ready("nobody"))
    refused("NOT_FOUND", "Request for unknown model", lambda: client.is_model_ready("double", "9"))
    refused("INVALID_ARGUMENT", "Request for unknown model", lambda: client.get_model_metadata("nobody"))
    refused("INVALID_ARGUMENT", "Request for unknown model", lambda: client.get_model_config("nobody"))
    refused("INVALID_ARGUMENT", "Request for unknown model", lambda: client.get_inference_statistics("nobody"))
    refused("INVALID_ARGUMENT", "Request for unknown model", lambda: client.infer("nobody", [tensor("x", rows(1))]))


# Description


def check_server_metadata(client: triton.InferenceServerClient) -> None:
    metadata = client.get_server_metadata()
    assert metadata.name == "onclock", metadata
    assert "statistics" in metadata.extensions, metadata
    as_json = client.get_server_metadata(as_json=True)
    assert as_json["version"] == metadata.version and as_json["version"], as_json


def check_model_metadata(client: triton.InferenceServerClient) -> None:
    metadata = client.get_model_metadata("double")
    assert (metadata.name, metadata.platform) == ("double", "onnxruntime_onnx"), metadata
    assert list(metadata.versions) == ["1", "2"], metadata
    assert [(i.name, i.datatype, list(i.shape)) for i in metadata.inputs] == [("x", "FP32", [-1, 4])], metadata
    assert [(o.name, o.datatype, list(o.shape)) for o in metadata.outputs] == [("y", "FP32", [-1, 4])], metadata
    as_json = client.get_model_metadata("double", as_json=True)
    assert as_json["inputs"][0]["shape"] == ["-1", "4"], as_json
    # Without a batch dimension the shape is the tensor's own.
    fixed = client.get_model_metadata("scalar_sum")
    assert [list(i.shape) for i in fixed.inputs] == [[], []], fixed


def check_model_config(client: triton.InferenceServerClient) -> None:
    config = client.get_model_config("double").config
    assert (config.name, config.platform, config.backend) == ("double", "onnxruntime_onnx", "onnxruntime"), config
    assert config.max_batch_size == 8, config
    assert config.HasField("dynamic_batching"), config
    # A message field that is present switches clients into another mode.
    for absent in ("sequence_batching", "ensemble_scheduling"):
        assert not config.HasField(absent), absent
    assert [(i.name, list(i.dims)) for i in config.input] == [("x", [4])], config
    metadata = client.get_model_metadata("double")
    assert {i.name for i in config.input} == {i.name for i in metadata.inputs}


def check_model_config_as_json(client: triton.InferenceServerClient) -> None:
    config = client.get_model_config("double", "1", as_json=True)["config"]
    assert config["max_batch_size"] == 8, config
    assert config["input"][0]["data_type"] == "TYPE_FP32", config
    assert "dynamic_batching" in config and "sequence_batching" not in config, config
    assert config["model_transaction_policy"]["decoupled"] is False if "model_transaction_policy" in config else True


def check_repository_index(client: triton.InferenceServerClient) -> None:
    index = client.get_model_repository_index()
    states = {(m.name, m.version): (m.state, m.reason) for m in index.models}
    assert states["double", "1"] == ("READY", ""), states
    assert states["double", "2"] == ("READY", ""), states
    state, reason = states["broken", "1"]
    assert state == "UNAVAILABLE" and "broken" in reason, states
    as_json = client.get_model_repository_index(as_json=True)
    assert {m["name"] for m in as_json["models"]} == {name for name, _ in states}, as_json


def check_statistics(client: triton.InferenceServerClient) -> None:
    def read() -> Any:
        (stats,) = client.get_inference_statistics("counted", "1").model_stats
        return stats

    before = read()
    for count in (1, 2, 3):
        client.infer("counted", [tensor("x", rows(count))])
    refused("INVALID_ARGUMENT", "", lambda: client.infer("counted", [tensor("nothing", rows(1))]))
    # Counted when the answer has been sent.
    end = time.monotonic() + WAIT_S
    after = read()
    while after.inference_stats.success.count < before.inference_stats.success.count + 3 and time.monotonic() < end:
        after = read()
    assert int(after.version) == 1
    assert after.inference_count - before.inference_count == 6, after
    assert after.execution_count - before.execution_count == 3, after
    stats = after.inference_stats
    assert stats.success.count - before.inference_stats.success.count == 3, after
    assert stats.queue.count == stats.success.count, after
    # perf_analyzer stops when these differ.
    assert stats.compute_input.count == stats.compute_infer.count == stats.compute_output.count, after
    assert stats.compute_infer.ns > 0 and stats.success.ns >= stats.compute_infer.ns, after
    assert sum(b.compute_infer.count for b in after.batch_stats) == after.execution_count, after


def check_statistics_of_all_models_as_json(client: triton.InferenceServerClient) -> None:
    everything = client.get_inference_statistics(as_json=True)["model_stats"]
    assert ("double", "1") in {(s["name"], s["version"]) for s in everything}, everything
    assert "broken" not in {s["name"] for s in everything}, everything


# Tensors


def check_numeric_datatypes(client: triton.InferenceServerClient) -> None:
    rng = np.random.default_rng(3)
    for datatype, dtype in NUMERIC.items():
        array = (rng.standard_normal((3, 4)) * 50).astype(dtype) if "FP" in datatype else None
        if array is None:
            limits = np.iinfo(dtype)
            array = rng.integers(limits.min, limits.max, (3, 4), dtype=dtype, endpoint=True)
        answer = echo(client, datatype, array)
        assert answer.dtype == dtype and np.array_equal(answer, array), (datatype, answer, array)


def check_bool(client: triton.InferenceServerClient) -> None:
    array = np.array([[True, False, False, True], [False, False, True, True]])
    answer = echo(client, "BOOL", array)
    assert answer.dtype == np.bool_ and np.array_equal(answer, array), answer


def check_bf16(client: triton.InferenceServerClient) -> None:
    array = np.array([[0.0, -1.5, 3.140625, 1e30], [np.inf, -np.inf, 1.0, 65280.0]], dtype=ml_dtypes.bfloat16)
    answer = echo(client, "BF16", array)
    assert answer.tobytes() == array.tobytes(), answer


def check_bytes(client: triton.InferenceServerClient) -> None:
    array = np.array([["", "one", "zwei \u00fc", "x" * 1000], ["\u4e09", "a b", "\n", "0"]], dtype=object)
    encoded = np.array([[element.encode() for element in row] for row in array], dtype=object)
    answer = echo(client, "BYTES", encoded)
    assert answer.tolist() == encoded.tolist(), answer


def check_empty_and_scalar_tensors(client: triton.InferenceServerClient) -> None:
    a, b = np.array(2.5, np.float32), np.array(4.0, np.float32)
    result = client.infer("scalar_sum", [tensor("a", a), tensor("b", b)])
    assert result.as_numpy("sum").shape == () and float(result.as_numpy("sum")) == 6.5
    result = client.infer("empty_rows", [tensor("x", np.empty((3, 0), np.float32))])
    assert result.as_numpy("y").shape == (3, 0)


def check_typed_contents(client: triton.InferenceServerClient) -> None:
    """Requests built by hand with typed contents; the answers are raw all the same."""
    with grpc.insecure_channel(URL) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for datatype, (field, values) in TYPED.items():
            name = f"identity_{datatype.lower()}"
            request = service_pb2.ModelInferRequest(model_name=name, id=datatype)
            item = request.inputs.add(name="x", datatype=datatype, shape=[1, 4])
            getattr(item.contents, field).extend(values)
            response = stub.ModelInfer(request, timeout=WAIT_S)
            assert response.id == datatype
            assert len(response.raw_output_contents) == len(response.outputs) == 1, response
            assert not response.outputs[0].HasField("contents")
            answer = triton.InferResult(response).as_numpy("y")
            wanted = values if datatype not in NUMERIC else np.array(values, NUMERIC[datatype]).tolist()
            assert answer.ravel().tolist() == wanted, (datatype, answer)


def check_contents_and_raw_together_are_refused(client: triton.InferenceServerClient) -> None:
    with grpc.insecure_channel(URL) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = service_pb2.ModelInferRequest(model_name="double")
        item = request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
        item.contents.fp32_contents.extend([1, 2, 3, 4])
        request.raw_input_contents.append(rows(1).tobytes())
        try:
            stub.ModelInfer(request, timeout=WAIT_S)
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error
        else:
            raise AssertionError("accepted")


def check_fp16_has_no_typed_contents(client: triton.InferenceServerClient) -> None:
    with grpc.insecure_channel(URL) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = service_pb2.ModelInferRequest(model_name="identity_fp16")
        item = request.inputs.add(name="x", datatype="FP16", shape=[1, 4])
        item.contents.fp32_contents.extend([1, 2, 3, 4])
        try:
            stub.ModelInfer(request, timeout=WAIT_S)
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error
            assert "raw_input_contents" in error.details(), error
        else:
            raise AssertionError("accepted")


# Requests


def check_infer(client: triton.InferenceServerClient) -> None:
    array = rows(3)
    result = client.infer("double", [tensor("x", array)])
    response = result.get_response()
    assert (response.model_name, response.model_version, response.id) == ("double", "2", ""), response
    assert np.array_equal(result.as_numpy("y"), array + array + array)
    assert result.as_numpy("nothing") is None


def check_versions(client: triton.InferenceServerClient) -> None:
    """Version 1 doubles, version 2 triples; no version asks for the newest."""
    array = rows(2)
    for version, factor, answered in (("1", 2, "1"), ("2", 3, "2"), ("", 3, "2")):
        result = client.infer("double", [tensor("x", array)], model_version=version)
        assert result.get_response().model_version == answered
        assert np.allclose(result.as_numpy("y"), factor * array), version
    refused("NOT_FOUND", "unknown", lambda: client.infer("double", [tensor("x", array)], model_version="7"))


def check_request_id(client: triton.InferenceServerClient) -> None:
    for request_id in ("7", "a-b_c", "\u00fc\u4e09", "x" * 200):
        result = client.infer("double", [tensor("x", rows(1))], request_id=request_id)
        assert result.get_response().id == request_id, result.get_response().id


def check_requested_outputs(client: triton.InferenceServerClient) -> None:
    inputs = [tensor("input_ids", np.array([[1, 2, 3]])), tensor("attention_mask", np.array([[1, 1, 0]]))]
    every = client.infer("text_encoder", inputs)
    assert {o.name for o in every.get_response().outputs} == {"states", "pooled"}
    for names in (["pooled"], ["states"], ["pooled", "states"], ["states", "pooled"]):
        result = client.infer("text_encoder", inputs, outputs=[triton.InferRequestedOutput(n) for n in names])
        assert [o.name for o in result.get_response().outputs] == names, result.get_response()
        for name in names:
            assert np.array_equal(result.as_numpy(name), every.as_numpy(name)), name


def check_compression(client: triton.InferenceServerClient) -> None:
    array = np.ones((8, 4), np.float32)
    for algorithm in ("gzip", "deflate"):
        result = client.infer("double", [tensor("x", array)], compression_algorithm=algorithm)
        assert np.array_equal(result.as_numpy("y"), 3 * array), algorithm


def check_headers_and_parameters_of_the_client_are_let_through(client: triton.InferenceServerClient) -> None:
    result = client.infer(
        "double",
        [tensor("x", rows(1))],
        headers={"x-request-origin": "test"},
        parameters={"origin": "test", "attempt": 1, "share": 0.5, "last": True},
    )
    assert result.as_numpy("y").shape == (1, 4)


def check_large_message(client: triton.InferenceServerClient) -> None:
    """More than gRPC's default of 4 MB, in both directions."""
    array = np.random.default_rng(0).standard_normal((8, 3, 224, 224)).astype(np.float32)
    answer = client.infer("image_identity", [tensor("x", array)]).as_numpy("y")
    assert np.array_equal(answer, array)


def check_keepalive(client: triton.InferenceServerClient) -> None:
    options = triton.KeepAliveOptions(
        keepalive_time_ms=10_000, keepalive_timeout_ms=20_000, keepalive_permit_without_calls=True
    )
    with triton.InferenceServerClient(URL, keepalive_options=options) as other:
        assert other.infer("double", [tensor("x", rows(1))]).as_numpy("y").shape == (1, 4)


# Time


def check_client_timeout(client: triton.InferenceServerClient) -> None:
    began = time.monotonic()
    refused("DEADLINE_EXCEEDED", "", lambda: client.infer("slow", [tensor("x", rows(1))], client_timeout=0.05))
    # The model takes 200 ms: the client has not waited for it.
    assert time.monotonic() - began < 0.15, time.monotonic() - began
    assert client.infer("slow", [tensor("x", rows(1))], client_timeout=WAIT_S).as_numpy("y").shape == (1, 4)


def check_timeout_parameter(client: triton.InferenceServerClient) -> None:
    refused("DEADLINE_EXCEEDED", "slow", lambda: client.infer("slow", [tensor("x", rows(1))], timeout=10_000))
    assert client.infer("slow", [tensor("x", rows(1))], timeout=10_000_000).as_numpy("y").shape == (1, 4)


def check_priority(client: triton.InferenceServerClient) -> None:
    """A request of priority 1 passes those of priority 2 that are queued before it."""
    order: list[str] = []
    done = threading.Semaphore(0)

    def note(result: Any, error: Any) -> None:
        order.append(error.message() if error else result.get_response().id)
        done.release()

    for name, priority in (("first", 2), ("second", 2), ("third", 2), ("urgent", 1)):
        client.async_infer("ranked", [tensor("x", rows(1))], note, request_id=name, priority=priority)
    for _ in range(4):
        assert done.acquire(timeout=WAIT_S), order
    assert set(order) == {"first", "second", "third", "urgent"}, order
    # One was running, and one may have been staged behind it, when the urgent one came.
    assert order.index("urgent") <= 2 and order[-1] != "urgent", order


# Asynchronous


def check_callbacks(client: triton.InferenceServerClient) -> None:
    answers: dict[str, Any] = {}
    done = threading.Semaphore(0)

    def collect(result: Any, error: Any) -> None:
        key = result.get_response().id if result is not None else "error"
        answers[key] = error if error is not None else result.as_numpy("y")
        done.release()

    sent = {str(number): rows(1 + number % 4, number) for number in range(40)}
    for request_id, array in sent.items():
        client.async_infer("double", [tensor("x", array)], collect, request_id=request_id)
    for _ in sent:
        assert done.acquire(timeout=WAIT_S)
    for request_id, array in sent.items():
        assert np.allclose(answers[request_id], 3 * array), request_id


def check_callback_gets_the_error(client: triton.InferenceServerClient) -> None:
    seen: list[Any] = []
    done = threading.Event()

    def collect(result: Any, error: Any) -> None:
        seen.append((result, error))
        done.set()

    client.async_infer("double", [tensor("wrong", rows(1))], collect)
    assert done.wait(WAIT_S)
    result, error = seen[0]
    assert result is None and error.status() == "StatusCode.INVALID_ARGUMENT", seen


def check_cancelled_call(client: triton.InferenceServerClient) -> None:
    seen: list[Any] = []
    done = threading.Event()

    def collect(result: Any, error: Any) -> None:
        seen.append((result, error))
        done.set()

    call = client.async_infer("slow", [tensor("x", rows(1))], collect)
    call.cancel()
    assert done.wait(WAIT_S)
    assert seen[0][0] is None and seen[0][1].status() == "StatusCode.CANCELLED", seen
    assert client.infer("slow", [tensor("x", rows(1))]).as_numpy("y").shape == (1, 4)


async def check_aio(_: triton.InferenceServerClient) -> None:
    async with triton_aio.InferenceServerClient(URL) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("double")
        metadata = await client.get_model_metadata("double")
        assert list(metadata.versions) == ["1", "2"], metadata
        config = await client.get_model_config("double", as_json=True)
        assert config["config"]["max_batch_size"] == 8, config
        index = await client.get_model_repository_index(as_json=True)
        assert "double" in {m["name"] for m in index["models"]}, index
        sent = [rows(1 + number % 4, number) for number in range(40)]
        answers = await asyncio.gather(
            *(client.infer("double", [tensor("x", array)], request_id=str(n)) for n, array in enumerate(sent))
        )
        for number, (array, answer) in enumerate(zip(sent, answers, strict=True)):
            assert answer.get_response().id == str(number)
            assert np.allclose(answer.as_numpy("y"), 3 * array), number
        stats = await client.get_inference_statistics("double", "2")
        assert stats.model_stats[0].inference_stats.success.count > 0, stats


async def check_aio_errors(_: triton.InferenceServerClient) -> None:
    async with triton_aio.InferenceServerClient(URL) as client:
        for status, act in (
            ("INVALID_ARGUMENT", client.is_model_ready("nobody")),
            ("INVALID_ARGUMENT", client.infer("double", [tensor("wrong", rows(1))])),
            ("DEADLINE_EXCEEDED", client.infer("slow", [tensor("x", rows(1))], client_timeout=0.05)),
            ("UNAVAILABLE", client.infer("broken", [tensor("x", rows(1))])),
        ):
            try:
                await act
            except InferenceServerException as error:
                assert error.status() == f"StatusCode.{status}", error
            else:
                raise AssertionError(f"no {status}")


# Logs and traces


def check_log_settings(client: triton.InferenceServerClient) -> None:
    started = client.get_log_settings(as_json=True)["settings"]
    assert started["log_format"]["string_param"] == "default", started
    changed = client.update_log_settings({"log_warning": False, "log_verbose_level": 1}, as_json=True)["settings"]
    assert changed["log_warning"].get("bool_param", False) is False, changed
    assert changed["log_verbose_level"]["uint32_param"] == 1, changed
    back = client.update_log_settings({"log_warning": True, "log_verbose_level": 0}, as_json=True)["settings"]
    assert back == started, back
    refused("UNIMPLEMENTED", "log file location", lambda: client.update_log_settings({"log_file": "/tmp/x"}))
    refused("INVALID_ARGUMENT", "log_format", lambda: client.update_log_settings({"log_format": "xml"}))


def check_trace_settings(client: triton.InferenceServerClient) -> None:
    started = client.get_trace_settings(as_json=True)["settings"]
    assert started["trace_level"]["value"] == ["OFF"], started
    assert started["trace_file"]["value"] == [str(TRACE_FILE)], started
    wanted = {"trace_level": ["TIMESTAMPS"], "trace_rate": "2", "trace_count": "3"}
    changed = client.update_trace_settings("counted", wanted, as_json=True)["settings"]
    assert changed["trace_rate"]["value"] == ["2"], changed
    for number in range(10):
        client.infer("counted", [tensor("x", rows(1))], request_id=str(number))
    deadline = time.monotonic() + WAIT_S
    traces: list[Any] = []
    while len(traces) < 3 and time.monotonic() < deadline:
        # It may be read just when the server has opened it and has written nothing, or half.
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            traces = json.loads(TRACE_FILE.read_text())
    assert [trace["request_id"] for trace in traces] == ["0", "2", "4"], traces
    for trace in traces:
        times = [time["ns"] for time in trace["timestamps"]]
        assert times == sorted(times), trace
    back = client.update_trace_settings("counted", dict.fromkeys(wanted), as_json=True)["settings"]
    assert back == started, back
    refused("UNIMPLEMENTED", "trace file", lambda: client.update_trace_settings(settings={"trace_file": "/tmp/x"}))
    refused("INVALID_ARGUMENT", "unknown model", lambda: client.get_trace_settings("nobody"))


# Errors


def check_errors_of_requests(client: triton.InferenceServerClient) -> None:
    good = tensor("x", rows(1))
    wide = tensor("x", np.zeros((1, 5), np.float32))
    flat = tensor("x", np.zeros(4, np.float32))
    many = tensor("x", rows(9))
    double = tensor("x", np.zeros((1, 4), np.float64))
    refused("INVALID_ARGUMENT", "unexpected shape for input 'x'", lambda: client.infer("double", [wide]))
    refused("INVALID_ARGUMENT", "unexpected shape for input 'x'", lambda: client.infer("double", [flat]))
    refused("INVALID_ARGUMENT", "batch-size must be <= 8", lambda: client.infer("double", [many]))
    refused("INVALID_ARGUMENT", "data-type is 'FP64'", lambda: client.infer("double", [double]))
    refused("INVALID_ARGUMENT", "unexpected inference input", lambda: client.infer("double", [tensor("z", rows(1))]))
    refused("INVALID_ARGUMENT", "expected 1 inputs", lambda: client.infer("double", []))
    refused("INVALID_ARGUMENT", "given twice", lambda: client.infer("double", [good, good]))
    unknown_output = [triton.InferRequestedOutput("nothing")]
    refused("INVALID_ARGUMENT", "nothing", lambda: client.infer("double", [good], outputs=unknown_output))
    reserved = triton.InferInput("x", [1, 4], "FP32")
    refused("INVALID_ARGUMENT", "unable to find data for input", lambda: client.infer("double", [reserved]))


def check_a_model_that_fails(client: triton.InferenceServerClient) -> None:
    bad = tensor("index", np.array([[1000]]))
    good = tensor("index", np.array([[1]]))
    refused("INTERNAL", "poison", lambda: client.infer("poison", [bad]))
    assert client.infer("poison", [good]).as_numpy("row").shape == (1, 4)


def check_a_model_that_is_not_loaded(client: triton.InferenceServerClient) -> None:
    error = refused("UNAVAILABLE", "is not at ready state", lambda: client.infer("broken", [tensor("x", rows(1))]))
    assert "model.onnx" in error.message(), error.message()


def check_what_is_refused_says_so(client: triton.InferenceServerClient) -> None:
    refused("UNAVAILABLE", "explicit model load / unload is not allowed", lambda: client.load_model("double"))
    refused("UNAVAILABLE", "explicit model load / unload is not allowed", lambda: client.unload_model("double"))
    assert len(client.get_cuda_shared_memory_status().regions) == 0
    client.unregister_cuda_shared_memory()
    refused("UNIMPLEMENTED", "CUDA", lambda: client.register_cuda_shared_memory("x", b"0" * 64, 0, 8))


# Classes and shared memory


def check_classification(client: triton.InferenceServerClient) -> None:
    x = np.array([[1, 5, 3, 4], [9, 0, 0, 2]], np.float32)
    top = [triton.InferRequestedOutput("y", class_count=2)]
    answer = client.infer("double", [tensor("x", x)], model_version="1", outputs=top).as_numpy("y")
    assert answer.shape == (2, 2), answer
    assert answer.tolist() == [[b"10.000000:1:two", b"8.000000:3"], [b"18.000000:0:one", b"4.000000:3"]], answer
    more = [triton.InferRequestedOutput("y", class_count=99)]
    assert client.infer("double", [tensor("x", x)], outputs=more).as_numpy("y").shape == (2, 4)


def check_shared_memory(client: triton.InferenceServerClient) -> None:
    from tritonclient.utils import shared_memory as shm

    client.unregister_system_shared_memory()
    x = rows(3)
    regions = {name: shm.create_shared_memory_region(name, f"/onclock_{name}_{PID}", x.nbytes) for name in ("i", "o")}
    try:
        shm.set_shared_memory_region(regions["i"], [x])
        for name in regions:
            client.register_system_shared_memory(name, f"/onclock_{name}_{PID}", x.nbytes)
        assert set(client.get_system_shared_memory_status().regions) == {"i", "o"}
        given = triton.InferInput("x", list(x.shape), "FP32")
        given.set_shared_memory("i", x.nbytes)
        wanted = triton.InferRequestedOutput("y")
        wanted.set_shared_memory("o", x.nbytes)
        for outputs in (None, [wanted]):
            result = client.infer("double", [given], model_version="1", outputs=outputs)
            if outputs is None:
                answer = result.as_numpy("y")
            else:
                described = result.get_output("y")
                assert described.parameters["shared_memory_region"].string_param == "o", described
                answer = shm.get_contents_as_numpy(regions["o"], np.float32, list(x.shape))
            assert np.array_equal(answer, 2 * x), answer
        again = lambda: client.register_system_shared_memory("i", f"/onclock_i_{PID}", 8)  # noqa: E731
        refused("ALREADY_EXISTS", "'i' already in", again)
        given.set_shared_memory("i", x.nbytes, offset=16)
        refused("INVALID_ARGUMENT", "Invalid offset", lambda: client.infer("double", [given]))
        given.set_shared_memory("i", 8)
        refused("INVALID_ARGUMENT", "byte size mismatch", lambda: client.infer("double", [given]))
        client.unregister_system_shared_memory("i")
        given.set_shared_memory("i", x.nbytes)
        refused("NOT_FOUND", "Unable to find shared memory region", lambda: client.infer("double", [given]))
    finally:
        client.unregister_system_shared_memory()
        for region in regions.values():
            shm.destroy_shared_memory_region(region)
    assert not client.get_system_shared_memory_status().regions
    refused("INVALID_ARGUMENT", "Unable to open", lambda: client.register_system_shared_memory("i", "/onclock_none", 8))


# Streams


class Stream:
    """A stream of a client of its own: what its callback is given comes out of `next`."""

    def __init__(self, **options: Any) -> None:
        self.client = triton.InferenceServerClient(URL)
        self._seen: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self.client.start_stream(lambda result, error: self._seen.put((result, error)), **options)

    def next(self) -> tuple[Any, Any]:
        return self._seen.get(timeout=WAIT_S)

    def close(self) -> None:
        self.client.stop_stream()
        self.client.close()


def check_stream(_client: triton.InferenceServerClient) -> None:
    stream = Stream()
    for number in range(20):
        x = np.full((1, 4), number, np.float32)
        stream.client.async_stream_infer("double", [tensor("x", x)], model_version="1", request_id=str(number))
    for number in range(20):
        result, error = stream.next()
        assert error is None, error
        assert result.get_response().id == str(number), result.get_response()
        assert result.get_response().parameters["triton_final_response"].bool_param is True
        assert np.array_equal(result.as_numpy("y"), np.full((1, 4), 2 * number, np.float32))
    stream.close()


def check_stream_goes_on_after_an_error(_client: triton.InferenceServerClient) -> None:
    stream = Stream()
    stream.client.async_stream_infer("double", [tensor("wrong", rows(1))], request_id="bad")
    stream.client.async_stream_infer("nobody", [tensor("x", rows(1))])
    stream.client.async_stream_infer("double", [tensor("x", rows(1))], request_id="good")
    result, error = stream.next()
    assert result is None and "unexpected inference input" in error.message(), (result, error)
    result, error = stream.next()
    assert result is None and "unknown model" in error.message(), (result, error)
    result, error = stream.next()
    assert error is None and result.get_response().id == "good", (result, error)
    stream.close()


def check_stream_with_a_status(_client: triton.InferenceServerClient) -> None:
    stream = Stream(headers={"triton_grpc_error": "true"})
    stream.client.async_stream_infer("double", [tensor("wrong", rows(1))])
    result, error = stream.next()
    assert result is None and error.status() == "StatusCode.INVALID_ARGUMENT", (result, error)
    stream.client.close()


async def check_aio_stream(_client: triton.InferenceServerClient) -> None:
    async def requests() -> Any:
        for number in range(5):
            x = np.full((1, 4), number, np.float32)
            yield {"model_name": "double", "model_version": "1", "inputs": [aio_tensor(x)], "request_id": str(number)}

    def aio_tensor(x: Any) -> Any:
        given = triton_aio.InferInput("x", list(x.shape), "FP32")
        given.set_data_from_numpy(x)
        return given

    async with triton_aio.InferenceServerClient(URL) as client:
        number = 0
        async for result, error in client.stream_infer(requests()):
            assert error is None, error
            assert result.get_response().id == str(number)
            assert np.array_equal(result.as_numpy("y"), np.full((1, 4), 2 * number, np.float32))
            number += 1
        assert number == 5


# Sequences


def sequence_sum(result: triton.InferResult) -> float:
    return float(result.as_numpy("sum")[0, 0])


def probe_inputs(value: float) -> list[triton.InferInput]:
    return [tensor("x", np.full((1, 2), value, np.float32)), tensor("pick", np.array([[1]]))]


def check_sequences(client: triton.InferenceServerClient) -> None:
    assert "sequence" in client.get_server_metadata().extensions
    for number in range(4):
        flags = {"sequence_start": number == 0, "sequence_end": number == 3}
        for identity, value in ((1001, 1.0), (1002, 10.0)):
            answer = client.infer("probe", probe_inputs(value), sequence_id=identity, **flags)
            assert sequence_sum(answer) == value * (number + 1)
            assert int(answer.as_numpy("was_who")[0, 0]) == identity
            assert bool(answer.as_numpy("was_ready")[0, 0])
            assert int(answer.as_numpy("was_last")[0, 0]) == (number == 3)
    start = "must specify the START flag on the first request of the sequence"
    refused("INVALID_ARGUMENT", start, lambda: client.infer("probe", probe_inputs(1), sequence_id=1001))
    no_id = "must specify a non-zero or non-empty correlation ID"
    refused("INVALID_ARGUMENT", no_id, lambda: client.infer("probe", probe_inputs(1), sequence_start=True))


def check_sequences_named_by_text(client: triton.InferenceServerClient) -> None:
    x = np.zeros((1, 1), np.float32)
    answer = client.infer("named", [tensor("x", x)], sequence_id="call \u00fc", sequence_start=True, sequence_end=True)
    assert answer.as_numpy("who")[0, 0].decode() == "call \u00fc"


def check_a_sequence_on_a_stream(_client: triton.InferenceServerClient) -> None:
    stream = Stream()
    for number in range(30):
        stream.client.async_stream_infer(
            "probe",
            probe_inputs(1),
            request_id=str(number),
            sequence_id=1003,
            sequence_start=number == 0,
            sequence_end=number == 29,
        )
    for number in range(30):
        result, error = stream.next()
        assert error is None, error
        assert result.get_response().id == str(number)
        assert sequence_sum(result) == number + 1
    stream.close()


async def check_aio_sequences(_client: triton.InferenceServerClient) -> None:
    def inputs() -> list[Any]:
        made = []
        for name, array in (("x", np.ones((1, 2), np.float32)), ("pick", np.array([[1]]))):
            given = triton_aio.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            given.set_data_from_numpy(array)
            made.append(given)
        return made

    async with triton_aio.InferenceServerClient(URL) as client:

        async def talk(identity: int) -> None:
            for number in range(10):
                flags = {"sequence_start": number == 0, "sequence_end": number == 9}
                answer = await client.infer("probe", inputs(), sequence_id=identity, **flags)
                assert float(answer.as_numpy("sum")[0, 0]) == number + 1

        await asyncio.gather(*(talk(2000 + number) for number in range(20)))


# Models that come and go


def check_load_and_unload(_client: triton.InferenceServerClient) -> None:
    with triton.InferenceServerClient(EXPLICIT_URL) as client:
        assert not client.is_model_ready("double")
        client.load_model("double")
        assert client.is_model_ready("double")
        client.load_model("double", config='{"max_batch_size": 4}')
        assert client.get_model_config("double").config.max_batch_size == 4
        client.unload_model("double")
        assert not client.is_model_ready("double")
        refused("UNAVAILABLE", "is not at ready state", lambda: client.infer("double", [tensor("x", rows(1))]))
        refused("INVALID_ARGUMENT", "nobody", lambda: client.load_model("nobody"))


def check_load_with_files(client: triton.InferenceServerClient) -> None:
    """A model that is not in the repository, sent along."""
    with triton.InferenceServerClient(EXPLICIT_URL) as explicit:
        model = (Path(sys.argv[4]) / "double" / "1" / "model.onnx").read_bytes()
        explicit.load_model("sent", config="{}", files={"file:7/model.onnx": model})
        assert explicit.is_model_ready("sent", "7")
        x = rows(2)
        assert np.array_equal(explicit.infer("sent", [tensor("x", x)]).as_numpy("y"), 2 * x)
        explicit.unload_model("sent")


async def check_aio_load_and_unload(_client: triton.InferenceServerClient) -> None:
    async with triton_aio.InferenceServerClient(EXPLICIT_URL) as client:
        await client.load_model("double")
        assert await client.is_model_ready("double")
        await client.unload_model("double")
        assert not await client.is_model_ready("double")


def main() -> int:
    checks = {name: thing for name, thing in globals().items() if name.startswith("check_")}
    failed = 0
    with triton.InferenceServerClient(URL) as client:
        for name, check in checks.items():
            began = time.monotonic()
            line: dict[str, Any] = {"check": name, "ok": True}
            try:
                answer = check(client)
                if inspect.iscoroutine(answer):
                    asyncio.run(answer)
            except Exception:
                failed += 1
                line = {"check": name, "ok": False, "error": traceback.format_exc()}
            line["seconds"] = round(time.monotonic() - began, 3)
            print(json.dumps(line), flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
