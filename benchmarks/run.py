"""All benchmarks, one report: `python -m benchmarks.run [--quick]`, which is `make bench`.

Writes `build/bench/<date>.json`, `.md` and `.png`. A benchmark that could not run is named with the reason, the others
still run, and the exit status is 1; a missed bar is a result, not a failure.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import shutil
import sys
import time
from collections.abc import Callable, Sequence

from benchmarks import efficiency, goodput, microbench, overhead
from benchmarks.harness import BenchmarkError, Settings, environment, parse_settings, say
from benchmarks.load import build_loadgen
from benchmarks.report import Report, publish

# Seconds measured per run, quick and full. Goodput counts events that are rare (late answers), so it looks longest; a
# batch of the heavy model takes a tenth of a second, so efficiency needs dozens of them.
Benchmark = tuple[str, Callable[[Settings], Report], float, float]
BENCHMARKS: tuple[Benchmark, ...] = (
    ("microbench", microbench.run, 0.2, 1.0),
    ("overhead", overhead.run, 1.5, 5.0),
    ("efficiency", efficiency.run, 4.0, 8.0),
    ("goodput", goodput.run, 3.0, 10.0),
)
# Below this share of idle time before the start, somebody else is using the machine.
QUIET = 0.95


def main() -> int:
    """Run everything; the exit status is 1 if something could not run."""
    settings = parse_settings("All benchmarks", window_s=0.0, quick_window_s=0.0)
    header = environment()
    if header["idle_share_before"] < QUIET:
        say(f"the machine is only {header['idle_share_before']:.0%} idle: figures will be worse than they are")
    try:
        build_loadgen()
    except BenchmarkError as error:
        say(str(error))
        return 1
    reports, failures = run_all(settings, BENCHMARKS)
    date = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H%M")
    for report in reports:
        for index, picture in enumerate(report.pictures):
            report.pictures[index] = picture.with_name(f"{date}{picture.suffix}")
            shutil.copyfile(picture, report.pictures[index])
    publish(settings, reports, date, {**header, "could_not_run": failures})
    return 1 if failures else 0


def run_all(settings: Settings, benchmarks: Sequence[Benchmark]) -> tuple[list[Report], list[str]]:
    """The reports of those that could run, and why the others could not."""
    reports: list[Report] = []
    failures: list[str] = []
    for name, benchmark, quick_s, full_s in benchmarks:
        window_s = settings.window_s or (quick_s if settings.quick else full_s)
        start = time.monotonic()
        try:
            reports.append(benchmark(dataclasses.replace(settings, window_s=window_s)))
            say(f"{name}: took {time.monotonic() - start:.0f} s")
        except BenchmarkError as error:
            failures.append(f"{name}: {error}")
            say(f"{name} could not run: {error}")
    return reports, failures


if __name__ == "__main__":
    sys.exit(main())
