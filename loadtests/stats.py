"""The numbers of a run: percentiles, shares, rates, over all of it, by entry and over time.

Percentiles are exact order statistics of all latencies, not of histogram buckets; latency counts from the intended send
time. A run whose client sent late is *void*: what it says of the server cannot be told from what it says of the client.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from loadtests.outcome import OK, Outcome, Records, lag_ns, latency_ns, status_name
from loadtests.records import Run

NS_PER_MS = 1e6
PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
# A run is void when the p99 of the client's own lag is above this share of the (shortest) objective; without an
# objective, above a millisecond.
VOID_SHARE = 0.01
VOID_WITHOUT_SLO_MS = 1.0
# A client this busy may be what was measured, even where its lag is still small.
BUSY_CORE = 0.9
# Width of a bin of the timeline: a hundred of them, at least this wide, seconds.
TIMELINE_BINS = 100
LEAST_BIN_S = 0.25
BOOTSTRAPS = 400

Floats = npt.NDArray[np.float64]


@dataclass(slots=True)
class Latency:
    """Of answers, milliseconds; None where there was no answer."""

    count: int
    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    p999: float | None = None
    max: float | None = None


@dataclass(slots=True)
class Summary:
    """A set of requests in numbers. Shares are of all but those cancelled by plan; rates are per second."""

    name: str
    slo_ms: float | None
    offered: int
    outcomes: dict[str, int]
    errors: dict[str, int]  # by status
    offered_rps: float
    answered_rps: float
    goodput_rps: float
    rows_rps: float
    attainment: float | None
    late_share: float | None
    refused_share: float | None
    error_share: float | None
    latency_ms: Latency
    reject_ms: Latency


@dataclass(slots=True)
class Timeline:
    """The measured part in bins by intended time. Lists of equal length; None where a bin has no answer."""

    at_s: list[float]
    width_s: float
    offered: list[float]  # per second, as are the next five
    in_slo: list[float]
    late: list[float]
    refused: list[float]
    expired: list[float]
    error: list[float]
    p50_ms: list[float | None]
    p99_ms: list[float | None]
    lag_p99_ms: list[float | None]


@dataclass(slots=True)
class Lag:
    """How late the client itself was, milliseconds, and the bound that makes a run void."""

    p50: float
    p99: float
    max: float
    limit_p99: float


@dataclass(slots=True)
class Analysis:
    """All of a run in numbers. `void` says why it must not be believed, empty if it may; `notes` what to keep in
    mind."""

    total: Summary
    entries: list[Summary]
    timeline: Timeline
    lag: Lag
    void: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def analyse(run: Run) -> Analysis:
    """The numbers of a run."""
    records = run.counted
    outcomes = run.outcomes(records)
    slos = {entry.slo_s for entry in run.info.entries}
    common = next(iter(slos)) if len(slos) == 1 else None
    total = summarise("all", records, outcomes, run.info.duration_s, common)
    entries = [
        summarise(entry.name, records[mine], outcomes[mine], run.info.duration_s, entry.slo_s)
        for index, entry in enumerate(run.info.entries)
        for mine in [records["entry"] == index]
    ]
    lag = _lag(run, records)
    analysis = Analysis(total, entries, _timeline(run, records, outcomes), lag)
    if not run.info.closed and lag.p99 > lag.limit_p99:
        analysis.void.append(
            f"the client sent late: p99 of its lag is {lag.p99:.2f} ms, more than {lag.limit_p99:.2f} ms; "
            "use more workers, a lower rate or a quieter machine"
        )
    busiest = max(run.info.worker_cpu, default=0.0)
    if busiest > BUSY_CORE:
        analysis.notes.append(f"a worker used {busiest:.0%} of a core: the client may be what was measured")
    if run.info.closed:
        analysis.notes.append(
            "closed loop: while the server stalls nothing is sent, so its stalls are seen by few requests; these "
            "latencies must not be compared with an open loop's"
        )
    if run.info.scrape_failures:
        analysis.notes.append(f"the server's metrics could not be read {run.info.scrape_failures} times")
    unsent = int(np.count_nonzero(records["sent_ns"] < 0))
    if unsent:
        analysis.notes.append(f"{unsent} requests were never sent: no connection, or no free stream on one")
    return analysis


def summarise(
    name: str, records: Records, outcomes: npt.NDArray[np.int8], duration_s: float, slo_s: float | None
) -> Summary:
    """Numbers of some requests."""
    counts = {outcome.name.lower(): int(np.count_nonzero(outcomes == outcome)) for outcome in Outcome}
    cancelled = counts["cancelled"]
    asked = len(records) - cancelled
    answered = counts["in_slo"] + counts["late"]
    refused = (outcomes == Outcome.REFUSED_ON_ARRIVAL) | (outcomes == Outcome.REFUSED_IN_QUEUE)
    failed = outcomes == Outcome.ERROR
    ok = records["status"] == OK
    latency = latency_ns(records) / NS_PER_MS
    statuses, numbers = np.unique(records["status"][failed], return_counts=True)
    waited = (records["done_ns"] - records["sent_ns"])[refused] / NS_PER_MS

    def share(part: int, whole: int) -> float | None:
        return part / whole if whole else None

    return Summary(
        name=name,
        slo_ms=None if slo_s is None else slo_s * 1e3,
        offered=len(records),
        outcomes=counts,
        errors={status_name(int(s)): int(n) for s, n in zip(statuses, numbers, strict=True)},
        offered_rps=len(records) / duration_s,
        answered_rps=answered / duration_s,
        goodput_rps=counts["in_slo"] / duration_s,
        rows_rps=float(records["rows"][outcomes == Outcome.IN_SLO].sum()) / duration_s,
        attainment=share(counts["in_slo"], asked),
        late_share=share(counts["late"], answered),
        refused_share=share(int(np.count_nonzero(refused)), asked),
        error_share=share(counts["error"], asked),
        latency_ms=_latency(latency[ok]),
        reject_ms=_latency(waited),
    )


def percentile(values: Floats, share: float) -> float:
    """The least value that at least `share` percent do not exceed (the inverted distribution function)."""
    return float(np.percentile(values, share, method="inverted_cdf"))


def _latency(values: Floats) -> Latency:
    if not len(values):
        return Latency(0)
    p50, p90, p95, p99, p999 = (percentile(values, share) for share in PERCENTILES)
    return Latency(len(values), float(values.mean()), p50, p90, p95, p99, p999, float(values.max()))


def _lag(run: Run, records: Records) -> Lag:
    lags = lag_ns(records)
    values = lags[lags >= 0] / NS_PER_MS
    slos = [entry.slo_s for entry in run.info.entries if entry.slo_s]
    limit = min(slos) * 1e3 * VOID_SHARE if slos else VOID_WITHOUT_SLO_MS
    if not len(values):
        return Lag(0.0, 0.0, 0.0, limit)
    return Lag(percentile(values, 50), percentile(values, 99), float(values.max()), limit)


def _timeline(run: Run, records: Records, outcomes: npt.NDArray[np.int8]) -> Timeline:
    duration = run.info.duration_s
    bins = max(1, min(TIMELINE_BINS, int(duration / LEAST_BIN_S)))
    width = duration / bins
    at = (records["intended_ns"] / 1e9) - run.info.warm_up_s
    which = np.clip((at / width).astype(np.int64), 0, bins - 1)
    latency, lags = latency_ns(records) / NS_PER_MS, lag_ns(records) / NS_PER_MS

    def rate(mask: Any) -> list[float]:
        return [float(n) / width for n in np.bincount(which[mask], minlength=bins)]

    def quantile(values: Floats, mask: Any, share: float) -> list[float | None]:
        order = np.argsort(which[mask], kind="stable")
        edges = np.searchsorted(which[mask][order], np.arange(bins + 1))
        ordered = values[mask][order]
        parts = [ordered[edges[i] : edges[i + 1]] for i in range(bins)]
        return [percentile(part, share) if len(part) else None for part in parts]

    ok = records["status"] == OK
    refused = (outcomes == Outcome.REFUSED_ON_ARRIVAL) | (outcomes == Outcome.REFUSED_IN_QUEUE)
    return Timeline(
        at_s=[round(i * width, 4) for i in range(bins)],
        width_s=width,
        offered=rate(np.ones(len(records), bool)),
        in_slo=rate(outcomes == Outcome.IN_SLO),
        late=rate(outcomes == Outcome.LATE),
        refused=rate(refused),
        expired=rate(outcomes == Outcome.EXPIRED),
        error=rate(outcomes == Outcome.ERROR),
        p50_ms=quantile(latency, ok, 50),
        p99_ms=quantile(latency, ok, 99),
        lag_p99_ms=quantile(lags, lags >= 0, 99),
    )


def recovery_s(run: Run, after_s: float, attainment: float) -> float | None:
    """How long after `after_s` of the measured part the objective was kept again: the least time from which on at least
    `attainment` of all later requests were answered in time. None if it never was."""
    records = run.counted
    at = records["intended_ns"] / 1e9 - run.info.warm_up_s - after_s
    outcomes = run.outcomes(records)
    later = (at >= 0) & (outcomes != Outcome.CANCELLED)
    if not later.any():
        return None
    at, good = at[later], outcomes[later] == Outcome.IN_SLO
    # Share of good ones from each request to the end.
    left = np.arange(len(at), 0, -1)
    shares = np.cumsum(good[::-1])[::-1] / left
    kept = np.flatnonzero(shares >= attainment)
    # The last few requests alone say nothing: at least a tenth of what was sent afterwards has to be kept.
    kept = kept[left[kept] >= len(at) / 10]
    return float(at[kept[0]]) if len(kept) else None


@dataclass(slots=True)
class Interval:
    """A value with its 95 % confidence interval."""

    value: float
    low: float
    high: float


def intervals(run: Run, blocks: int = 20, seed: int = 0) -> dict[str, Interval]:
    """Confidence intervals of the main figures, by bootstrap over blocks of time: requests near to each other share
    queues, so that resampling single ones would promise too much (Kuensch 1989, block bootstrap)."""
    records = run.counted
    outcomes = run.outcomes(records)
    at = records["intended_ns"] / 1e9 - run.info.warm_up_s
    which = np.clip((at / run.info.duration_s * blocks).astype(np.int64), 0, blocks - 1)
    latency = latency_ns(records) / NS_PER_MS
    parts = [np.flatnonzero(which == block) for block in range(blocks)]
    rng = np.random.default_rng(seed)

    def figures(chosen: npt.NDArray[np.int64]) -> dict[str, float]:
        picked = outcomes[chosen]
        in_slo = int(np.count_nonzero(picked == Outcome.IN_SLO))
        asked = max(1, int(np.count_nonzero(picked != Outcome.CANCELLED)))
        answers = latency[chosen][records["status"][chosen] == OK]
        late = int(np.count_nonzero(picked == Outcome.LATE))
        result = {
            "goodput_rps": in_slo / run.info.duration_s,
            "attainment": in_slo / asked,
            "late_share": late / max(1, in_slo + late),
        }
        for name, share in (("p50_ms", 50.0), ("p90_ms", 90.0), ("p99_ms", 99.0)):
            result[name] = percentile(answers, share) if len(answers) else float("nan")
        return result

    whole = figures(np.arange(len(records)))
    drawn = [figures(np.concatenate([parts[i] for i in rng.integers(0, blocks, blocks)])) for _ in range(BOOTSTRAPS)]
    result = {}
    for name, value in whole.items():
        values = np.array([sample[name] for sample in drawn])
        values = values[~np.isnan(values)]
        low, high = np.percentile(values, [2.5, 97.5]) if len(values) else (value, value)
        result[name] = Interval(value, float(min(low, value)), float(max(high, value)))
    return result
