"""`sequence_batching`: what of the graph the server fills and keeps, where a state's batch dimension is, what is
refused."""

from __future__ import annotations

import pytest

from service.clock import NS_PER_MS, NS_PER_S, NS_PER_US
from service.config.sequences import DEFAULT_MAX_SEQUENCES, ControlKind
from service.tensor import DataType
from tests.unit.config.test_complete import completed, refused, tensor

X = tensor("x", "N", 4)
Y = tensor("y", "N", 2)
STATE = tensor("s", 2, "N", 3)
STATE_OUT = tensor("t", None, None, None)
GRAPH = {"inputs": (X, STATE), "outputs": (Y, STATE_OUT)}
TEXT = """
max_batch_size: 8
sequence_batching { state { input_name: "s" output_name: "t" dims: [ 2, 3 ] } }
"""


def one_state(state: str, more: str = "", size: int = 8) -> str:
    names = 'input_name: "s" output_name: "t"'
    return f"max_batch_size: {size} sequence_batching {{ state {{ {names} {state} }} }} {more}"


def control(kind: str, values: str, name: str = "c") -> str:
    said = f'name: "{name}" control {{ kind: {kind} {values} }}'
    return f"max_batch_size: 8 sequence_batching {{ control_input {{ {said} }} }}"


def test_clients_neither_send_nor_get_what_the_server_keeps() -> None:
    result = completed(TEXT, **GRAPH)
    config = result.config
    assert config.sequences is not None
    assert [spec.name for spec in config.inputs] == ["x"]
    assert [spec.name for spec in config.outputs] == ["y"]
    assert [io.name for io in result.proto.input] == ["x"]
    assert [io.name for io in result.proto.output] == ["y"]
    assert [spec.full_shape for spec in config.session_inputs] == [(-1, 4), (2, -1, 3)]
    assert [spec.full_shape for spec in config.session_outputs] == [(-1, 2), (2, -1, 3)]
    assert config.joins_requests
    assert result.proto.HasField("sequence_batching")
    assert not result.proto.HasField("dynamic_batching")


def test_what_is_unset_is_tritons_default() -> None:
    sequences = completed(TEXT, **GRAPH).config.sequences
    assert sequences is not None
    assert (sequences.max_idle_ns, sequences.max_sequences) == (NS_PER_S, DEFAULT_MAX_SEQUENCES)
    (state,) = sequences.states
    assert (state.initial_shape, state.initial_file) == ((2, 3), "")


@pytest.mark.parametrize(
    ("graph", "dims", "more", "axis"),
    [
        (("N", 2, 3), "[ 2, 3 ]", "", 0),
        ((2, "N", 3), "[ 2, 3 ]", "", 1),
        ((2, 3, "N"), "[ 2, 3 ]", "", 2),
        ((2, None, 3), "[ 2, 3 ]", "", 1),
        ((None, None, 3), "[ 2, 3 ]", "", 0),
        (("M", "N", 3), "[ 2, 3 ]", "", 1),
        (("N", "L", 3), "[ -1, 3 ]", "", 0),
        (("L", "N", 3), "[ -1, 3 ]", "", 1),
        ((None, None, None), "[ 2, 3 ]", "", 0),
        ((None, None, None), "[ 2, 3 ]", "s=2", 2),
        ((None, None), "[ 3 ]", " s = 1 ", 1),
        (("N",), "[ ]", "", 0),
        (("N", 5, 3), "[ -1, 3 ] of 5", "", 0),
        ((5, "N", 3), "[ -1, 3 ] of 5", "", 1),
    ],
)
def test_where_the_batch_dimension_of_a_state_is(
    graph: tuple[int | str | None, ...], dims: str, more: str, axis: int
) -> None:
    """Where the file leaves room for it; where it has the batch's name; in front; or as the parameter says."""
    parameter = f'parameters {{ key: "state_batch_axis" value {{ string_value: "{more}" }} }}' if more else ""
    dims, _, size = dims.partition(" of ")
    first = dims.replace("-1", size or "0")
    text = one_state(f"dims: {dims} initial_state {{ zero_data: true dims: {first} }}", parameter)
    graph_state = tensor("s", *graph)
    sequences = completed(
        text, inputs=(X, graph_state), outputs=(Y, tensor("t", *(None,) * len(graph)))
    ).config.sequences
    assert sequences is not None
    assert (sequences.states[0].input.axis, sequences.states[0].output.axis) == (axis, axis)


