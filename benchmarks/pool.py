"""The session pool, fed from memory, over a bare session: what gathering, binding and handing out add.

One process on the server's core. Rows per second: requests of one row, joined into the best batch, merged, run and
taken apart, over plain `session.run` on an array that is there already. Latency: one row through the pool, less one
`run_with_iobinding` on buffers bound once, with whatever copies to the device that needs. Windows alternate.

With `--device cuda` the same on the first GPU, and once more from ordinary instead of page-locked memory, and with
CUDA graphs: the latency of one row and of eight, at the median and at p99. Two instances that take turns (two run
slots) show what the copies of one batch gain by running beside the computing of another. The child
(`python -m benchmarks.pool --child MODEL`) prints one JSON object per window.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.harness import ROOT, BenchmarkError, Settings, parse_settings, say
from benchmarks.models import MODELS, model_file
from benchmarks.report import Figure, Report, Sense, Table, publish
from benchmarks.servers import pinned
from service.engine.pool import Instance

RATE_BAR = 0.95
ADDED_BAR_MS = 0.3
NAMES = ("tiny", "resnet", "resnet50", "resnet50_fp16", "efficientnet", "efficientnet_fp16", "heavy")
CPU_NAMES = ("tiny", "resnet", "efficientnet", "heavy")
CHILD = "--child"
MIN_LAPS = 5
TIMES = ("bare p50 ms", "pool p50 ms", "added", "pool p99 ms", "8 rows p50 ms", "8 rows p99 ms")


@dataclass(frozen=True, slots=True)
class Window:
    """One comparison: rows/s at `batch`, bare, of the pool and of two instances at once; the median time of one row,
    bare and through the pool, and the tail of it and of eight rows through the pool, milliseconds."""

    batch: int
    bare_rows_s: float
    pool_rows_s: float
    two_rows_s: float
    bare_ms: float
    pool_ms: float
    pool_p99_ms: float
    eight_ms: float
    eight_p99_ms: float


def run(settings: Settings) -> Report:
    """Measure the models that the device can do in reasonable time. Raises `BenchmarkError`."""
    report = Report("pool")
    columns = ("model", "memory", "batch", "bare rows/s", "pool rows/s", "ratio", "two slots rows/s", *TIMES)
    table = Table("The pool over a bare session, in one process", columns)
    gpu = settings.device == "cuda"
    for name in NAMES if gpu else CPU_NAMES:
        if settings.only not in name:
            continue
        for memory in ("page-locked", "ordinary", "graphs") if gpu else ("ordinary",):
            say(f"pool: {name}, {memory} memory")
            windows = _measure(settings, name, memory)
            ratios = tuple(w.pool_rows_s / w.bare_rows_s for w in windows)
            added = tuple(w.pool_ms - w.bare_ms for w in windows)
            for window, ratio, more in zip(windows, ratios, added, strict=True):
                # With graphs the bare session replays one without its inputs being copied: no figure to compare with.
                bare, over = ("-", "-") if memory == "graphs" else (f"{window.bare_rows_s:.1f}", f"{ratio:.3f}")
                cells = [name, memory, str(window.batch), bare, f"{window.pool_rows_s:.1f}", over]
                times = (window.bare_ms, window.pool_ms, more, window.pool_p99_ms, window.eight_ms, window.eight_p99_ms)
                table.rows.append([*cells, f"{window.two_rows_s:.1f}", *(f"{time_ms:.3f}" for time_ms in times)])
            if memory == "page-locked" or not gpu:
                label = f"{name}: pool / bare session"
                # `tiny` computes nothing: its ratio is what a row costs the pool, and nothing was promised for it.
                bar = RATE_BAR if name != "tiny" else None
                report.figures.append(Figure("pool", f"{label}, rows/s", ratios, "x", bar, Sense.AT_LEAST))
                report.figures.append(Figure("pool", f"{name}: added at one row, p50", added, "ms", ADDED_BAR_MS))
            report.details[f"{name} {memory}"] = windows
    report.tables.append(table)
    return report


def _measure(settings: Settings, name: str, memory: str) -> list[Window]:
    command = [sys.executable, "-m", "benchmarks.pool", CHILD, str(model_file(name, settings.models)), settings.device]
    command += [memory, str(MODELS[name].max_batch), str(settings.repeats), str(settings.window_s)]
    done = subprocess.run(pinned(settings.server_core, command), capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise BenchmarkError(f"pool of {name} failed (exit {done.returncode}): {done.stderr[-1500:]}")
    return [Window(**json.loads(line)) for line in done.stdout.splitlines()]


def _child(
    path: Path, device: Literal["cpu", "cuda"], memory: str, max_batch: int, repeats: int, seconds: float
) -> None:
    from service.config.complete import complete
    from service.config.graph import read_graph
    from service.engine.devices import find_devices
    from service.engine.instances import finish_graphs, make_instances
    from service.engine.warmup import batch_arrays, requests, samples

    graph = read_graph(path)
    config = complete(None, path.stem, graph.inputs, graph.outputs, graph.dynamic_quantisation, max_batch).config
    locked = memory != "ordinary"
    optimization = replace(
        config.optimization,
        input_pinned_memory=locked,
        output_pinned_memory=locked,
        cuda_graphs=memory == "graphs",
    )
    config = replace(config, optimization=optimization)
    place = find_devices(device, cpu_slots=1, gpu_slots=1, cpu_threads=1).taken[0]
    instance, second = make_instances(path, config, place, 2)
    session: Any = instance.session._session
    sample = samples(config, path.parent)[0]
    for note in finish_graphs([instance, second], config, sample, sorted({1, min(8, max_batch), *_sizes(max_batch)})):
        say(f"pool: {path.stem}: {note}")

    kept: list[object] = []

    def bare(rows: int) -> Callable[[], object]:
        feeds = {name: array for name, (_, array) in batch_arrays([sample] * rows, config).items()}
        names = [spec.name for spec in config.outputs]
        return lambda: session.run(names, feeds)

    def bound(rows: int) -> Callable[[], object]:
        feeds = batch_arrays([sample] * rows, config)
        outputs = [(spec, np.zeros((rows, *spec.shape), spec.datatype.dtype)) for spec in config.outputs]
        binding = instance.session.bind(list(feeds.values()), outputs)
        # The arrays must outlive the binding, which knows only where they are.
        kept.append((feeds, outputs))
        return lambda: instance.session.run_bound(binding)

    def pool(rows: int, instance: Instance = instance) -> Callable[[], object]:
        segments = requests(sample, config, rows)

        def once() -> None:
            for output in instance.run(segments, rows, rows).outputs:
                assert output.view is not None
                for row in range(rows):
                    # What the encoder takes of it: a view of the row's bytes.
                    _ = output.view[row * output.row_bytes : (row + 1) * output.row_bytes]

        return once

    rates = {rows: rows / _times(bare(rows), seconds / 10)[1] for rows in _sizes(max_batch)}
    best = max(rates, key=lambda rows: rates[rows])
    bare_best, pool_best, bare_one, pool_one = bare(best), pool(best), bound(1), pool(1)
    pool_eight = pool(min(8, max_batch))
    for _ in range(repeats):
        one, eight = (np.array(_laps(call, seconds)) * 1e3 for call in (pool_one, pool_eight))
        window = Window(
            best,
            best / _times(bare_best, seconds)[1],
            best / _times(pool_best, seconds)[1],
            best * _together([pool_best, pool(best, second)], seconds),
            _times(bare_one, seconds)[0] * 1e3,
            *(float(np.percentile(laps, q)) for laps in (one, eight) for q in (50, 99)),
        )
        print(json.dumps({field: getattr(window, field) for field in Window.__dataclass_fields__}), flush=True)


def _sizes(max_batch: int) -> list[int]:
    return [1 << power for power in range(max_batch.bit_length()) if 1 << power <= max_batch]


def _times(once: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Median and mean time of a call, seconds."""
    laps = _laps(once, seconds)
    return float(np.median(laps)), float(np.mean(laps))


def _together(calls: list[Callable[[], object]], seconds: float) -> float:
    """Calls a second, of threads that each repeat one of `calls`."""
    start = time.perf_counter()
    with ThreadPoolExecutor(len(calls)) as threads:
        counts = [len(laps) for laps in threads.map(lambda call: _laps(call, seconds), calls)]
    return sum(counts) / (time.perf_counter() - start)


def _laps(once: Callable[[], object], seconds: float) -> list[float]:
    """The time of each call made within `seconds`, seconds."""
    for _ in range(3):
        once()
    laps: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(laps) < MIN_LAPS:
        lap = time.perf_counter()
        once()
        laps.append(time.perf_counter() - lap)
    return laps


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        file, where, kind, largest, windows, length = sys.argv[2:]
        assert where in ("cpu", "cuda")
        _child(Path(file), where, kind, int(largest), int(windows), float(length))  # type: ignore[arg-type]
    else:
        chosen = parse_settings("The session pool over a bare session", window_s=4.0, quick_window_s=0.5)
        publish(chosen, [run(chosen)], "pool")
