"""The highest load that is still answered in time: doubled until it is not, then bisected.

The decisions are pure (`Search`): a rate out, a verdict in. A load that failed is tried once more before it counts as
too much, since on a shared machine one bad second is not the server's."""

from __future__ import annotations

from dataclasses import dataclass, field

# Doublings before giving up: from 100/s to over 100,000/s, more than a client of this kind offers.
MAX_DOUBLINGS = 12


@dataclass(slots=True)
class Search:
    """The state of a search. Rates are factors of the scenario's own; `tolerance` is how far apart the bounds may
    end."""

    tolerance: float = 0.05
    low: float = 0.0  # the highest that passed
    high: float | None = None  # the lowest that failed
    retried: bool = False
    doublings: int = 0
    tried: list[tuple[float, bool]] = field(default_factory=list)
    current: float = 1.0

    def next(self) -> float | None:
        """The factor to try now; None when the search is over."""
        if self.retried:
            return self.current
        if self.high is None:
            if self.doublings > MAX_DOUBLINGS:
                return None
            self.current = 1.0 if self.low == 0.0 else self.low * 2
            return self.current
        if self.high <= self.low * (1 + self.tolerance) or self.high < 1e-3:
            return None
        self.current = (self.low * self.high) ** 0.5 if self.low else self.high / 2
        return self.current

    def tell(self, passed: bool) -> None:
        """What came of the factor that `next` gave."""
        self.tried.append((self.current, passed))
        if passed:
            self.low = max(self.low, self.current)
            self.retried = False
            self.doublings += self.high is None
        elif not self.retried:
            self.retried = True
        else:
            self.retried = False
            self.high = self.current if self.high is None else min(self.high, self.current)
