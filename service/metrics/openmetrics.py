"""The lines of the classic text format as OpenMetrics 1.0: the same series under the same names, so that rules and
dashboards work with either.

What differs is what OpenMetrics asks for: a counter's family is named without `_total`, one that has no `_total` (those
of Triton) is `unknown`, and the samples end with `# EOF`. A histogram with bounds below zero may have no sum there; its
buckets, sum and count are families of their own of type `unknown`. Bounds stay written as they are (`le="1"`, where
`1.0` would be canonical): another text would be another series.

https://prometheus.io/docs/specs/om/open_metrics_spec/.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

CONTENT_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"
_TOTAL = "_total"
_PARTS = ("_bucket", "_sum", "_count")


def openmetrics_lines(lines: Iterable[str]) -> Iterator[str]:
    """`lines` are those of the classic format: HELP and TYPE of each family before its samples."""
    help_line, kind_line = "", ""
    samples: list[str] = []
    for line in lines:
        if line.startswith("# HELP "):
            yield from _family(help_line, kind_line, samples)
            help_line, kind_line, samples = line, "", []
        elif line.startswith("# TYPE "):
            kind_line = line
        else:
            samples.append(line)
    yield from _family(help_line, kind_line, samples)
    yield "# EOF"


def _family(help_line: str, kind_line: str, samples: list[str]) -> Iterator[str]:
    if not help_line:
        return
    _, _, name, documentation = help_line.split(" ", 3)
    kind = kind_line.rpartition(" ")[2]
    documentation = documentation.replace('"', '\\"')
    if kind == "histogram" and any('le="-' in sample for sample in samples):
        for part in _PARTS:
            yield from _header(name + part, "unknown", documentation)
            yield from (sample for sample in samples if sample.startswith((f"{name}{part}{{", f"{name}{part} ")))
        return
    if kind == "counter" and name.endswith(_TOTAL):
        name = name.removesuffix(_TOTAL)
    elif kind in ("counter", "untyped"):
        kind = "unknown"
    yield from _header(name, kind, documentation)
    yield from samples


def _header(name: str, kind: str, documentation: str) -> tuple[str, str]:
    return f"# HELP {name} {documentation}", f"# TYPE {name} {kind}"
