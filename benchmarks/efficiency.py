"""Served rows per second at saturation over a bare in-process session at its best batch size.

Models of 5 ms and more, where the model and not the protocol should take the time: a residual conv net on
3x224x224 images (about 10 ms a row, batching gains little) and a stack of eight 4096 x 4096 layers (weight-bound,
batching gains an order of magnitude). No objective is set, so nothing is shed; the closed loop keeps twice the largest
batch in flight. The bare session runs alone on the server's core, with the server idle; windows alternate.
"""

from __future__ import annotations

from benchmarks.bare_session import SWEEP, measure
from benchmarks.harness import Settings, parse_settings, say
from benchmarks.load import Load, Request, closed_loop
from benchmarks.models import MODELS, make_repository, model_file
from benchmarks.report import Figure, Report, Sense, Table, publish
from benchmarks.servers import onclock_server

BAR = 0.9
NAMES = ("resnet", "heavy")


def refusals(load: Load) -> str:
    """Without an objective nothing should be refused; if something was, saying no took part of the time."""
    if not load.errors:
        return ""
    return f"{sum(load.errors.values()) / max(1, load.sent):.0%} not answered: {load.errors}"


def run(settings: Settings) -> Report:
    """Measure both models; raises `BenchmarkError` if the server does not start."""
    report = Report("efficiency")
    table = Table(
        "Rows per second at saturation",
        (
            "model",
            "best batch",
            "bare rows/s",
            "served rows/s",
            "ratio",
            "server CPU us/row",
            "server cores",
            "foreign",
        ),
    )
    for name in (name for name in NAMES if settings.only in name):
        model = MODELS[name]
        path = model_file(name, settings.models)
        sizes = [size for size in SWEEP if size <= model.max_batch and (size & (size - 1) == 0 or not settings.quick)]
        say(f"efficiency: {name}, bare session at batch {sizes}")
        sweep = measure(path, settings.server_core, sizes, settings.window_s / 10, settings.device)
        best, _ = sweep.best()
        repository = make_repository(
            settings.out / f"efficiency_{name}", settings.models, {name: None}, settings.device
        )
        request = Request(name, "x", (1, *model.row))
        ratios: list[float] = []
        doubt = ""
        with onclock_server(settings, repository, [name]) as server:
            for repeat in range(settings.repeats):
                say(f"efficiency: {name}, run {repeat + 1} of {settings.repeats}")
                _, bare = measure(path, settings.server_core, [best], settings.window_s, settings.device).best()
                # Twice the largest batch in flight, so that a full batch can form while the other one runs.
                load = closed_loop(settings, server, request, 2 * model.max_batch)
                ratios.append(load.ok_rps / bare)
                doubt = doubt or load.doubt() or refusals(load)
                cells = [name, str(best), f"{bare:.1f}", f"{load.ok_rps:.1f}", f"{ratios[-1]:.3f}"]
                table.rows.append(
                    [*cells, f"{load.server_cpu_us:.0f}", f"{load.server_cores:.2f}", f"{load.foreign:.1%}"]
                )
        report.figures.append(
            Figure("efficiency", f"{name}: rows/s / bare session", tuple(ratios), "x", BAR, Sense.AT_LEAST, doubt)
        )
        report.details[name] = {"sweep": sweep, "best": best, "ratios": ratios}
    report.tables.append(table)
    return report


if __name__ == "__main__":
    chosen = parse_settings("Rows per second at saturation over a bare session", window_s=8.0, quick_window_s=4.0)
    publish(chosen, [run(chosen)], "efficiency")
