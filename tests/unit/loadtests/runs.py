"""Runs made by hand, for tests of what is computed from them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loadtests.outcome import RECORD, Records
from loadtests.records import EntryInfo, Run, RunInfo
from loadtests.scrape import Scrape

MS = 1_000_000
S = 1_000_000_000


def records(rows: Sequence[tuple[float, int, float]], entry: int = 0) -> Records:
    """Records of (intended second, status, latency in ms; negative: it never ended), sent when intended."""
    made = np.zeros(len(rows), RECORD)
    for index, (at_s, status, latency_ms) in enumerate(rows):
        record = made[index]
        record["index"], record["entry"], record["rows"], record["status"] = index, entry, 1, status
        record["intended_ns"] = record["sent_ns"] = round(at_s * S)
        record["done_ns"] = -1 if latency_ms < 0 else round(at_s * S) + round(latency_ms * MS)
    return made


def run_of(
    made: Records,
    slos_s: Sequence[float | None] = (0.05,),
    duration_s: float = 10.0,
    warm_up_s: float = 0.0,
    closed: bool = False,
    capacity: float | None = None,
    scrapes: Sequence[Scrape] = (),
    scenario: dict[str, object] | None = None,
    name: str = "made",
) -> Run:
    """A run of these records; entry i has objective `slos_s[i]`."""
    info = RunInfo(
        name=name,
        description="Made by hand & <checked>.",
        server="127.0.0.1:8001",
        server_name="made 1",
        started_at="2026-01-01T00:00:00+00:00",
        start_ns=0,
        seed=1,
        plan="0123",
        warm_up_s=warm_up_s,
        duration_s=duration_s,
        workers=1,
        closed=closed,
        capacity=capacity,
        entries=[EntryInfo(f"entry{i}", "m", slo, "poisson") for i, slo in enumerate(slos_s)],
        scenario=scenario or {},
        worker_cpu=[0.2],
        client={"system": "Linux", "cores": "2", "python": "3.11"},
        rates={"at_s": [0.0, 5.0], "per_second": [10.0, 10.0]},
        scrapes=list(scrapes),
    )
    return Run(info, made)


def steady(count: int = 1000, duration_s: float = 10.0, latency_ms: float = 10.0, seed: int = 0) -> Records:
    """Answers of lognormal latency with this median."""
    rng = np.random.default_rng(seed)
    at = np.sort(rng.uniform(0, duration_s, count))
    latencies = latency_ms * np.exp(0.3 * rng.standard_normal(count))
    return records([(float(a), 0, float(ms)) for a, ms in zip(at, latencies, strict=True)])
