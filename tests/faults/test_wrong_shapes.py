"""A model whose file is wrong about its own outputs: answers are what it computes, not what it declares.

Converters of tree and linear models declare `label` as one element whatever the rows; ONNX Runtime then refuses buffers
of the true size.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from onnx import helper

from service.clock import NEVER_NS
from service.config.complete import complete
from service.config.graph import read_graph
from service.config.model import ModelConfig
from service.engine.devices import Device
from service.engine.options import plan_session, share_threads
from service.engine.pool import Instance
from service.engine.session import OnnxSession
from service.engine.warmup import first_run, requests, samples
from service.errors import ExecutionFailed
from service.pb import model_config_pb2 as pb
from service.request import InferenceRequest, ShapeClass
from service.scheduler import Segment
from tests.support import onnx_models
from tests.support.onnx_models import value, write_model

CPU = Device("cpu", "cpu", 0, 1, 1)


def instance_of(directory: Path, model: onnx.ModelProto, config_text: str = "") -> tuple[Instance, ModelConfig]:
    """An instance of `model` as the loader makes it, and its configuration."""
    share_threads(1)
    path = write_model(directory, "model", model) / "1" / "model.onnx"
    graph = read_graph(path)
    given = text_format.Parse(config_text, pb.ModelConfig())
    config = complete(given, "model", graph.inputs, graph.outputs).config
    session = OnnxSession(path, plan_session(config, CPU))
    return Instance(session, config.inputs, config.outputs, max(1, config.max_batch_size)), config


@pytest.mark.parametrize("build", [onnx_models.linear_classifier, onnx_models.tree_classifier])
def test_outputs_declared_too_small_are_answered_whole(tmp_path: Path, build: object) -> None:
    """One label per row for any number of rows, although the file declares one label."""
    instance, config = instance_of(tmp_path, build())
    sample, reason = first_run(instance, config, samples(config, tmp_path))
    assert sample is not None, reason
    for rows in (1, 3, 1, 2):
        executed = instance.run(requests(sample, config, rows), rows, rows)
        assert [output.shape[0] for output in executed.outputs] == [rows, rows]
        assert [output.spec.batched for output in executed.outputs] == [True, True]


def test_an_unbatched_output_of_another_size_than_declared(tmp_path: Path) -> None:
    """Selected elements: the declared size is the first run's, the next run has more."""
    nodes = [helper.make_node("Compress", ["a", "keep"], ["kept"], axis=0)]
    inputs = [value("a", "FP32", [4]), value("keep", "BOOL", [4])]
    model = onnx_models.make_model("compress", nodes, inputs, [value("kept", "FP32", [1])])
    instance, _ = instance_of(tmp_path, model)
    numbers = np.arange(4, dtype=np.float32)
    for keep in ([True, False, False, False], [True, True, False, True], [False] * 4):
        request = InferenceRequest(
            1, 0, NEVER_NS, 1, ShapeClass(((4,), (4,)), (), 8), [numbers.tobytes(), bytes(keep)], None, None, b""
        )
        (output,) = instance.run([Segment(request, 0, 1)], 1, 1).outputs
        assert np.array_equal(output.array, numbers[keep])


def test_rows_that_depend_on_the_data_are_answered_to_a_request_alone(tmp_path: Path) -> None:
    """A detector: as many rows as it finds, not as many as it is sent. Requests are not joined, answers are whole."""
    nodes = [
        helper.make_node("Greater", ["x", "zero"], ["positive"]),
        helper.make_node("Squeeze", ["positive", "axis"], ["keep"]),
        helper.make_node("Compress", ["x", "keep"], ["found"], axis=0),
    ]
    constants = {"zero": np.array(0, np.float32), "axis": np.array([1], np.int64)}
    outputs = [value("found", "FP32", ["M", 1])]
    model = onnx_models.make_model("detector", nodes, [value("x", "FP32", ["N", 1])], outputs, constants)
    config_text = 'max_batch_size: 8\nparameters { key: "batching" value { string_value: "off" } }\n'
    instance, config = instance_of(tmp_path, model, config_text)
    assert config.max_batch_size == 8
    assert not config.joins_requests
    for numbers in ([1.0, 2.0], [1.0, -1.0, 2.0], [-1.0]):
        x = np.array(numbers, np.float32).reshape(-1, 1)
        shape = ShapeClass(((1,),), (), 1)
        request = InferenceRequest(len(x), 0, NEVER_NS, 1, shape, [x.tobytes()], None, None, b"")
        (output,) = instance.run([Segment(request, 0, len(x))], len(x), len(x)).outputs
        assert np.array_equal(output.array, x[x[:, 0] > 0])


def test_a_run_that_really_fails_still_fails(tmp_path: Path) -> None:
    """An error that has nothing to do with shapes is not hidden by trying another way."""
    instance, _ = instance_of(tmp_path, onnx_models.poison())
    shape = ShapeClass(((1,),), (), 1)
    request = InferenceRequest(1, 0, NEVER_NS, 1, shape, [np.array([[1000]]).tobytes()], None, None, b"")
    with pytest.raises(ExecutionFailed, match="Gather"):
        instance.run([Segment(request, 0, 1)], 1, 1)
    assert not instance.undeclared_shapes
