"""From `sequence_batching` of a configuration and the graph's signature to `SequenceBatching`: checked, complete.

Raises `ConfigError` with the path of the wrong key, as all of `service.config.build` does.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from service.clock import NS_PER_US
from service.config.build import DATATYPE_NUMBERS, MAX_WAIT_US, datatype_of, inner_file
from service.config.sequences import (
    DEFAULT_IDLE_NS,
    DEFAULT_MAX_SEQUENCES,
    Control,
    ControlKind,
    SequenceBatching,
    State,
)
from service.config.signature import Dimension, GraphTensor
from service.errors import ConfigError
from service.pb import model_config_pb2 as pb
from service.tensor import DataType, TensorSpec, element_count

PATH = "sequence_batching"
# Elements of one state: beyond that it is a mistake in `dims`.
MAX_STATE_ELEMENTS = 1 << 28

_VALUES = {"int32_false_true": DataType.INT32, "fp32_false_true": DataType.FP32, "bool_false_true": DataType.BOOL}
_CORRID_TYPES = (DataType.UINT64, DataType.INT64, DataType.UINT32, DataType.INT32, DataType.BYTES)


def server_filled(
    config: pb.ModelConfig, inputs: Sequence[GraphTensor], outputs: Sequence[GraphTensor]
) -> tuple[frozenset[str], frozenset[str]]:
    """The inputs that the server fills (controls and states), and the outputs that it keeps (states)."""
    if not config.HasField("sequence_batching"):
        return frozenset(), frozenset()
    batching = config.sequence_batching
    known_inputs, known_outputs = {t.name: t for t in inputs}, {t.name: t for t in outputs}
    for index, item in enumerate(batching.control_input):
        _tensor(f"{PATH}.control_input[{index}].name", "input", item.name, known_inputs)
    for index, state in enumerate(batching.state):
        _tensor(f"{PATH}.state[{index}].input_name", "input", state.input_name, known_inputs)
        _tensor(f"{PATH}.state[{index}].output_name", "output", state.output_name, known_outputs)
    filled = {item.name for item in batching.control_input} | {state.input_name for state in batching.state}
    return frozenset(filled), frozenset(state.output_name for state in batching.state)


def build_sequences(
    config: pb.ModelConfig,
    inputs: Sequence[GraphTensor],
    outputs: Sequence[GraphTensor],
    axes: Mapping[str, int],
    max_sequences: int | None,
) -> SequenceBatching | None:
    """The sequences of a completed configuration; None when the model has none.

    `axes` states where the batch dimension of a state input is; `max_sequences` the bound, where it was given.
    """
    if not config.HasField("sequence_batching"):
        for name in axes:
            raise ConfigError("parameters[state_batch_axis]", f"there is no state '{name}': {PATH} is not set")
        if max_sequences is not None:
            raise ConfigError("parameters[max_sequences]", f"{PATH} is not set")
        return None
    batching = config.sequence_batching
    if batching.max_sequence_idle_microseconds > MAX_WAIT_US:
        raise ConfigError(f"{PATH}.max_sequence_idle_microseconds", f"expected at most {MAX_WAIT_US} (a day)")
    known_inputs = {tensor.name: tensor for tensor in inputs}
    known_outputs = {tensor.name: tensor for tensor in outputs}
    batched = config.max_batch_size > 0
    filled, _ = server_filled(config, inputs, outputs)
    rows = _batch_symbols([tensor for tensor in inputs if tensor.name not in filled])
    controls = _controls(batching, known_inputs, batched)
    taken = {control.spec.name for control in controls}
    states: list[State] = []
    for index, item in enumerate(batching.state):
        path = f"{PATH}.state[{index}]"
        if item.input_name in taken or item.output_name in {state.output.name for state in states}:
            raise ConfigError(path, f"'{item.input_name}' or '{item.output_name}' is used twice")
        taken.add(item.input_name)
        axis = axes.get(item.input_name)
        states.append(_state(path, item, known_inputs, known_outputs, batched, axis, rows))
    for name in axes:
        if name not in {state.input.name for state in states}:
            raise ConfigError("parameters[state_batch_axis]", f"'{name}' is not a state's input_name")
    preferred, delay_ns, candidates = _strategy(batching, config.max_batch_size)
    return SequenceBatching(
        max_idle_ns=batching.max_sequence_idle_microseconds * NS_PER_US or DEFAULT_IDLE_NS,
        max_sequences=max_sequences or max(DEFAULT_MAX_SEQUENCES, candidates),
        controls=controls,
        states=tuple(states),
        preferred_batch_size=preferred,
        max_queue_delay_ns=delay_ns,
    )


def _strategy(batching: pb.ModelSequenceBatching, max_batch_size: int) -> tuple[tuple[int, ...], int, int]:
    """(preferred batch sizes, longest wait for company in ns, candidate sequences)."""
    if batching.WhichOneof("strategy_choice") == "oldest":
        oldest, path = batching.oldest, f"{PATH}.oldest"
        if oldest.max_candidate_sequences < 0:
            raise ConfigError(f"{path}.max_candidate_sequences", "expected 0 or more")
        preferred = tuple(sorted(set(oldest.preferred_batch_size)))
        if preferred and not 1 <= preferred[0] <= preferred[-1] <= max_batch_size:
            raise ConfigError(
                f"{path}.preferred_batch_size", f"{list(preferred)}: expected 1 to max_batch_size ({max_batch_size})"
            )
        delay_us, candidates = oldest.max_queue_delay_microseconds, oldest.max_candidate_sequences
    else:
        direct, path = batching.direct, f"{PATH}.direct"
        share = direct.minimum_slot_utilization
        if not 0 <= share <= 1:
            raise ConfigError(f"{path}.minimum_slot_utilization", f"{share:g} is not in the range 0 to 1")
        delay_us, candidates = direct.max_queue_delay_microseconds, 0
        preferred = (math.ceil(share * max_batch_size),) if share * max_batch_size > 0 and delay_us else ()
    if delay_us > MAX_WAIT_US:
        raise ConfigError(f"{path}.max_queue_delay_microseconds", f"expected at most {MAX_WAIT_US} (a day)")
    return preferred, delay_us * NS_PER_US, candidates


# ------------------------------------------------------------------------------------------------------- controls --


def _controls(
    batching: pb.ModelSequenceBatching, inputs: Mapping[str, GraphTensor], batched: bool
) -> tuple[Control, ...]:
    controls: list[Control] = []
    for index, item in enumerate(batching.control_input):
        path = f"{PATH}.control_input[{index}]"
        tensor = inputs[item.name]
        if len(item.control) != 1:
            raise ConfigError(f"{path}.control", f"{len(item.control)} controls; an input carries exactly one")
        if any(control.spec.name == item.name for control in controls):
            raise ConfigError(f"{path}.name", f"'{item.name}' is listed twice")
        control = _control(f"{path}.control[0]", item.control[0], tensor, batched)
        if any(other.kind is control.kind for other in controls):
            raise ConfigError(f"{path}.control[0].kind", f"there is another control of kind {control.kind.value}")
        controls.append(control)
    return tuple(controls)


def _control(path: str, item: pb.ModelSequenceBatching.Control, tensor: GraphTensor, batched: bool) -> Control:
    kind = ControlKind(pb.ModelSequenceBatching.Control.Kind.Name(item.kind))
    shape = _control_shape(path, tensor, batched)
    datatype = tensor.datatype
    assert datatype is not None
    spec = TensorSpec(tensor.name, datatype, shape, batched)
    given = [key for key in _VALUES if getattr(item, key)]
    if kind is ControlKind.CORRID:
        if given:
            raise ConfigError(f"{path}.{given[0]}", "a correlation id has no values for no and yes; remove it")
        stated = datatype_of(item.data_type, f"{path}.data_type")
        if stated not in (None, datatype) or datatype not in _CORRID_TYPES:
            names = ", ".join(_type_name(d) for d in _CORRID_TYPES)
            raise ConfigError(f"{path}.data_type", f"expected the model's {_type_name(datatype)}, one of {names}")
        return Control(spec, kind)
    if len(given) != 1 or len(getattr(item, given[0])) != 2:
        raise ConfigError(path, f"expected two values in one of {', '.join(_VALUES)}")
    if _VALUES[given[0]] is not datatype:
        raise ConfigError(f"{path}.{given[0]}", f"the model's input '{tensor.name}' is {_type_name(datatype)}")
    no, yes = getattr(item, given[0])
    return Control(spec, kind, float(no), float(yes))


def _control_shape(path: str, tensor: GraphTensor, batched: bool) -> tuple[int, ...]:
    """One row's: one element, whatever the rank."""
    if tensor.shape is None or (batched and not tensor.shape):
        raise ConfigError(path, f"input {tensor} has no batch dimension, which a control of a batched model needs")
    sizes = tensor.sizes(skip=1 if batched else 0)
    if any(size not in (1, -1) for size in sizes):
        raise ConfigError(path, f"input {tensor} has more than one element per row; a control has one")
    return tuple(1 for _ in sizes)


