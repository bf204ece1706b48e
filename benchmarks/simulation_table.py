"""The scheduler in simulation against a published table of its rule: 90 settings, each as a share of the exact optimum.

Prints goodput / clairvoyant goodput next to the reference figure of the same setting (simulation_table.csv) and the
largest difference. Exits 1 when any differs by more than 0.01. About half a minute on one core.

    python benchmarks/simulation_table.py
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from service.simulation import (
    Disturbance,
    Load,
    SimulatedModel,
    arrivals,
    clairvoyant,
    linear_table,
    simulate,
    summarise,
)

REFERENCE = Path(__file__).with_name("simulation_table.csv")
TOLERANCE = 0.01
REQUESTS = 6_000
WARM_UP = REQUESTS // 10
MAX_ROWS = 512
ARRIVAL_SEED, NOISE_SEED, NOISE_CV = 1, 2, 0.03


@dataclass(frozen=True, slots=True)
class Cell:
    """One setting: l(b) = setup + per row x b in ms, SLO in l(1), arrival process, load in classical capacities."""

    setup_ms: float
    per_row_ms: float
    slo_factor: float
    process: str
    load: float
    optimum: float
    ratio: float

    @property
    def slo_ms(self) -> float:
        return self.slo_factor * (self.setup_ms + self.per_row_ms)

    @property
    def classical_per_ms(self) -> float:
        rows = max(1, min(MAX_ROWS, math.floor((self.slo_ms / 2 - self.setup_ms) / self.per_row_ms + 1e-9)))
        return rows / (self.setup_ms + self.per_row_ms * rows)


@dataclass(frozen=True, slots=True)
class Result:
    cell: Cell
    optimum: float
    ratio: float
    late_share: float
    goodput: float


def read_cells(path: Path = REFERENCE) -> list[Cell]:
    """The settings and their reference figures."""
    with path.open(newline="") as file:
        return [
            Cell(
                float(row["setup_ms"]),
                float(row["per_row_ms"]),
                float(row["slo_factor"]),
                row["process"],
                float(row["load"]),
                float(row["optimum_attainment"]),
                float(row["ratio"]),
            )
            for row in csv.DictReader(file)
        ]


def measure(cell: Cell) -> Result:
    """Simulate one setting: every batch size is a bucket, as in the reference."""
    slo_s, setup_s, per_row_s = cell.slo_ms / 1e3, cell.setup_ms / 1e3, cell.per_row_ms / 1e3
    rate = cell.load * cell.classical_per_ms * 1e3
    times = arrivals(cell.process, rate, REQUESTS, np.random.default_rng(ARRIVAL_SEED))
    optimum = clairvoyant(times[WARM_UP:], linear_table(setup_s, per_row_s, MAX_ROWS), slo_s) / (REQUESTS - WARM_UP)
    # Sizes that take longer than the objective are never run: leaving them out changes nothing but the time it takes.
    most = min(MAX_ROWS, int(slo_s / per_row_s) + 1)
    model = SimulatedModel.linear("model", setup_s, per_row_s, most, slo_s, Load(times), exact=True)
    (outcomes,) = simulate([model], seed=NOISE_SEED, disturbance=Disturbance(NOISE_CV))
    summary = summarise(outcomes)
    return Result(cell, optimum, summary.attainment / optimum, summary.late_share, summary.goodput)


def render(results: Sequence[Result]) -> Table:
    """The table, one line per setting."""
    table = Table(title="goodput / clairvoyant goodput, simulated")
    for name in ("l(b) ms", "SLO ms", "arrivals", "load", "optimum", "reference", "ours", "difference", "late share"):
        table.add_column(name, justify="left" if name in ("l(b) ms", "arrivals") else "right")
    for result in results:
        cell = result.cell
        difference = result.ratio - cell.ratio
        table.add_row(
            f"{cell.setup_ms:g}+{cell.per_row_ms:g}b",
            f"{cell.slo_ms:g}",
            cell.process,
            f"{cell.load:g}",
            f"{result.optimum:.3f}",
            f"{cell.ratio:.3f}",
            f"{result.ratio:.3f}",
            f"{difference:+.3f}",
            f"{result.late_share:.4f}",
            style="red" if abs(difference) > TOLERANCE else None,
        )
    return table


def main() -> int:
    cells = read_cells()
    with ProcessPoolExecutor() as pool:
        results = list(pool.map(measure, cells, chunksize=5))
    Console(width=120).print(render(results))
    worst = max(abs(result.ratio - result.cell.ratio) for result in results)
    wrong_optimum = max(abs(result.optimum - result.cell.optimum) for result in results)
    mean = sum(result.ratio for result in results) / len(results)
    reference = sum(cell.ratio for cell in cells) / len(cells)
    late = sum(result.late_share for result in results) / len(results)
    print(f"mean ratio {mean:.4f} (reference {reference:.4f}); lowest {min(r.ratio for r in results):.3f}")
    print(f"late share of answers: mean {late:.4f}, largest {max(r.late_share for r in results):.4f}")
    print(f"largest difference: {worst:.4f} in the ratio (bar {TOLERANCE}), {wrong_optimum:.4f} in the optimum")
    return 0 if worst <= TOLERANCE and wrong_optimum <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
