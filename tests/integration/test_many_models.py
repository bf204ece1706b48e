"""A thousand models in one server: soon ready, each answers as ONNX Runtime does, and having them costs only memory."""

from __future__ import annotations

import os
import re
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import onnxruntime as ort
import pytest

from tests.support import corpus
from tests.support.client import Client, arrays, request
from tests.support.server import RunningServer, running_server

pytestmark = [pytest.mark.slow, pytest.mark.timed]

MODELS = 1000
FEW = 10
READY_S = 60.0
# Time over which an idle server is watched, and the share of one core it may use.
IDLE_S = 5.0
IDLE_SHARE = 0.02
# Twice the time that saturation looks back, about.
IDLE_BY_S = 40.0
# A small model's session, buffers, metrics and queue. Twice what was seen when this was written.
MEBIBYTES_PER_MODEL = 1.0
TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True)
class Loaded:
    """A running server with its models, and how long it took from its start to be ready."""

    server: RunningServer
    models: list[corpus.CorpusModel]
    ready_s: float


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """The server of a thousand models, with the measurement it has by default."""
    directory = tmp_path_factory.mktemp("many")
    models = corpus.write_corpus(directory, MODELS)
    began_s = time.monotonic()
    with running_server(directory, "--profile-budget-ms", "2000", "--metrics-port", "0", ready=False) as server:
        server.wait_ready(2 * READY_S)
        yield Loaded(server, models, time.monotonic() - began_s)


def test_all_are_ready_in_time(many: Loaded) -> None:
    """No model of the corpus fails to load, and all are ready within a minute on two cores."""
    index = Client(many.server.channel()).call("RepositoryIndex").models
    assert {(m.name, m.reason) for m in index if m.state != "READY"} == set()
    assert len(index) == MODELS
    assert many.ready_s < READY_S


def test_each_answers_as_onnxruntime(many: Loaded) -> None:
    """Every model, with inputs of its own: names, shapes, types and values."""
    client = Client(many.server.channel())
    wrong: list[str] = []
    for model in many.models:
        session = corpus.open_session(corpus.model_file(model.directory))
        # What quantises over its rows is run row by row: a request of several rows has other answers there.
        rows = 1 if model.kind == "dynamic_quantised" else None
        inputs = corpus.draw_inputs(session, np.random.default_rng(7), rows)
        try:
            answer = arrays(client.infer(request(model.name, inputs, datatypes=bf16(session))))
        except grpc.RpcError as error:
            wrong.append(f"{model.name}: {error.details()}")
            continue
        expected = corpus.run_directly(session, inputs)
        wrong += [f"{model.name}: {name}" for name in expected if not same(answer.get(name), expected[name])]
    assert not wrong, f"{len(wrong)} of {len(many.models)}: {wrong[:10]}"


def bf16(session: ort.InferenceSession) -> dict[str, str]:
    """The datatypes of the inputs whose NumPy type does not tell them."""
    return {tensor.name: "BF16" for tensor in session.get_inputs() if tensor.type == "tensor(bfloat16)"}


def same(actual: corpus.Array | None, expected: corpus.Array) -> bool:
    """Equal shape and values, floating-point ones up to rounding."""
    if actual is None or actual.shape != expected.shape:
        return False
    if expected.dtype.kind in "OU":
        return [text.decode() for text in actual.ravel()] == expected.ravel().tolist()
    if expected.dtype.kind == "f":
        return bool(np.allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True))
    return actual.dtype == expected.dtype and bool(np.array_equal(actual, expected))


def test_threads_do_not_grow_with_models(many: Loaded, tmp_path: Path) -> None:
    """As many threads for a thousand models as for ten, after every one of them has been used."""
    few_models = corpus.write_corpus(tmp_path, FEW)
    with running_server(tmp_path, "--metrics-port", "0") as few:
        for server, models in ((few, few_models), (many.server, many.models)):
            client = Client(server.channel())
            for model in models:
                client.call("ModelMetadata", name=model.name)
        assert threads(many.server.pid) <= threads(few.pid) + 1


def threads(pid: int) -> int:
    """The threads of a process, all languages'."""
    return sum(1 for _ in Path(f"/proc/{pid}/task").iterdir())


def asked_lately(server: RunningServer) -> bool:
    """Whether any model was asked in the last 15 seconds."""
    with urllib.request.urlopen(server.metrics_url, timeout=10) as answer:
        text = answer.read().decode()
    (saturation,) = re.findall(r"^onclock_saturation_ratio (\S+)$", text, re.MULTILINE)
    return float(saturation) > 0


def test_idle_models_use_no_time(many: Loaded) -> None:
    """Nothing polls per model: an idle server uses hardly any of a core. What a thousand models counted while they were
    asked is taken in once, for the status page, at the end of the step: until then the server is not idle."""
    end = time.monotonic() + IDLE_BY_S
    while asked_lately(many.server):
        assert time.monotonic() < end, "the models are never idle"
        time.sleep(0.5)
    before_s = cpu_seconds(many.server.pid)
    time.sleep(IDLE_S)  # the thing measured is what happens when nothing happens
    assert cpu_seconds(many.server.pid) - before_s < IDLE_SHARE * IDLE_S


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far (proc(5), fields 14 and 15 of stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_memory_per_model_is_in_the_log(many: Loaded) -> None:
    """Each model's line states what it took; together they are most of the process."""
    lines = many.server.log_lines("model ready")
    assert len(lines) == MODELS
    stated = [float(line["memory_mib"]) for line in lines]
    assert min(stated) >= 0
    assert 0 < sum(stated) < MODELS * MEBIBYTES_PER_MODEL
    resident_pages = int(Path(f"/proc/{many.server.pid}/statm").read_text().split()[1])
    assert sum(stated) < resident_pages * os.sysconf("SC_PAGE_SIZE") / 2**20
