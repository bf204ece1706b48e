"""Pass or fail: what was measured against what the scenario calls a pass.

A run that is void neither passes nor fails: it says nothing of the server.
"""

from __future__ import annotations

from dataclasses import dataclass

from loadtests.records import Run
from loadtests.scenario import Criteria, Scenario
from loadtests.stats import Analysis, Summary, recovery_s

# The default bound on recovery: five objectives and a second.
RECOVERY_SLOS, RECOVERY_S = 5.0, 1.0


@dataclass(slots=True)
class Verdict:
    """One criterion: `bound` and `measured` are texts for people, `passed` the decision."""

    subject: str  # "all", or an entry's name
    criterion: str
    bound: str
    measured: str
    passed: bool


def judge(run: Run, scenario: Scenario, analysis: Analysis) -> list[Verdict]:
    """All criteria of a scenario, those of the whole load first."""
    verdicts = _judged(run, scenario.criteria, analysis.total, scenario.slo)
    for entry, summary in zip(scenario.load, analysis.entries, strict=True):
        if entry.criteria is not None:
            verdicts += _judged(run, entry.criteria, summary, scenario.slo_of(entry))
    return verdicts


def memory_growth_mib(run: Run) -> float | None:
    """How much larger the server's process was at the end than when the measured part began; None if not scraped."""
    sizes = [
        scrape.values["memory_bytes"]
        for scrape in run.info.scrapes
        if scrape.at_s >= run.info.warm_up_s and "memory_bytes" in scrape.values
    ]
    return (sizes[-1] - sizes[0]) / 2**20 if len(sizes) > 1 else None


def _judged(run: Run, criteria: Criteria, summary: Summary, slo_s: float | None) -> list[Verdict]:
    found: list[Verdict] = []

    def most(name: str, bound: float | None, measured: float | None, unit: str = "", needed: bool = False) -> None:
        """`needed`: nothing to measure it by is a failure, as no answer at all has no latency."""
        if bound is not None:
            passed = not needed if measured is None else measured <= bound
            found.append(Verdict(summary.name, name, f"<= {_text(bound, unit)}", _text(measured, unit), passed))

    def least(name: str, bound: float | None, measured: float | None, unit: str = "") -> None:
        if bound is not None:
            passed = measured is not None and measured >= bound
            found.append(Verdict(summary.name, name, f">= {_text(bound, unit)}", _text(measured, unit), passed))

    latency, rejects = summary.latency_ms, summary.reject_ms
    if criteria.p99_within_slo:
        most("p99 within the objective", slo_s * 1e3 if slo_s else summary.slo_ms, latency.p99, "ms", needed=True)
    most("p50", criteria.p50_ms, latency.p50, "ms", needed=True)
    most("p90", criteria.p90_ms, latency.p90, "ms", needed=True)
    most("p99", criteria.p99_ms, latency.p99, "ms", needed=True)
    most("p99.9", criteria.p999_ms, latency.p999, "ms", needed=True)
    least("answered in time", criteria.attainment, summary.attainment, "%")
    least("goodput", criteria.goodput, summary.goodput_rps, "/s")
    if criteria.goodput_of_capacity is not None:
        capacity = run.info.capacity or 0.0
        part = summary.goodput_rps / capacity if capacity else None
        least("goodput over capacity", criteria.goodput_of_capacity, part, "x")
    most("late answers", criteria.late_share, summary.late_share, "%")
    most("refused", criteria.refused_share, summary.refused_share, "%")
    most("time to a refusal, p50", criteria.reject_p50_ms, rejects.p50, "ms")
    most("time to a refusal, p99", criteria.reject_p99_ms, rejects.p99, "ms")
    most("memory growth", criteria.memory_growth_mib, memory_growth_mib(run), "MiB", needed=True)
    most("errors", criteria.errors, summary.error_share, "%")
    if criteria.recovery is not None:
        recovery = criteria.recovery
        within = recovery.within
        if within is None:
            within = RECOVERY_SLOS * (slo_s or 0.0) + RECOVERY_S
        measured = recovery_s(run, recovery.after, recovery.attainment)
        text = "never" if measured is None else f"{measured:.2f} s"
        passed = measured is not None and measured <= within
        found.append(
            Verdict(
                summary.name,
                f"{recovery.attainment:.0%} in time again, after the overload",
                f"<= {within:.2f} s",
                text,
                passed,
            )
        )
    return found


def _text(value: float | None, unit: str) -> str:
    if value is None:
        return "none"
    if unit == "%":
        return f"{value:.2%}"
    return f"{value:.4g}{'' if unit == 'x' else ' '}{unit}".strip()
