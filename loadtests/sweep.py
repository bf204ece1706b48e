"""A sweep: one load after another, from below capacity to far above, and the curve beside what was possible at all.

The optimum knows every arrival in advance and has no costs but the model's: it is computed for the very arrivals that
were sent, on a latency table measured over the wire (one request of b rows at a time), or given. The one import from
the server's own package is that computation; nothing of the server under test is known but its answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loadtests import charts
from loadtests.charts import Curve
from loadtests.errors import LoadTestError
from loadtests.outcome import DEADLINE_EXCEEDED, OK, UNAVAILABLE, latency_ns
from loadtests.payload import templates
from loadtests.plan import pacer_of
from loadtests.records import Run
from loadtests.report import Page, Table, number
from loadtests.run import Prepared, Watch, execute
from loadtests.scenario import Closed, Criteria, Scenario
from loadtests.stats import Analysis, Interval, analyse, intervals
from service.simulation.capacity import fluid
from service.simulation.optimum import clairvoyant

DEFAULT_LOADS = (0.5, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0, 4.0)
# Sizes timed for the table: each half as large again as the one before, each for this long.
TABLE_GROWTH = 1.5
TABLE_S = 0.6
FALLBACK_ROWS = 64


@dataclass(slots=True)
class Point:
    """One offered load: rates per second; `goodput` with its confidence interval."""

    load: float
    offered: float
    goodput: Interval
    optimum: float
    fluid: float
    shares: dict[str, float]
    p50_ms: float | None
    p99_ms: float | None
    reject_p50_ms: float | None
    void: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Sweep:
    """A finished sweep."""

    name: str
    server: str
    server_name: str
    started_at: str
    slo_s: float
    capacity: float
    table_ms: dict[int, float]
    points: list[Point]


def measure_table(prepared: Prepared, watch: Watch | None = None) -> dict[int, float]:
    """Median latency (seconds) of requests of 1, 2, 3, 5, ... rows, one at a time, as the client sees it.

    It ends before the first size that the server refuses for want of time: no batch of that size could be in time, so
    that the optimum has none either. Raises `LoadTestError` when a size is not answered for another reason.
    """
    entry, info = prepared.scenario.load[0], prepared.models[0]
    most = info.max_batch_size or FALLBACK_ROWS if info.batched else 1
    sizes, size = [], 1.0
    while size < most:
        sizes.append(round(size))
        size = max(size * TABLE_GROWTH, round(size) + 1)
    table: dict[int, float] = {}
    for rows in [*sizes, most]:
        # Nothing may be refused for being late: what is measured is how long it takes.
        sized = entry.model_copy(update={"rows": {rows: 1.0}, "priority": None, "deadline": None, "variants": 4,
                                         "cancel": None, "arrivals": None, "slow": None, "criteria": None})  # fmt: skip
        scenario = prepared.scenario.model_copy(
            update={"arrivals": Closed(kind="closed", concurrency=1), "duration": TABLE_S, "warm_up": 0.2,
                    "workers": 1, "connections": 1, "load": (sized,), "capacity": None, "criteria": Criteria(),
                    "metrics": None}
        )  # fmt: skip
        made = tuple(templates(sized, info, [scenario.seed, 200, rows]))
        run = execute(Prepared(scenario, prepared.server_name, (info,), (made,)), None, watch)
        latencies = latency_ns(run.counted)[run.counted["status"] == OK]
        if not len(latencies):
            if table and refused_for_time(run.counted["status"]):
                break
            words = [word for words in run.info.messages.values() for word in words]
            raise LoadTestError(f"no request of {rows} rows was answered, so there is no latency table: {words}")
        table[rows] = float(np.median(latencies)) / 1e9
    return table


def refused_for_time(status: npt.NDArray[np.int16]) -> bool:
    """Whether all of these statuses, and there are some, are those of requests that need longer than they have."""
    return len(status) > 0 and bool(np.isin(status, (DEADLINE_EXCEEDED, UNAVAILABLE)).all())


def read_table(path: Path) -> dict[int, float]:
    """A latency table in seconds from JSON: `{"1": 4.5, "32": 17.0}` in milliseconds, or what `onclock profile --json`
    prints. Raises `LoadTestError`."""
    try:
        raw = json.loads(path.read_text())
        if isinstance(raw, dict) and "latency_ms" in raw:
            raw = raw["latency_ms"]
        table = {int(rows): float(value) / 1e3 for rows, value in raw.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise LoadTestError(
            f"{path}: no latency table: {error}; expected rows and milliseconds, such as {{'1': 4.5}}"
        ) from error
    if 1 not in table or min(table.values()) <= 0:
        raise LoadTestError(f"{path}: a latency table needs a positive latency for 1 row")
    return table


def full_table(table: Mapping[int, float]) -> npt.NDArray[np.float64]:
    """Latency of 1, 2, ... rows up to the largest: interpolated, and never falling, since a batch can be padded."""
    sizes = np.arange(1, max(table) + 1)
    known = sorted(table)
    values = np.interp(sizes, known, [table[rows] for rows in known])
    return np.minimum.accumulate(values[::-1])[::-1]


def point(run: Run, analysis: Analysis, load: float, table: Mapping[int, float], slo_s: float) -> Point:
    """A load's numbers beside its optimum."""
    records = run.counted
    arrivals = (records["intended_ns"] / 1e9) - run.info.warm_up_s
    best = clairvoyant(np.sort(arrivals), full_table(table), slo_s) / run.info.duration_s
    total = analysis.total
    counts, asked = total.outcomes, max(1, total.offered)
    shares = {
        "in time": counts["in_slo"] / asked,
        "late": counts["late"] / asked,
        "refused": (counts["refused_on_arrival"] + counts["refused_in_queue"]) / asked,
        "expired": counts["expired"] / asked,
        "error": (counts["error"] + counts["cancelled"]) / asked,
    }
    offered = total.offered_rps
    return Point(
        load, offered, intervals(run)["goodput_rps"], best, fluid(table, slo_s, offered), shares,
        total.latency_ms.p50, total.latency_ms.p99, total.reject_ms.p50, analysis.void,
    )  # fmt: skip


