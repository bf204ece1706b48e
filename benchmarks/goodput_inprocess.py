"""Goodput from 0.5 to 4 times capacity over the clairvoyant optimum, the scheduler fed from memory, at T = 20 ms.

As `goodput`, of which this is the same measurement, without HTTP/2 and gRPC: what a card can answer is more than one
machine's cores can send. Where 20 ms is less than `SLO_IN_L1` times the shortest batch the objective is that: below
four times nobody can batch (docs/performance.md).

    python -m benchmarks.goodput_inprocess [--device cuda] [--only MODEL]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.goodput import Send, Sent, details, measure_subject, picture, prepare
from benchmarks.goodput_results import Cell, Subject, figures, tables
from benchmarks.harness import Settings, parse_settings
from benchmarks.inprocess import InProcess
from benchmarks.report import Report, publish
from benchmarks.yardsticks import Seconds

SLO_S = 0.020
SLO_IN_L1 = 8.0
# The feeding thread shares the interpreter with the workers. What it is late by counts against the request, which is
# answered on time or not from when it was due; beyond this the load was another than the one drawn.
LAG_LIMIT_T = 0.05
LOADS = (0.5, 0.9, 1.2, 2.0, 4.0)
CPU_NAMES = ("mid",)
GPU_NAMES = ("resnet50", "resnet50_fp16", "efficientnet", "efficientnet_fp16")


@contextmanager
def fed_from_memory(settings: Settings, repository: Path, subject: Subject) -> Iterator[Send]:
    """Answers a subject's arrivals within a process of its own."""
    with InProcess(settings, repository, subject.name) as process:

        def send(arrivals: Seconds, _cell: Cell) -> Sent:
            replay = process.replay(arrivals)
            return Sent(replay.records, replay.cores, {}, "", LAG_LIMIT_T)

        yield send


def run(settings: Settings) -> Report:
    """Measure the models of the device. Raises `BenchmarkError` if one cannot be loaded."""
    settings = dataclasses.replace(settings, warmup_s=2 * settings.warmup_s)
    report = Report("goodput_inprocess")
    subjects = []
    for name in GPU_NAMES if settings.device == "cuda" else CPU_NAMES:
        if settings.only not in name:
            continue
        subject = prepare(settings, name, SLO_S, SLO_IN_L1)
        cells = [Cell(name, kind, x * subject.r2, x) for kind in ("poisson", "gamma3") for x in LOADS]
        measure_subject(settings, subject, cells, fed_from_memory)
        report.figures += figures(subject)
        report.tables += tables(subject)
        report.details[name] = details(subject)
        subjects.append(subject)
    report.pictures += picture(settings, subjects, "goodput_inprocess.png")
    return report


if __name__ == "__main__":
    chosen = parse_settings("Goodput with the scheduler fed from memory", window_s=10.0, quick_window_s=3.0)
    publish(chosen, [run(chosen)], "goodput_inprocess")
