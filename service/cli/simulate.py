"""`onclock simulate`: how much load a model carries within an objective, and how many replicas a rate needs.

Simulates the server's own scheduler on a latency profile: of `onclock profile --json`, or stated as a + b x rows.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from service.errors import ModelLoadError
from service.scheduler import bucket_ladder
from service.simulation.arrivals import PROCESSES, read_trace
from service.simulation.capacity import (
    REQUESTS,
    Point,
    Scenario,
    classical,
    peak,
    replicas_for,
    run_trace,
    sustainable_rate,
    sweep,
)

LOADS = (0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 3.0, 4.0)
_LINEAR = re.compile(r"\s*([0-9.eE+-]+?)\s*\+\s*([0-9.eE-]+)\s*\*\s*rows\s*")


@dataclass(frozen=True, slots=True)
class SimulateOptions:
    """What to simulate.

    `profile`: a JSON file with {"table": {"1": ms, "2": ms, ...}}; or `latency`: "a+b*rows" in ms, with `max_rows`.
    `slo_ms`: the objective. `rate`: requests per second to be carried in total (None: only the capacity of one
    replica). `process` and `cv`: how requests arrive; or `trace`, a file of arrival times. `attainment`: the share that
    must be answered in time. `noise_cv`: spread of the service time. `plot`: where to draw goodput and latency.
    """

    slo_ms: float
    profile: Path | None = None
    latency: str | None = None
    max_rows: int = 64
    rate: float | None = None
    process: str = "poisson"
    cv: float = 3.0
    trace: Path | None = None
    attainment: float = 0.99
    noise_cv: float = 0.03
    seed: int = 1
    requests: int = REQUESTS
    plot: Path | None = None
    as_json: bool = False


def simulate(options: SimulateOptions) -> int:
    """Simulate and print what was found. Returns the exit code: 0, or 1 when the rate cannot be carried at all.

    Raises `ModelLoadError` when the profile or an option is unusable; the message says what is expected.
    """
    table_s = read_table(options)
    slo_s = options.slo_ms / 1e3
    _check(options, table_s)
    scenario = Scenario(
        options.process, options.cv, options.noise_cv, options.seed, options.requests, options.attainment
    )
    if options.trace is not None:
        return _replay(options, table_s, slo_s, scenario)
    points = sweep(table_s, slo_s, LOADS, scenario)
    carried = sustainable_rate(table_s, slo_s, scenario)
    replicas = None if options.rate is None else replicas_for(options.rate, carried)
    if options.plot is not None:
        # Imported here: drawing takes a second to load, and most runs do not draw.
        from service.simulation.plot import plot_sweep

        plot_sweep(points, slo_s, options.plot, f"objective {options.slo_ms:g} ms, {options.process} arrivals")
    failed = options.rate is not None and replicas is None
    if options.as_json:
        print(json.dumps(_as_json(options, table_s, points, carried, replicas), indent=2))
        return int(failed)
    console = Console()
    console.print(_table(options, points))
    for line in _conclusions(options, table_s, carried, replicas):
        console.print(line, markup=False, soft_wrap=True)
    if options.plot is not None:
        console.print(f"plot: {options.plot}", markup=False, soft_wrap=True)
    return int(failed)


def read_table(options: SimulateOptions) -> dict[int, float]:
    """The latency table in seconds by rows. Raises `ModelLoadError` when there is none, or it is not one."""
    if (options.profile is None) == (options.latency is None):
        raise ModelLoadError(
            "state the latency once: --profile FILE (from onclock profile --json), or --latency a+b*rows"
        )
    if options.latency is not None:
        return _linear(options.latency, options.max_rows)
    path = options.profile
    assert path is not None
    try:
        document = json.loads(path.read_text())
        table = {int(rows): float(ms) / 1e3 for rows, ms in document["table"].items()}
    except OSError as error:
        raise ModelLoadError(
            f"{path}: {error.strerror}; write one with onclock profile MODEL --json > {path}"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(
            f'{path}: not a profile ({error!r}); expected JSON with {{"table": {{"1": ms, "2": ms, ...}}}}'
        ) from error
    if not table or min(table) < 1 or not all(0 < seconds < math.inf for seconds in table.values()):
        raise ModelLoadError(f"{path}: the table needs rows >= 1 with times > 0 ms, got {document['table']}")
    least = 0.0
    for rows in sorted(table):  # measured times jitter: more rows never take less
        table[rows] = least = max(least, table[rows])
    return dict(sorted(table.items()))


def _linear(text: str, max_rows: int) -> dict[int, float]:
    match = _LINEAR.fullmatch(text)
    try:
        if match is None:
            raise ValueError(text)
        setup_ms, per_row_ms = float(match[1]), float(match[2])
    except ValueError as error:
        raise ModelLoadError(
            f"--latency '{text}': expected milliseconds as a+b*rows, for example 5+0.5*rows"
        ) from error
    if setup_ms < 0 or per_row_ms < 0 or setup_ms + per_row_ms <= 0 or max_rows < 1:
        raise ModelLoadError(f"--latency '{text}' for 1 to {max_rows} rows: expected times > 0 and at least one row")
    return {rows: (setup_ms + per_row_ms * rows) / 1e3 for rows in bucket_ladder(max_rows)}


def _check(options: SimulateOptions, table_s: dict[int, float]) -> None:
    if options.process not in PROCESSES:
        raise ModelLoadError(f"--process {options.process}: expected one of {', '.join(PROCESSES)}")
    if options.plot is not None and options.plot.suffix not in (".png", ".svg"):
        raise ModelLoadError(f"--plot {options.plot}: expected a file name that ends in .png or .svg")
    alone_ms = 1e3 * min(table_s.values())
    if options.slo_ms < alone_ms:
        raise ModelLoadError(
            f"--slo-ms {options.slo_ms:g}: one request takes {alone_ms:.3g} ms with nothing else running; "
            f"choose an objective of at least {2 * alone_ms:.3g} ms"
        )


def _replay(options: SimulateOptions, table_s: dict[int, float], slo_s: float, scenario: Scenario) -> int:
    assert options.trace is not None
    try:
        times = read_trace(options.trace, np.random.default_rng(options.seed))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"--trace: {error}") from error
    point = run_trace(table_s, slo_s, times, scenario)
    if options.as_json:
        print(json.dumps({"slo_ms": options.slo_ms, "points": [_point(point)]}, indent=2))
    else:
        Console().print(_table(options, [point]))
    return 0


def _table(options: SimulateOptions, points: list[Point]) -> Table:
    arriving = str(options.trace) if options.trace is not None else options.process
    if options.process == "gamma" and options.trace is None:
        arriving += f" (CV {options.cv:g})"
    table = Table(
        title=f"one replica, objective {options.slo_ms:g} ms, {arriving} arrivals", title_justify="left", box=None
    )
    for column in ("offered/s", "in time/s", "share", "of optimum", "late", "p50 ms", "p99 ms", "mean batch", "busy"):
        table.add_column(column, justify="right")
    for point in points:
        summary = point.summary
        table.add_row(
            f"{summary.rate:.0f}",
            f"{summary.goodput:.0f}",
            f"{summary.attainment:.2%}",
            f"{summary.goodput / point.optimum:.3f}" if point.optimum else "-",
            f"{summary.late_share:.2%}",
            f"{1e3 * summary.p50_s:.2f}",
            f"{1e3 * summary.p99_s:.2f}",
            f"{summary.mean_batch:.1f}",
            f"{summary.utilisation:.0%}",
        )
    return table


def _conclusions(
    options: SimulateOptions, table_s: dict[int, float], carried: float, replicas: int | None
) -> list[str]:
    share = f"{100 * options.attainment:g} %"
    unit = classical(table_s, options.slo_ms / 1e3)
    lines = [
        f"one replica answers {share} within {options.slo_ms:g} ms up to {carried:.0f} requests/s "
        f"(classical capacity {unit:.0f}/s, without an objective {peak(table_s):.0f}/s)"
    ]
    if carried == 0.0:
        lines = [
            f"no rate is answered to {share} within {options.slo_ms:g} ms with {options.process} arrivals: "
            "the objective is too few executions long for such bursts; try a longer one, or a lower --attainment"
        ]
    if options.rate is not None:
        needed = "no number of replicas carries it" if replicas is None else f"{replicas} replica{'s'[: replicas > 1]}"
        lines.append(f"{options.rate:g} requests/s: {needed}")
    return lines


def _as_json(
    options: SimulateOptions, table_s: dict[int, float], points: list[Point], carried: float, replicas: int | None
) -> dict[str, object]:
    return {
        "slo_ms": options.slo_ms,
        "process": options.process,
        "attainment": options.attainment,
        "sustainable_per_s": carried,
        "classical_per_s": classical(table_s, options.slo_ms / 1e3),
        "rate_per_s": options.rate,
        "replicas": replicas,
        "points": [_point(point) for point in points],
    }


def _point(point: Point) -> dict[str, float]:
    summary = point.summary
    return {
        "offered_per_s": summary.rate,
        "goodput_per_s": summary.goodput,
        "optimum_per_s": point.optimum,
        "fluid_per_s": point.fluid,
        "attainment": summary.attainment,
        "late_share": summary.late_share,
        "p50_ms": 1e3 * summary.p50_s,
        "p99_ms": 1e3 * summary.p99_s,
        "mean_batch": summary.mean_batch,
        "utilisation": summary.utilisation,
    }
