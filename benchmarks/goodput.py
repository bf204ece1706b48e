"""Goodput past saturation, over the exact clairvoyant optimum for the very same arrivals.

Two models bound by the bandwidth of their weights, so that batching decides:

    heavy   eight 4096 x 4096 layers, objective T = 8 l(1) of the table measured here; offered 0.9, 1.2, 2 and 4 times
            its capacity R2, Poisson and Gamma CV 3
    cheap   4096-4096-4096-64, T = 50 ms; offered 1,200, 1,800, 3,000 and 6,000 a second, Poisson: the load on which
            Triton with a hand-tuned queue timeout was measured. Here the cost of saying no decides.

The latency table is that of a bare session on the server's core, timed before the load. Between any two runs three
sizes of it are timed again: a run's optimum is computed on the table times the mean slowness just before and just after
it, so that a machine that is slower for a while does not count against the server, nor a faster one for it; what is
offered to `heavy` follows the pace just before the run. The optimum knows every arrival in advance, has no host costs
and no noise: 1.0 is out of reach. Every run replays arrivals drawn beforehand from a recorded seed, another seed for
each repetition; the cells of the grid take turns, so that drift hits all of them.

A run in which the load generator was late (send lag p99 above 1 % of T) is repeated once, and marked if late again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bare_session import SWEEP, Pace, SessionTimes, measure, slowness
from benchmarks.goodput_plot import plot
from benchmarks.goodput_results import LAG_LIMIT_T, TRITON_GOODPUT, Cell, Run, Subject, figures, series, tables
from benchmarks.harness import Settings, parse_settings, say
from benchmarks.load import Records, Request, open_loop
from benchmarks.models import MODELS, make_repository, model_file
from benchmarks.outcomes import classify
from benchmarks.profile_server import split_by_group, thread_names, thread_times
from benchmarks.report import Report, publish
from benchmarks.servers import onclock_server
from benchmarks.yardsticks import Seconds, capacity, draw
from service.simulation.optimum import clairvoyant

HEAVY_LOADS = (0.9, 1.2, 2.0, 4.0)
HEAVY_SLO_IN_L1 = 8.0
CHEAP_SLO_S = 0.050
# Sizes timed between runs: the least, the one that matters for a tight objective, the largest.
PACE_ROWS = (1, 32, 64)


def session_times(settings: Settings, name: str) -> SessionTimes:
    """The latency table of a bare session on the server's core."""
    say(f"goodput: {name}, latency table of a bare session")
    seconds = 0.2 if settings.quick else 0.5
    return measure(model_file(name, settings.models), settings.server_core, SWEEP, seconds, settings.device)


def prepare(settings: Settings, name: str, least_slo_s: float, slo_in_l1: float) -> Subject:
    """A subject with its table; the objective is `slo_in_l1` times its l(1), but no less than `least_slo_s`."""
    times = session_times(settings, name)
    table = times.table_s()
    # Whole milliseconds, so that the server's configuration and this process mean the same objective.
    slo_s = max(least_slo_s, round(slo_in_l1 * float(table[0]), 3))
    return Subject(name, slo_s, times, table, capacity(table, slo_s))


@dataclass(frozen=True, slots=True)
class Sent:
    """What came of a load: a record per request, cores the server used, its CPU time by group of threads, doubts."""

    records: Records
    cores: float
    threads: dict[str, tuple[int, int]]
    doubt: str
    lag_limit_t: float = LAG_LIMIT_T


Send = Callable[[Seconds, Cell], Sent]
Serve = Callable[[Settings, Path, Subject], AbstractContextManager[Send]]


@contextmanager
def over_the_wire(settings: Settings, repository: Path, subject: Subject) -> Iterator[Send]:
    """Sends a subject's arrivals to a server with the load generator."""
    with onclock_server(settings, repository, [subject.name]) as server:

        def send(arrivals: Seconds, cell: Cell) -> Sent:
            request = Request(cell.model, "x", (1, *MODELS[cell.model].row))
            before = thread_times(server.pid)
            load, records = open_loop(settings, server, request, arrivals, subject.slo_s)
            groups = split_by_group(before, thread_times(server.pid), thread_names(server.pid))
            return Sent(records, load.server_cores, groups, load.doubt())

        yield send