# --------------------------------------------------------------------------------------------------------- states --


def _state(
    path: str,
    item: pb.ModelSequenceBatching.State,
    inputs: Mapping[str, GraphTensor],
    outputs: Mapping[str, GraphTensor],
    batched: bool,
    stated_axis: int | None,
    rows: Collection[Dimension],
) -> State:
    source, result = inputs[item.input_name], outputs[item.output_name]
    datatype = source.datatype
    assert datatype is not None
    if datatype_of(item.data_type, f"{path}.data_type") not in (None, datatype):
        raise ConfigError(f"{path}.data_type", f"the model's input '{source.name}' is {_type_name(datatype)}")
    if result.datatype is not datatype:
        raise ConfigError(path, f"input {source} and output {result} differ in their type")
    if datatype is DataType.BYTES:
        raise ConfigError(path, f"'{source.name}' is TYPE_STRING; states are numbers")
    dims = tuple(item.dims)
    if any(size < -1 for size in dims):
        raise ConfigError(f"{path}.dims", f"{list(dims)}: expected sizes of 0 or more, or -1 for any")
    axis = 0
    if batched:
        axis = _axis(path, dims, source, stated_axis, rows)
    elif stated_axis is not None:
        raise ConfigError("parameters[state_batch_axis]", "the model is not batched (max_batch_size is 0)")
    spec = TensorSpec(source.name, datatype, dims, batched, axis=axis)
    _check_fits(f"{path}.dims", spec, source)
    _check_fits(f"{path}.dims", spec, result)
    output = TensorSpec(result.name, datatype, dims, batched, axis=axis)
    shape, file = _initial(path, item, spec)
    _check_fits(f"{path}.initial_state[0].dims", replace(spec, shape=shape), source)
    return State(spec, output, shape, file)


