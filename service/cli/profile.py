"""`onclock profile`: how long a model takes per batch size, and what can be promised with it.

Promise: the model is loaded and run exactly as the server would (same configuration, session options, buffers), on one
device, with nothing else running. The JSON that `--json` prints is what `onclock simulate --profile` reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from service.clock import NS_PER_MS, NS_PER_S
from service.config.complete import complete
from service.config.graph import model_file, read_graph
from service.config.model import ModelConfig
from service.engine.batchable import check_batching
from service.engine.devices import Device, find_devices
from service.engine.instances import make_instances
from service.engine.options import share_threads
from service.engine.pool import Instance
from service.engine.warmup import LatencySample, Sample, first_run, measure, samples
from service.errors import ModelLoadError
from service.pb.model_config_pb2 import ModelConfig as ConfigMessage
from service.repository.layout import scan_model
from service.simulation.capacity import REQUESTS, Scenario, classical, peak, sustainable_rate

# Batches that reach this share of the peak rows per second are large enough: beyond it, latency buys little.
EFFICIENT_SHARE = 0.9

# How long the simulation for `--slo-ms` is: this many objectives, within this many requests.
SPAN_IN_OBJECTIVES = 20
MOST_REQUESTS = 40_000


@dataclass(frozen=True, slots=True)
class ProfileOptions:
    """What to measure and how to report it. `path`: a model's directory, a version's directory or an .onnx file.

    `version` None: the newest. `slo_ms` None: the objective of the model's configuration, if it has one. `budget_ms`
    bounds the measuring. `threads`: intra-op threads on the CPU.
    """

    path: Path
    version: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 1
    max_batch_size: int = 64
    budget_ms: int = 10_000
    slo_ms: float | None = None
    plot: Path | None = None
    as_json: bool = False


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """A measured model. `table`: latency per number of rows. `notes`: what was decided without being asked."""

    model: str
    device: str
    slo_ns: int | None
    table: dict[int, LatencySample]
    notes: tuple[str, ...]

    @property
    def medians_ns(self) -> dict[int, int]:
        """Median latency per number of rows, nanoseconds."""
        return {rows: sample.p50_ns for rows, sample in self.table.items()}


@dataclass(frozen=True, slots=True)
class Promise:
    """What a server could promise: with batches of `rows`, `rows_per_s` within an objective of `slo_ns`."""

    rows: int
    rows_per_s: float
    slo_ns: int


@dataclass(frozen=True, slots=True)
class Capacity:
    """Rows per second within an objective: the classical figure (batches that fit into it twice), and what the
    simulated scheduler sustains with at least 99 % of random (Poisson) arrivals in time."""

    classical: float
    sustainable: float


def profile(options: ProfileOptions) -> int:
    """Measure a model and print what was found. Returns the exit code; raises `ModelLoadError`."""
    measured = measure_model(options)
    slo_ns = measured.slo_ns if options.slo_ms is None else round(options.slo_ms * NS_PER_MS)
    unasked = shortest_promise(measured.medians_ns)
    asked = None if slo_ns is None else capacity_within(measured.medians_ns, slo_ns)
    if options.plot is not None:
        _plot(measured, slo_ns, options.plot)
    if options.as_json:
        print(json.dumps(as_json(measured, slo_ns, unasked, asked), indent=2))
        return 0
    console = Console()
    console.print(_table(measured))
    for note in measured.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    for line in _conclusions(measured, slo_ns, unasked, asked):
        console.print(line, markup=False, soft_wrap=True)
    if options.plot is not None:
        console.print(f"plot: {options.plot}", markup=False, soft_wrap=True)
    return 0


def measure_model(options: ProfileOptions) -> ModelProfile:
    """Load the model of `options` and measure it. Raises `ModelLoadError`."""
    name, message, directory, path = find_model(options.path, options.version)
    graph = read_graph(path)
    devices = find_devices(options.device, cpu_slots=1, gpu_slots=1, cpu_threads=options.threads)
    device = devices.taken[0]
    completed = complete(
        message,
        name,
        graph.inputs,
        graph.outputs,
        graph.dynamic_quantisation,
        options.max_batch_size,
        [gpu.index for gpu in devices.gpus],
        graph.convolutions,
    )
    share_threads(device.threads)
    explicit = message is not None and message.max_batch_size > 1
    instance, config, sample, notes = open_model(path, directory, completed.config, device, explicit)
    max_rows = config.max_batch_size if config.batched else 1
    found = measure(instance, config, sample, max_rows, None, options.budget_ms * NS_PER_MS)
    notes = [*completed.notes, *notes]
    if not found.complete:
        notes.append(
            f"the time was enough for batches up to {max(found.table)} of {max_rows} rows; give more with --budget-ms"
        )
    return ModelProfile(name, f"{device.name} ({device.provider})", config.objective.slo_ns, found.table, tuple(notes))


def find_model(path: Path, version: int | None) -> tuple[str, ConfigMessage | None, Path, Path]:
    """What `path` stands for: model name, configuration as in the file (None = none), model directory, model file.

    Raises `ModelLoadError` when nothing there is a model.
    """
    if path.is_file() or model_file(path).is_file():
        if version is not None:
            raise ModelLoadError(f"{path}: is one model file; leave --version out, or give the model's directory")
        file = model_file(path)
        return (path.stem if path.is_file() else path.resolve().name), None, file.parent, file
    if not path.is_dir():
        raise ModelLoadError(f"{path}: no such file or directory; expected a model's directory or an .onnx file")
    found, _ = scan_model(path.resolve())
    if found.error is not None:
        raise found.error
    files = found.versions[-1] if version is None else found.version(version)
    if files is None:
        there = ", ".join(str(v.version) for v in found.versions)
        raise ModelLoadError(f"{path}: there is no version {version}; there are: {there}")
    return found.name, found.config, found.directory, model_file(files.model_path)


def open_model(
    path: Path, directory: Path, config: ModelConfig, device: Device, explicit: bool
) -> tuple[Instance, ModelConfig, Sample, list[str]]:
    """Load a model and run it once: (instance, configuration to serve with, its warm-up row, notes).

    `explicit`: its batch size was asked for, not derived.
    Raises `ModelLoadError` when it does not load, or accepts none of the inputs tried.
    """
    (instance,) = make_instances(path, config, device, 1)
    sample, reason = first_run(instance, config, samples(config, directory))
    if sample is None:
        raise ModelLoadError(f"{path}: no input that was tried is accepted; state one in model_warmup: {reason}")
    notes: list[str] = []
    if config.joins_requests:
        config, notes = check_batching(instance, config, sample, explicit)
    return instance, config, sample, notes


def shortest_promise(medians_ns: Mapping[int, int]) -> Promise:
    """The shortest objective worth promising: two executions of the smallest efficient batch.

    A request waits for the batch before it and then for its own. The batch is the smallest that reaches 90 % of the
    peak rows per second: a shorter objective costs capacity, a longer one brings little.
    """
    best = max(rows / ns for rows, ns in medians_ns.items())
    rows = min(rows for rows, ns in medians_ns.items() if rows / ns >= EFFICIENT_SHARE * best)
    return Promise(rows, rows / medians_ns[rows] * NS_PER_S, 2 * medians_ns[rows])


def capacity_within(medians_ns: Mapping[int, int], slo_ns: int) -> Capacity | None:
    """What one replica carries within an objective; None when not even one row fits into it."""
    table_s = {rows: ns / NS_PER_S for rows, ns in medians_ns.items()}
    slo_s = slo_ns / NS_PER_S
    if table_s[min(table_s)] > slo_s:
        return None
    most = peak(table_s)
    # Long enough that a load above the peak cannot hide in a queue as long as the objective; bounded to a few seconds.
    requests = min(MOST_REQUESTS, max(REQUESTS, round(SPAN_IN_OBJECTIVES * slo_s * most)))
    sustained = sustainable_rate(table_s, slo_s, Scenario(requests=requests))
    return Capacity(classical(table_s, slo_s), min(sustained, most))


def as_json(measured: ModelProfile, slo_ns: int | None, unasked: Promise, asked: Capacity | None) -> dict[str, object]:
    """The profile as JSON: `table` (rows to median ms) is what `onclock simulate` reads."""
    return {
        "model": measured.model,
        "device": measured.device,
        "table": {str(rows): round(s.p50_ns / NS_PER_MS, 6) for rows, s in measured.table.items()},
        "p99_ms": {str(rows): round(s.p99_ns / NS_PER_MS, 6) for rows, s in measured.table.items()},
        "rows_per_s": {str(rows): round(rows / s.p50_ns * NS_PER_S, 3) for rows, s in measured.table.items()},
        "promise": {"slo_ms": unasked.slo_ns / NS_PER_MS, "rows": unasked.rows, "rows_per_s": unasked.rows_per_s},
        "slo_ms": None if slo_ns is None else slo_ns / NS_PER_MS,
        "capacity": None
        if asked is None
        else {"classical_rows_per_s": asked.classical, "sustainable_rows_per_s": asked.sustainable},
        "notes": list(measured.notes),
    }


def _table(measured: ModelProfile) -> Table:
    best = max(rows / ns for rows, ns in measured.medians_ns.items())
    table = Table(title=f"{measured.model} on {measured.device}", title_justify="left", box=None, pad_edge=False)
    for column in ("rows", "p50 ms", "p99 ms", "rows/s", "of peak", "runs"):
        table.add_column(column, justify="right")
    for rows, sample in sorted(measured.table.items()):
        table.add_row(
            str(rows),
            f"{sample.p50_ns / NS_PER_MS:.3f}",
            f"{sample.p99_ns / NS_PER_MS:.3f}",
            f"{rows / sample.p50_ns * NS_PER_S:.0f}",
            f"{rows / sample.p50_ns / best:.0%}",
            str(sample.runs),
        )
    return table


def _conclusions(measured: ModelProfile, slo_ns: int | None, unasked: Promise, asked: Capacity | None) -> list[str]:
    lines = [
        f"shortest objective worth promising: latency_slo_ms {unasked.slo_ns / NS_PER_MS:.3g} "
        f"(two batches of {unasked.rows}, about {unasked.rows_per_s:.0f} rows/s)"
    ]
    if slo_ns is None:
        return lines
    slo_ms = slo_ns / NS_PER_MS
    alone_ms = measured.medians_ns[min(measured.table)] / NS_PER_MS
    if asked is None:
        lines.append(f"within {slo_ms:g} ms: nothing, one row alone takes {alone_ms:.3g} ms; choose more")
    else:
        lines.append(
            f"within {slo_ms:g} ms: {asked.sustainable:.0f} rows/s with 99 % of random arrivals in time (simulated); "
            f"classical capacity {asked.classical:.0f} rows/s; bursts and replicas: onclock simulate"
        )
    if asked is not None and slo_ms < 2 * alone_ms:
        lines.append(f"note: below {2 * alone_ms:.3g} ms a request that finds the device busy is already late")
    return lines


def _plot(measured: ModelProfile, slo_ns: int | None, path: Path) -> None:
    """Latency and throughput per batch size, one above the other, as an image whose kind the suffix says."""
    # Imported here: it takes a second, and most profiles are not plotted.
    from matplotlib.figure import Figure

    rows = sorted(measured.table)
    figure = Figure(figsize=(7, 6), layout="constrained")
    latency, throughput = figure.subplots(2, 1, sharex=True)
    latency.plot(rows, [measured.table[r].p50_ns / NS_PER_MS for r in rows], marker="o", label="median")
    latency.plot(rows, [measured.table[r].p99_ns / NS_PER_MS for r in rows], marker=".", linestyle=":", label="p99")
    if slo_ns is not None:
        latency.axhline(slo_ns / NS_PER_MS, color="tab:red", linewidth=1, label="objective")
    latency.set_ylabel("latency, ms")
    latency.set_ylim(bottom=0)
    latency.legend()
    throughput.plot(rows, [r / measured.table[r].p50_ns * NS_PER_S for r in rows], marker="o", color="tab:green")
    throughput.set_ylabel("rows per second")
    throughput.set_xlabel("rows in the batch")
    throughput.set_ylim(bottom=0)
    figure.suptitle(f"{measured.model} on {measured.device}")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path}: the plot cannot be written: {error}") from error