def measure_cell(settings: Settings, send: Send, subject: Subject, cell: Cell, rate: float, seed: int) -> Run:
    """One window of `cell` at `rate`, repeated once if the load generator was late; without its optimum."""
    start, end = settings.warmup_s, settings.warmup_s + settings.window_s
    arrivals = draw(cell.kind, rate, end, seed)

    def once() -> Run:
        sent = send(arrivals, cell)
        outcomes = classify(sent.records, subject.slo_s, start, end)
        return Run(seed, rate, outcomes, 0, sent.cores, sent.threads, sent.doubt, lag_limit_t=sent.lag_limit_t)

    run = once()
    if run.outcomes.lag_p99_t > run.lag_limit_t:
        say(f"goodput: {cell.label}: send lag p99 {run.outcomes.lag_p99_t:.1%} of T: void, once more")
        run = once()
    return run


def optimum(settings: Settings, subject: Subject, cell: Cell, run: Run) -> int:
    """The most requests of the window any schedule could answer in time, knowing the future and at no host cost."""
    arrivals = draw(cell.kind, run.rate, settings.warmup_s + settings.window_s, run.seed)
    return int(clairvoyant(arrivals[arrivals >= settings.warmup_s], subject.table_s * run.slowness, subject.slo_s))


def measure_subject(settings: Settings, subject: Subject, cells: Sequence[Cell], serve: Serve) -> None:
    """All repetitions of all cells, the machine's pace between them, then the optimum of every run."""
    folder = settings.out / f"goodput_{subject.name}"
    repository = make_repository(folder, settings.models, {subject.name: subject.slo_s * 1e3}, settings.device)
    model = model_file(subject.name, settings.models)
    seconds = 0.1 if settings.quick else 0.2
    with (
        serve(settings, repository, subject) as send,
        Pace(model, settings.server_core, PACE_ROWS, seconds, settings.device) as pace,
    ):
        before = slowness(pace.times(), subject.table_s)
        for repeat in range(settings.repeats):
            for index, cell in enumerate(cells):
                say(f"goodput: {cell.label}, run {repeat + 1} of {settings.repeats}")
                # A load in units of capacity is one of the capacity there is now.
                rate = cell.rate if cell.absolute else cell.load * capacity(subject.table_s * before, subject.slo_s)
                run = measure_cell(settings, send, subject, cell, rate, settings.seed + 1000 * repeat + index)
                after = slowness(pace.times(), subject.table_s)
                run.slowness, run.drift = (before + after) / 2, after / before
                before = after
                subject.runs.setdefault(cell, []).append(run)
    say(f"goodput: {subject.name}, clairvoyant optimum of every run")
    for cell, runs in subject.runs.items():
        for run in runs:
            run.optimum = optimum(settings, subject, cell, run)


def run(settings: Settings) -> Report:
    """Measure both models. Raises `BenchmarkError` if the server does not start."""
    settings = dataclasses.replace(settings, warmup_s=2 * settings.warmup_s)  # long enough for the estimator to settle
    report = Report("goodput")
    heavy, cheap = prepare(settings, "heavy", 0, HEAVY_SLO_IN_L1), prepare(settings, "cheap", CHEAP_SLO_S, 0)
    grids = {
        "heavy": [Cell("heavy", kind, x * heavy.r2, x) for kind in ("poisson", "gamma3") for x in HEAVY_LOADS],
        "cheap": [Cell("cheap", "poisson", rate, rate / cheap.r2, absolute=True) for rate in TRITON_GOODPUT],
    }
    subjects = [heavy, cheap]
    for subject in list(subjects):
        cells = [cell for cell in grids[subject.name] if settings.only in cell.label]
        if not cells:
            subjects.remove(subject)
            continue
        measure_subject(settings, subject, cells, over_the_wire)
        report.figures += figures(subject)
        report.tables += tables(subject)
        report.details[subject.name] = details(subject)
    report.pictures += picture(settings, subjects, "goodput.png")
    return report


def details(subject: Subject) -> dict[str, object]:
    """All that was measured of a subject."""
    return {
        "slo_s": subject.slo_s,
        "r2": subject.r2,
        "table_ms": [round(float(seconds) * 1e3, 4) for seconds in subject.table_s],
        "cells": [{"cell": cell, "runs": runs} for cell, runs in subject.runs.items()],
    }


def picture(settings: Settings, subjects: Sequence[Subject], name: str) -> list[Path]:
    """The curves of all subjects in one picture; none without subjects."""
    kinds = [(subject, kind) for subject in subjects for kind in dict.fromkeys(c.kind for c in subject.runs)]
    if not kinds:
        return []
    plot([series(subject, kind) for subject, kind in kinds], settings.out / name)
    return [settings.out / name]


if __name__ == "__main__":
    chosen = parse_settings("Goodput over the clairvoyant optimum", window_s=10.0, quick_window_s=3.0)
    publish(chosen, [run(chosen)], "goodput")