def _axis(
    path: str, dims: tuple[int, ...], tensor: GraphTensor, stated: int | None, symbols: Collection[Dimension]
) -> int:
    """Where the batch dimension of a state is: stated, or the one place where the model's shape has room for it."""
    if stated is not None:
        if stated > len(dims):
            raise ConfigError("parameters[state_batch_axis]", f"'{tensor.name}' has no dimension {stated}")
        return stated
    if tensor.shape is None:
        return 0
    if len(tensor.shape) != len(dims) + 1:
        raise ConfigError(
            f"{path}.dims", f"{list(dims)} has not the {len(tensor.shape) - 1} dims of {tensor} without its batch's"
        )
    sizes = tensor.sizes()
    found = [
        axis
        for axis, size in enumerate(sizes)
        if size == -1 and all(map(_fits, dims, (*sizes[:axis], *sizes[axis + 1 :])))
    ]
    named = [axis for axis in found if tensor.shape[axis] in symbols]
    if not found:
        raise ConfigError(f"{path}.dims", f"{list(dims)} and a free batch dimension do not make {tensor}")
    if len(named) == 1:
        return named[0]
    # As Triton has it, where the file leaves it open.
    return 0 if 0 in found else found[0]


def _fits(stated: int, size: int) -> bool:
    return -1 in (stated, size) or stated == size


