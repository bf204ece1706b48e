"""Pictures of runs, as SVG that goes into a page: one picture, one question.

Colours are those of Okabe and Ito (2008), which people with any colour vision tell apart; red is for what is bad.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from loadtests.outcome import OK, latency_ns
from loadtests.records import Run
from loadtests.stats import NS_PER_MS, Analysis

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8a8f98",
)  # fmt: skip
INK, GRID = "#2b2f36", "#e6e8ec"
SIZE = (5.4, 3.1)
CURVE_SIZE = (5.4, 3.7)
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    # Ids in the SVG are hashes of this: the same run gives the same page.
    "svg.hashsalt": "onclock",
}
# Enough points for a smooth curve of a distribution, few enough for a small page.
CDF_POINTS = 400

Optional = Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture with its title and what it says."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True, slots=True)
class Curve:
    """A line of a sweep: rates per second against the offered rate."""

    label: str
    offered: Sequence[float]
    values: Sequence[float]
    style: str = "line"  # or "bound"
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def run_charts(run: Run, analysis: Analysis) -> list[Chart]:
    """All pictures of a run that have something to show."""
    charts = [outcomes_over_time(run, analysis), latency_over_time(run, analysis), distribution([run])]
    charts += [chart for chart in (against_load(analysis), *server_charts(run)) if chart is not None]
    return charts


def outcomes_over_time(run: Run, analysis: Analysis) -> Chart:
    """What became of the requests, second by second, under the rate that was offered."""
    line = analysis.timeline
    parts = [
        ("in time", line.in_slo, GREEN),
        ("late", line.late, ORANGE),
        ("refused", line.refused, SKY),
        ("expired", line.expired, PURPLE),
        ("error", line.error, RED),
    ]
    shown = [part for part in parts if any(part[1])] or parts[:1]
    with rc_context(STYLE):
        figure, axes = _axes("seconds", "requests/s")
        at = _edges(line.at_s, line.width_s)
        stack = np.zeros(len(line.at_s))
        for label, values, colour in shown:
            upper = stack + np.array(values)
            axes.fill_between(at, _steps(stack), _steps(upper), step=None, color=colour, alpha=0.85, lw=0, label=label)
            stack = upper
        if run.info.rates:
            axes.plot(
                run.info.rates["at_s"], run.info.rates["per_second"], color=INK, lw=1.2, ls="--", label="intended"
            )
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, line.at_s[-1] + line.width_s)
        _legend(axes, len(shown) + 1)
        return Chart(
            "What became of the requests",
            "By the time they were meant to be sent. In time: answered within the objective.",
            _svg(figure),
        )


def latency_over_time(run: Run, analysis: Analysis) -> Chart:
    """Percentiles of answers by intended time, with the objective and the client's own lag."""
    line = analysis.timeline
    middle = [at + line.width_s / 2 for at in line.at_s]
    with rc_context(STYLE):
        figure, axes = _axes("seconds", "milliseconds")
        axes.plot(middle, _gaps(line.p50_ms), color=BLUE, label="p50")
        axes.plot(middle, _gaps(line.p99_ms), color=ORANGE, label="p99")
        if any(value for value in line.lag_p99_ms if value):
            axes.plot(middle, _gaps(line.lag_p99_ms), color=GREY, lw=1, label="client's lag p99")
        _objective(axes, run, vertical=False)
        axes.set_yscale("log")
        _decades(axes.yaxis)
        axes.set_xlim(0, line.at_s[-1] + line.width_s)
        _legend(axes, 4)
        return Chart(
            "Latency over time",
            "Of answers, from the intended send time. How late the client sent is its lag, a part of every latency.",
            _svg(figure),
        )


