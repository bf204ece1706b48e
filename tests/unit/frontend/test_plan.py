"""The plan of a request: what its header is checked for, and what the messages say."""

from __future__ import annotations

from typing import Any

import pytest

from service.clock import NS_PER_MS
from service.errors import InvalidRequest, ServiceError, UnsupportedFeature
from service.frontend.codec.plan import RequestPlan, make_plan
from service.pb.grpc_service_pb2 import ModelInferRequest
from service.request import SequenceFlags
from tests.unit.frontend.served import FakeModel, model, spec


def message(*tensors: tuple[str, str, list[int]], outputs: tuple[str, ...] = (), name: str = "m") -> Any:
    request = ModelInferRequest(model_name=name)
    for tensor, datatype, shape in tensors:
        request.inputs.add(name=tensor, datatype=datatype, shape=shape)
    for wanted in outputs:
        request.outputs.add(name=wanted)
    return request


def refused(request: Any, served: FakeModel) -> str:
    """The message that `request` is refused with as invalid."""
    with pytest.raises(InvalidRequest) as caught:
        make_plan(request, served)
    return str(caught.value)


X = ("x", "FP32", [2, 4])


def test_a_plan_states_rows_sizes_shapes_and_outputs() -> None:
    """All that the data must look like and all that the answer needs is in the plan."""
    served = model(spec("x"), spec("ids", "INT64", (-1,)), spec("words", "BYTES", (2,)))
    plan = make_plan(message(("words", "BYTES", [3, 2]), ("x", "FP32", [3, 4]), ("ids", "INT64", [3, 5])), served)
    assert plan.rows == 3
    # in the order of the message's raw tensors; the index is that of the model's input
    assert [(p.name, p.index, p.count, p.nbytes) for p in plan.inputs] == [
        ("words", 2, 6, -1),
        ("x", 0, 12, 48),
        ("ids", 1, 15, 120),
    ]
    assert plan.shapes == ((4,), (5,), (2,))
    assert plan.outputs == (0,)
    assert plan.shape is served.shape_class(plan.shapes, ())


def test_an_unbatched_model_has_one_row_and_whole_shapes() -> None:
    """Where nothing is batched, the first dimension is one like the others."""
    served = model(spec("x", shape=(3, 4), batched=False), max_batch_size=0)
    plan = make_plan(message(("x", "FP32", [3, 4])), served)
    assert plan.rows == 1
    assert plan.shapes == ((3, 4),)
    assert not plan.inputs[0].side
    assert plan.shape is not None


def test_a_scalar_is_a_tensor_of_one_element() -> None:
    """Rank 0 has no dimensions and one element."""
    served = model(spec("a", shape=(), batched=False), max_batch_size=0)
    assert make_plan(message(("a", "FP32", [])), served).inputs[0].nbytes == 4


def test_optional_inputs_may_be_left_out() -> None:
    """What is absent has no shape; what is given is counted as usual."""
    served = model(spec("x"), spec("scale", shape=(1,), batched=False, optional=True))
    assert make_plan(message(X), served).shapes == ((4,), None)
    assert make_plan(message(X, ("scale", "FP32", [1])), served).shapes == ((4,), (1,))


def test_side_inputs_leave_the_shape_class_open() -> None:
    """Who may share a batch depends on the values of side inputs, which a header does not have."""
    served = model(spec("x"), spec("rate", "INT64", (), batched=False))
    plan = make_plan(message(X, ("rate", "INT64", [])), served)
    assert plan.shape is None
    assert [p.side for p in plan.inputs] == [False, True]


def test_outputs_come_in_the_order_asked_for() -> None:
    """None asked for means all; otherwise exactly those, in the client's order."""
    served = model(outputs=(spec("p"), spec("q"), spec("r")))
    assert make_plan(message(X), served).outputs == (0, 1, 2)
    assert make_plan(message(X, outputs=("r", "p")), served).outputs == (2, 0)


