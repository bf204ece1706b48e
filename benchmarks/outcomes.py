"""Sorting the requests of an open-loop run into outcomes, each request in exactly one.

Everything is computed from the load generator's records, so from the client's side and from the intended send time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.load import Records

OK = 0
DEADLINE_EXCEEDED = 4
REFUSALS = (8, 14)  # RESOURCE_EXHAUSTED, UNAVAILABLE


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Counts over one window and what follows from them. `good + late + refused + expired + failed == offered`.

    Latencies in units of the objective T. `failed` holds what was lost: connection errors, no answer by the end of the
    drain, any other status. NaN where nothing was counted.
    """

    window_s: float
    offered: int
    good: int
    late: int
    refused: int
    expired: int
    failed: int
    p50_t: float
    p99_t: float
    reject_p50_t: float
    reject_p99_t: float
    lag_p99_t: float

    @property
    def goodput(self) -> float:
        """Answers within the objective, per second of the window."""
        return self.good / self.window_s

    @property
    def late_share(self) -> float:
        """Share of the OK answers that came after the objective; 0 without answers."""
        return self.late / max(1, self.good + self.late)


def classify(records: Records, slo_s: float, from_s: float, to_s: float) -> Outcomes:
    """Outcomes of the requests intended within [from_s, to_s) seconds from the start of the load."""
    intended = records["intended_ns"] * 1e-9
    rows = records[(intended >= from_s) & (intended < to_s)]
    latency_t = rows["latency_ns"] * 1e-9 / slo_s
    status = rows["status"]
    answered = status == OK
    good = answered & (latency_t <= 1)
    refused = np.isin(status, REFUSALS)
    expired = status == DEADLINE_EXCEEDED
    rejected = latency_t[refused | expired]

    def quantile(values: np.ndarray, level: float) -> float:
        return float(np.quantile(values, level, method="higher")) if len(values) else float("nan")

    return Outcomes(
        window_s=to_s - from_s,
        offered=len(rows),
        good=int(good.sum()),
        late=int((answered & ~good).sum()),
        refused=int(refused.sum()),
        expired=int(expired.sum()),
        failed=int((~answered & ~refused & ~expired).sum()),
        p50_t=quantile(latency_t[answered], 0.5),
        p99_t=quantile(latency_t[answered], 0.99),
        reject_p50_t=quantile(rejected, 0.5),
        reject_p99_t=quantile(rejected, 0.99),
        lag_p99_t=quantile(rows["lag_ns"] * 1e-9 / slo_s, 0.99),
    )
