"""Bound buffers: what is merged, what is answered, what is kept between batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from service.engine.buffers import ShapeBuffers, as_array, batch_output, bindable
from service.request import ShapeClass
from service.scheduler import Segment
from service.tensor import DataType, TensorSpec
from tests.support import onnx_models
from tests.unit.engine.support import Requests, SessionDouble, instance_of, split_rows, whole

X = TensorSpec("x", DataType.FP32, (4,), batched=True)
Y = TensorSpec("y", DataType.FP32, (4,), batched=True)


def numbers(rows: int, first: float = 0.0) -> np.ndarray:
    return (np.arange(rows * 4, dtype=np.float32) + np.float32(first)).reshape(rows, 4)


def test_rows_of_several_requests_come_back_to_each(tmp_path: Path) -> None:
    """One execution of 1 + 3 + 2 rows answers each request with its own rows."""
    instance, config = instance_of(tmp_path, onnx_models.mlp(inputs=4))
    requests = Requests(config.inputs)
    sent = [requests.make(numbers(rows, 10.0 * rows)) for rows in (1, 3, 2)]
    executed = instance.run(whole(*sent), 6, 6)
    spec = config.inputs[0]
    for request, (answer,) in zip(sent, split_rows(sent, executed.outputs), strict=True):
        alone = instance.session.run(
            {"x": (spec, np.frombuffer(request.inputs[0], np.float32).reshape(-1, 4))}, config.outputs
        )
        np.testing.assert_allclose(answer, alone[0], rtol=1e-5)


def test_part_of_a_request_rides_with_others(tmp_path: Path) -> None:
    """Rows 2 to 4 of a request of 5 share a batch with a whole request, and only those rows are merged."""
    instance, config = instance_of(tmp_path, onnx_models.identity())
    requests = Requests(config.inputs)
    large, small = requests.make(numbers(5)), requests.make(numbers(1, 100.0))
    executed = instance.run([Segment(large, 2, 2), Segment(small, 0, 1)], 3, 3)
    assert np.array_equal(executed.outputs[0].array, np.concatenate([numbers(5)[2:4], numbers(1, 100.0)]))


def test_an_input_without_rows_is_given_once(tmp_path: Path) -> None:
    """A side input is the whole tensor, not a row per request."""
    text = 'max_batch_size: 8\nparameters { key: "unbatched_inputs" value { string_value: "rate" } }\n'
    instance, config = instance_of(tmp_path, onnx_models.side_input(), text)
    requests = Requests(config.inputs)
    order = [spec.name for spec in config.inputs]
    rate = np.array(3, np.int64)
    sent = [requests.make(*[{"x": numbers(rows, 5.0), "rate": rate}[name] for name in order]) for rows in (2, 1)]
    assert sent[0].shape is sent[1].shape
    executed = instance.run(whole(*sent), 3, 3)
    for request, (answer,) in zip(sent, split_rows(sent, executed.outputs), strict=True):
        assert np.array_equal(answer, numbers(request.rows, 5.0) * 3)


def test_growing_keeps_answers_right(tmp_path: Path) -> None:
    """Larger, smaller, larger again: each batch sees its own rows, whatever was bound before."""
    instance, config = instance_of(tmp_path, onnx_models.identity())
    requests = Requests(config.inputs)
    for turn, rows in enumerate((1, 7, 2, 16, 16, 3, 64, 1)):
        request = requests.make(numbers(rows, 1000.0 * turn))
        executed = instance.run(whole(request), rows, rows)
        assert np.array_equal(executed.outputs[0].array, numbers(rows, 1000.0 * turn))


def test_a_size_is_bound_once() -> None:
    """The second batch of a size only runs; growing binds anew."""
    session = SessionDouble(lambda arrays: {"y": arrays["x"]})
    requests = Requests([X])
    buffers = ShapeBuffers(session, requests.shape(numbers(1)), [X], [Y])  # type: ignore[arg-type]
    buffers.reserve(4, 8)
    first = buffers.bound(2)
    assert buffers.bound(2) is first
    assert buffers.bound(3) is not first
    assert [output.shape for output in first.outputs] == [(2, 4)]
    buffers.reserve(4, 8)
    assert buffers.bound(2) is first
    buffers.reserve(5, 8)
    assert buffers.bound(2) is not first


def test_padding_repeats_the_last_row() -> None:
    """Rows that nobody sent are copies of one that somebody did: neither zeros nor what an earlier batch left there."""
    seen: list[np.ndarray] = []

    def compute(arrays: object) -> dict[str, np.ndarray]:
        seen.append(arrays["x"].copy())  # type: ignore[index]
        return {"y": arrays["x"]}  # type: ignore[index]

    session = SessionDouble(compute)
    requests = Requests([X])
    buffers = ShapeBuffers(session, requests.shape(numbers(1)), [X], [Y])  # type: ignore[arg-type]
    buffers.reserve(8, 8)
    buffers.merge(whole(requests.make(numbers(8, 500.0))), 8, 8)
    session.run_bound(buffers.bound(8).binding)
    buffers.merge(whole(requests.make(numbers(2)), requests.make(numbers(1, 50.0))), 3, 5)
    session.run_bound(buffers.bound(5).binding)
    assert np.array_equal(seen[1][:3], np.concatenate([numbers(2), numbers(1, 50.0)]))
    assert np.array_equal(seen[1][3:], np.repeat(numbers(1, 50.0), 2, axis=0))


def test_a_poisoned_row_does_not_come_back_as_padding(tmp_path: Path) -> None:
    """After a batch that failed, a smaller one padded to the same bucket succeeds."""
    instance, config = instance_of(tmp_path, onnx_models.poison())
    requests = Requests(config.inputs)
    poisoned = requests.make(np.array([[0], [1], [2], [1000]], np.int64))
    with pytest.raises(Exception, match="indices element out of data bounds"):
        instance.run(whole(poisoned), 4, 4)
    executed = instance.run(whole(requests.make(np.array([[1], [2]], np.int64))), 2, 4)
    assert executed.outputs[0].shape[0] == 4


def test_memory_that_is_not_there_leaves_smaller_batches_possible() -> None:
    """Buffers that cannot be made are an error of that batch; the next one allocates what it needs."""
    session = SessionDouble(lambda arrays: {"y": arrays["x"]})
    requests = Requests([X])
    buffers = ShapeBuffers(session, requests.shape(numbers(1)), [X], [Y])  # type: ignore[arg-type]
    buffers.reserve(2, 10**17)
    with pytest.raises(MemoryError):
        buffers.reserve(10**17, 10**17)
    buffers.reserve(2, 10**17)
    buffers.merge(whole(requests.make(numbers(2))), 2, 2)
    bound = buffers.bound(2)
    session.run_bound(bound.binding)
    assert np.array_equal(bound.outputs[0].array, numbers(2))


@pytest.mark.parametrize(
    ("shape", "inputs", "outputs", "expected"),
    [
        (((4,),), [X], [Y], True),
        (((0,),), [X], [Y], False),
        ((None,), [X], [Y], True),
        (((4,),), [TensorSpec("x", DataType.BYTES, (4,), True)], [Y], False),
        (((4,),), [X], [TensorSpec("y", DataType.BYTES, (4,), True)], False),
        (((4,),), [X], [TensorSpec("y", DataType.FP32, (-1,), True)], False),
        (((4,),), [X], [TensorSpec("y", DataType.FP32, (0,), True)], False),
        (((),), [X], [TensorSpec("y", DataType.FP32, (), True)], True),
    ],
)
def test_what_can_be_bound(shape: object, inputs: list[TensorSpec], outputs: list[TensorSpec], expected: bool) -> None:
    """Fixed-size elements, at least one of them, and outputs whose size is known beforehand."""
    assert bindable(ShapeClass(shape, (), 1), inputs, outputs) is expected  # type: ignore[arg-type]


def test_an_output_that_does_not_follow_the_batch_is_given_whole() -> None:
    """Three rows in, two out: no row belongs to anybody, so the output counts as not batched."""
    output = batch_output(Y, np.zeros((2, 4), np.float32), 3)
    assert not output.spec.batched
    assert output.shape == (2, 4)
    assert output.view is not None
    assert len(output.view) == 32
    assert batch_output(Y, np.zeros((), np.float32), 3).shape == ()


@pytest.mark.parametrize("offset", range(9))
def test_bytes_at_any_offset_become_an_array(offset: int) -> None:
    """A message's tensors begin where they begin; ONNX Runtime wants them aligned."""
    wanted = np.arange(6, dtype=np.float64).reshape(2, 3)
    message = memoryview(bytes(offset) + wanted.tobytes() + b"rest")
    spec = TensorSpec("x", DataType.FP64, (3,), True)
    array = as_array(message[offset : offset + wanted.nbytes], spec, (2, 3))
    assert array.flags.aligned
    assert np.array_equal(array, wanted)


