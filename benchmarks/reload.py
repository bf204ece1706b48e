"""Fifty changes of a model under steady load: nobody's request fails, and the tail hardly moves.

A server in `poll` mode and the load generator's Poisson arrivals at 0.7 of the capacity that a closed loop finds. Three
rounds: good changes, broken ones, and files written slowly in pieces. Each round has a window without changes first;
reported are failed requests and the p99 of answers during the changes over that before them. A round in which nothing
changes comes before them and another after them: what those show is the machine's doing, not that of the changes.

    python -m benchmarks.reload [--quick] [--repeats N]
"""

from __future__ import annotations

import os
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from benchmarks.harness import BenchmarkError, Settings, parse_settings, say
from benchmarks.load import Request, closed_loop, open_loop
from benchmarks.models import MODELS, config_text
from benchmarks.report import Figure, Report, Sense, Table, publish
from benchmarks.servers import Server, onclock_server
from benchmarks.yardsticks import draw

NAME = "reloaded"
MODEL = MODELS["mid"]
CHANGES = 50
LOAD = 0.7
SLO_MS = 100.0
RATIO_BAR = 1.5
# What a change takes until it is seen, about.
SECONDS_A_CHANGE = 4.0
# The server looks this often, and waits for quiet for two seconds.
POLL = ("--model-control-mode", "poll", "--repository-poll-secs", "0.5")


def _whole(path: Path) -> Path:
    """Where the complete file is kept: dotfiles are not part of a model."""
    return path.with_name(".whole.onnx")


def _good(path: Path, _number: int) -> None:
    # The same network, but another file: that is what counts.
    aside = path.with_name(".new.onnx")
    shutil.copyfile(_whole(path), aside)
    aside.rename(path)


def _broken(path: Path, number: int) -> None:
    whole = _whole(path).read_bytes()
    aside = path.with_name(".new.onnx")
    aside.write_bytes(whole[: len(whole) * (number % 9 + 1) // 10])
    aside.rename(path)


def _slowly(path: Path, _number: int) -> None:
    whole = _whole(path).read_bytes()
    size = len(whole) // 8 + 1
    with path.open("wb") as file:
        for start in range(0, len(whole), size):
            file.write(whole[start : start + size])
            file.flush()
            time.sleep(0.2)


def _nothing(_path: Path, _number: int) -> None:
    time.sleep(SECONDS_A_CHANGE)


UNCHANGED = ""
ROUNDS: tuple[tuple[str, Callable[[Path, int], None], str], ...] = (
    ("nothing changes, first", _nothing, UNCHANGED),
    ("good changes", _good, "loaded"),
    ("broken changes", _broken, "failed"),
    ("files written in pieces", _slowly, "loaded"),
    ("nothing changes, last", _nothing, UNCHANGED),
)


def run(settings: Settings) -> Report:
    """Measure. Raises `BenchmarkError` if the server does not start, or does not take the changes."""
    report = Report("reload")
    table = Table(
        f"{CHANGES} changes at {LOAD} of capacity",
        (
            "round",
            "offered/s",
            "send lag p99 ms",
            "failed",
            "late",
            "p99 before ms",
            "p99 during ms",
            "ratio",
            "changes seen",
            "stolen ms/s",
        ),
    )
    changes = 5 if settings.quick else CHANGES
    repository = settings.out / "reload"
    shutil.rmtree(repository, ignore_errors=True)
    path = repository / NAME / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    onnx.save_model(MODEL.build(), str(path))
    shutil.copyfile(path, _whole(path))
    (repository / NAME / "config.pbtxt").write_text(config_text(MODEL, SLO_MS).replace(MODEL.name, NAME))
    request = Request(NAME, "x", (1, *MODEL.row))
    with onclock_server(settings, repository, [NAME], POLL) as server:
        capacity = closed_loop(settings, server, request, 32).ok_rps
        for label, change, result in ROUNDS:
            if settings.only not in label:
                continue
            say(f"reload: {label}")
            at = _Load(settings, server, request, capacity * LOAD)
            table.rows.append(_round(report, at, label, change, changes, path, result))
    report.tables.append(table)
    return report


@dataclass(frozen=True, slots=True)
class _Load:
    settings: Settings
    server: Server
    request: Request
    rate: float

    def window(self) -> tuple[np.ndarray, int, int, np.ndarray]:
        """Latencies of answers in ms, failed requests, answers after the objective, and send lags in ms."""
        seconds = self.settings.warmup_s + self.settings.window_s
        arrivals = draw("poisson", self.rate, seconds, time.time_ns() % 2**32)
        _, records = open_loop(self.settings, self.server, self.request, arrivals, SLO_MS / 1e3)
        answered = records["status"] == 0
        latency_ms = records["latency_ns"][answered] / 1e6
        return latency_ms, int((~answered).sum()), int((latency_ms > SLO_MS).sum()), records["lag_ns"] / 1e6


def _round(
    report: Report,
    at: _Load,
    label: str,
    change: Callable[[Path, int], None],
    changes: int,
    path: Path,
    result: str,
) -> list[str]:
    before = at.window()
    seen = _seen(at.server, result)
    begin, stolen = time.monotonic(), _stolen_s()
    done = threading.Event()

    def work() -> None:
        # Copying files takes a core that the server or the load generator has: behind them.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        for number in range(1, changes + 1):
            change(path, number)
            end = time.monotonic() + 60
            while result and _seen(at.server, result) < seen + number and time.monotonic() < end:
                time.sleep(0.1)
        done.set()

    worker = threading.Thread(target=work)
    worker.start()
    latencies: list[np.ndarray] = []
    lags: list[np.ndarray] = []
    failed = late = 0
    while not done.is_set():
        window = at.window()
        latencies.append(window[0])
        lags.append(window[3])
        failed, late = failed + window[1], late + window[2]
    worker.join()
    during = float(np.percentile(np.concatenate(latencies), 99))
    first = float(np.percentile(before[0], 99))
    stolen_ms = (_stolen_s() - stolen) * 1e3 / (time.monotonic() - begin)
    taken = _seen(at.server, result) - seen
    if result and taken < changes:
        raise BenchmarkError(f"{label}: only {taken} of {changes} changes were seen within a minute each")
    report.figures.append(Figure("reload", f"{label}: failed requests", (float(failed),), "", 0, Sense.AT_MOST))
    report.figures.append(Figure("reload", f"{label}: p99 during / before", (during / first,), "x", RATIO_BAR))
    shutil.copyfile(_whole(path), path)
    lag = float(np.percentile(np.concatenate(lags), 99))
    counts = (f"{at.rate:.0f}", f"{lag:.2f}", f"{failed + before[1]}", f"{late}")
    numbers = (*counts, f"{first:.2f}", f"{during:.2f}", f"{during / first:.2f}")
    return [label, *numbers, str(taken), f"{stolen_ms:.1f}"]


def _stolen_s() -> float:
    """What the hypervisor has taken from the processors so far, in seconds of one of them (Linux)."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return int(fields[8]) / os.sysconf("SC_CLK_TCK")


def _seen(server: Server, result: str) -> int:
    line = f'onclock_model_changes_total{{model="{NAME}",result="{result}"}} '
    url = f"http://127.0.0.1:{server.metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    return next((int(found.removeprefix(line)) for found in text.splitlines() if found.startswith(line)), 0)


if __name__ == "__main__":
    chosen = parse_settings("Changes of a model under load", window_s=5.0, quick_window_s=3.0)
    publish(chosen, [run(chosen)], "reload")
