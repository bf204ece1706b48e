"""Ten heads on one backbone, against ten models that each carry it, and against one.

A backbone of four layers of 2048 x 2048 (64 MB, where batching pays: all weights are read for one row as for sixty)
and heads of ten classes. Requests for the ten names come in turn, Poisson arrivals. Server on one core, load generator
on the other. T decides how large the batches of ten models can be, each of which has a tenth of the requests, so there
are three: at the longest all of them fill their batches anyway.

goodput   at 1.2 times what the one model can do: answers within T a second
p99, CPU  at 0.5 times what the ten models can do, where all keep up
memory    resident, of the loaded server

    python -m benchmarks.heads [--quick]
"""

from __future__ import annotations

import shutil
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx

from benchmarks.harness import Settings, parse_settings, say
from benchmarks.load import Request, closed_loop, open_loop
from benchmarks.report import Figure, Report, Sense, Table, publish
from benchmarks.servers import Server, onclock_server
from benchmarks.yardsticks import draw
from tests.support.onnx_models import backbone, composed, head

HEADS = 10
WIDTH = 2048
LAYERS = 4
SLOS_MS = (100.0, 30.0, 15.0)
OVERLOAD = 1.2
EASE = 0.5
# The targets: goodput over that of ten models, memory over theirs, CPU a request over that of one model.
GOODPUT_BAR, MEMORY_BAR, COST_BAR = 3.0, 0.2, 1.15
_OWN = "max_batch_size: 64\ndynamic_batching { }\ninstance_group { kind: KIND_CPU count: 1 }\n"


def run(settings: Settings) -> Report:
    """Measure. Raises `BenchmarkError`."""
    report = Report("heads")
    columns = ("T ms", "served as", "memory MB", "goodput/s", "p99 ms", "CPU us/request", "rows a batch")
    table = Table(f"{HEADS} heads, Poisson arrivals in turn", columns)
    for slo_ms in SLOS_MS:
        _at(settings, slo_ms, report, table)
    report.tables.append(table)
    return report


def _at(settings: Settings, slo_ms: float, report: Report, table: Table) -> None:
    repositories = _write(settings.out / "heads", slo_ms)
    capacity: dict[str, float] = {}
    for kind in ("one", "ten"):
        with _serving(settings, repositories, kind) as server:
            capacity[kind] = closed_loop(settings, server, _request(kind), 64).ok_rps
    found: dict[str, list[tuple[float, float, float, float]]] = {kind: [] for kind in repositories}
    for repeat in range(settings.repeats):
        for kind in repositories:
            say(f"heads: T = {slo_ms:g} ms, {kind}, run {repeat + 1} of {settings.repeats}")
            with _serving(settings, repositories, kind) as server:
                memory = _resident_mb(server.pid)
                good, _, _ = _window(settings, server, kind, capacity["one"] * OVERLOAD, slo_ms)
                _, p99, cpu = _window(settings, server, kind, capacity["ten"] * EASE, slo_ms)
                rows = _rows_per_batch(server)
            found[kind].append((memory, good, p99, cpu))
            cells = (f"{memory:.0f}", f"{good:.0f}", f"{p99:.1f}", f"{cpu:.0f}", f"{rows:.1f}")
            table.rows.append([f"{slo_ms:g}", kind, *cells])
    ratios = (
        ("goodput, heads / ten", 1, "ten", GOODPUT_BAR, Sense.AT_LEAST),
        ("memory, heads / ten", 0, "ten", MEMORY_BAR, Sense.AT_MOST),
        ("p99, heads / ten", 2, "ten", None, Sense.AT_MOST),
        ("goodput, heads / one", 1, "one", None, Sense.AT_LEAST),
        ("p99, heads / one", 2, "one", None, Sense.AT_MOST),
        ("CPU a request, heads / one", 3, "one", COST_BAR, Sense.AT_MOST),
    )
    for label, at, other, bar, sense in ratios:
        values = tuple(mine[at] / theirs[at] for mine, theirs in zip(found["heads"], found[other], strict=True))
        report.figures.append(Figure("heads", f"T = {slo_ms:g} ms: {label}", values, "x", bar, sense))


def _write(root: Path, slo_ms: float) -> dict[str, Path]:
    shutil.rmtree(root, ignore_errors=True)
    promise = f'parameters {{ key: "latency_slo_ms" value {{ string_value: "{slo_ms:g}" }} }}\n'
    below = backbone(WIDTH, WIDTH, LAYERS)
    above = [head(WIDTH, 10, seed) for seed in range(1, HEADS + 1)]
    _publish(root / "heads" / "backbone", below, _OWN)
    named = 'parameters { key: "backbone" value { string_value: "backbone" } }\n'
    for number, model in enumerate(above):
        _publish(root / "heads" / f"m{number}", model, named + promise)
        _publish(root / "ten" / f"m{number}", composed(below, model), _OWN + promise)
    _publish(root / "one" / "m0", composed(below, above[0]), _OWN + promise)
    return {kind: root / kind for kind in ("one", "ten", "heads")}


def _publish(directory: Path, model: onnx.ModelProto, config: str) -> None:
    (directory / "1").mkdir(parents=True)
    onnx.save_model(model, str(directory / "1" / "model.onnx"))
    (directory / "config.pbtxt").write_text(config)


def _names(kind: str) -> Sequence[str]:
    return ["m0"] if kind == "one" else [f"m{number}" for number in range(HEADS)]


def _request(kind: str) -> Request:
    return Request(",".join(_names(kind)), "x", (1, WIDTH))


def _serving(settings: Settings, repositories: dict[str, Path], kind: str):  # type: ignore[no-untyped-def]
    return onclock_server(settings, repositories[kind], _names(kind))


def _window(settings: Settings, server: Server, kind: str, rate: float, slo_ms: float) -> tuple[float, float, float]:
    """Answers within the objective a second, p99 of the answers in ms, and server CPU for each in us."""
    arrivals = draw("poisson", rate, settings.warmup_s + settings.window_s, time.time_ns() % 2**32)
    load, records = open_loop(settings, server, _request(kind), arrivals, slo_ms / 1e3)
    inside = records[records["intended_ns"] >= settings.warmup_s * 1e9]
    answered = inside[inside["status"] == 0]
    good = int((answered["latency_ns"] <= slo_ms * 1e6).sum())
    return good / settings.window_s, float(np.percentile(answered["latency_ns"], 99)) / 1e6, load.server_cpu_us


def _rows_per_batch(server: Server) -> float:
    """Mean rows of the batches that ran a backbone, whether it is a model of its own or not."""
    url = f"http://127.0.0.1:{server.metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    mine = [line for line in lines if line.startswith("onclock_batch_rows_") and 'model="backbone"' in line]
    mine = mine or [line for line in lines if line.startswith("onclock_batch_rows_")]
    total = {
        part: sum(float(line.split()[-1]) for line in mine if line.startswith(f"onclock_batch_rows_{part}{{"))
        for part in ("sum", "count")
    }
    return total["sum"] / max(1.0, total["count"])


def _resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20


if __name__ == "__main__":
    chosen = parse_settings("Ten heads on one backbone", window_s=5.0, quick_window_s=2.0)
    publish(chosen, [run(chosen)], "heads")