@pytest.mark.parametrize(
    ("request_message", "fragments"),
    [
        (message(("z", "FP32", [2, 4])), ["unexpected inference input 'z'", "'m'", "it has 'x'"]),
        (message(X, X), ["input 'x' is given twice", "'m'"]),
        (message(), ["expected 1 inputs but got 0", "'m'", "missing 'x'"]),
        (message(("x", "FP64", [2, 4])), ["'x'", "'FP64'", "model 'm' expects 'FP32'"]),
        (message(("x", "float", [2, 4])), ["'x'", "'float'", "expects 'FP32'"]),
        (message(("x", "", [2, 4])), ["'x'", "''", "expects 'FP32'"]),
        (message(("x", "FP32", [2, 5])), ["unexpected shape for input 'x'", "'m'", "[-1, 4]", "got [2, 5]"]),
        (message(("x", "FP32", [4])), ["unexpected shape for input 'x'", "[-1, 4]", "got [4]"]),
        (message(("x", "FP32", [1, 2, 4])), ["unexpected shape for input 'x'", "got [1, 2, 4]"]),
        (message(("x", "FP32", [])), ["unexpected shape for input 'x'", "got []"]),
        (message(("x", "FP32", [-1, 4])), ["unexpected shape for input 'x'", "got [-1, 4]"]),
        (message(("x", "FP32", [0, 4])), ["batch-size must be <= 8 and >= 1 for 'm'", "got 0 for input 'x'"]),
        (message(("x", "FP32", [9, 4])), ["batch-size must be <= 8", "'m'", "got 9 for input 'x'"]),
        (message(("x", "FP32", [2**62, 4])), ["input 'x'", "'m'"]),
        (message(("x", "FP32", [1] * 40)), ["unexpected shape for input 'x'"]),
        (message(X, outputs=("z",)), ["unexpected inference output 'z'", "'m'", "it has 'y'"]),
        (message(X, outputs=("y", "y")), ["output 'y' is requested twice", "'m'"]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(request_message: Any, fragments: list[str]) -> None:
    """A refusal names the model, the tensor and what was expected."""
    text = refused(request_message, model())
    for fragment in fragments:
        assert fragment in text, text


def test_batched_inputs_must_agree_on_the_rows() -> None:
    """All batched inputs of a request have as many rows as the first of them."""
    served = model(spec("a"), spec("b"))
    text = refused(message(("a", "FP32", [2, 4]), ("b", "FP32", [3, 4])), served)
    assert text == "input 'b' of model 'm' has batch size 3, but input 'a' has 2"


def test_a_model_without_inputs_says_so() -> None:
    """An input sent to a model that has none is told that there are none."""
    served = FakeModel("m", (), (spec("y", batched=False),), max_batch_size=0)
    assert "it has none" in refused(message(("x", "FP32", [1])), served)
    assert make_plan(message(), served).rows == 1


def test_a_batched_request_needs_an_input_with_rows() -> None:
    """When all batched inputs are optional and absent, nothing says how many rows there are: refused."""
    served = model(spec("x", optional=True), spec("rate", "INT64", (), batched=False, optional=True))
    text = refused(message(("rate", "INT64", [])), served)
    assert "'m'" in text
    assert "'x'" in text


@pytest.mark.parametrize(
    "shape", [[1, 0, 2**62], [1, 2**62, 0], [1, 0, 2**33, 2**33], [8, 0, 2**60], [1, 2**40, 2**40], [1, 2**31, 1]]
)
def test_dimensions_beyond_any_message_are_refused(shape: list[int]) -> None:
    """No message holds so many elements, and an empty tensor with such a dimension is one that NumPy cannot make."""
    served = model(spec("x", shape=(-1,) * (len(shape) - 1)))
    text = refused(message(("x", "FP32", shape)), served)
    assert "input 'x'" in text
    assert "'m'" in text


def test_empty_tensors_of_ordinary_dimensions_are_accepted() -> None:
    """A tensor without elements is as good as any other."""
    served = model(spec("x", shape=(-1, 4)))
    plan = make_plan(message(("x", "FP32", [2, 0, 4])), served)
    assert (plan.inputs[0].count, plan.inputs[0].nbytes) == (0, 0)


# Parameters


def with_parameter(name: str, **value: Any) -> Any:
    request = message(X)
    for kind, given in value.items():
        setattr(request.parameters[name], kind, given)
    if not value:
        request.parameters[name].SetInParent()
    return request


def planned(request: Any, **more: Any) -> RequestPlan:
    return make_plan(request, model(**more))


@pytest.mark.parametrize("kind", ["int64_param", "uint64_param"])
def test_timeout_and_priority_come_signed_or_unsigned(kind: str) -> None:
    """Clients send both as int64 or as uint64; the timeout is in microseconds."""
    assert planned(with_parameter("timeout", **{kind: 5_000})).timeout_ns == 5 * NS_PER_MS
    assert planned(with_parameter("priority", **{kind: 2}), priority_levels=3).priority == 2


def test_no_timeout_is_zero_and_a_huge_one_is_kept_exactly() -> None:
    """0 means none was asked for; the largest that fits the message does not overflow."""
    assert planned(message(X)).timeout_ns == 0
    assert planned(with_parameter("timeout", uint64_param=2**64 - 1)).timeout_ns == (2**64 - 1) * 1000


@pytest.mark.parametrize(("asked", "given"), [(0, 2), (1, 1), (3, 3), (4, 2), (2**64 - 1, 2)])
def test_priority_zero_or_beyond_the_levels_is_the_default(asked: int, given: int) -> None:
    """As in Triton: priorities beyond the configured levels fall back to the default."""
    request = with_parameter("priority", uint64_param=asked)
    assert planned(request, priority_levels=3, default_priority=2).priority == given


@pytest.mark.parametrize("name", ["timeout", "priority"])
@pytest.mark.parametrize(
    ("value", "fragment"),
    [
        ({"int64_param": -1}, "must not be negative, got -1"),
        ({"string_param": "1"}, "must be an integer, got string_param"),
        ({"bool_param": True}, "must be an integer, got bool_param"),
        ({"double_param": 1.0}, "must be an integer, got double_param"),
        ({}, "must be an integer, got nothing"),
    ],
)
def test_timeout_and_priority_must_be_natural_numbers(name: str, value: dict[str, Any], fragment: str) -> None:
    """A parameter of the wrong type is refused with its name and the type it came in."""
    text = refused(with_parameter(name, **value), model())
    assert f"parameter '{name}'" in text
    assert fragment in text


def test_sequence_parameters_are_refused_only_when_they_ask_for_a_sequence() -> None:
    """Clients send zero and false with every request: that is no sequence."""
    for value in ({"int64_param": 0}, {"string_param": ""}, {}):
        planned(with_parameter("sequence_id", **value))
    planned(with_parameter("sequence_start", bool_param=False))
    for name, value in (("sequence_id", {"int64_param": 7}), ("sequence_start", {"bool_param": True})):
        text = refused(with_parameter(name, **value), model())
        assert f"parameter '{name}'" in text
        assert "model 'm' is not a sequence model" in text


def stateful(**parameters: object) -> SequenceFlags:
    """What a stateful model is told by these parameters, by field of `InferParameter`."""
    sent = message(("x", "FP32", [1, 4]))
    for name, (field, value) in parameters.items():  # type: ignore[misc]
        setattr(sent.parameters[name], field, value)
    flags = make_plan(sent, model(stateful=True)).sequence
    assert flags is not None
    return flags


def test_sequence_parameters_of_a_stateful_model() -> None:
    """Numbers and texts are ids, flags that are not given are false, and a negative number is one."""
    start, end = ("bool_param", True), ("bool_param", False)
    assert stateful(sequence_id=("int64_param", 7)) == SequenceFlags(7, False, False)
    assert stateful(sequence_id=("int64_param", -7), sequence_start=start) == SequenceFlags(-7, True, False)
    assert stateful(sequence_id=("uint64_param", 2**63)) == SequenceFlags(2**63, False, False)
    assert stateful(sequence_id=("string_param", "7"), sequence_start=end, sequence_end=start) == SequenceFlags(
        "7", False, True
    )
    assert make_plan(message(X), model()).sequence is None


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({}, "must specify a non-zero or non-empty correlation ID"),
        ({"sequence_id": ("int64_param", 0)}, "must specify a non-zero or non-empty correlation ID"),
        ({"sequence_id": ("string_param", "")}, "must specify a non-zero or non-empty correlation ID"),
        ({"sequence_id": ("double_param", 1.0)}, "'sequence_id' must be an integer or a string, got double_param"),
        ({"sequence_id": ("string_param", "x" * 129)}, "cannot be longer than 128 characters, got 129"),
        ({"sequence_id": ("int64_param", 1), "sequence_start": ("int64_param", 1)}, "'sequence_start' must be a bool"),
        ({"sequence_id": ("int64_param", 1), "sequence_end": ("string_param", "1")}, "'sequence_end' must be a bool"),
    ],
)
def test_wrong_sequence_parameters_are_named(parameters: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidRequest, match="m") as caught:
        stateful(**parameters)
    assert said in str(caught.value)


def test_a_step_is_one_row() -> None:
    sent = message(X)
    sent.parameters["sequence_id"].int64_param = 7
    assert "to model 'm' must specify batch-size 1" in refused(sent, model(stateful=True))


def test_reserved_parameters() -> None:
    """What the C++ client sends with every call passes; other reserved names do not."""
    planned(with_parameter("triton_enable_empty_final_response", bool_param=False))
    planned(with_parameter("triton_enable_empty_final_response", bool_param=True))
    text = refused(with_parameter("triton_enable_empty_final_response", int64_param=1), model())
    assert "must be a bool, got int64_param" in text
    text = refused(with_parameter("triton_enable_empty_final_response"), model())
    assert "must be a bool, got nothing" in text
    assert "reserved, got 'triton_x'" in refused(with_parameter("triton_x", bool_param=True), model())


def test_parameters_of_the_clients_own_pass() -> None:
    """Names that mean nothing to the server are let through."""
    planned(with_parameter("my_tag", string_param="a"))
    planned(with_parameter("threshold", double_param=0.5))


def test_every_refusal_is_a_service_error() -> None:
    """The status table knows what a plan raises."""
    assert issubclass(InvalidRequest, ServiceError)
    assert issubclass(UnsupportedFeature, ServiceError)