def distribution(runs: Sequence[Run], names: Sequence[str] = ()) -> Chart:
    """The share of requests answered within a time. Refused ones are never answered: the curve ends below 100 %."""
    with rc_context(STYLE):
        figure, axes = _axes("milliseconds", "share of requests answered")
        for index, run in enumerate(runs):
            records = run.counted
            answered = np.sort(latency_ns(records)[records["status"] == OK]) / NS_PER_MS
            if not len(answered):
                continue
            picks = np.unique(np.linspace(0, len(answered) - 1, CDF_POINTS).astype(np.int64))
            colour = (BLUE, ORANGE)[index % 2]
            label = names[index] if names else "answers"
            axes.step(answered[picks], (picks + 1) / len(records), where="post", color=colour, label=label)
        _objective(axes, runs[0], vertical=True)
        axes.set_xscale("log")
        _decades(axes.xaxis)
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        _legend(axes, 3)
        return Chart(
            "Latency distribution",
            "The share of all requests that had been answered after so long. What was refused is missing at the top.",
            _svg(figure),
        )


def against_load(analysis: Analysis) -> Chart | None:
    """Goodput and refusals against what was offered, where that varied."""
    line = analysis.timeline
    offered = np.array(line.offered)
    if len(offered) < 5 or offered.max(initial=0.0) < 2 * max(1.0, float(np.median(offered))) * 0.75:
        return None
    with rc_context(STYLE):
        figure, axes = _axes("offered, requests/s", "requests/s")
        most = float(offered.max())
        axes.plot([0, most], [0, most], color=GREY, lw=1, ls=":", label="all of it")
        axes.scatter(offered, line.in_slo, s=14, color=GREEN, label="in time", zorder=3)
        axes.scatter(offered, line.refused, s=14, color=SKY, label="refused", zorder=3)
        if any(line.late):
            axes.scatter(offered, line.late, s=14, color=ORANGE, label="late", zorder=3)
        axes.set_xlim(0, most * 1.03)
        axes.set_ylim(bottom=0)
        _legend(axes, 4)
        return Chart(
            "Against the load",
            f"Each point is {line.width_s:.2g} s of the run. Past capacity, what is in time should stay level.",
            _svg(figure),
        )


def server_charts(run: Run) -> list[Chart]:
    """The server's own view, where it was scraped."""
    scrapes = [scrape for scrape in run.info.scrapes if scrape.at_s >= run.info.warm_up_s - 1]
    if len(scrapes) < 3:
        return []
    at = np.array([scrape.at_s - run.info.warm_up_s for scrape in scrapes])
    middle = (at[1:] + at[:-1]) / 2

    def growth(name: str) -> npt.NDArray[np.float64] | None:
        if any(name not in scrape.values for scrape in scrapes):
            return None
        return np.diff([scrape.values[name] for scrape in scrapes])

    charts: list[Chart] = []
    rows, batches, queue, requests = growth("rows"), growth("batches"), growth("queue_us"), growth("requests")
    with rc_context(STYLE):
        if rows is not None and batches is not None and batches.sum() > 0:
            figure, axes = _axes("seconds", "rows per execution")
            axes.plot(middle, rows / np.maximum(batches, 1), color=BLUE, label="batch size")
            axes.set_ylim(bottom=0)
            if queue is not None and requests is not None:
                other = axes.twinx()
                other.plot(middle, queue / np.maximum(requests, 1) / 1e3, color=ORANGE, label="time in queue")
                other.set_ylabel("milliseconds")
                other.set_ylim(bottom=0)
                other.grid(visible=False)
                _legend(axes, 2, other)
            else:
                _legend(axes, 1)
            caption = "As the server counts: rows in each execution of the model, and how long requests waited for one."
            charts.append(Chart("Batches and the queue", caption, _svg(figure)))
        cpu = growth("cpu_s")
        if cpu is not None:
            figure, axes = _axes("seconds", "cores")
            axes.plot(middle, cpu / np.maximum(np.diff(at), 1e-9), color=BLUE, label="CPU")
            axes.set_ylim(bottom=0)
            if all("memory_bytes" in scrape.values for scrape in scrapes):
                other = axes.twinx()
                other.plot(at, [s.values["memory_bytes"] / 2**20 for s in scrapes], color=GREEN, label="memory")
                other.set_ylabel("MiB")
                other.set_ylim(bottom=0)
                other.grid(visible=False)
                _legend(axes, 2, other)
            else:
                _legend(axes, 1)
            caption = "Of the server's process."
            done = requests.sum() if requests is not None else 0.0
            if done > 0:
                caption += f" {cpu.sum() / done * 1e6:.0f} microseconds of CPU for each answer."
            charts.append(Chart("What the server used", caption, _svg(figure)))
    return charts


