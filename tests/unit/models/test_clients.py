"""The example clients against a server of a few lines: what they send, what they make of the answer, how they fail."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from models.clients.inference import InferenceClient, NotReadyError
from service.pb import grpc_service_pb2 as pb
from service.tensor import BY_ONNX_NAME, BY_WIRE_NAME, decode_bytes, encode_bytes
from tests.support import onnx_models
from tests.support.corpus import open_session

ROOT = Path(__file__).parents[3]
DIGITS = ROOT / "models" / "examples" / "digits" / "1" / "model.onnx"


class Answers:
    """`ModelInfer` and `ModelReady` over bare sessions, by the letter of the protocol: raw contents in order."""

    def __init__(self, directory: Path) -> None:
        tfidf = onnx_models.write_model(directory, "tfidf", onnx_models.string_tfidf())
        upper = onnx_models.write_model(directory, "upper", onnx_models.string_upper())
        files = {"digits": DIGITS, "tfidf": tfidf / "1" / "model.onnx", "upper": upper / "1" / "model.onnx"}
        self.sessions = {name: open_session(file) for name, file in files.items()}
        self.deadlines: list[float] = []

    def infer(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.deadlines.append(context.time_remaining())
        if request.model_name not in self.sessions:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no model '{request.model_name}'")
        session = self.sessions[request.model_name]
        feeds = {}
        for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
            datatype = BY_WIRE_NAME[tensor.datatype]
            if datatype.wire_name == "BYTES":
                words = decode_bytes(raw, int(np.prod(tensor.shape)), tensor.name)
                flat = np.array([word.decode() for word in words], object)
            else:
                flat = np.frombuffer(raw, datatype.dtype)
            feeds[tensor.name] = flat.reshape(tuple(tensor.shape))
        wanted = [output.name for output in request.outputs] or [output.name for output in session.get_outputs()]
        types = {output.name: BY_ONNX_NAME[output.type] for output in session.get_outputs()}
        response = pb.ModelInferResponse(model_name=request.model_name)
        for name, array in zip(wanted, session.run(wanted, feeds), strict=True):
            response.outputs.add(name=name, datatype=types[name].wire_name, shape=array.shape)
            raw = encode_bytes(array) if types[name].wire_name == "BYTES" else array.tobytes()
            response.raw_output_contents.append(raw)
        return response

    def ready(self, request: Any, _: grpc.ServicerContext) -> Any:
        return pb.ModelReadyResponse(ready=request.name in self.sessions)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return Answers(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def url(answers: Answers) -> Iterator[str]:
    handlers = {
        "ModelInfer": grpc.unary_unary_rpc_method_handler(
            answers.infer, pb.ModelInferRequest.FromString, pb.ModelInferResponse.SerializeToString
        ),
        "ModelReady": grpc.unary_unary_rpc_method_handler(
            answers.ready, pb.ModelReadyRequest.FromString, pb.ModelReadyResponse.SerializeToString
        ),
    }
    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_arrays_go_and_come_back(url: str) -> None:
    """All outputs when none is named, the named ones otherwise, equal to the model run directly."""
    pixels = np.random.default_rng(0).uniform(0, 16, (3, 64)).astype(np.float32)
    label, probabilities = open_session(DIGITS).run(["label", "probabilities"], {"pixels": pixels})
    with InferenceClient(url) as client:
        answer = client.infer("digits", {"pixels": pixels})
        only = client.infer("digits", {"pixels": pixels}, ["label"])
    np.testing.assert_array_equal(answer["label"], label)
    np.testing.assert_array_equal(answer["probabilities"], probabilities)
    assert list(only) == ["label"]


def test_an_array_in_any_memory_order_is_sent_row_by_row(url: str) -> None:
    """A transposed view is sent as it reads, not as it lies."""
    pixels = np.asfortranarray(np.random.default_rng(1).uniform(0, 16, (4, 64)).astype(np.float32))
    with InferenceClient(url) as client:
        straight = client.infer("digits", {"pixels": np.ascontiguousarray(pixels)})
        turned = client.infer("digits", {"pixels": pixels})
    np.testing.assert_array_equal(straight["probabilities"], turned["probabilities"])


def test_strings_go_and_come_back(url: str) -> None:
    """Text in an object array travels as BYTES, both ways."""
    with InferenceClient(url) as client:
        counted = client.infer("tfidf", {"words": np.array([["spam", "ham", "spam", "x"]], object)})
        upper = client.infer("upper", {"text": np.array([["ham", "and", "eggs"]], object)})
    np.testing.assert_array_equal(counted["counts"], [[1, 2, 0]])
    assert upper["upper"].tolist() == [[b"HAM", b"AND", b"EGGS"]]


def test_the_deadline_reaches_the_server(url: str, answers: Answers) -> None:
    """`timeout_s` is what the server sees, so that it can refuse in time."""
    answers.deadlines.clear()
    with InferenceClient(url) as client:
        client.infer("digits", {"pixels": np.zeros((1, 64), np.float32)}, timeout_s=7)
    assert 0 < answers.deadlines[0] < 8


def test_readiness_is_asked_for(url: str) -> None:
    """A ready model returns at once; another one, or no server at all, ends with the last answer."""
    with InferenceClient(url) as client:
        client.wait_until_ready("digits", timeout_s=5)
        with pytest.raises(NotReadyError, match=r"'absent'.*last answer: not ready"):
            client.wait_until_ready("absent", timeout_s=0.2)
    with InferenceClient("127.0.0.1:1") as client, pytest.raises(NotReadyError, match="UNAVAILABLE"):
        client.wait_until_ready("digits", timeout_s=0.5)


def test_the_digits_client_draws_and_names(url: str) -> None:
    """The command shows each digit beside what the server saw."""
    pytest.importorskip("sklearn", reason="install onclock[models]")
    done = command("models.clients.digits", "--url", url, "--count", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saw ") == 2
    assert "@@" in done.stdout


def test_the_digits_client_says_why_it_failed() -> None:
    """No server: status 1, with the address and gRPC's reason."""
    pytest.importorskip("sklearn", reason="install onclock[models]")
    done = command("models.clients.digits", "--url", "127.0.0.1:1", "--timeout-ms", "500")
    assert done.returncode == 1
    assert "127.0.0.1:1: UNAVAILABLE" in done.stderr


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a module of this project as its user would."""
    line = [sys.executable, "-m", *arguments]
    return subprocess.run(line, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=60, check=False)
