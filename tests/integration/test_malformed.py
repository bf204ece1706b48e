"""A thousand malformed requests of every kind, while others are served: each gets its own error, nobody else does."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import StatusCode

from service.frontend.codec.wire import delimited
from service.pb.grpc_service_pb2 import ModelInferResponse
from tests.support import onnx_models
from tests.support.client import Client, arrays, request, words
from tests.support.corpus import draw_inputs, model_file, open_session, run_directly
from tests.support.server import RunningServer, running_server

MALFORMED = 1000
SEED = 3
MAX_MESSAGE = 1 << 20
VALID_THREADS = 3
# The clients are Python threads that share the machine with the server: more of them only wait for each other.
MALFORMED_THREADS = 3

X = np.ones((2, 8), np.float32)
INVALID = StatusCode.INVALID_ARGUMENT


def mlp(**more: Any) -> Any:
    """A valid request for the model `mlp`, to be spoilt."""
    return request("mlp", {"x": X}, **more)


def with_shape(*shape: int, model: str = "mlp") -> Any:
    message = request(model, {"x": X})
    del message.inputs[0].shape[:]
    message.inputs[0].shape.extend(shape)
    return message


def with_datatype(datatype: str) -> Any:
    message = mlp()
    message.inputs[0].datatype = datatype
    return message


def with_raw(*raws: bytes, message: Any = None) -> Any:
    message = mlp() if message is None else message
    del message.raw_input_contents[:]
    message.raw_input_contents.extend(raws)
    return message


def with_parameter(name: str, **value: Any) -> Any:
    message = mlp()
    for kind, given in value.items():
        setattr(message.parameters[name], kind, given)
    return message


def with_contents(typed: bool = True, **contents: list[Any]) -> Any:
    message = mlp(typed=typed)
    message.inputs[0].contents.Clear()
    for field, values in contents.items():
        getattr(message.inputs[0].contents, field).extend(values)
    return message


def no_classes() -> Any:
    message = mlp(outputs=["y"])
    message.outputs[0].parameters["classification"].int64_param = 0
    return message


def in_shared_memory(place: str, **only: Any) -> Any:
    """A tensor in a region, or with these parameters of one alone."""
    message = mlp(outputs=["y"])
    tensor = message.inputs[0] if place == "input" else message.outputs[0]
    if place == "input":
        del message.raw_input_contents[:]
    for name, value in (only or {"region": "r", "byte_size": 64}).items():
        setattr(
            tensor.parameters[f"shared_memory_{name}"],
            "string_param" if isinstance(value, str) else "int64_param",
            value,
        )
    return message


def names(raw: bytes, rows: int = 1) -> Any:
    """A request for the model of strings with this as its raw tensor."""
    return with_raw(raw, message=request("names", {"name": words(*[""] * rows, shape=(rows, 1))}))


def twice(message: Any) -> Any:
    message.inputs.append(message.inputs[0])
    message.raw_input_contents.append(message.raw_input_contents[0])
    return message


def encoder(mask: tuple[int, int] = (2, 3)) -> Any:
    return request(
        "encoder",
        {"input_ids": np.ones((2, 3), np.int64), "attention_mask": np.ones(mask, np.int64)},
        outputs=["pooled"],
    )


def without_mask() -> Any:
    message = encoder()
    del message.inputs[1]
    del message.raw_input_contents[1]
    return message


def half_typed() -> Any:
    message = request("half", {"x": np.ones((1, 4), np.float16)})
    del message.raw_input_contents[:]
    message.inputs[0].contents.fp32_contents.extend([1.0] * 4)
    return message


VALID_BYTES: bytes = mlp(request_id="1").SerializeToString()

# name -> (the request, the status it gets, what the message says)
KINDS: dict[str, tuple[Any, StatusCode, tuple[str, ...]]] = {
    "garbage": (b"\xff\xfe\xfd" * 9, INVALID, ("not a valid ModelInferRequest",)),
    "text": (b"GET / HTTP/1.1\r\n\r\n", INVALID, ("not a valid ModelInferRequest",)),
    "cut in the data": (VALID_BYTES[:-1], INVALID, ("not a valid ModelInferRequest",)),
    "cut in the header": (VALID_BYTES[:12], INVALID, ("not a valid ModelInferRequest",)),
    "nothing": (b"", INVALID, ("Request for unknown model: ''",)),
    "id is no text": (
        delimited(3, b"\xff\xfe") + mlp().SerializeToString(),
        INVALID,
        ("not a valid ModelInferRequest", "UTF-8"),
    ),
    "model name is no text": (delimited(1, b"\xff") + delimited(7, b""), INVALID, ("not a valid ModelInferRequest",)),
    "too large": (with_raw(bytes(MAX_MESSAGE + 1)), StatusCode.RESOURCE_EXHAUSTED, ("larger than max",)),
    "unknown model": (request("nobody", {"x": X}), INVALID, ("Request for unknown model: 'nobody' is not found",)),
    "a path as model": (request("../mlp", {"x": X}), INVALID, ("Request for unknown model: '../mlp'",)),
    "unknown version": (mlp(version="9"), StatusCode.NOT_FOUND, ("Request for unknown model: 'mlp' version 9",)),
    "version is no number": (mlp(version="latest"), INVALID, ("model 'mlp'", "version 'latest' is not a number")),
    "negative version": (mlp(version="-1"), INVALID, ("version '-1' is not a number",)),
    "endless version": (mlp(version="1" * 5000), INVALID, ("is not a number",)),
    "model that failed to load": (
        request("broken", {"x": X}),
        StatusCode.UNAVAILABLE,
        ("Request for model 'broken' is not at ready state",),
    ),
    "unknown input": (request("mlp", {"z": X}), INVALID, ("unexpected inference input 'z' for model 'mlp'", "'x'")),
    "input twice": (twice(mlp()), INVALID, ("input 'x' is given twice for model 'mlp'",)),
    "no input": (request("mlp", {}), INVALID, ("expected 1 inputs but got 0 inputs for model 'mlp'", "missing 'x'")),
    "one input of two": (without_mask(), INVALID, ("expected 2 inputs but got 1", "missing 'attention_mask'")),
    "rows that disagree": (encoder((1, 3)), INVALID, ("'attention_mask'", "batch size 1", "'input_ids' has 2")),
    "wrong datatype": (with_datatype("FP64"), INVALID, ("'x' data-type is 'FP64'", "'mlp' expects 'FP32'")),
    "unknown datatype": (with_datatype("float32"), INVALID, ("'x' data-type is 'float32'", "expects 'FP32'")),
    "no datatype": (with_datatype(""), INVALID, ("'x' data-type is ''",)),
    "wrong rank": (with_shape(16), INVALID, ("unexpected shape for input 'x' for model 'mlp'", "[-1, 8]", "got [16]")),
    "no shape": (with_shape(), INVALID, ("unexpected shape for input 'x'", "got []")),
    "wrong dimension": (with_shape(4, 4), INVALID, ("unexpected shape for input 'x'", "[-1, 8]", "got [4, 4]")),
    "negative dimension": (with_shape(-1, 8), INVALID, ("unexpected shape for input 'x'", "got [-1, 8]")),
    "no rows": (with_shape(0, 8), INVALID, ("batch-size must be <= 64 and >= 1 for 'mlp'", "got 0")),
    "too many rows": (with_shape(65, 8), INVALID, ("inference request batch-size must be <= 64", "got 65")),
    "endless rows": (with_shape(2**62, 8), INVALID, ("input 'x'", "'mlp'")),
    "a thousand dimensions": (with_shape(*[1] * 1000), INVALID, ("unexpected shape for input 'x'",)),
    "empty but endless": (with_raw(b"", message=with_shape(1, 0, 2**62, model="free")), INVALID, ("unexpected shape",)),
    "empty but large": (with_raw(b"", message=with_shape(64, 0, 2**40, model="free")), INVALID, ("unexpected shape",)),
    "scalar as a vector": (request("scalars", {"a": X[0, :1], "b": X[0, 0]}), INVALID, ("input 'a'", "'scalars'")),
    "whole shape wrong": (request("matrix", {"a": X}), INVALID, ("input 'a' for model 'matrix'", "[3, 4]", "[2, 8]")),
    "a byte too few": (with_raw(bytes(63)), INVALID, ("byte size mismatch for input 'x'", "Expected 64, got 63")),
    "a byte too many": (with_raw(bytes(65)), INVALID, ("byte size mismatch for input 'x'", "Expected 64, got 65")),
    "no data": (with_raw(), INVALID, ("unable to find data for input tensor 'x' for model 'mlp'",)),
    "data of one input of two": (
        with_raw(bytes(48), message=encoder()),
        INVALID,
        ("unable to find data for input tensor 'attention_mask'", "2 inputs, 1 raw_input_contents"),
    ),
    "too much data": (with_raw(bytes(64), b""), INVALID, ("2 raw_input_contents for the 1 inputs", "'mlp'")),
    "raw and typed": (
        with_contents(typed=False, fp32_contents=[1.0] * 16),
        INVALID,
        ("contents field must not be specified when using raw_input_contents for 'x' for model 'mlp'",),
    ),
    "typed in the wrong field": (
        with_contents(fp64_contents=[1.0] * 16),
        INVALID,
        ("input 'x'", "contents.fp32_contents", "fp64_contents is filled"),
    ),
    "typed in two fields": (
        with_contents(fp32_contents=[1.0] * 16, int_contents=[1]),
        INVALID,
        ("int_contents and fp32_contents is filled",),
    ),
    "typed and too few": (with_contents(fp32_contents=[1.0] * 15), INVALID, ("asks for 16 elements", "has 15")),
    "half floats typed": (half_typed(), INVALID, ("input 'x': FP16 has no typed contents", "raw_input_contents")),
    "string beyond the end": (names(b"\x09\x00\x00\x00abc"), INVALID, ("input 'name'", "states 9 bytes", "only 3")),
    "string of 4 GiB": (names(b"\xff\xff\xff\xffabc"), INVALID, ("input 'name'", "states 4294967295 bytes")),
    "string cut in its length": (names(b"\x00\x00"), INVALID, ("input 'name'", "expected 1 BYTES elements")),
    "strings left over": (names(b"\x00\x00\x00\x00!"), INVALID, ("input 'name'", "1 bytes left over")),
    "too few strings": (
        names(b"\x04\x00\x00\x00abcd", rows=2),
        INVALID,
        ("input 'name'", "expected 2 BYTES elements", "ends after 1"),
    ),
    "string is no text": (names(b"\x01\x00\x00\x00\xff"), INVALID, ("input 'name'", "not valid UTF-8")),
    "a bool of two": (
        with_raw(X[:1, :4].tobytes(), b"\x02", message=request("branch", {"x": X[:1, :4], "negate": np.array([True])})),
        INVALID,
        ("input 'negate' for model 'branch'", "must be 0 or 1"),
    ),
    "unknown output": (mlp(outputs=["z"]), INVALID, ("unexpected inference output 'z' for model 'mlp'", "has 'y'")),
    "output twice": (mlp(outputs=["y", "y"]), INVALID, ("output 'y' is requested twice for model 'mlp'",)),
    "no classes": (no_classes(), INVALID, ("output 'y'", "'classification' must be greater than 0")),
    "input in shared memory": (in_shared_memory("input"), StatusCode.UNIMPLEMENTED, ("--allow-client-shm",)),
    "output in shared memory": (in_shared_memory("output"), StatusCode.UNIMPLEMENTED, ("--allow-client-shm",)),
    "a region without a size": (in_shared_memory("input", region="r"), INVALID, ("input 'x'", "given together")),
    "a region that is a number": (in_shared_memory("output", region=1), INVALID, ("output 'y'", "must be a string")),
    "negative priority": (with_parameter("priority", int64_param=-1), INVALID, ("'priority' must not be negative",)),
    "priority as text": (with_parameter("priority", string_param="1"), INVALID, ("'priority' must be an integer",)),
    "negative timeout": (with_parameter("timeout", int64_param=-5), INVALID, ("'timeout' must not be negative",)),
    "timeout as a fraction": (with_parameter("timeout", double_param=0.5), INVALID, ("'timeout' must be an integer",)),
    "reserved parameter": (
        with_parameter("triton_secret", bool_param=True),
        INVALID,
        ("reserved, got 'triton_secret'",),
    ),
    "final response as a number": (
        with_parameter("triton_enable_empty_final_response", int64_param=1),
        INVALID,
        ("'triton_enable_empty_final_response' must be a bool",),
    ),
    "a sequence": (with_parameter("sequence_id", uint64_param=7), INVALID, ("'mlp' is not a sequence model",)),
    "a sequence by name": (with_parameter("sequence_id", string_param="s"), INVALID, ("is not a sequence model",)),
    "a sequence's end": (with_parameter("sequence_end", bool_param=True), INVALID, ("is not a sequence model",)),
}

GOOD = ("mlp", "names", "encoder", "branch", "scalars", "matrix", "half", "free")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("repository")
    models = {
        "mlp": onnx_models.mlp(),
        "names": onnx_models.string_labels(),
        "encoder": onnx_models.text_encoder(),
        "branch": onnx_models.branching(),
        "scalars": onnx_models.scalar_sum(),
        "matrix": onnx_models.unbatched_matrix(),
        "half": onnx_models.identity("FP16"),
        "free": onnx_models.identity("FP32", ("N", "A", "B")),
    }
    for name, model in models.items():
        onnx_models.write_model(directory, name, model)
    (directory / "broken" / "1").mkdir(parents=True)
    (directory / "broken" / "1" / "model.onnx").write_bytes(b"this is no model")
    return directory


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[RunningServer]:
    with running_server(repository, "--max-message-bytes", str(MAX_MESSAGE)) as running:
        yield running


def refusal(client: Client, message: bytes) -> tuple[StatusCode, str]:
    try:
        client.infer_bytes(message)
    except grpc.RpcError as error:
        return error.code(), error.details()
    return StatusCode.OK, "answered"


def complaint(kind: str, got: tuple[StatusCode, str]) -> str | None:
    """What is wrong with the answer to a malformed request of this kind, if anything."""
    _, code, fragments = KINDS[kind]
    if got[0] is not code or any(fragment not in got[1] for fragment in fragments):
        return f"{kind}: expected {code.name} {fragments}, got {got[0].name} {got[1][:300]!r}"
    return None


def serialized(kind: str) -> bytes:
    message = KINDS[kind][0]
    data: bytes = message if isinstance(message, bytes) else message.SerializeToString()
    return data


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_by_itself(server: RunningServer, kind: str) -> None:
    """Status and message of each kind, and the same again from a decoder that has seen it."""
    client = Client(server.channel())
    for _ in range(2):
        assert complaint(kind, refusal(client, serialized(kind))) is None


def valid_requests(repository: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Requests for every good model and what ONNX Runtime, called directly, answers."""
    cases = []
    for name in GOOD:
        session = open_session(model_file(repository / name))
        for seed in range(6):
            inputs = draw_inputs(session, np.random.default_rng(seed))
            message = request(name, inputs, request_id=f"{name}-{seed}")
            cases.append((message.SerializeToString(), run_directly(session, inputs)))
    return cases