def test_a_state_of_any_size_must_say_what_it_begins_with() -> None:
    error = refused(one_state("dims: [ -1 ]"), inputs=(X, tensor("s", "N", "L")), outputs=(Y, tensor("t", "N", "L")))
    assert error.path == "sequence_batching.state[0].initial_state"
    assert "leave sizes open" in str(error)


def test_a_state_begins_with_sizes_that_the_model_takes() -> None:
    """Also where the dims leave them open."""
    text = one_state("dims: [ -1, 3 ] initial_state { dims: [ 4, 3 ] zero_data: true }")
    error = refused(text, inputs=(X, tensor("s", "N", 5, 3)), outputs=(Y, tensor("t", "N", 5, 3)))
    assert error.path == "sequence_batching.state[0].initial_state[0].dims"
    assert "[4, 3]" in str(error)


def test_controls_of_every_kind_and_type() -> None:
    text = """
    max_batch_size: 8
    sequence_batching {
      max_sequence_idle_microseconds: 2500
      control_input { name: "a" control { kind: CONTROL_SEQUENCE_START fp32_false_true: [ -1, 2 ] } }
      control_input { name: "b" control { kind: CONTROL_SEQUENCE_END int32_false_true: [ 0, 1 ] } }
      control_input { name: "c" control { kind: CONTROL_SEQUENCE_READY bool_false_true: [ false, true ] } }
      control_input { name: "d" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_STRING } }
    }
    """
    inputs = (
        X,
        tensor("a", "N", 1),
        tensor("b", "N", kind="int32"),
        tensor("c", "N", "K", kind="bool"),
        tensor("d", "N", 1, kind="string"),
    )
    sequences = completed(text, inputs=inputs).config.sequences
    assert sequences is not None
    assert sequences.max_idle_ns == 2500 * NS_PER_US
    assert [(c.spec.name, c.kind, c.spec.shape, c.no, c.yes) for c in sequences.controls] == [
        ("a", ControlKind.START, (1,), -1.0, 2.0),
        ("b", ControlKind.END, (), 0.0, 1.0),
        ("c", ControlKind.READY, (1,), 0.0, 1.0),
        ("d", ControlKind.CORRID, (1,), 0.0, 1.0),
    ]
    assert sequences.controls[3].spec.datatype is DataType.BYTES


def test_strategies() -> None:
    """Their knobs are those of dynamic batching; candidates raise the bound of live sequences."""
    oldest = completed(
        TEXT.replace(
            "sequence_batching {",
            "sequence_batching { oldest { max_candidate_sequences: 9000 preferred_batch_size: [ 4, 2 ] "
            "max_queue_delay_microseconds: 1000 }",
        ),
        **GRAPH,
    ).config
    assert oldest.sequences is not None
    assert oldest.sequences.max_sequences == 9000
    assert oldest.dynamic_batching is not None
    assert oldest.dynamic_batching.preferred_batch_size == (2, 4)
    assert oldest.dynamic_batching.max_queue_delay_ns == NS_PER_MS
    direct = completed(
        TEXT.replace(
            "sequence_batching {",
            "sequence_batching { direct { minimum_slot_utilization: 0.4 max_queue_delay_microseconds: 1000 }",
        ),
        **GRAPH,
    ).config
    assert direct.dynamic_batching is not None
    assert direct.dynamic_batching.preferred_batch_size == (4,)


def test_a_state_that_is_listed_as_output_is_given_to_clients_too() -> None:
    text = one_state("dims: [ 3 ]", 'output { name: "y" } output { name: "t" }')
    config = completed(text, inputs=(X, tensor("s", "N", 3)), outputs=(Y, tensor("t", "N", 3))).config
    assert [spec.name for spec in config.outputs] == ["y", "t"]
    assert config.session_outputs == config.outputs


def test_an_unbatched_model_keeps_whole_tensors() -> None:
    text = 'sequence_batching { state { input_name: "s" output_name: "t" dims: [ 2, 1, 3 ] } }'
    config = completed(
        text, inputs=(tensor("x", 1, 4), tensor("s", 2, 1, 3)), outputs=(tensor("y", 1, 2), tensor("t", 2, 1, 3))
    ).config
    assert config.max_batch_size == 0
    assert config.sequences is not None
    assert not config.sequences.states[0].input.batched