def one_load(prepared: Prepared, capacity: float, load: float, watch: Watch | None) -> tuple[Run, Analysis]:
    """Run the scenario at `load` times the capacity, once more when the run is void."""
    base = _mean_rate(prepared.scenario, capacity)
    scaled = replace(prepared, factor=load * capacity / base)
    run = execute(scaled, capacity, watch)
    analysis = analyse(run)
    if analysis.void:
        run = execute(scaled, capacity, watch)
        analysis = analyse(run)
    return run, analysis


def check(scenario: Scenario) -> float:
    """The objective, seconds, of a scenario fit for a sweep. Raises `LoadTestError`."""
    slos = {scenario.slo_of(entry) for entry in scenario.load}
    (slo,) = slos if len(slos) == 1 else (None,)
    if slo is None or scenario.closed:
        raise LoadTestError("a sweep needs one objective (`slo`) for the whole load, and open-loop arrivals")
    if len(scenario.load) > 1 or set(scenario.load[0].rows) != {1}:
        raise LoadTestError("a sweep is of one load entry with requests of one row: the optimum is known for no other")
    return slo


def _mean_rate(scenario: Scenario, capacity: float) -> float:
    arrivals = scenario.load[0].arrivals or scenario.arrivals
    assert arrivals is not None
    assert not isinstance(arrivals, Closed)
    pacer = pacer_of(arrivals, capacity, [scenario.seed, 0])
    at = np.linspace(0.0, scenario.duration, 200, endpoint=False)
    return float(np.mean([pacer.rate(float(second), scenario.duration) for second in at]))


