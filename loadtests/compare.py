"""Two runs side by side: is one better, or is it noise?

The differences carry 95 % confidence intervals from both runs' own (block bootstrap); a difference is called one only
where the intervals are apart. Runs of different plans can be compared, and the page says that they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from loadtests import charts
from loadtests.outcome import Outcome
from loadtests.records import Run
from loadtests.report import Page, Table, number
from loadtests.stats import Interval, analyse, intervals

# What is compared, in which unit, and whether more is better.
FIGURES = (
    ("goodput_rps", "goodput, /s", "", True),
    ("attainment", "answered in time", "%", True),
    ("late_share", "late answers", "%", False),
    ("p50_ms", "p50, ms", "", False),
    ("p90_ms", "p90, ms", "", False),
    ("p99_ms", "p99, ms", "", False),
)


@dataclass(slots=True)
class Difference:
    """A figure of both runs. `verdict`: `better`, `worse`, or `no difference` of B against A beyond the noise."""

    figure: str
    a: Interval
    b: Interval
    verdict: str


def differences(a: Run, b: Run) -> list[Difference]:
    """Every figure of both runs, with the verdict on B."""
    of_a, of_b = intervals(a), intervals(b)
    found = []
    for name, label, _, more_is_better in FIGURES:
        left, right = of_a[name], of_b[name]
        if right.low > left.high:
            verdict = "better" if more_is_better else "worse"
        elif right.high < left.low:
            verdict = "worse" if more_is_better else "better"
        else:
            verdict = "no difference"
        found.append(Difference(label, left, right, verdict))
    return found


def page_of(a: Run, b: Run, names: tuple[str, str]) -> Page:
    """The page of two runs."""
    rows = []
    units = {label: unit for _, label, unit, _ in FIGURES}
    for difference in differences(a, b):
        unit = units[difference.figure]
        kind = {"better": "ok", "worse": "no"}.get(difference.verdict, "")
        rows.append(
            (difference.figure, _shown(difference.a, unit), _shown(difference.b, unit), _change(difference),
             {"text": difference.verdict, "kind": kind})
        )  # fmt: skip
    page = Page(
        title=f"{names[0]} and {names[1]}",
        subtitle=f"A: {a.info.server_name}, {a.info.started_at}. B: {b.info.server_name}, {b.info.started_at}.",
        tables=[
            Table(
                "Side by side",
                ("figure", f"A: {names[0]}", f"B: {names[1]}", "B against A", "B is"),
                list(rows),
                "In brackets 95 % confidence intervals, from resampling blocks of time. Better or worse only where "
                "they are apart.",
            ),
            _accounts(a, b, names),
        ],
    )
    page.charts.append(charts.distribution([a, b], names))
    for run, name in ((a, names[0]), (b, names[1])):
        analysis = analyse(run)
        for chart in (charts.outcomes_over_time(run, analysis), charts.latency_over_time(run, analysis)):
            page.charts.append(charts.Chart(f"{name}: {chart.title.lower()}", chart.caption, chart.svg))
        page.notes += [f"{name}: {note}" for note in (*analysis.void, *analysis.notes)]
    if a.info.plan != b.info.plan:
        page.notes.append("The two runs had different plans: they were asked for different things.")
    else:
        page.notes.append("Both runs had the same plan: the same requests at the same times.")
    return page


def _accounts(a: Run, b: Run, names: tuple[str, str]) -> Table:
    rows = []
    for run, name in ((a, names[0]), (b, names[1])):
        summary = analyse(run).total
        counts = [f"{summary.outcomes[outcome.name.lower()]:,}" for outcome in Outcome]
        rows.append([name, f"{summary.offered:,}", *counts])
    return Table(
        "Every request accounted for", ("requests", "offered", *(outcome.title for outcome in Outcome)), list(rows)
    )


def _shown(interval: Interval, unit: str) -> str:
    return f"{number(interval.value, unit)}  ({number(interval.low, unit)} to {number(interval.high, unit)})"


def _change(difference: Difference) -> str:
    if not difference.a.value:
        return "\N{EN DASH}"
    return f"{difference.b.value / difference.a.value - 1:+.1%}"
