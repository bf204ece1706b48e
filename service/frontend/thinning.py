"""Refusing before reading: how many calls to turn away unseen when nearly all of them would be refused anyway.

Deep in overload the cost of saying no decides how much is still answered: a request that is read, decoded, queued and
then refused costs two to three times what a call costs that is refused before its message is read. So when the models
refuse most of what arrives, a share of the calls is refused at once, leaving `HEADROOM` times as many as are being
served: enough to choose from, since the scheduler serves the newest requests it can.

A call refused unseen could have been for any model. Therefore nothing is turned away unless every model that had
requests lately is refusing a large share of them, has as many rows waiting as its device took last, and knows no
priorities.

A value machine: it is told the time and what happened, and answers with a share between 0 and 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from service.clock import NS_PER_MS

# How often the share is renewed: after twice the tightest objective in demand, within these bounds. Requests are given
# up when a batch closes: a window must hold a few batches, or it sees only refusals, or none. It should be a fraction
# of the time in which people notice a change of load.
WINDOW_NS = 50 * NS_PER_MS
MAX_WINDOW_NS = 10 * WINDOW_NS
# Requests let through for each one served. That batches do not run short in a burst is seen to by who asks: nothing is
# refused unseen while less waits than a device takes next.
HEADROOM = 2.0
# A model counts as overloaded when it refuses at least this share of its requests ...
OVERLOADED = 0.3
# ... and from then on for as long as it refuses this share of those that are still read.
STILL_OVERLOADED = 0.05
# ... but not for fewer calls in a window than this. Reading and refusing them costs a few milliseconds of 50 or more;
# and a handful of requests that could not be met, whatever the reason, says nothing about those that come next.
MIN_OFFERED = 50
# However deep the overload, one call in twenty is read: without them nobody would notice its end.
MAX_SHARE = 0.95
# Weight of the newest window.
STEP = 0.5


@dataclass(slots=True)
class ModelLoad:
    """What became of one model's requests in a window: `arrived` of them, `refused` for want of time. `ranked`: they
    have priorities, so that one unseen may be the one that must not be refused."""

    arrived: int
    refused: int
    ranked: bool = False


class Thinning:
    """The share of calls to refuse unseen."""

    __slots__ = ("_credit", "share")

    def __init__(self) -> None:
        self.share = 0.0
        self._credit = 0.0

    def window(self, thinned: int, loads: Sequence[ModelLoad]) -> None:
        """A window has passed: `thinned` calls were refused unseen, the others are in `loads`, one for each model."""
        arrived = sum(load.arrived for load in loads)
        kept = arrived - sum(load.refused for load in loads)
        wanted = 0.0
        least = STILL_OVERLOADED if self.share else OVERLOADED
        enough = arrived > 0 and arrived + thinned >= MIN_OFFERED
        if enough and all(load.refused >= least * load.arrived and not load.ranked for load in loads if load.arrived):
            wanted = max(0.0, 1.0 - HEADROOM * max(kept, 0) / (arrived + thinned))
        # Falling load ends the thinning at once; rising load is followed over a few windows.
        self.share = min(MAX_SHARE, wanted if wanted < self.share else self.share + STEP * (wanted - self.share))

    def refuses(self) -> bool:
        """Whether to refuse the next call unseen. Spread evenly, without a random generator."""
        if self.share <= 0.0:
            return False
        self._credit += self.share
        if self._credit >= 1.0:
            self._credit -= 1.0
            return True
        return False


def window_ns(slo_ns: int) -> int:
    """How long a window is when `slo_ns` is the tightest objective in demand (0: none)."""
    return min(MAX_WINDOW_NS, max(WINDOW_NS, 2 * slo_ns))


def shares_of(thinned: int, loads: Sequence[ModelLoad]) -> list[int]:
    """For which of at least one model `thinned` calls were meant, in all likelihood: in proportion to what the models
    refused, or where none refused anything, to what arrived for them. The shares are whole and add up to `thinned`."""
    weights = [load.refused for load in loads]
    if not any(weights):
        weights = [load.arrived for load in loads]
    if not any(weights):
        weights = [1] * len(loads)
    total = sum(weights)
    shares: list[int] = []
    reached = given = 0
    for weight in weights:
        reached += weight
        shares.append(thinned * reached // total - given)
        given += shares[-1]
    return shares
