"""The tensors of stateful models that no client sends: made for a step before it runs, kept from it afterwards.

A state is kept as the bytes of one row on the host, so any instance on any device can run a sequence's next step. That
costs two copies of the row per step, which are small beside the run (docs/sequences.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from service.config.model import ModelConfig
from service.config.sequences import INITIAL_DIRECTORY, Control, ControlKind, SequenceBatching
from service.errors import ExecutionFailed, InvalidRequest, ModelLoadError
from service.request import BatchOutput, InputData
from service.tensor import DataType, TensorSpec, element_count

# A correlation id as a client gives it.
CorrelationId = int | str
Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class States:
    """The states of one sequence, in the order of the configuration: the shape of each one's row, and its elements."""

    shapes: Shapes
    data: tuple[bytes, ...]

    @property
    def nbytes(self) -> int:
        """Memory of the elements, bytes."""
        return sum(map(len, self.data))


class StepTensors:
    """What the sequences of one model add to its tensors. Any thread."""

    def __init__(self, config: ModelConfig, directory: Path) -> None:
        """`directory` is the model's. Raises `ModelLoadError` for an initial state that cannot be read or does not
        fit."""
        assert config.sequences is not None
        sequences = config.sequences
        self.initial = _initial(sequences, directory)
        self._control_shapes: Shapes = tuple(control.spec.shape for control in sequences.controls)
        self._controls = [(c, _said(c, False), _said(c, True)) for c in sequences.controls]
        names = [spec.name for spec in config.session_outputs]
        self._cuts = [_Cut(names.index(state.output.name), state.output) for state in sequences.states]

    def first(self) -> tuple[Shapes, tuple[InputData, ...]]:
        """The tensors of a sequence's first step, as warm-up runs it."""
        text = any(c.kind is ControlKind.CORRID and c.spec.datatype is DataType.BYTES for c, _, _ in self._controls)
        return self.before("1" if text else 1, True, False, self.initial)

    def before(
        self, identity: CorrelationId, start: bool, end: bool, states: States
    ) -> tuple[Shapes, tuple[InputData, ...]]:
        """The tensors of one step beside the client's, in the order of the session's inputs: shapes and elements.

        Raises `InvalidRequest` when the model cannot be told the correlation id.
        """
        if not self._controls:
            return states.shapes, states.data
        told: list[InputData] = []
        for control, no, yes in self._controls:
            if control.kind is ControlKind.CORRID:
                told.append(_identity(control.spec.datatype, identity))
            elif control.kind is ControlKind.START:
                told.append(yes if start else no)
            elif control.kind is ControlKind.END:
                told.append(yes if end else no)
            else:
                told.append(yes)
        return self._control_shapes + states.shapes, (*told, *states.data)

    def after(self, outputs: Sequence[BatchOutput], row: int) -> States:
        """Copies of the states that the step in row `row` of a batch leaves.

        Raises `ExecutionFailed` when one cannot be an input of the next step.
        """
        shapes, data = [], []
        for cut in self._cuts:
            output, spec = outputs[cut.position], cut.spec
            array = output.array
            if spec.batched:
                if not output.spec.batched:
                    raise ExecutionFailed(
                        f"state '{spec.name}' has shape {list(output.shape)}: it has no row per request"
                    )
                array = array[(*cut.before, row)]
            if not cut.fits(array.shape) or array.dtype != spec.datatype.dtype:
                raise ExecutionFailed(
                    f"state '{spec.name}' has shape {list(array.shape)} after a step, expected {list(spec.shape)}"
                )
            shapes.append(array.shape)
            data.append(array.tobytes())
        return States(tuple(shapes), tuple(data))


class _Cut:
    """Where a state is among the session's outputs, and how a row is cut out of it."""

    __slots__ = ("before", "fixed", "position", "spec")

    def __init__(self, position: int, spec: TensorSpec) -> None:
        self.position = position
        self.spec = spec
        self.before: tuple[Any, ...] = (slice(None),) * spec.axis
        self.fixed = -1 not in spec.shape

    def fits(self, shape: tuple[int, ...]) -> bool:
        wanted = self.spec.shape
        if self.fixed:
            return shape == wanted
        return len(shape) == len(wanted) and all(w in (-1, s) for w, s in zip(wanted, shape, strict=True))


def _initial(sequences: SequenceBatching, directory: Path) -> States:
    data = []
    for state in sequences.states:
        size = element_count(state.initial_shape) * state.input.datatype.itemsize
        elements = bytes(size)
        if state.initial_file:
            path = directory / INITIAL_DIRECTORY / state.initial_file
            try:
                elements = path.read_bytes()
            except OSError as error:
                raise ModelLoadError(f"{path}: the initial state cannot be read: {error.strerror}") from error
            if len(elements) != size:
                raise ModelLoadError(f"{path}: {len(elements)} bytes, expected {size} for state '{state.input.name}'")
        data.append(elements)
    return States(tuple(state.initial_shape for state in sequences.states), tuple(data))


def _said(control: Control, value: bool) -> bytes:
    """The element that says no or yes; empty for a correlation id."""
    if control.kind is ControlKind.CORRID:
        return b""
    return np.array(control.yes if value else control.no).astype(control.spec.datatype.dtype).tobytes()


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
