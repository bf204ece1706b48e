"""Merging and splitting: whatever rows are joined, each request gets what it would have got alone."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import helper

from service.clock import NEVER_NS
from service.config.complete import complete
from service.config.graph import read_graph
from service.engine.options import plan_session
from service.engine.pool import Instance
from service.engine.session import OnnxSession
from service.pb import model_config_pb2 as pb
from service.request import InferenceRequest, ShapeClass
from service.scheduler import Segment
from service.tensor import Array, DataType, TensorSpec
from tests.support import onnx_models
from tests.unit.engine.support import CPU, Answers, Requests, rows_of, split_rows, whole

MOST_ROWS = 4
WORDS = ("", "a", "ham", "späm", "eggs and ham")

Tensor = tuple[str, tuple[int, ...], bool]
# Name of a datatype, shape of a row, whether the file states its sizes (else they are open, and nothing is bound).
tensors: st.SearchStrategy[Tensor] = st.tuples(
    st.sampled_from([datatype.wire_name for datatype in DataType]),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.booleans(),
)
sizes = st.lists(st.integers(1, MOST_ROWS), min_size=1, max_size=5)


def identities(tensors: list[Tensor]) -> onnx.ModelProto:
    """`x0` -> `y0`, `x1` -> `y1`...: several inputs and outputs of any datatypes and shapes, batched."""
    nodes, inputs, outputs = [], [], []
    for index, (datatype, shape, stated) in enumerate(tensors):
        dims = ["N", *(size if stated else f"D{index}_{axis}" for axis, size in enumerate(shape))]
        nodes.append(helper.make_node("Identity", [f"x{index}"], [f"y{index}"]))
        inputs.append(onnx_models.value(f"x{index}", datatype, dims))
        outputs.append(onnx_models.value(f"y{index}", datatype, dims))
    return onnx_models.make_model("identities", nodes, inputs, outputs)


def draw(rng: np.random.Generator, spec: TensorSpec, shape: tuple[int, ...]) -> Array:
    """Any contents, as the codec passes them: all bit patterns of numbers, 0 and 1 for BOOL, text for BYTES."""
    if spec.datatype is DataType.BYTES:
        words = np.empty(shape, object)
        words[...] = rng.choice(np.array(WORDS, object), size=shape)
        return words
    if spec.datatype is DataType.BOOL:
        return rng.integers(0, 2, shape).astype(np.bool_)
    count = int(np.prod(shape)) * spec.datatype.itemsize
    return np.frombuffer(rng.bytes(count), spec.datatype.dtype).reshape(shape)


def instance_of(directory: str, model: onnx.ModelProto) -> tuple[Instance, OnnxSession, tuple[TensorSpec, ...]]:
    path = onnx_models.write_model(Path(directory), "model", model) / "1" / "model.onnx"
    graph = read_graph(path)
    config = complete(None, "model", graph.inputs, graph.outputs).config
    session = OnnxSession(path, plan_session(config, CPU))
    return Instance(session, config.inputs, config.outputs, config.max_batch_size), session, config.inputs


def same(one: Array, other: Array) -> bool:
    """Equal in shape and in every bit (NaN included)."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return one.tolist() == other.tolist() if one.dtype == object else one.tobytes() == other.tobytes()