def goodput_curve(curves: Sequence[Curve], slo_ms: float) -> Chart:
    """Answered in time against offered, with bounds as lines."""
    with rc_context(STYLE):
        figure, axes = _axes("offered, requests/s", f"answered within {slo_ms:g} ms, requests/s", CURVE_SIZE)
        colours = iter((BLUE, ORANGE, PURPLE, RED))
        most = max(max(curve.offered) for curve in curves)
        for curve in curves:
            if curve.style == "bound":
                first = not any(line.get_label() == "optimum" for line in axes.lines)
                axes.plot(curve.offered, curve.values, color=INK if first else GREY, lw=1.3,
                          ls="--" if first else ":", label=curve.label)  # fmt: skip
                continue
            colour = next(colours)
            axes.plot(curve.offered, curve.values, color=colour, marker="o", ms=4, label=curve.label, zorder=3)
            if curve.low:
                axes.fill_between(curve.offered, curve.low, curve.high, color=colour, alpha=0.15, lw=0)
        axes.set_xlim(0, most * 1.03)
        axes.set_ylim(bottom=0)
        _legend(axes, 3)
        return Chart(
            "Goodput against offered load",
            "A server that falls below its own best when more is offered collapses when it is needed. No schedule can "
            "be above the optimum, which knows the future; the fluid bound is what evenly flowing arrivals allow.",
            _svg(figure),
        )


def shares_curve(offered: Sequence[float], parts: Sequence[tuple[str, Sequence[float]]]) -> Chart:
    """What became of the requests at each offered rate."""
    colours = {"in time": GREEN, "late": ORANGE, "refused": SKY, "expired": PURPLE, "error": RED}
    with rc_context(STYLE):
        figure, axes = _axes("offered, requests/s", "share of requests", CURVE_SIZE)
        positions = np.arange(len(offered))
        base = np.zeros(len(offered))
        for label, values in parts:
            if any(values):
                axes.bar(positions, values, 0.7, bottom=base, color=colours[label], label=label)
            base += np.array(values)
        axes.set_xticks(positions, [f"{rate:.0f}" for rate in offered])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.set_ylim(0, 1)
        axes.grid(visible=False, axis="x")
        _legend(axes, 5)
        return Chart("What became of the requests", "At each offered rate.", _svg(figure))


def _axes(x: str, y: str, size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    return figure, axes


def _legend(axes: Axes, columns: int, other: Axes | None = None) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if other is not None:
        more, words = other.get_legend_handles_labels()
        handles, labels = handles + more, labels + words
    axes.legend(
        handles, labels, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=max(1, columns), borderaxespad=0.2,
        handlelength=1.4, columnspacing=1.2,
    )  # fmt: skip


def _objective(axes: Axes, run: Run, vertical: bool) -> None:
    slos = sorted({entry.slo_s for entry in run.info.entries if entry.slo_s})
    for index, slo in enumerate(slos):
        label = "objective" if index == 0 else None
        (axes.axvline if vertical else axes.axhline)(slo * 1e3, color=RED, lw=1, ls="--", label=label)


def _decades(axis: Axis) -> None:
    """Labels at 1, 2 and 5 of each decade of a logarithmic axis, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _gaps(values: Optional) -> npt.NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _edges(at: Sequence[float], width: float) -> npt.NDArray[np.float64]:
    edges = np.array([*at, at[-1] + width])
    return np.repeat(edges, 2)[1:-1]


def _steps(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.repeat(values, 2)


def _svg(figure: Figure) -> str:
    """The picture as an element that takes the width it is given."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    # Sizes in points would fix the width; the view box keeps the proportions.
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
