"""Outcomes of a run in figures: goodput, attainment, late share, percentiles. Counted after a warm-up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from service.simulation.simulator import IN_SLO, LATE, REFUSED, Outcomes

WARM_UP_SHARE = 0.1


@dataclass(slots=True, frozen=True)
class Summary:
    """Figures of the requests that arrived after the warm-up.

    `goodput`: answers within the objective per second; `attainment`: their share of what was offered; `late_share`:
    share of the answers that came too late; times in seconds; `mean_batch` rows; `utilisation` share of the time.
    """

    offered: int
    in_slo: int
    late: int
    refused: int
    rate: float
    goodput: float
    attainment: float
    late_share: float
    p50_s: float
    p99_s: float
    mean_batch: float
    utilisation: float
    refused_on_arrival: int
    refusal_p50_s: float
    refusal_p99_s: float


def summarise(outcomes: Outcomes, warm_up: float = WARM_UP_SHARE) -> Summary:
    """The figures of one model, leaving out the first `warm_up` share of its arrivals. Raises `ValueError` when
    nothing is left."""
    first = int(len(outcomes.arrivals_s) * warm_up)
    if first >= len(outcomes.arrivals_s):
        raise ValueError("no arrivals after the warm-up; simulate longer")
    begin = outcomes.arrivals_s[first]
    span = max(float(outcomes.arrivals_s[-1] - begin), 1e-9)
    outcome, elapsed = outcomes.outcome[first:], outcomes.elapsed_s[first:]
    in_slo, late, refused = (int((outcome == kind).sum()) for kind in (IN_SLO, LATE, REFUSED))
    answered, rejected = elapsed[outcome != REFUSED], elapsed[outcome == REFUSED]
    counted = outcomes.batch_starts_s >= begin
    rows, seconds = outcomes.batch_rows[counted], outcomes.batch_s[counted]
    offered = len(outcome)
    return Summary(
        offered,
        in_slo,
        late,
        refused,
        offered / span,
        in_slo / span,
        in_slo / offered,
        late / max(1, in_slo + late),
        _percentile(answered, 50),
        _percentile(answered, 99),
        float(rows.mean()) if len(rows) else 0.0,
        float(seconds.sum()) / span,
        int(outcomes.on_arrival[first:].sum()),
        _percentile(rejected, 50),
        _percentile(rejected, 99),
    )


def _percentile(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]], percent: float) -> float:
    return float(np.percentile(values, percent)) if len(values) else 0.0
