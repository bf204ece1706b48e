"""The Prometheus text format, version 0.0.4, written directly.

The client library's own writer cannot be used for two reasons: it appends `_total` to the name of every counter, where
Triton's counters have none; and it prints large numbers with an exponent, which perf_analyzer's pattern
(`(\\d+\\.?\\d*)`) reads as their first digit: 150754824192 becomes 1 byte. Here no number ever has an exponent.

Source of the format: https://prometheus.io/docs/instrumenting/exposition_formats/.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from decimal import Decimal

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def format_number(value: float) -> str:
    """The shortest decimal text that reads back as `value`, without an exponent; NaN, +Inf and -Inf as such."""
    if isinstance(value, int):
        return str(int(value))
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    if value == int(value):
        return str(int(value))
    text = repr(value)
    return format(Decimal(text), "f") if "e" in text else text


def label_text(names_and_values: Iterable[tuple[str, str]]) -> str:
    """`name="value",...` with values escaped, without braces."""
    return ",".join(f'{name}="{_escape(value)}"' for name, value in names_and_values)


def header_lines(name: str, kind: str, documentation: str) -> list[str]:
    """The HELP and TYPE lines of one family. `kind`: counter, gauge, histogram or untyped."""
    text = documentation.replace("\\", "\\\\").replace("\n", "\\n")
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def sample_line(name: str, labels: str, value: float) -> str:
    """One sample; `labels` as `label_text` makes them, may be empty."""
    return f"{name}{{{labels}}} {format_number(value)}" if labels else f"{name} {format_number(value)}"


def exemplar_text(trace_id: bytes, value: float, at_s: float) -> str:
    """What OpenMetrics has behind a bucket: a trace in which one of its values can be seen, and when (since 1970)."""
    return f' # {{trace_id="{trace_id.hex()}"}} {format_number(value)} {at_s:.3f}'


def family_lines(
    name: str, kind: str, documentation: str, samples: Iterable[tuple[Iterable[tuple[str, str]], float]]
) -> list[str]:
    """A whole family: its header and each sample, which is labels and a value."""
    lines = header_lines(name, kind, documentation)
    lines += [sample_line(name, label_text(labels), value) for labels, value in samples]
    return lines


def histogram_lines(
    name: str, labels: str, bounds: Sequence[str], cells: Sequence[int], total: float, exemplars: Sequence[str] = ()
) -> list[str]:
    """The samples of one histogram. `exemplars`: what follows each bucket (empty: nothing does).

    `cells[i]` counts the values up to `bounds[i]` and beyond the bound before; the last cell is everything beyond the
    last bound. `total` is the sum of the values.
    """
    prefix = f"{labels}," if labels else ""
    lines: list[str] = []
    cumulative = 0
    for bound, cell, exemplar in zip((*bounds, "+Inf"), cells, exemplars or [""] * len(cells), strict=True):
        cumulative += cell
        lines.append(f'{name}_bucket{{{prefix}le="{bound}"}} {cumulative}{exemplar}')
    lines.append(sample_line(f"{name}_sum", labels, total))
    lines.append(sample_line(f"{name}_count", labels, cumulative))
    return lines


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
