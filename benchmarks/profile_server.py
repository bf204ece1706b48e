"""Where a running server's CPU time goes: over its threads, and over its Python functions.

    python -m benchmarks.profile_server --pid PID [--seconds 5]          a server that is already under load
    python -m benchmarks.profile_server --model tiny --concurrency 64    starts onclock and the load itself

Threads: run time of every thread over the interval, from `/proc/PID/task/*/schedstat` (nanoseconds, exact, costs the
server nothing), grouped by the name Python gave them. Names and functions come from py-spy (`pip install py-spy`; it
needs the right to ptrace the server: same user, or CAP_SYS_PTRACE in a container). Functions are sampled 200 times a
second, so shares below one percent mean little; "holding the GIL" counts only samples in which the thread held it.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.harness import BUILD, BenchmarkError, Settings
from benchmarks.load import Request, closed_loop
from benchmarks.models import MODELS, make_repository
from benchmarks.report import Report, Table, publish
from benchmarks.servers import Server, onclock_server

SAMPLES_PER_S = 200
SHOWN_FUNCTIONS = 25


def thread_times(pid: int) -> dict[int, int]:
    """Run time in nanoseconds of every live thread of a process, by thread id."""
    times: dict[int, int] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended between the listing and the read
            times[int(task.name)] = int((task / "schedstat").read_text().split()[0])
    return times


def py_spy() -> str | None:
    """The py-spy beside this interpreter or on PATH."""
    return shutil.which("py-spy", path=sysconfig.get_path("scripts")) or shutil.which("py-spy")


def thread_names(pid: int) -> dict[int, str]:
    """Python's names of the threads of a process by thread id; empty without py-spy or the right to use it."""
    spy = py_spy()
    if spy is None:
        return {}
    done = subprocess.run([spy, "dump", "--json", "--nonblocking", "--pid", str(pid)], capture_output=True, text=True)
    if done.returncode != 0:
        print(f"py-spy: {done.stderr.strip()[-300:]}", file=sys.stderr)
        return {}
    return {int(t["os_thread_id"]): str(t["thread_name"]) for t in json.loads(done.stdout) if t["os_thread_id"]}


def group_of(name: str) -> str:
    """The name without what numbers it: `ThreadPoolExecutor-0_12` and `..._3` are one group."""
    return re.sub(r"[-_ ]*\d+(?:[-_]\d+)*$", "", name) or name


def split_by_group(
    before: Mapping[int, int], after: Mapping[int, int], names: Mapping[int, str]
) -> dict[str, tuple[int, int]]:
    """Run time in ns and number of threads per group, most time first. A thread Python does not know is `native`."""
    groups: dict[str, tuple[int, int]] = {}
    for tid, total in after.items():
        spent = total - before.get(tid, 0)
        group = group_of(names[tid]) if tid in names else "native"
        time_ns, threads = groups.get(group, (0, 0))
        groups[group] = (time_ns + spent, threads + 1)
    return dict(sorted(groups.items(), key=lambda item: -item[1][0]))


def functions(pid: int, seconds: float, gil_only: bool) -> collections.Counter[str]:
    """Samples per innermost Python function over `seconds`. Raises `BenchmarkError` without py-spy."""
    spy = py_spy()
    if spy is None:
        raise BenchmarkError("py-spy is not installed: pip install py-spy")
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "stacks"
        command = [spy, "record", "--pid", str(pid), "--duration", str(max(1, round(seconds))), "--format", "raw"]
        command += ["--function", "--nonblocking", "--rate", str(SAMPLES_PER_S), "--output", str(raw)]
        done = subprocess.run([*command, *(["--gil"] if gil_only else [])], capture_output=True, text=True)
        if done.returncode != 0 or not raw.exists():
            raise BenchmarkError(f"py-spy failed: {done.stderr.strip()[-500:]}")
        return leaf_counts(raw.read_text())


def leaf_counts(stacks: str) -> collections.Counter[str]:
    """Samples per innermost frame from stacks as flame graphs take them: `outer;...;inner 12` a line."""
    counts: collections.Counter[str] = collections.Counter()
    for line in stacks.splitlines():
        stack, _, count = line.rpartition(" ")
        if stack:
            counts[stack.rsplit(";", 1)[-1]] += int(count)
    return counts


def threads_table(groups: Mapping[str, tuple[int, int]], seconds: float, requests: float) -> Table:
    """The split over thread groups; per request where `requests` (answered in the interval) is not 0."""
    table = Table("CPU time by thread", ("threads", "count", "cores", "share", "us/request"))
    total = sum(time_ns for time_ns, _ in groups.values()) or 1
    for group, (time_ns, count) in groups.items():
        per_request = f"{time_ns / requests / 1e3:.1f}" if requests else ""
        table.rows.append([group, str(count), f"{time_ns / seconds / 1e9:.3f}", f"{time_ns / total:.1%}", per_request])
    return table


def functions_table(title: str, counts: collections.Counter[str]) -> Table:
    table = Table(title, ("function", "samples", "share"))
    total = counts.total() or 1
    table.rows = [[name, str(n), f"{n / total:.1%}"] for name, n in counts.most_common(SHOWN_FUNCTIONS)]
    return table


def profile(pid: int, seconds: float) -> Report:
    """Split a running process over threads, then over functions twice (all running, then holding the GIL)."""
    report = Report("profile")
    names = thread_names(pid)
    before, start = thread_times(pid), time.monotonic()
    time.sleep(seconds)
    after, took = thread_times(pid), time.monotonic() - start
    groups = split_by_group(before, after, {**names, **thread_names(pid)})
    report.tables.append(threads_table(groups, took, 0))
    report.details["threads"] = groups
    for title, gil_only in (("Functions, running", False), ("Functions, holding the GIL", True)):
        counts = functions(pid, seconds, gil_only)
        report.tables.append(functions_table(title, counts))
        report.details[title] = dict(counts)
    return report


@contextlib.contextmanager
def background_load(
    settings: Settings, server: Server, request: Request, concurrency: int, window_s: float
) -> Iterator[None]:
    """A closed loop that lasts at least as long as the body takes, if the body takes no more than `window_s`."""
    thread = threading.Thread(target=closed_loop, args=(settings, server, request, concurrency, window_s))
    thread.start()
    time.sleep(settings.warmup_s + 0.2)
    yield
    thread.join()


def main() -> None:
    """Profile a given process, or onclock under a closed loop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pid", type=int)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--model", choices=sorted(MODELS), default="tiny")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--slo-ms", type=float)
    arguments = parser.parse_args()
    settings = Settings()
    if arguments.pid is not None:
        report = profile(arguments.pid, arguments.seconds)
    else:
        name = arguments.model
        repository = make_repository(BUILD / "bench" / "profile", settings.models, {name: arguments.slo_ms})
        request = Request(name, "x", (1, *MODELS[name].row))
        # Three intervals, plus the time py-spy takes to attach and to write.
        window_s = 3 * arguments.seconds + 5
        with (
            onclock_server(settings, repository, [name]) as server,
            background_load(settings, server, request, arguments.concurrency, window_s),
        ):
            report = profile(server.pid, arguments.seconds)
    publish(dataclasses.replace(settings, repeats=1), [report], "profile")


if __name__ == "__main__":
    main()