def _batch_symbols(inputs: Sequence[GraphTensor]) -> frozenset[Dimension]:
    """What the file calls the batch dimension of the clients' inputs."""
    return frozenset(t.first for t in inputs if t.shape and isinstance(t.first, str))


def _check_fits(path: str, spec: TensorSpec, tensor: GraphTensor) -> None:
    """A state's dims are what the model takes and gives, as far as the file says so."""
    if tensor.shape is None:
        return
    whole = spec.whole(-1, spec.shape)
    sizes = tensor.sizes()
    batch = spec.axis if spec.batched else -1
    if len(whole) != len(sizes) or not all(
        _fits(stated, size) for at, (stated, size) in enumerate(zip(whole, sizes, strict=True)) if at != batch
    ):
        place = f" with the batch dimension at {spec.axis}" if spec.batched else ""
        raise ConfigError(path, f"{list(spec.shape)}{place} is not the shape of {tensor}")
    if spec.batched and sizes[batch] != -1:
        raise ConfigError(path, f"dimension {batch} of {tensor} is fixed, so it cannot be the batch's")


def _initial(path: str, item: pb.ModelSequenceBatching.State, spec: TensorSpec) -> tuple[tuple[int, ...], str]:
    if element_count([size for size in spec.shape if size > 0]) > MAX_STATE_ELEMENTS:
        raise ConfigError(f"{path}.dims", f"{list(spec.shape)} are more than {MAX_STATE_ELEMENTS} elements")
    if not item.initial_state:
        if -1 in spec.shape:
            raise ConfigError(
                f"{path}.initial_state", f"dims {list(spec.shape)} leave sizes open: state what a sequence begins with"
            )
        return spec.shape, ""
    if len(item.initial_state) > 1:
        raise ConfigError(f"{path}.initial_state", f"{len(item.initial_state)} initial states; expected one")
    initial, path = item.initial_state[0], f"{path}.initial_state[0]"
    if datatype_of(initial.data_type, f"{path}.data_type") not in (None, spec.datatype):
        raise ConfigError(f"{path}.data_type", f"the state is {_type_name(spec.datatype)}")
    shape = tuple(initial.dims) or spec.shape
    fits = len(shape) == len(spec.shape) and all(w in (-1, s) for w, s in zip(spec.shape, shape, strict=True))
    if not fits or any(size < 0 for size in shape):
        raise ConfigError(f"{path}.dims", f"{list(shape)} does not give all sizes of {list(spec.shape)}")
    if element_count(shape) > MAX_STATE_ELEMENTS:
        raise ConfigError(f"{path}.dims", f"{list(shape)} are more than {MAX_STATE_ELEMENTS} elements")
    match initial.WhichOneof("state_data"):
        case "zero_data":
            return shape, ""
        case "data_file":
            return shape, inner_file(initial.data_file, f"{path}.data_file")
        case _:
            raise ConfigError(path, "expected zero_data or data_file")


def _tensor(path: str, kind: str, name: str, known: Mapping[str, GraphTensor]) -> GraphTensor:
    if name not in known:
        raise ConfigError(path, f"the model has no {kind} '{name}'; it has {', '.join(known) or 'none'}")
    tensor = known[name]
    if tensor.datatype is None:
        raise ConfigError(path, f"'{name}' is of type {tensor.onnx_type}, which is no tensor of numbers or text")
    return tensor


def _type_name(datatype: DataType) -> str:
    return pb.DataType.Name(DATATYPE_NUMBERS[datatype])
