"""Pictures of a sweep: goodput against offered load beside the optimum and the fluid line, and latency percentiles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from service.simulation.capacity import Point

FORMATS = (".png", ".svg")


def plot_sweep(points: Sequence[Point], slo_s: float, path: Path, title: str) -> None:
    """Write the picture of a sweep to `path` (.png or .svg). Raises `ValueError` for another suffix."""
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: cannot draw a '{path.suffix}' file; expected one of {', '.join(FORMATS)}")
    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    goodput, latency = figure.subplots(1, 2)
    rates = [point.summary.rate for point in points]
    goodput.plot(rates, rates, color="0.8", linestyle=":", label="offered")
    goodput.plot(rates, [point.optimum for point in points], "k--", label="clairvoyant optimum")
    goodput.plot(rates, [point.fluid for point in points], color="tab:orange", label="fluid")
    goodput.plot(rates, [point.summary.goodput for point in points], "o-", color="tab:blue", label="this scheduler")
    goodput.set_xlabel("offered (requests/s)")
    goodput.set_ylabel("answered in time (requests/s)")
    goodput.set_ylim(0.0, 1.2 * max(point.optimum for point in points) + 1e-9)
    goodput.legend(frameon=False)
    goodput.set_title(title)
    latency.plot(rates, [1e3 * point.summary.p50_s for point in points], "o-", label="p50 of answers")
    latency.plot(rates, [1e3 * point.summary.p99_s for point in points], "s-", label="p99 of answers")
    latency.axhline(1e3 * slo_s, color="tab:red", linestyle="--", label="objective")
    latency.set_xlabel("offered (requests/s)")
    latency.set_ylabel("latency (ms)")
    latency.set_ylim(bottom=0.0)
    latency.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas = FigureCanvasSVG(figure) if path.suffix == ".svg" else FigureCanvasAgg(figure)
    canvas.print_figure(str(path), dpi=150)
