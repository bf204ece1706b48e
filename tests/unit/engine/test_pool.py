"""Instances: the path without bound buffers, the bound on shapes kept, and the pool."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from service.engine.pool import MAX_SHAPES, SessionPool, undeclared
from service.errors import ExecutionFailed, OutOfMemory
from service.scheduler import Segment
from service.tensor import DataType, TensorSpec
from tests.support import onnx_models
from tests.unit.engine.support import Requests, SessionDouble, double_instance, instance_of, rows_of, split_rows, whole


def words(*rows: list[str]) -> np.ndarray:
    return np.array(rows, dtype=object)


def test_strings_are_merged_and_split(tmp_path: Path) -> None:
    """Text goes in and comes out by rows, numbers beside it."""
    instance, config = instance_of(tmp_path, onnx_models.string_labels(columns=2))
    requests = Requests(config.inputs)
    sent = [requests.make(words(["cat", "dog"])), requests.make(words(["bird", "?"], ["dog", "dog"]))]
    executed = instance.run(whole(*sent), 3, 3)
    answers = [dict(zip([s.name for s in config.outputs], a, strict=True)) for a in split_rows(sent, executed.outputs)]
    assert answers[0]["id"].tolist() == [[0, 1]]
    assert answers[1]["id"].tolist() == [[2, -1], [1, 1]]
    assert answers[1]["echo"].tolist() == [["bird", "unknown"], ["dog", "dog"]]


def test_part_of_a_request_of_strings(tmp_path: Path) -> None:
    """Chunks of text are cut by rows, too."""
    instance, config = instance_of(tmp_path, onnx_models.string_labels())
    request = Requests(config.inputs).make(words(["cat"], ["dog"], ["bird"]))
    executed = instance.run([Segment(request, 1, 2)], 2, 2)
    assert rows_of(executed.outputs, 0, 2)[0].tolist() == [[1], [2]]


def test_outputs_of_open_size(tmp_path: Path) -> None:
    """A cache that grows by one: the shape of the answer is known when it is there."""
    instance, config = instance_of(tmp_path, onnx_models.growing_cache())
    requests = Requests(config.inputs)
    for length in (0, 3):
        sent = [
            requests.make(np.full((rows, length, 4), rows, np.float32), np.full((rows, 1, 4), -rows, np.float32))
            for rows in (1, 2)
        ]
        executed = instance.run(whole(*sent), 3, 3)
        for request, (present,) in zip(sent, split_rows(sent, executed.outputs), strict=True):
            assert present.shape == (request.rows, length + 1, 4)
            assert np.all(present[:, -1] == -request.rows)
            assert np.all(present[:, :-1] == request.rows)


def test_an_output_whose_rows_cannot_be_told_apart_fails_a_joined_batch(tmp_path: Path) -> None:
    """Twice as many rows as were sent: fine for a request alone, an error for two."""
    instance, config = instance_of(tmp_path, onnx_models.mixed_batch_outputs())
    instance.undeclared_shapes = True
    specs = tuple(TensorSpec(s.name, s.datatype, (4,), True) for s in config.outputs)
    instance._outputs = specs
    x = TensorSpec("x", DataType.FP32, (4,), True)
    instance._inputs = (x,)
    requests = Requests([x])
    one, other = requests.make(np.ones((1, 4), np.float32)), requests.make(np.ones((2, 4), np.float32))
    shapes = {o.spec.name: o.shape for o in instance.run(whole(other), 2, 2).outputs}
    assert shapes == {"rows": (2, 4), "total": (4,), "twice": (4, 4)}
    with pytest.raises(ExecutionFailed, match=r"output 'total' has shape \[4\] for a batch of 3 rows"):
        instance.run(whole(one, other), 3, 3)


def test_buffers_are_kept_for_a_bounded_number_of_shapes(tmp_path: Path) -> None:
    """The least recently used goes first, and every answer stays right."""
    instance, config = instance_of(tmp_path, onnx_models.text_encoder(), "max_batch_size: 4")
    # Fixed outputs only, so that buffers are bound.
    instance._outputs = tuple(spec for spec in config.outputs if spec.name == "pooled")
    requests = Requests(config.inputs)
    for length in (*range(1, MAX_SHAPES + 5), 2, 1):
        ids = np.full((2, length), length, np.int64)
        request = requests.make(ids, np.ones_like(ids))
        (output,) = instance.run(whole(request), 2, 2).outputs
        (wanted,) = instance.session.run(
            {s.name: (s, a) for s, a in zip(config.inputs, (ids, np.ones_like(ids)), strict=True)}, instance._outputs
        )
        np.testing.assert_allclose(output.array, wanted, rtol=1e-5)
        assert len(instance._buffers) <= MAX_SHAPES
    kept = [shape.shapes[0] for shape in instance._buffers]
    assert kept[-2:] == [(2,), (1,)]
    assert (3,) not in kept


def test_a_shape_in_use_is_not_the_one_to_go(tmp_path: Path) -> None:
    """A shape that comes again and again keeps its buffers while others pass."""
    instance, config = instance_of(tmp_path, onnx_models.text_encoder(), "max_batch_size: 1")
    instance._outputs = tuple(spec for spec in config.outputs if spec.name == "pooled")
    requests = Requests(config.inputs)

    def run(length: int) -> None:
        ids = np.zeros((1, length), np.int64)
        instance.run(whole(requests.make(ids, np.ones_like(ids))), 1, 1)

    run(1)
    kept = next(iter(instance._buffers.values()))
    for length in range(2, 2 * MAX_SHAPES):
        run(length)
        run(1)
    assert kept in instance._buffers.values()


def test_misaligned_tensors_are_run(tmp_path: Path) -> None:
    """Bytes at an odd offset of a message give the answer of aligned ones, bound or not."""
    instance, config = instance_of(tmp_path, onnx_models.identity("FP64", ("N", 3)))
    requests = Requests(config.inputs)
    wanted = np.arange(6, dtype=np.float64).reshape(2, 3)
    request = requests.make(wanted)
    request.inputs = [memoryview(b"\x01" + wanted.tobytes())[1:]]
    for unbound in (False, True):
        instance.undeclared_shapes = unbound
        assert np.array_equal(instance.run(whole(request), 2, 2).outputs[0].array, wanted)


@pytest.mark.parametrize("build", [onnx_models.mlp, onnx_models.text_encoder, onnx_models.string_labels])
def test_padding_without_buffers_is_run_and_taken_out_again(
    build: Callable[[], onnx.ModelProto], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with buffers: the session sees the bucket, the clients their rows."""
    instance, config = instance_of(tmp_path, build())
    instance.undeclared_shapes = True
    seen: list[int] = []
    real = instance.session.run

    def run(feeds: Any, outputs: Any) -> Any:
        seen.append(len(next(iter(feeds.values()))[1]))
        return real(feeds, outputs)

    monkeypatch.setattr(instance.session, "run", run)
    requests = Requests(config.inputs)
    shape = tuple(8 if size == -1 else size for size in config.inputs[0].shape)
    sent = []
    for rows in (1, 2):
        arrays = [
            np.full((rows, *shape), "ham", object)
            if spec.datatype is DataType.BYTES
            else np.full((rows, *shape), rows).astype(spec.datatype.dtype)
            for spec in config.inputs
        ]
        sent.append(requests.make(*arrays))
    padded = split_rows(sent, instance.run(whole(*sent), 3, 8).outputs)
    plain = split_rows(sent, instance.run(whole(*sent), 3, 3).outputs)
    assert seen == [8, 3]
    for one, other in zip(padded, plain, strict=True):
        for left, right in zip(one, other, strict=True):
            assert left.shape == right.shape
            if left.dtype.kind == "f":
                np.testing.assert_allclose(left, right, atol=1e-6)
            else:
                np.testing.assert_array_equal(left, right)


