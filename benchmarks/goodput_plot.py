"""The picture of the goodput benchmark: goodput against offered load, with what could have been reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib import pyplot as plt


@dataclass(frozen=True, slots=True)
class Series:
    """One panel. Rates per second; `goodput` holds every run of each load, `optimum` the clairvoyant one per load."""

    title: str
    offered: Sequence[float]
    goodput: Sequence[Sequence[float]]
    optimum: Sequence[float]
    fluid: Callable[[float], float]
    capacity: float
    peer: Mapping[float, float] = field(default_factory=dict)


def plot(panels: Sequence[Series], path: Path) -> None:
    """Write a PNG with one panel per series: median of the runs, with a bar from the least to the most."""
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.2), squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels, strict=True):
        line = np.linspace(0.02 * max(panel.offered), max(panel.offered) * 1.05, 200)
        axis.plot(line, line, color="0.8", label="all that is offered")
        axis.plot(line, [panel.fluid(float(rate)) for rate in line], color="C2", ls=":", label="fluid")
        axis.plot(panel.offered, panel.optimum, color="C1", ls="--", marker=".", label="clairvoyant optimum")
        middle = np.array([median(runs) for runs in panel.goodput])
        low = middle - np.array([min(runs) for runs in panel.goodput])
        high = np.array([max(runs) for runs in panel.goodput]) - middle
        axis.errorbar(panel.offered, middle, yerr=[low, high], color="C0", marker="o", capsize=3, label="onclock")
        if panel.peer:
            rates = sorted(panel.peer)
            values = [panel.peer[rate] for rate in rates]
            axis.plot(rates, values, color="C3", marker="x", ls="-.", label="Triton, hand-tuned (measured earlier)")
        axis.axvline(panel.capacity, color="0.6", lw=0.8)
        axis.annotate("R2", (panel.capacity, 0), textcoords="offset points", xytext=(3, 4), color="0.4")
        axis.set(title=panel.title, xlabel="offered, requests/s", ylabel="answered within the objective, /s")
        axis.set_xlim(left=0)
        axis.set_ylim(0, 1.15 * max(*panel.optimum, *panel.peer.values(), 1.0))
        axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
