"""What the verdict on a model version depends on: nouns."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from service.status_page.history import NOTHING_ASKED, Window


class State(enum.Enum):
    """What a model version is to its clients."""

    READY = "ready"
    LOADING = "loading"
    FAILED = "failed"
    RETIRING = "retiring"
    OFF = "not loaded"


@dataclass(frozen=True, slots=True)
class Facts:
    """What the verdict on a model version depends on.

    `reason`: why it is not ready or, of one that is, why a change of it came to nothing. `minute` and `recent`: the
    last minute and the last 15 s. `scale`: the present speed, as a factor on the latencies measured at load;
    `quantile`: the safety factor on top of it, for their spread. `saturation`: of the busiest of its devices. `lost`:
    those of its devices that are broken for good.
    """

    state: State
    reason: str = ""
    slo_ns: int | None = None
    minute: Window = NOTHING_ASKED
    recent: Window = NOTHING_ASKED
    scale: float | None = None
    quantile: float | None = None
    saturation: float = 0.0
    lost: tuple[str, ...] = ()
