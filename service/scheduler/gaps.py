"""How requests arrive: the share of short gaps, and the rate. Exponentially forgotten, O(1) per arrival."""

from __future__ import annotations

import math

GAP_SHARE = 0.1  # a gap below this share of the budget is short: part of a clump
GAP_DECAY = 0.995  # remembers about the last 200 gaps
CLUMPY_SHARE = 0.05  # of the gaps must be short for waiting in the blackout regime to pay
RATE_MEMORY = 10.0  # budgets over which the arrival rate is averaged


class ArrivalStatistics:
    """Gaps between the arrivals of requests with a budget of `budget_ns`; their rate too where `rated`."""

    __slots__ = ("_count", "_gap_ns", "_gaps", "_memory_ns", "_rated", "_short", "_span_ns", "last_ns")

    def __init__(self, budget_ns: int, rated: bool) -> None:
        self.last_ns = -1  # the latest arrival
        self._gap_ns = int(budget_ns * GAP_SHARE)
        self._memory_ns = RATE_MEMORY * budget_ns
        self._rated = rated
        self._gaps = 0.0
        self._short = 0.0
        self._count = 0.0
        self._span_ns = 0.0

    @property
    def clumpy(self) -> bool:
        """Whether a notable share of the recent gaps was short."""
        return self._short > CLUMPY_SHARE * self._gaps

    def note(self, arrival_ns: int) -> None:
        """Count one arrival."""
        if self.last_ns >= 0:
            gap_ns = arrival_ns - self.last_ns
            self._gaps = self._gaps * GAP_DECAY + 1.0
            self._short = self._short * GAP_DECAY + (gap_ns < self._gap_ns)
            if self._rated:
                kept = math.exp(-gap_ns / self._memory_ns)
                self._count = self._count * kept + 1.0
                self._span_ns = self._span_ns * kept + self._memory_ns * (1.0 - kept)
        self.last_ns = arrival_ns

    def expected_within(self, span_ns: int) -> float:
        """Arrivals expected in the next `span_ns`; 0 where the rate is not kept."""
        return self._count / self._span_ns * span_ns if self._span_ns > 0.0 else 0.0