def wrong(answer: bytes, expected: dict[str, Any]) -> str | None:
    """What is wrong with an answer, if anything."""
    message: Any = ModelInferResponse.FromString(answer)
    got = arrays(message)
    for name, array in expected.items():
        value = got[name]
        if value.shape != array.shape:
            return f"{message.id} {name}: shape {value.shape}, not {array.shape}"
        if array.dtype == object:
            same = [e.decode() for e in value.ravel()] == array.ravel().tolist()
        else:
            same = bool(np.allclose(value, array, rtol=1e-5, atol=1e-6))
        if not same:
            return f"{message.id} {name}: {value} is not {array}"
    return None


def test_a_thousand_malformed_requests_among_valid_ones(server: RunningServer, repository: Path) -> None:
    """All at once from several connections: every malformed request gets its own status and message, every valid one
    the right answer."""
    logged = len(server.log_lines())
    order = [kind for kind in KINDS for _ in range(-(-MALFORMED // len(KINDS)))][:MALFORMED]
    random.Random(SEED).shuffle(order)
    cases = valid_requests(repository)
    malformed_done = threading.Event()
    answered: Counter[str] = Counter()

    def send_valid(worker: int) -> list[str]:
        client, rng, complaints = Client(server.channel()), random.Random(worker), []
        while not malformed_done.is_set():
            message, expected = rng.choice(cases)
            problem = wrong(client.infer_bytes(message), expected)
            if problem is not None:
                complaints.append(problem)
            answered[str(worker)] += 1
        return complaints

    def send_malformed(worker: int) -> list[str]:
        client = Client(server.channel())
        found = (complaint(kind, refusal(client, serialized(kind))) for kind in order[worker::MALFORMED_THREADS])
        return [problem for problem in found if problem is not None]

    with ThreadPoolExecutor(VALID_THREADS + MALFORMED_THREADS) as pool:
        valid = [pool.submit(send_valid, worker) for worker in range(VALID_THREADS)]
        malformed = [pool.submit(send_malformed, worker) for worker in range(MALFORMED_THREADS)]
        try:
            problems = [problem for future in malformed for problem in future.result()]
        finally:
            malformed_done.set()
        problems += [problem for future in valid for problem in future.result()]
    assert not problems, "\n".join(problems[:10])
    assert sum(answered.values()) >= MALFORMED // 10, answered
    # Nothing of this is a fault of the server's: its log has no error.
    assert [line for line in server.log_lines()[logged:] if line["level"] == "error"] == []
    assert "Traceback" not in server.stderr


def test_there_are_at_least_thirty_kinds() -> None:
    """The thousand is of many kinds, each at least ten times."""
    assert len(KINDS) >= 30
    assert MALFORMED // len(KINDS) >= 10
