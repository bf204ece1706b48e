"""What a benchmark hands back: figures with their bars, tables for the reader, everything measured for the record.

A figure is one number that a bar can be held against. Its verdict is a fact about this run on this machine, not a
test: a benchmark exits 0 whether or not the bar is met.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.harness import Settings, environment


class Sense(enum.Enum):
    """Which side of the bar is good."""

    AT_MOST = "<="
    AT_LEAST = ">="


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured number: the median of `runs`. `bar` is None where nothing was promised; `doubt` says why the number
    should not be trusted (the load generator was late, the machine busy), empty when nothing was wrong."""

    benchmark: str
    name: str
    runs: tuple[float, ...]
    unit: str = ""
    bar: float | None = None
    sense: Sense = Sense.AT_MOST
    doubt: str = ""

    @property
    def measured(self) -> float:
        return statistics.median(self.runs) if self.runs else math.nan

    @property
    def verdict(self) -> str:
        """`met`, `missed`, `doubtful` (with a bar, but not to be trusted) or `-` (no bar)."""
        if self.bar is None:
            return "-"
        if self.doubt or math.isnan(self.measured):
            return "doubtful"
        good = self.measured <= self.bar if self.sense is Sense.AT_MOST else self.measured >= self.bar
        return "met" if good else "missed"

    def cells(self) -> list[str]:
        """The row of this figure in the summary."""
        bar = "" if self.bar is None else f"{self.sense.value} {self.bar:g}"
        spread = f"{min(self.runs):.3g} to {max(self.runs):.3g}" if len(self.runs) > 1 else ""
        verdict = f"{self.verdict}: {self.doubt}" if self.doubt else self.verdict
        return [self.benchmark, self.name, bar, f"{self.measured:.3g} {self.unit}".strip(), spread, verdict]


SUMMARY_COLUMNS = ("benchmark", "figure", "bar", "measured", "min to max", "verdict")


@dataclass(slots=True)
class Table:
    """A table of finished text."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", "| " + " | ".join(self.columns) + " |", "|---" * len(self.columns) + "|"]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in self.rows]
        return "\n".join([*lines, "", *(f"{note}\n" for note in self.notes)])

    def rich(self) -> RichTable:
        table = RichTable(title=self.title, title_justify="left", caption="\n".join(self.notes), caption_justify="left")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in self.rows:
            table.add_row(*row)
        return table


@dataclass(slots=True)
class Report:
    """The outcome of one benchmark. `details` is whatever it measured, as plain JSON values."""

    benchmark: str
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    pictures: list[Path] = field(default_factory=list)


def summary(reports: Sequence[Report]) -> Table:
    """Every figure of these reports with bar, measured and verdict."""
    rows = [figure.cells() for report in reports for figure in report.figures]
    return Table("Summary", SUMMARY_COLUMNS, rows)


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: dataclasses become objects, NaN and infinities null, enums their value."""
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return value.name
    return value


def publish(settings: Settings, reports: Sequence[Report], name: str, header: dict[str, Any] | None = None) -> Path:
    """Print the reports and write `<out>/<name>.json` and `.md`; returns the path of the latter."""
    header = header or environment()
    now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    overview = summary(reports)
    console = Console(width=None if Console().is_terminal else 160)
    for report in reports:
        for table in (table for table in report.tables if table.rows):
            console.print(table.rich())
    console.print(overview.rich())

    settings.out.mkdir(parents=True, exist_ok=True)
    document = {"time": now, "environment": header, "settings": plain(settings), "reports": plain(list(reports))}
    (settings.out / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    parts = [f"# Benchmarks, {now}", "", *(f"- {key}: {value}" for key, value in header.items())]
    parts += [
        f"- {'quick run: not to be quoted' if settings.quick else 'full run'}, {settings.repeats} runs of each",
        "",
    ]
    parts.append(overview.markdown())
    for report in reports:
        parts.append(f"## {report.benchmark}\n")
        parts += [table.markdown() for table in report.tables if table.rows]
        parts += [f"![{picture.stem}]({picture.name})\n" for picture in report.pictures]
    markdown = settings.out / f"{name}.md"
    markdown.write_text("\n".join(parts))
    console.print(f"written: {markdown} and {markdown.with_suffix('.json')}")
    return markdown