def test_no_bytes_are_an_empty_array() -> None:
    """A tensor with a dimension of 0 has a shape and no data."""
    assert as_array(b"", TensorSpec("x", DataType.FP32, (0,), True), (3, 0)).shape == (3, 0)


def test_a_session_takes_buffers_of_rank_0(tmp_path: Path) -> None:
    """A scalar model has no rows: its inputs and outputs are bound as they are."""
    instance, config = instance_of(tmp_path, onnx_models.scalar_sum())
    assert not config.batched
    requests = Requests(config.inputs, batched=False)
    request = requests.make(np.array(2.5, np.float32), np.array(4.0, np.float32))
    (output,) = instance.run(whole(request), 1, 1).outputs
    assert output.shape == ()
    assert float(output.array) == 6.5


def test_an_optional_input_may_be_absent(tmp_path: Path) -> None:
    """With the input the request's value counts, without it the model's default; the two do not share buffers."""
    text = (
        'max_batch_size: 4\ninput { name: "scale" optional: true }\n'
        'parameters { key: "unbatched_inputs" value { string_value: "scale" } }\n'
    )
    instance, config = instance_of(tmp_path, onnx_models.default_input(), text)
    assert [spec.optional for spec in config.inputs] == [False, True]
    requests = Requests(config.inputs)
    for scale, factor in ((None, 2.0), (np.array([5], np.float32), 5.0), (None, 2.0)):
        request = requests.make(numbers(3), scale)
        assert np.array_equal(instance.run(whole(request), 3, 3).outputs[0].array, numbers(3) * factor)
