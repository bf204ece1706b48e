"""Stateful models: what the server keeps between the requests of a sequence, and what it tells the model about it.

A sequence is a series of requests with one correlation id. The model sees each as a row of a batch, together with
tensors that no client sends: controls (does the sequence begin or end, which one is it) and states (outputs of its last
request, kept on the server). The schema is Triton Inference Server's `ModelSequenceBatching`; docs/sequences.md says
what of it means what here.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from service.clock import NS_PER_S
from service.tensor import TensorSpec

# Triton's, where a configuration states none.
DEFAULT_IDLE_NS = NS_PER_S
# Live sequences, where a configuration does not say. Enough for any number of streams that one model can keep up with;
# bounds what forgotten sequences hold until they are found idle.
DEFAULT_MAX_SEQUENCES = 4096
# The directory of a model that holds what sequences begin with.
INITIAL_DIRECTORY = "initial_state"


class ControlKind(enum.Enum):
    """What a control tells the model. READY is always yes here: there are no empty places in a batch."""

    START = "CONTROL_SEQUENCE_START"
    READY = "CONTROL_SEQUENCE_READY"
    END = "CONTROL_SEQUENCE_END"
    CORRID = "CONTROL_SEQUENCE_CORRID"


@dataclass(frozen=True, slots=True)
class Control:
    """An input that the server fills: one element per row. `no` and `yes` are its values but for CORRID."""

    spec: TensorSpec
    kind: ControlKind
    no: float = 0.0
    yes: float = 1.0


@dataclass(frozen=True, slots=True)
class State:
    """An output that is an input of the sequence's next request.

    `initial_shape` is one row's, all sizes known; `initial_file` (below `initial_state/` of the model) holds the values
    a sequence begins with, zeros if empty.
    """

    input: TensorSpec
    output: TensorSpec
    initial_shape: tuple[int, ...]
    initial_file: str = ""


@dataclass(frozen=True, slots=True)
class SequenceBatching:
    """How the sequences of a model are kept.

    A sequence that was silent for `max_idle_ns` is over; at most `max_sequences` are live. `preferred_batch_size` and
    `max_queue_delay_ns` are the strategy's, and mean what they mean in `DynamicBatching`.
    """

    max_idle_ns: int = DEFAULT_IDLE_NS
    max_sequences: int = DEFAULT_MAX_SEQUENCES
    controls: tuple[Control, ...] = ()
    states: tuple[State, ...] = ()
    preferred_batch_size: tuple[int, ...] = ()
    max_queue_delay_ns: int = 0