@settings(max_examples=120, deadline=None)
@given(
    tensors=st.lists(tensors, min_size=1, max_size=3),
    batches=st.lists(sizes, min_size=1, max_size=3),
    padding=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_every_request_gets_the_rows_of_its_own(
    tensors: list[Tensor], batches: list[list[int]], padding: int, seed: int
) -> None:
    """Any datatypes, ranks and sizes (0 included), several batches on one instance, padded: as if run alone."""
    # Refused at load: the one pair of datatypes that cannot meet in a model.
    assume(not {"BF16", "BYTES"} <= {datatype for datatype, _, _ in tensors})
    rng = np.random.default_rng(seed)
    with TemporaryDirectory() as directory:
        instance, session, inputs = instance_of(directory, identities(tensors))
        outputs = instance._outputs
        requests = Requests(inputs)
        for rows_each in batches:
            contents = [
                [draw(rng, spec, (rows, *shape)) for spec, (_, shape, _) in zip(inputs, tensors, strict=True)]
                for rows in rows_each
            ]
            sent = [requests.make(*arrays) for arrays in contents]
            assert len({id(request.shape) for request in sent}) == 1
            total = sum(rows_each)
            executed = instance.run(whole(*sent), total, total + padding)
            for arrays, answers in zip(contents, split_rows(sent, executed.outputs), strict=True):
                feeds = {s.name: (s, a) for s, a in zip(inputs, arrays, strict=True)}
                alone = session.run(feeds, outputs)
                for answer, wanted, array in zip(answers, alone, arrays, strict=True):
                    assert same(answer, wanted)
                    assert same(answer, array)


@settings(max_examples=80, deadline=None)
@given(
    tensor=tensors,
    rows=st.integers(2, 9),
    cuts=st.sets(st.integers(1, 8), max_size=4),
    company=st.integers(0, 2),
    seed=st.integers(0, 2**31),
)
def test_chunks_of_a_request_put_together_are_the_request(
    tensor: Tensor, rows: int, cuts: set[int], company: int, seed: int
) -> None:
    """A request cut anywhere, each chunk in a batch with rows of others: its chunks in order are its answer."""
    rng = np.random.default_rng(seed)
    with TemporaryDirectory() as directory:
        instance, _, inputs = instance_of(directory, identities([tensor]))
        requests = Requests(inputs)
        array = draw(rng, inputs[0], (rows, *tensor[1]))
        request = requests.make(array)
        edges = [0, *sorted(cut for cut in cuts if cut < rows), rows]
        pieces = []
        for first, end in pairwise(edges):
            others = [requests.make(draw(rng, inputs[0], (1, *tensor[1]))) for _ in range(company)]
            segments = [*whole(*others), Segment(request, first, end - first)]
            total = company + end - first
            pieces += rows_of(instance.run(segments, total, total).outputs, company, end - first)
        assert same(np.concatenate(pieces), array)


@settings(max_examples=60, deadline=None)
@given(tensor=tensors, seed=st.integers(0, 2**31))
def test_tensors_without_a_batch_come_back_whole(tensor: Tensor, seed: int) -> None:
    """Unbatched models: any datatype, rank 0 and empty tensors included."""
    datatype, shape, _ = tensor
    rng = np.random.default_rng(seed)
    with TemporaryDirectory() as directory:
        instance, _, inputs = instance_of(directory, onnx_models.identity(datatype, shape))
        array = draw(rng, inputs[0], shape)
        request = Requests(inputs, batched=False).make(array)
        (output,) = instance.run(whole(request), 1, 1).outputs
        (answer,) = rows_of([output], 0, 1)
        assert same(answer, array)


@settings(max_examples=120, deadline=None)
@given(
    datatype=st.sampled_from([d for d in DataType if d is not DataType.BYTES]),
    row=st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple),
    axis=st.integers(0, 3),
    stated=st.booleans(),
    batches=st.lists(sizes, min_size=1, max_size=3),
    padding=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_states_whose_batch_dimension_is_anywhere(
    datatype: DataType, row: tuple[int, ...], axis: int, stated: bool, batches: list[list[int]], padding: int, seed: int
) -> None:
    """Rows joined along any axis and cut out again, beside a tensor with its rows in front: each as it was."""
    axis = min(axis, len(row))
    rng = np.random.default_rng(seed)
    dims: list[int | str] = [size if stated else f"D{index}" for index, size in enumerate(row)]
    dims.insert(axis, "N")
    model = onnx_models.make_model(
        "states",
        [helper.make_node("Identity", ["s"], ["t"]), helper.make_node("Identity", ["x"], ["y"])],
        [onnx_models.value("s", datatype.wire_name, dims), onnx_models.value("x", "FP32", ["N", 2])],
        [onnx_models.value("t", datatype.wire_name, dims), onnx_models.value("y", "FP32", ["N", 2])],
    )
    shape = row if stated else tuple(-1 for _ in row)
    given = TensorSpec("s", datatype, shape, True, axis=axis), TensorSpec("x", DataType.FP32, (2,), True)
    taken = TensorSpec("t", datatype, shape, True, axis=axis), TensorSpec("y", DataType.FP32, (2,), True)
    with TemporaryDirectory() as directory:
        path = onnx_models.write_model(Path(directory), "model", model) / "1" / "model.onnx"
        graph = read_graph(path)
        text = pb.ModelConfig(max_batch_size=64)
        text.sequence_batching.state.add(input_name="s", output_name="t", dims=list(shape)).initial_state.add(
            dims=list(row), zero_data=True
        )
        text.parameters["state_batch_axis"].string_value = f"s={axis}"
        config = complete(text, "model", graph.inputs, graph.outputs).config
        assert config.session_inputs == (given[1], given[0])
        instance = Instance(OnnxSession(path, plan_session(config, CPU)), given, taken, 64)
        for rows_each in batches:
            contents = [
                (draw(rng, given[0], (*row[:axis], rows, *row[axis:])), draw(rng, given[1], (rows, 2)))
                for rows in rows_each
            ]
            shapes = ShapeClass((row, (2,)), (), 1)
            sent = [
                InferenceRequest(
                    len(x), 0, NEVER_NS, 1, shapes, [bytes(s.tobytes()), x.tobytes()], Answers(), None, b""
                )
                for s, x in contents
            ]
            total = sum(rows_each)
            executed = instance.run(whole(*sent), total, total + padding)
            first = 0
            for (state, x), rows in zip(contents, rows_each, strict=True):
                outputs = executed.outputs
                assert all(output.spec.batched for output in outputs)
                assert same(np.ascontiguousarray(taken[0].rows(outputs[0].array, first, first + rows)), state)
                assert same(outputs[1].array[first : first + rows], x)
                first += rows
