"""What the goodput benchmark found: its cells and runs, and the figures, tables and picture made of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from benchmarks.bare_session import SessionTimes
from benchmarks.goodput_plot import Series
from benchmarks.outcomes import Outcomes
from benchmarks.report import Figure, Sense, Table
from benchmarks.yardsticks import Seconds, fluid

# A run in which the load generator sent later than this (p99, in units of T) is void.
LAG_LIMIT_T = 0.01
# When the machine's pace changed by more than this from before a run to after it, their mean says little about the run.
DRIFT_LIMIT = 0.15

# Triton 2.51.0, ONNX Runtime backend, delay 1 ms and `timeout_action: REJECT` after 15 ms, the best of five queue
# policies tried on this very load; one core for the server and one for the client of an AMD EPYC (AVX-512) machine.
TRITON_GOODPUT = {1200.0: 1141.0, 1800.0: 1380.0, 3000.0: 1412.0, 6000.0: 1184.0}
# On that machine a bare session took 17.35 ms for a batch of 32 of `cheap`. Machines differ by more than servers do, so
# goodput is also compared in units of the machine's own bare rate.
TRITON_ROWS = 32
TRITON_BARE_RATE = TRITON_ROWS / 0.01735

# The least share of the clairvoyant optimum promised, for objectives of at least 4 l(1).
BAR_UP_TO_CAPACITY = 0.97
BAR_OVERLOAD = 0.93
BAR_BURSTY = 0.90
BAR_LATE_SHARE = 0.005
BAR_REJECT_P50 = 0.35
# Goodput at a higher load over the best at any lower load.
BAR_NO_FALL = 0.95


@dataclass(frozen=True, slots=True)
class Cell:
    """One load on one model: `rate` a second, which is `load` times R2 at the table's pace; `absolute`: at any pace."""

    model: str
    kind: str
    rate: float
    load: float
    absolute: bool = False

    @property
    def label(self) -> str:
        return f"{self.model}, {self.kind}, {self.load:.2f} x R2 = {self.rate:.0f}/s"

    @property
    def bar(self) -> float:
        """The promised share of the optimum."""
        if self.kind != "poisson":
            return BAR_BURSTY
        return BAR_UP_TO_CAPACITY if self.load <= 0.9 else BAR_OVERLOAD


@dataclass(slots=True)
class Run:
    """One window of one cell.

    `optimum` is filled in at the end. `slowness` is how much longer than the table says a bare session took around the
    run, `drift` how much that changed from before it to after it. `threads` is the server's CPU time in ns and number
    of threads by group, warm-up and drain included.
    """

    seed: int
    rate: float
    outcomes: Outcomes
    optimum: int
    server_cores: float
    threads: dict[str, tuple[int, int]]
    doubt: str = ""
    slowness: float = 1.0
    drift: float = 1.0
    lag_limit_t: float = LAG_LIMIT_T

    @property
    def ratio(self) -> float:
        return self.outcomes.good / max(1, self.optimum)

    @property
    def paced_goodput(self) -> float:
        """Goodput as it would be at the table's pace, to compare runs with each other."""
        return self.outcomes.goodput * self.slowness

    @property
    def cpu_us_per_good(self) -> float:
        return self.server_cores * self.outcomes.window_s / max(1, self.outcomes.good) * 1e6


@dataclass(slots=True)
class Subject:
    """A model under test: its objective, the bare session's table, and the runs of each cell."""

    name: str
    slo_s: float
    before: SessionTimes
    table_s: Seconds
    r2: float
    runs: dict[Cell, list[Run]] = field(default_factory=dict)

    @property
    def bare_rate(self) -> float:
        """Rows per second of the bare session at the batch size Triton ran with (or the largest, if smaller)."""
        rows = min(TRITON_ROWS, len(self.table_s))
        return rows / float(self.table_s[rows - 1])

    def fluid(self, rate: float) -> float:
        return fluid(self.table_s, self.slo_s, rate)


def _doubt(runs: list[Run]) -> str:
    worst = max(run.outcomes.lag_p99_t for run in runs)
    if worst > runs[0].lag_limit_t:
        return f"send lag p99 {worst:.1%} of T"
    return next((run.doubt for run in runs if run.doubt), "")


def _drifted(runs: list[Run]) -> str:
    change = statistics.median(abs(run.drift - 1) for run in runs)
    return f"the machine's pace changed by {change:.0%} during a run" if change > DRIFT_LIMIT else ""


def _least_rise(series: list[list[Run]]) -> tuple[float, ...]:
    """Per repetition, the least of goodput at a load over the best goodput at any lower load."""
    least = []
    for per_load in zip(*series, strict=True):
        goodputs = np.array([run.paced_goodput for run in per_load])
        best = np.maximum.accumulate(goodputs)
        least.append(float(min(goodputs[1:] / np.maximum(best[:-1], 1e-9))))
    return tuple(least)


def _cell_figures(subject: Subject, cell: Cell, runs: list[Run]) -> list[Figure]:
    doubt, outcomes = _doubt(runs) or _drifted(runs), [run.outcomes for run in runs]

    def figure(what: str, values: list[float], bar: float | None, sense: Sense, unit: str = "") -> Figure:
        return Figure("goodput", f"{cell.label}: {what}", tuple(values), unit, bar, sense, doubt)

    found = [figure("goodput / optimum", [run.ratio for run in runs], cell.bar, Sense.AT_LEAST)]
    if cell.model == "cheap":
        goodputs = [o.goodput for o in outcomes]
        triton = TRITON_GOODPUT[cell.rate]
        found.append(figure("goodput; bar: Triton hand-tuned", goodputs, triton, Sense.AT_LEAST, "/s"))
        shares, bar = [run.paced_goodput / subject.bare_rate for run in runs], round(triton / TRITON_BARE_RATE, 3)
        found.append(figure("goodput / bare rows/s; bar: Triton's", shares, bar, Sense.AT_LEAST, "x"))
    found.append(figure("p99 of answers", [o.p99_t for o in outcomes], 1.0, Sense.AT_MOST, "T"))
    found.append(figure("late share of answers", [o.late_share for o in outcomes], BAR_LATE_SHARE, Sense.AT_MOST))
    if cell.load > 1.5:
        found.append(
            figure("time to reject p50", [o.reject_p50_t for o in outcomes], BAR_REJECT_P50, Sense.AT_MOST, "T")
        )
    return found


