"""The tensors of stateful models that no client sends: made for a step before it runs, kept from it afterwards.

A state is kept as the bytes of one row on the host, so any instance on any device can run a sequence's next step. That
costs two copies of the row per step, which are small beside the run (docs/sequences.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from service.config.sequences import Control, ControlKind, SequenceBatching
from service.engine.buffers import bytes_of
from service.errors import ExecutionFailed, InvalidRequest, ModelLoadError
from service.request import BatchOutput, InputData
from service.tensor import DataType, element_count

# The directory of a model that holds what sequences begin with.
INITIAL_DIRECTORY = "initial_state"

# A correlation id as a client gives it.
CorrelationId = int | str


@dataclass(frozen=True, slots=True)
class StateRow:
    """One state of one sequence: a row's shape, and its elements."""

    shape: tuple[int, ...]
    data: memoryview | bytes


# The tensors of a row beside the clients': shape and data of each, in the order of the session's inputs.
Row = tuple[tuple[tuple[int, ...], InputData], ...]


def initial_states(sequences: SequenceBatching, directory: Path) -> tuple[StateRow, ...]:
    """What the states of the model in `directory` begin with. Raises `ModelLoadError` for a file that does not fit."""
    rows = []
    for state in sequences.states:
        size = element_count(state.initial_shape) * state.input.datatype.itemsize
        data = bytes(size)
        if state.initial_file:
            path = directory / INITIAL_DIRECTORY / state.initial_file
            try:
                data = path.read_bytes()
            except OSError as error:
                raise ModelLoadError(f"{path}: the initial state cannot be read: {error.strerror}") from error
            if len(data) != size:
                raise ModelLoadError(f"{path}: {len(data)} bytes, expected {size} for state '{state.input.name}'")
        rows.append(StateRow(state.initial_shape, data))
    return tuple(rows)


def first_step(sequences: SequenceBatching, initial: Sequence[StateRow]) -> Row:
    """The server's tensors of a sequence's first step, as warm-up runs it."""
    identity: CorrelationId = 1
    if any(c.kind is ControlKind.CORRID and c.spec.datatype is DataType.BYTES for c in sequences.controls):
        identity = "1"
    return step_row(sequences, identity, True, False, initial)


def step_row(
    sequences: SequenceBatching, identity: CorrelationId, start: bool, end: bool, states: Sequence[StateRow]
) -> Row:
    """The server's tensors of one step. Raises `InvalidRequest` when the model cannot be told the correlation id."""
    controls = tuple((c.spec.shape, _control(c, identity, start, end)) for c in sequences.controls)
    return controls + tuple((state.shape, state.data) for state in states)


def _control(control: Control, identity: CorrelationId, start: bool, end: bool) -> InputData:
    datatype = control.spec.datatype
    if control.kind is ControlKind.CORRID:
        return _identity(datatype, identity)
    said = {ControlKind.START: start, ControlKind.END: end, ControlKind.READY: True}[control.kind]
    return np.array(control.yes if said else control.no).astype(datatype.dtype).tobytes()


def _identity(datatype: DataType, identity: CorrelationId) -> InputData:
    if datatype is DataType.BYTES:
        text = np.empty(1, dtype=object)
        text[0] = str(identity)
        return text
    if isinstance(identity, str):
        raise InvalidRequest(f"the model takes numbers as correlation ids, got the text '{identity}'")
    # As in C: what does not fit loses its upper bits.
    bits = 8 * datatype.itemsize
    return (identity % (1 << bits)).to_bytes(datatype.itemsize, "little")


def states_after(
    sequences: SequenceBatching, positions: Sequence[int], outputs: Sequence[BatchOutput], row: int
) -> tuple[StateRow, ...]:
    """Copies of row `row` of a batch's states. `positions[i]` is where state i is among the session's outputs.

    Raises `ExecutionFailed` when a state cannot be an input of the next step.
    """
    states = []
    for state, position in zip(sequences.states, positions, strict=True):
        output = outputs[position]
        spec = state.output
        if spec.batched and not output.spec.batched:
            raise ExecutionFailed(f"state '{spec.name}' has shape {list(output.shape)}: it has no row per request")
        array = spec.rows(output.array, row, row + 1)
        if not spec.accepts(array.shape) or array.dtype != spec.datatype.dtype:
            raise ExecutionFailed(
                f"state '{spec.name}' has shape {list(array.shape)} after a step, expected {list(spec.full_shape)}"
            )
        kept = array.copy()
        shape = kept.shape
        if spec.batched:
            shape = (*shape[: spec.axis], *shape[spec.axis + 1 :])
        states.append(StateRow(shape, bytes_of(kept)))
    return tuple(states)
