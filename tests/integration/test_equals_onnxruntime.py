"""Answers through the server equal ONNX Runtime's own, whatever the kind of model and whoever shares the batch.

Real models and built ones, many requests at a time. Before each burst the device is kept busy for a moment, so that the
burst waits together and, where the model batches, is run together; the statistics must show that it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from tests.support import corpus, onnx_models, real_models
from tests.support.client import Array, Client, arrays, request
from tests.support.onnx_models import write_model
from tests.support.server import ROOT, RunningServer, running_server

# Kept between runs: making them downloads packages once and trains two small models.
REAL_MODELS = ROOT / "build" / "test-models"
TOLERANCE = 1e-5
# Requests of one burst: more than a few batches' worth of single rows would only take time.
BURST = 12
VOCABULARY = 100
# How long the statistics may take to show what has been answered: they are counted after the answer is sent.
SETTLE_S = 5.0

BUILT: Mapping[str, Callable[[], onnx.ModelProto]] = {
    "conv_net": lambda: onnx_models.conv_net(64),
    "text_encoder": onnx_models.text_encoder,
    "string_labels": onnx_models.string_labels,
    "string_upper": onnx_models.string_upper,
    "fixed_batch_cnn": onnx_models.fixed_batch_cnn,
    "linear_classifier": onnx_models.linear_classifier,
    "tree_classifier": onnx_models.tree_classifier,
    "side_input": onnx_models.side_input,
    "shared_side_input": onnx_models.side_input,
    "recurrent": onnx_models.recurrent,
    "growing_cache": onnx_models.growing_cache,
    "bfloat16": lambda: onnx_models.identity("BF16"),
    "dynamic_quantised": onnx_models.dynamic_quantised,
    "mixed_batch_outputs": onnx_models.mixed_batch_outputs,
}
NAMES = (*real_models.NAMES, *BUILT, "external_data")
# What a person who knows these models expects to be joined into batches without any configuration.
JOINED = {
    "efficientnet-lite0",
    "minilm",
    "magika",
    "text-classifier",
    "lightgbm",
    "conv_net",
    "text_encoder",
    "string_labels",
    "linear_classifier",
    "tree_classifier",
    "external_data",
    "bfloat16",
    "shared_side_input",
    "growing_cache",
}
# A side input that is named in the configuration may be shared by a batch.
CONFIGS = {"shared_side_input": 'parameters { key: "unbatched_inputs" value { string_value: "rate" } }\n'}


@dataclass(frozen=True, slots=True)
class Served:
    """A running server and, for each model, a session on the same file and requests for it."""

    server: RunningServer
    sessions: dict[str, ort.InferenceSession]
    feeds: dict[str, list[dict[str, Array]]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    real = real_models.prepare(REAL_MODELS)
    built = tmp_path_factory.mktemp("built")
    for model in real:
        # Without their configurations: an objective would refuse what a busy machine cannot answer in time.
        (built / model.name).mkdir()
        (built / model.name / "1").symlink_to(model.path.parent.resolve())
    for name, build in BUILT.items():
        write_model(built, name, build(), config=CONFIGS.get(name))
    onnx_models.external_data(built / "external_data" / "1")
    write_model(built, "busy", onnx_models.slow_for(100), config="max_batch_size: 8\n")
    paths = {model.name: model.path for model in real}
    paths |= {name: built / name / "1" / "model.onnx" for name in (*BUILT, "external_data")}
    sessions = {name: corpus.open_session(path) for name, path in paths.items()}
    feeds = {model.name: [dict(model.feeds[i % len(model.feeds)]) for i in range(BURST)] for model in real}
    feeds |= {name: [_drawn(name, sessions[name], i) for i in range(BURST)] for name in (*BUILT, "external_data")}
    # Batches stop at what could be measured: time enough for a few rows of the slowest model.
    with running_server(built, "--profile-budget-ms", "1000") as server:
        yield Served(server, sessions, feeds)


def _drawn(name: str, session: ort.InferenceSession, seed: int) -> dict[str, Array]:
    # What quantises over its rows is run row by row: a request of several rows has other answers there.
    rows = 1 if name == "dynamic_quantised" else 1 + seed % 3
    inputs = corpus.draw_inputs(session, np.random.default_rng(seed), rows)
    if name == "text_encoder":
        inputs["input_ids"] = np.abs(inputs["input_ids"]) % VOCABULARY
    if name == "shared_side_input":
        inputs["rate"] = np.array(seed % 2)
    return inputs


@pytest.mark.parametrize("name", NAMES)
def test_answers_equal_onnxruntime(name: str, served: Served) -> None:
    """Each of many concurrent requests gets the answer that a session of its own would have given."""
    client = Client(served.server.channel())
    session = served.sessions[name]
    feeds = served.feeds[name]
    datatypes = {i.name: "BF16" for i in session.get_inputs() if i.type == "tensor(bfloat16)"}
    before = client.statistics(name)
    busy = client.infer_future(request("busy", {"x": np.zeros((1, 4), np.float32)}))
    futures = [
        client.infer_future(request(name, inputs, request_id=str(i), datatypes=datatypes))
        for i, inputs in enumerate(feeds)
    ]
    for number, (inputs, future) in enumerate(zip(feeds, futures, strict=True)):
        answer = future.result(timeout=60)
        assert answer.id == str(number)
        assert_same(arrays(answer), corpus.run_directly(session, inputs))
    busy.result(timeout=60)

    after = statistics_after(client, name, before.inference_stats.success.count + len(feeds))
    config = client.call("ModelConfig", name=name).config
    joined = config.max_batch_size > 1 and config.HasField("dynamic_batching")
    executions = after.execution_count - before.execution_count
    answered = len(feeds)
    assert joined == (name in JOINED)
    if joined:
        assert executions < answered, f"{executions} executions for {answered} requests: no batch was formed"
        assert max(batch.batch_size for batch in after.batch_stats) > max(rows_of(inputs) for inputs in feeds)
    else:
        assert executions == answered


def statistics_after(client: Client, name: str, successes: int) -> Any:
    """The statistics once they count `successes` answers, and no more."""
    end = time.monotonic() + SETTLE_S
    while True:
        stats = client.statistics(name)
        if stats.inference_stats.success.count >= successes or time.monotonic() > end:
            assert stats.inference_stats.success.count == successes
            return stats


def rows_of(inputs: Mapping[str, Array]) -> int:
    """The first dimension of the first input that has one."""
    return next(array.shape[0] for array in inputs.values() if array.ndim)


def assert_same(got: Mapping[str, Array], wanted: Mapping[str, Any]) -> None:
    """Equal names, shapes and values; floating-point values up to the order in which sums are made."""
    assert list(got) == list(wanted)
    for name, expected in wanted.items():
        actual = got[name]
        assert actual.shape == expected.shape, f"{name}: {actual.shape}, expected {expected.shape}"
        if expected.dtype.kind == "f":
            scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
            np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * scale, err_msg=name)
        elif expected.dtype.kind in "OU":
            assert [text.decode() for text in actual.ravel()] == expected.ravel().tolist(), name
        else:
            assert actual.dtype == expected.dtype, name
            assert np.array_equal(actual, expected), name


def test_the_kinds_are_all_there(served: Served) -> None:
    """Nothing failed to load, so nothing was compared with nothing."""
    index = Client(served.server.channel()).call("RepositoryIndex").models
    assert {entry.name: entry.state for entry in index} == dict.fromkeys((*NAMES, "busy"), "READY")