def figures(subject: Subject) -> list[Figure]:
    """What is promised of every cell, and of the series over the loads."""
    found = [figure for cell, runs in subject.runs.items() for figure in _cell_figures(subject, cell, runs)]
    for kind in sorted({cell.kind for cell in subject.runs}):
        series = [runs for cell, runs in subject.runs.items() if cell.kind == kind]
        if len(series) < 2:
            continue
        doubt = next(filter(None, (_doubt(runs) or _drifted(runs) for runs in series)), "")
        name = f"{subject.name}, {kind}: goodput at a load / best at a lower one"
        found.append(Figure("goodput", name, _least_rise(series), "", BAR_NO_FALL, Sense.AT_LEAST, doubt))
    return found


def _mid(runs: list[Run], value: Callable[[Run], float]) -> float:
    return statistics.median(value(run) for run in runs)


def _share(runs: list[Run], count: Callable[[Outcomes], int]) -> str:
    return f"{_mid(runs, lambda run: count(run.outcomes) / max(1, run.outcomes.offered)):.1%}"


def tables(subject: Subject) -> list[Table]:
    """One row per cell, medians over its runs; and the split of the server's CPU time over its threads."""
    goodput = Table(
        f"Goodput of {subject.name}, T = {subject.slo_s * 1e3:.0f} ms, R2 = {subject.r2:.0f}/s",
        ("arrivals", "x R2", "offered/s", "goodput/s", "optimum/s", "fluid/s", "of optimum", "slowness", "Triton/s"),
        notes=[
            f"l(1) = {subject.before.median_ms[0]:.2f} ms, best bare {subject.before.best()[1]:.0f} rows/s at batch "
            f"{subject.before.best()[0]}. Slowness: a bare session's times around the run over the table's."
        ],
    )
    outcome = Table(
        f"Outcomes of {subject.name}, times in units of T",
        (
            "arrivals",
            "offered/s",
            "p50",
            "p99",
            "late",
            "refused",
            "expired",
            "lost",
            "reject p50",
            "p99",
            "send lag p99",
        ),
    )
    cpu = Table(
        f"Server CPU of {subject.name}", ("arrivals", "offered/s", "cores", "us per good answer", "by thread group")
    )
    for cell, runs in subject.runs.items():
        offered = f"{cell.rate:.0f}"
        counts = [
            f"{cell.load:.2f}",
            f"{_mid(runs, lambda run: run.outcomes.offered / run.outcomes.window_s):.0f}",
            f"{_mid(runs, lambda run: run.outcomes.goodput):.0f}",
            f"{_mid(runs, lambda run: run.optimum / run.outcomes.window_s):.0f}",
            f"{subject.fluid(cell.rate):.0f}",
            f"{_mid(runs, lambda run: run.ratio):.3f}",
            f"{_mid(runs, lambda run: run.slowness):.2f}",
            f"{TRITON_GOODPUT[cell.rate]:.0f}" if cell.model == "cheap" else "",
        ]
        goodput.rows.append([cell.kind, *counts])
        shares = [
            f"{_mid(runs, lambda run: run.outcomes.late_share):.2%}",
            _share(runs, lambda o: o.refused),
            _share(runs, lambda o: o.expired),
            _share(runs, lambda o: o.failed),
        ]
        times = [
            f"{_mid(runs, lambda run: run.outcomes.p50_t):.2f}",
            f"{_mid(runs, lambda run: run.outcomes.p99_t):.2f}",
            *shares,
            f"{_mid(runs, lambda run: run.outcomes.reject_p50_t):.3f}",
            f"{_mid(runs, lambda run: run.outcomes.reject_p99_t):.3f}",
            f"{max(run.outcomes.lag_p99_t for run in runs):.2%}",
        ]
        outcome.rows.append([cell.kind, offered, *times])
        total = sum(time_ns for time_ns, _ in runs[-1].threads.values()) or 1
        groups = [f"{group} {time_ns / total:.0%}" for group, (time_ns, _) in runs[-1].threads.items()]
        used = [f"{_mid(runs, lambda run: run.server_cores):.2f}", f"{_mid(runs, lambda run: run.cpu_us_per_good):.0f}"]
        cpu.rows.append([cell.kind, offered, *used, ", ".join(groups[:5])])
    return [goodput, outcome, cpu]


def series(subject: Subject, kind: str) -> Series:
    """What the picture shows of one model under one arrival process."""
    cells = [cell for cell in subject.runs if cell.kind == kind]
    return Series(
        title=f"{subject.name}, {kind}, T = {subject.slo_s * 1e3:.0f} ms",
        offered=[cell.rate for cell in cells],
        goodput=[[run.outcomes.goodput for run in subject.runs[cell]] for cell in cells],
        optimum=[_mid(subject.runs[cell], lambda run: run.optimum / run.outcomes.window_s) for cell in cells],
        fluid=subject.fluid,
        capacity=subject.r2,
        peer=TRITON_GOODPUT if subject.name == "cheap" else {},
    )