@pytest.mark.parametrize(
    ("text", "path", "said"),
    [
        (one_state("dims: [ 2, 4 ]"), "sequence_batching.state[0].dims", "do not make"),
        (one_state("dims: [ 2 ]"), "sequence_batching.state[0].dims", "has not the 2 dims"),
        (one_state("dims: [ -2, 3 ]"), "sequence_batching.state[0].dims", "-1 for any"),
        (one_state("dims: [ 2, 3 ] data_type: TYPE_INT8"), "sequence_batching.state[0].data_type", "TYPE_FP32"),
        (one_state("dims: [ 4, -1 ]"), "sequence_batching.state[0].dims", "do not make"),
        (one_state("dims: [ 2, -1 ]"), "sequence_batching.state[0].initial_state", "leave sizes open"),
        (
            one_state("dims: [ 2, 3 ] initial_state { dims: [ 2, 4 ] zero_data: true }"),
            "sequence_batching.state[0].initial_state[0].dims",
            "does not give all sizes",
        ),
        (
            one_state("dims: [ 2, 3 ] initial_state { dims: [ 2, 3 ] }"),
            "sequence_batching.state[0].initial_state[0]",
            "zero_data or data_file",
        ),
        (
            one_state('dims: [ 2, 3 ] initial_state { data_file: "../x" }'),
            "sequence_batching.state[0].initial_state[0].data_file",
            "inside",
        ),
        (
            one_state("dims: [ 2, 3 ] initial_state { zero_data: true } initial_state { zero_data: true }"),
            "sequence_batching.state[0].initial_state",
            "expected one",
        ),
        (
            one_state("dims: [ 2, 3 ] use_growable_memory: true"),
            "sequence_batching.state[0].use_growable_memory",
            "not supported",
        ),
        (one_state("dims: [ 2, 3 ]", 'input { name: "s" }'), "input[0].name", "filled by the server"),
        (one_state("dims: [ 2, 3 ]", 'output { name: "t" }'), "output[0].name", "behind others"),
        (one_state("dims: [ 2, 3 ]").replace('"s"', '"q"'), "sequence_batching.state[0].input_name", "no input 'q'"),
        (one_state("dims: [ 2, 3 ]").replace('"t"', '"q"'), "sequence_batching.state[0].output_name", "no output 'q'"),
        (
            one_state("dims: [ 2, 3 ]", 'parameters { key: "state_batch_axis" value { string_value: "q=1" } }'),
            "parameters[state_batch_axis]",
            "not a state's input_name",
        ),
        (
            one_state("dims: [ 2, 3 ]", 'parameters { key: "state_batch_axis" value { string_value: "s=0" } }'),
            "sequence_batching.state[0].dims",
            "is fixed, so it cannot be the batch's",
        ),
        (
            one_state("dims: [ 2, 3 ]", 'parameters { key: "state_batch_axis" value { string_value: "s" } }'),
            "parameters[state_batch_axis]",
            "pairs",
        ),
        ('parameters { key: "max_sequences" value { string_value: "7" } }', "parameters[max_sequences]", "is not set"),
        (
            TEXT.replace("sequence_batching {", "sequence_batching { direct { minimum_slot_utilization: 1.5 }"),
            "sequence_batching.direct.minimum_slot_utilization",
            "0 to 1",
        ),
        (
            TEXT.replace("sequence_batching {", "sequence_batching { oldest { preferred_batch_size: [ 9 ] }"),
            "sequence_batching.oldest.preferred_batch_size",
            "1 to max_batch_size (8)",
        ),
    ],
)
def test_what_is_wrong_with_a_state_is_named(text: str, path: str, said: str) -> None:
    error = refused(text, **GRAPH)
    assert error.path == path
    assert said in str(error)


@pytest.mark.parametrize(
    ("text", "at", "said"),
    [
        (control("CONTROL_SEQUENCE_START", "fp32_false_true: [ 0 ]"), "[0]", "expected two values"),
        (control("CONTROL_SEQUENCE_START", ""), "[0]", "expected two values"),
        (control("CONTROL_SEQUENCE_START", "int32_false_true: [ 0, 1 ]"), "[0].int32_false_true", "is TYPE_FP32"),
        (control("CONTROL_SEQUENCE_CORRID", "data_type: TYPE_FP32"), "[0].data_type", "one of TYPE_UINT64"),
        (control("CONTROL_SEQUENCE_CORRID", "fp32_false_true: [ 0, 1 ]"), "[0].fp32_false_true", "no values"),
        (control("CONTROL_SEQUENCE_START", "fp32_false_true: [ 0, 1 ]", "x"), "[0]", "more than one element"),
    ],
)
def test_what_is_wrong_with_a_control_is_named(text: str, at: str, said: str) -> None:
    error = refused(text, inputs=(X, tensor("c", "N", 1)))
    assert error.path == f"sequence_batching.control_input[0].control{at}"
    assert said in str(error)
