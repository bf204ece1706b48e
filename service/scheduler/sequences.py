"""Which step of which sequence may run: the table of live sequences of one model. Pure: times are arguments.

Promises:
- Of a sequence at most one step runs; the others are held, in the order in which they came, since each needs the state
  that the one before it leaves.
- A step that was not run (refused, failed, cancelled) leaves no hole: what is held behind it, up to the next start, is
  handed back. The sequence itself stays as it was before that step, unless the step was its start.
- A start on a live sequence begins it anew, after the steps that came before.
- A sequence with nothing running or held is over when it was silent for `idle_ns`, or has run its end.
- At most `max_sequences` are live, and at most `MAX_HELD` steps of each are held.

The semantics are those of Triton Inference Server's sequence batcher (docs/user_guide/batcher.md of its server
repository); docs/protocol.md lists where they differ.
"""

from __future__ import annotations

import enum
from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

# A client that sends ahead holds the messages in memory. As many as one stream may have in flight.
MAX_HELD = 1024

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Step(Generic[T]):
    """One request of a sequence."""

    start: bool
    end: bool
    request: T


@dataclass(slots=True, eq=False)
class LiveSequence(Generic[T]):
    """A sequence. `begun`: its start has run, and its end has not. `state` belongs to the owner of the table."""

    key: Hashable
    last_ns: int
    begun: bool = False
    running: Step[T] | None = None
    held: deque[Step[T]] = field(default_factory=deque)
    state: object = None

    @property
    def open(self) -> bool:
        """Whether it will be live when everything that came so far has run."""
        last = self.held[-1] if self.held else self.running
        return self.begun if last is None else not last.end

    @property
    def busy(self) -> bool:
        """Whether a step runs or is held."""
        return self.running is not None


class Verdict(enum.Enum):
    """What becomes of a step on arrival."""

    RUN = "run"  # now
    HELD = "held"  # behind those of its sequence
    NOT_STARTED = "not_started"  # no such sequence: the first step must say that it is the start
    TOO_MANY = "too_many"  # live sequences
    TOO_LONG = "too_long"  # steps held


@dataclass(frozen=True, slots=True)
class Next(Generic[T]):
    """What follows from a step's end: the step to run, and those that will not be run."""

    run: Step[T] | None = None
    dropped: tuple[Step[T], ...] = ()


class SequenceTable(Generic[T]):
    """The live sequences of a model. The caller keeps others out meanwhile."""

    def __init__(self, max_sequences: int, idle_ns: int) -> None:
        self.max_sequences = max_sequences
        self.idle_ns = idle_ns
        # The least recently used first.
        self._live: OrderedDict[Hashable, LiveSequence[T]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._live)

    def open(self, key: Hashable) -> bool:
        """Whether a step of this sequence that is no start would be taken in."""
        sequence = self._live.get(key)
        return sequence is not None and sequence.open

    def discard(self, key: Hashable) -> None:
        """Take in no more steps of a sequence; what runs and is held goes on to its end."""
        self._live.pop(key, None)

    def live(self) -> list[LiveSequence[T]]:
        """The live sequences, the least recently used first."""
        return list(self._live.values())

    def arrive(self, key: Hashable, step: Step[T], at_ns: int) -> tuple[Verdict, LiveSequence[T] | None]:
        """Take a step in, or say why not. RUN: `finished` must follow."""
        sequence = self._live.get(key)
        if not step.start and (sequence is None or not sequence.open):
            return Verdict.NOT_STARTED, None
        if sequence is None:
            if len(self._live) >= self.max_sequences:
                return Verdict.TOO_MANY, None
            sequence = self._live[key] = LiveSequence(key, at_ns)
        elif len(sequence.held) >= MAX_HELD:
            return Verdict.TOO_LONG, sequence
        self._touch(sequence, at_ns)
        if sequence.busy:
            sequence.held.append(step)
            return Verdict.HELD, sequence
        sequence.running = step
        return Verdict.RUN, sequence

    def finished(self, sequence: LiveSequence[T], ran: bool, at_ns: int) -> Next[T]:
        """The running step is done. Not `ran`: it never was, or failed, so that there is no new state."""
        step = sequence.running
        assert step is not None
        sequence.running = None
        self._touch(sequence, at_ns)
        dropped: tuple[Step[T], ...] = ()
        if ran:
            sequence.begun = not step.end
        else:
            if step.start:
                sequence.begun = False
            dropped = _up_to_start(sequence.held)
        if sequence.held:
            sequence.running = sequence.held.popleft()
        elif not sequence.begun and self._live.get(sequence.key) is sequence:
            del self._live[sequence.key]
        return Next(sequence.running, dropped)

    def withdraw(self, sequence: LiveSequence[T], step: Step[T]) -> tuple[Step[T], ...]:
        """Take back a step that is held: it and those that cannot follow without it. Nothing if it is not held."""
        if step not in sequence.held:
            return ()
        before = deque[Step[T]]()
        while sequence.held[0] is not step:
            before.append(sequence.held.popleft())
        sequence.held.popleft()
        gone = (step, *_up_to_start(sequence.held))
        sequence.held.extendleft(reversed(before))
        return gone

    def expire(self, at_ns: int) -> list[LiveSequence[T]]:
        """Remove the sequences that were silent for too long."""
        gone = []
        while self._live:
            sequence = next(iter(self._live.values()))
            if at_ns - sequence.last_ns < self.idle_ns:
                break
            if sequence.busy:
                self._touch(sequence, at_ns)
                continue
            del self._live[sequence.key]
            gone.append(sequence)
        return gone

    def clear(self) -> tuple[Step[T], ...]:
        """Forget everything; the steps that were held. Those that run still call `finished`."""
        held = tuple(step for sequence in self._live.values() for step in sequence.held)
        for sequence in self._live.values():
            sequence.held.clear()
        self._live.clear()
        return held

    def _touch(self, sequence: LiveSequence[T], at_ns: int) -> None:
        sequence.last_ns = at_ns
        if self._live.get(sequence.key) is sequence:
            self._live.move_to_end(sequence.key)


def _up_to_start(held: deque[Step[T]]) -> tuple[Step[T], ...]:
    """Take out what cannot run without the step before it."""
    gone = []
    while held and not held[0].start:
        gone.append(held.popleft())
    return tuple(gone)
