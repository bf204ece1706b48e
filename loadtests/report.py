"""A run as something to read: one HTML page that needs nothing else, JSON for programs, Markdown for a pull request."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import yaml

from loadtests import charts
from loadtests.charts import Chart
from loadtests.errors import LoadTestError
from loadtests.outcome import Outcome, status_name
from loadtests.records import Run
from loadtests.stats import Analysis, Latency, Summary
from loadtests.verdict import Verdict

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(slots=True)
class Table:
    """Rows of texts; a cell may be `{"text": ..., "kind": "ok"}` to be coloured."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[Any]]
    note: str = ""
    first: bool = False  # above the pictures
    texts: bool = False  # the second column is text


@dataclass(slots=True)
class Page:
    """What the template shows."""

    title: str
    subtitle: str
    description: str = ""
    banner: dict[str, Any] | None = None
    tiles: list[dict[str, str]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    scenario: str = ""


def state(analysis: Analysis, verdicts: Sequence[Verdict]) -> str:
    """`void`, `fail`, `pass`, or `done` when nothing was to be judged."""
    if analysis.void:
        return "void"
    if any(not verdict.passed for verdict in verdicts):
        return "fail"
    return "pass" if verdicts else "done"


def page_of(run: Run, analysis: Analysis, verdicts: Sequence[Verdict]) -> Page:
    """The page of one run."""
    info, total = run.info, analysis.total
    kind = state(analysis, verdicts)
    page = Page(
        title=f"Load test: {info.name}",
        subtitle=f"{info.server_name} at {info.server}, {info.started_at}",
        description=info.description,
        banner=_banner(kind, analysis, verdicts),
        tiles=_tiles(total, analysis),
        charts=charts.run_charts(run, analysis),
        notes=analysis.notes,
        facts=_facts(run, analysis),
        scenario=yaml.safe_dump(info.scenario, sort_keys=False, allow_unicode=True),
    )
    if verdicts:
        page.tables.append(
            Table(
                "What counts as a pass",
                ("", "of", "criterion", "measured", "bound"),
                [(_met(v), v.subject, v.criterion, v.measured, v.bound) for v in verdicts],
                first=True,
                texts=True,
            )
        )
    page.tables.append(_accounts(analysis))
    page.tables.append(_latencies(analysis))
    errors = _errors(run, analysis)
    if errors.rows:
        page.tables.append(errors)
    return page


def html(page: Page) -> str:
    """The page as one self-contained document."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    values = {name: getattr(page, name) for name in Page.__dataclass_fields__}
    return environment.get_template("page.html.j2").render(**values)


def as_json(run: Run, analysis: Analysis, verdicts: Sequence[Verdict]) -> str:
    """Everything but the single requests."""
    document = {
        "state": state(analysis, verdicts),
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "analysis": asdict(analysis),
        "run": asdict(run.info),
    }
    return json.dumps(document, indent=1)


def markdown(run: Run, analysis: Analysis, verdicts: Sequence[Verdict]) -> str:
    """The tables of the page."""
    page = page_of(run, analysis, verdicts)
    assert page.banner is not None
    lines = [f"# {page.title}", "", page.subtitle, "", f"**{page.banner['headline']}**", ""]
    lines += [*page.banner["lines"], ""] if page.banner["lines"] else []
    for table in page.tables:
        lines += [f"## {table.title}", "", "| " + " | ".join(table.columns) + " |", "|" + " --- |" * len(table.columns)]
        for row in table.rows:
            cells = [cell["text"] if isinstance(cell, dict) else str(cell) for cell in row]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    lines += [f"- {note}" for note in page.notes]
    return "\n".join(lines).rstrip() + "\n"


def write(run: Run, analysis: Analysis, verdicts: Sequence[Verdict], stem: Path) -> list[Path]:
    """Write `stem`.html, .json and .md; their paths. Raises `LoadTestError`."""
    texts = {
        ".html": html(page_of(run, analysis, verdicts)),
        ".json": as_json(run, analysis, verdicts),
        ".md": markdown(run, analysis, verdicts),
    }
    return write_texts(stem, texts)


def write_texts(stem: Path, texts: dict[str, str]) -> list[Path]:
    """Write a text per suffix; their paths. Raises `LoadTestError`."""
    paths = []
    for suffix, text in texts.items():
        path = stem.with_name(stem.name + suffix)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        except OSError as error:
            raise LoadTestError(f"{path}: cannot be written: {error.strerror}") from error
        paths.append(path)
    return paths


def number(value: float | None, unit: str = "") -> str:
    """For people: `1,234`, `12.3 ms`, a dash for nothing."""
    if value is None:
        return "\N{EN DASH}"
    if unit == "%":
        return f"{value:.2%}" if value < 0.1 or value > 0.9 else f"{value:.1%}"
    size = abs(value)
    text = f"{value:,.0f}" if size >= 100 or value == int(value) else f"{value:.3g}"
    return f"{text} {unit}".strip()


def _met(verdict: Verdict) -> dict[str, str]:
    return {"text": "met", "kind": "ok"} if verdict.passed else {"text": "missed", "kind": "no"}


def _banner(kind: str, analysis: Analysis, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    missed = [f"{v.subject}: {v.criterion} is {v.measured}, bound {v.bound}" for v in verdicts if not v.passed]
    headline = {
        "pass": f"Passed: all {len(verdicts)} criteria are met.",
        "fail": f"Failed: {len(missed)} of {len(verdicts)} criteria are missed.",
        "void": "Void: these numbers must not be believed.",
        "done": "Done. The scenario names no criteria.",
    }[kind]
    return {"kind": kind, "headline": headline, "lines": analysis.void or missed}


def _tiles(total: Summary, analysis: Analysis) -> list[dict[str, str]]:
    slo = f"within {total.slo_ms:g} ms" if total.slo_ms else "within the objective"
    tiles = [
        ("answered in time", number(total.attainment, "%"), slo),
        ("goodput", f"{number(total.goodput_rps)}/s", f"of {number(total.offered_rps)}/s offered"),
        ("p50", number(total.latency_ms.p50, "ms"), "of answers"),
        ("p99", number(total.latency_ms.p99, "ms"), f"p99.9 {number(total.latency_ms.p999, 'ms')}"),
        ("late", number(total.late_share, "%"), "of answers"),
        ("refused", number(total.refused_share, "%"), f"in {number(total.reject_ms.p50, 'ms')} (p50)"),
        ("errors", number(total.error_share, "%"), "all other statuses"),
        ("client's lag", number(analysis.lag.p99, "ms"), f"p99; void above {analysis.lag.limit_p99:g} ms"),
    ]
    return [{"label": label, "value": value, "note": note} for label, value, note in tiles]


def _accounts(analysis: Analysis) -> Table:
    everyone = [analysis.total, *(analysis.entries if len(analysis.entries) > 1 else [])]
    rows: list[Sequence[Any]] = []
    for summary in everyone:
        counts = [summary.outcomes[outcome.name.lower()] for outcome in Outcome]
        assert sum(counts) == summary.offered
        rows.append([summary.name, f"{summary.offered:,}", *(f"{count:,}" for count in counts)])
    columns = ("requests", "offered", *(outcome.title for outcome in Outcome))
    note = (
        "Every request is in exactly one column. Refused on arrival: within a fifth of the objective of being sent; "
        "later it had been queued first."
    )
    return Table("Every request accounted for", columns, rows, note)


def _latencies(analysis: Analysis) -> Table:
    rows: list[Sequence[Any]] = []
    for summary in [analysis.total, *(analysis.entries if len(analysis.entries) > 1 else [])]:
        for label, latency in (("answers", summary.latency_ms), ("refusals", summary.reject_ms)):
            if latency.count:
                rows.append((f"{summary.name}: {label}", *_latency_cells(latency)))
    columns = ("milliseconds", "count", "mean", "p50", "p90", "p95", "p99", "p99.9", "max")
    return Table("Latency", columns, rows, "Answers from the intended send time; refusals from when they were sent.")


def _latency_cells(latency: Latency) -> list[str]:
    values = (latency.mean, latency.p50, latency.p90, latency.p95, latency.p99, latency.p999, latency.max)
    return [f"{latency.count:,}", *(number(value) for value in values)]


def _errors(run: Run, analysis: Analysis) -> Table:
    by_name = {status_name(int(key)): words for key, words in run.info.messages.items()}
    names = dict.fromkeys([*analysis.total.errors, *by_name])
    rows = [
        (name, f"{analysis.total.errors.get(name, 0):,}", {"text": " / ".join(by_name.get(name, ())), "kind": "words"})
        for name in names
    ]
    return Table("What the server said", ("status", "errors", "in its words"), list(rows), "Refusals are not errors.")


def _facts(run: Run, analysis: Analysis) -> list[tuple[str, str]]:
    info = run.info
    arrivals = ", ".join(dict.fromkeys(f"{entry.name}: {entry.arrivals}" for entry in info.entries))
    lag, client = analysis.lag, info.client
    shares = ", ".join(f"{share:.0%}" for share in info.worker_cpu)
    return [
        ("Duration", f"{info.duration_s:g} s, after {info.warm_up_s:g} s of warm-up that do not count"),
        ("Arrivals", arrivals),
        ("Capacity", f"{info.capacity:,.0f}/s" if info.capacity else "not asked for"),
        ("Seed and plan", f"{info.seed}, {info.plan}: the same plan asks for the same requests at the same times"),
        ("Client", f"{info.workers} worker{'s' if info.workers > 1 else ''}, {shares} of a core"),
        ("Client's lag", f"p50 {lag.p50:.3f} ms, p99 {lag.p99:.3f} ms, max {lag.max:.2f} ms"),
        ("Client's machine", f"{client.get('system')}, {client.get('cores')} cores, Python {client.get('python')}"),
    ]
