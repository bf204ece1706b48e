"""The life of the server as one value, from which every question about health is answered.

    STARTING -> READY -> DRAINING -> STOPPED        STARTING -> STOPPED when nothing could be started

READY is set only after requests can be served, DRAINING before they are refused: whoever sees READY may send.
"""

from __future__ import annotations

import enum


class Phase(enum.Enum):
    """Where the server is in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


_NEXT: dict[Phase, frozenset[Phase]] = {
    Phase.STARTING: frozenset({Phase.READY, Phase.DRAINING, Phase.STOPPED}),
    Phase.READY: frozenset({Phase.DRAINING}),
    Phase.DRAINING: frozenset({Phase.STOPPED}),
    Phase.STOPPED: frozenset(),
}


class ServerState:
    """The present phase. Changed by the thread that runs the server, read by any."""

    def __init__(self) -> None:
        self.phase = Phase.STARTING
        # What is broken for good; the process then serves no more and ends. Set by the thread that finds out.
        self.failure = ""

    @property
    def ready(self) -> bool:
        return self.phase is Phase.READY and not self.failure

    def enter(self, phase: Phase) -> None:
        """Go on to `phase`. Raises `ValueError` when the table has no such step."""
        if phase not in _NEXT[self.phase]:
            raise ValueError(f"the server cannot go from {self.phase.value} to {phase.value}")
        self.phase = phase