def test_padding_that_cannot_be_taken_out_is_left_out() -> None:
    """An answer without a row per row belongs to the request, not to what was added to it."""
    spec = TensorSpec("x", DataType.FP32, (2,), True)
    found = TensorSpec("y", DataType.FP32, (2,), True)
    # As many as are positive: a selection, as detections are.
    session = SessionDouble(lambda arrays: {"y": arrays["x"][arrays["x"][:, 0] > 0]})
    instance = double_instance(session, (spec,), (found,), 8)
    instance.undeclared_shapes = True
    x = np.array([[1, 2], [-1, 0], [3, 4]], np.float32)
    outputs = instance.run(whole(Requests((spec,)).make(x)), 3, 8).outputs
    assert session.runs == [8, 3]
    np.testing.assert_array_equal(outputs[0].array, x[[0, 2]])


@pytest.mark.parametrize("dims", [("N", 4), ("N",), (), (3, 0), ("N", 0), ("N", "M")])
@pytest.mark.parametrize("unbound", [False, True])
def test_bf16_travels_as_bits(tmp_path: Path, dims: tuple[int | str, ...], unbound: bool) -> None:
    """BF16 in and out, of any rank: the 16 bits of each element are what was sent."""
    instance, config = instance_of(tmp_path, onnx_models.identity("BF16", dims))
    instance.undeclared_shapes = unbound
    shape = tuple(2 if isinstance(d, str) else d for d in dims)
    bits = (np.arange(int(np.prod(shape)), dtype=np.uint16) + 0x3F80).reshape(shape)
    request = Requests(config.inputs, config.batched).make(bits)
    (output,) = instance.run(whole(request), request.rows, request.rows).outputs
    assert output.shape == shape
    assert np.array_equal(output.array, bits)