def page_of(sweep: Sweep, others: Sequence[Sweep] = ()) -> Page:
    """The page of a sweep, or of several servers' beside each other."""
    everyone = [sweep, *others]
    curves = [
        Curve(
            each.server_name if len(everyone) > 1 else "answered in time",
            [p.offered for p in each.points],
            [p.goodput.value for p in each.points],
            low=[p.goodput.low for p in each.points],
            high=[p.goodput.high for p in each.points],
        )
        for each in everyone
    ]
    offered = [p.offered for p in sweep.points]
    curves += [
        Curve("optimum", offered, [p.optimum for p in sweep.points], "bound"),
        Curve("fluid bound", offered, [p.fluid for p in sweep.points], "bound"),
    ]
    parts = [(name, [p.shares[name] for p in sweep.points]) for name in sweep.points[0].shares]
    page = Page(
        title=f"Sweep: {sweep.name}",
        subtitle=f"{sweep.server_name} at {sweep.server}, {sweep.started_at}",
        description=f"Requests of one row, to be answered within {sweep.slo_s * 1e3:g} ms, at "
        f"{sweep.points[0].load:g} to {sweep.points[-1].load:g} times the capacity of {sweep.capacity:,.0f}/s.",
        charts=[charts.goodput_curve(curves, sweep.slo_s * 1e3), charts.shares_curve(offered, parts)],
    )
    best, lines = 0.0, []
    for p in sweep.points:
        if best and p.goodput.value < 0.9 * best:
            lines.append(f"at {p.load:g}x only {p.goodput.value / best:.0%} of the goodput at a lower load")
        best = max(best, p.goodput.value)
    void = [f"{p.load:g}x: {reason}" for p in sweep.points for reason in p.void]
    if void:
        page.banner = {"kind": "void", "headline": "Some of these loads are void: the client sent late.", "lines": void}
    elif lines:
        page.banner = {"kind": "fail", "headline": "Goodput falls as the load rises.", "lines": lines}
    else:
        page.banner = {"kind": "pass", "headline": "Goodput holds as the load rises.", "lines": []}
    for each in everyone:
        page.tables.append(_table(each, f": {each.server_name}" if len(everyone) > 1 else ""))
    page.facts = [
        ("Objective", f"{sweep.slo_s * 1e3:g} ms from the intended send time"),
        ("Capacity", f"{sweep.capacity:,.0f}/s, the unit of the loads"),
        ("Latency table", ", ".join(f"{rows} rows {ms:.3g} ms" for rows, ms in sweep.table_ms.items())),
    ]
    page.notes = [
        "The optimum is computed on the latency table as a client sees it, for the very arrivals that were sent. It is "
        "exact for requests of one row to one instance of the model; a server with several instances can be above it.",
    ]
    return page


def _table(sweep: Sweep, suffix: str) -> Table:
    rows = []
    for p in sweep.points:
        of_optimum = p.goodput.value / p.optimum if p.optimum else None
        shares = [number(p.shares[name], "%") for name in ("in time", "late", "refused", "expired", "error")]
        rows.append(
            [f"{p.load:g}x", number(p.offered), number(p.goodput.value),
             f"{number(p.goodput.low)} to {number(p.goodput.high)}", number(p.optimum), number(of_optimum),
             number(p.fluid), *shares, number(p.p50_ms), number(p.p99_ms), number(p.reject_p50_ms)]
        )  # fmt: skip
    columns = ("load", "offered/s", "in time/s", "95 %", "optimum/s", "of it", "fluid/s", "in time", "late", "refused",
               "expired", "errors", "p50 ms", "p99 ms", "refusal p50 ms")  # fmt: skip
    return Table(f"Load by load{suffix}", columns, list(rows))


def as_json(sweep: Sweep) -> str:
    """All of it, to be read again."""
    return json.dumps(asdict(sweep), indent=1)


def from_json(path: Path) -> Sweep:
    """Read what `as_json` wrote. Raises `LoadTestError`."""
    try:
        raw = json.loads(path.read_text())
        points = [Point(**{**p, "goodput": Interval(**p["goodput"])}) for p in raw.pop("points")]
        table = {int(rows): ms for rows, ms in raw.pop("table_ms").items()}
        return Sweep(**raw, points=points, table_ms=table)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadTestError(f"{path}: not the JSON of a sweep: {error}") from error
