"""What only a GPU can show: `python -m benchmarks.run_gpu [--quick]`, which is `make bench-gpu`.

The pool over a bare session, the overhead and the efficiency of the server, with the models on the first GPU; the
goodput of the scheduler fed from memory.
Without one it says why there is none and ends with status 0: nothing was measured, and nothing is claimed.
"""

from __future__ import annotations

import dataclasses
import sys

from benchmarks import efficiency, goodput_inprocess, overhead, pool
from benchmarks.harness import BenchmarkError, environment, parse_settings, say
from benchmarks.load import build_loadgen
from benchmarks.report import publish
from benchmarks.run import Benchmark, run_all
from service.engine.devices import find_devices

BENCHMARKS: tuple[Benchmark, ...] = (
    ("pool", pool.run, 0.5, 3.0),
    ("overhead", overhead.run, 1.0, 3.0),
    ("efficiency", efficiency.run, 1.5, 4.0),
    ("goodput_inprocess", goodput_inprocess.run, 1.0, 3.0),
)


def main() -> int:
    """Run everything; the exit status is 1 if something could not run."""
    settings = dataclasses.replace(parse_settings("What only a GPU can show", 0.0, 0.0), device="cuda")
    devices = find_devices("auto", cpu_slots=1, gpu_slots=1, cpu_threads=1)
    if not devices.gpus:
        say(f"nothing was measured: {devices.why}")
        return 0
    try:
        build_loadgen()
    except BenchmarkError as error:
        say(str(error))
        return 1
    reports, failures = run_all(settings, BENCHMARKS)
    publish(settings, reports, "gpu", {**environment(), "gpu": devices.why, "could_not_run": failures})
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