def test_bf16_beside_other_types(tmp_path: Path) -> None:
    """Only the BF16 tensors are bits."""
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)
    model = onnx_models.make_model(
        "cast", [node], [onnx_models.value("x", "BF16", ["N", "D"])], [onnx_models.value("y", "FP32", ["N", "D"])]
    )
    instance, config = instance_of(tmp_path, model)
    request = Requests(config.inputs).make(np.array([[0x3F80, 0xC000]], np.uint16))
    assert instance.run(whole(request), 1, 1).outputs[0].array.tolist() == [[1.0, -2.0]]


def test_tensors_too_large_for_memory_are_out_of_memory() -> None:
    """The allocation of a batch's buffers is the device's memory, too: the batch can be made smaller."""
    x = TensorSpec("x", DataType.FP32, (4,), True)
    y = TensorSpec("y", DataType.FP32, (4,), True)
    instance = double_instance(SessionDouble(lambda arrays: {"y": arrays["x"]}), (x,), (y,), 10**17)
    request = Requests([x]).make(np.ones((1, 4), np.float32))
    with pytest.raises(OutOfMemory, match="100000000000000000 rows"):
        instance.run(whole(request), 1, 10**17)
    assert instance.run(whole(request), 1, 1).outputs[0].array.tolist() == [[1.0] * 4]


def test_a_failed_run_leaves_the_instance_usable(tmp_path: Path) -> None:
    """Poisoned, then healthy, on the same buffers."""
    instance, config = instance_of(tmp_path, onnx_models.poison())
    requests = Requests(config.inputs)
    with pytest.raises(ExecutionFailed, match="out of data bounds"):
        instance.run(whole(requests.make(np.array([[99999]], np.int64))), 1, 1)
    assert instance.run(whole(requests.make(np.array([[0]], np.int64))), 1, 1).outputs[0].shape == (1, 4)


def test_what_counts_as_undeclared() -> None:
    """Trailing sizes and datatypes count, the number of rows and open sizes do not."""
    specs = [TensorSpec("y", DataType.FP32, (-1, 2), True)]
    assert not undeclared(specs, [np.zeros((5, 9, 2), np.float32)])
    assert undeclared(specs, [np.zeros((5, 9, 3), np.float32)])
    assert undeclared(specs, [np.zeros((5, 2), np.float32)])
    assert undeclared(specs, [np.zeros((5, 9, 2), np.float64)])


def test_the_pool_hands_each_instance_to_one() -> None:
    """Two instances: two takers hold different ones, and one given back can be had again."""
    x = TensorSpec("x", DataType.FP32, (1,), True)
    instances = [double_instance(SessionDouble(dict), (x,), (x,), 1) for _ in range(2)]
    pool = SessionPool(instances)
    one, other = pool.acquire(), pool.acquire()
    assert {id(one), id(other)} == {id(i) for i in instances}
    pool.release(one)
    assert pool.acquire() is one
