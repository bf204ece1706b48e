"""Pass, fail and void."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loadtests.cli import EXIT_MISSED, EXIT_PASSED, EXIT_VOID, exit_code
from loadtests.scenario import parse_scenario
from loadtests.scrape import Scrape
from loadtests.stats import analyse
from loadtests.verdict import Verdict, judge
from tests.unit.loadtests.runs import MS, records, run_of, steady


def judged(run: Any, criteria: dict[str, Any], **more: Any) -> list[Verdict]:
    raw = {
        "name": "t", "duration": "10s", "slo": "50ms", "arrivals": {"kind": "poisson", "rate": 1},
        "load": [{"model": "m", "name": "entry0"}], "pass": criteria, **more,
    }  # fmt: skip
    return judge(run, parse_scenario(raw, "t", Path()), analyse(run))


@pytest.mark.parametrize(
    ("criterion", "met", "missed"),
    [
        ("p50_ms", 11, 9),
        ("p90_ms", 20, 11),
        ("p99_ms", 25, 11),
        ("p999_ms", 40, 11),
        ("goodput", 99, 101),
        ("late_share", 0.001, None),
        ("refused_share", 0.0, None),
    ],
)
def test_each_bound(criterion: str, met: float, missed: float | None) -> None:
    """A hundred answers a second with a median of 10 ms."""
    run = run_of(steady())
    assert judged(run, {criterion: met})[0].passed
    if missed is not None:
        verdict = judged(run, {criterion: missed})[0]
        assert not verdict.passed
        assert verdict.measured != "none"


def test_errors_are_judged_unasked() -> None:
    """No scenario passes with requests that failed, unless it says how many may."""
    run = run_of(records([(1, 0, 1.0)] * 99 + [(2, 13, 1.0)]))
    assert [v.criterion for v in judged(run, {}) if not v.passed] == ["errors"]
    assert all(v.passed for v in judged(run, {"errors": 0.01}))


def test_no_answer_is_not_a_fast_one() -> None:
    """A latency bound is missed when nothing was answered; a bound on refusals needs none."""
    run = run_of(records([(1, 14, 1.0)]))
    assert [v.passed for v in judged(run, {"p99_ms": 1000})] == [False, True]
    assert [v.passed for v in judged(run_of(steady()), {"reject_p50_ms": 1})] == [True, True]


def test_capacity_recovery_memory() -> None:
    """Criteria that need more than latencies."""
    run = run_of(steady(), capacity=200.0, scrapes=[Scrape(t, {"memory_bytes": (100 + t) * 2**20}) for t in range(10)])
    more = {"capacity": 200}
    assert judged(run, {"goodput_of_capacity": 0.49}, **more)[0].passed
    assert not judged(run, {"goodput_of_capacity": 0.51}, **more)[0].passed
    assert judged(run, {"recovery": {"after": "5s"}})[-1].passed
    assert judged(run, {"memory_growth_mib": 9})[0].passed
    assert not judged(run, {"memory_growth_mib": 8.9})[0].passed
    assert not judged(run_of(steady()), {"memory_growth_mib": 9})[0].passed  # it was not scraped


def test_exit_codes() -> None:
    """Void wins over missed: the run says nothing."""
    run = run_of(steady())
    assert exit_code(analyse(run), judged(run, {"p50_ms": 11})) == EXIT_PASSED
    assert exit_code(analyse(run), judged(run, {"p50_ms": 9})) == EXIT_MISSED
    run.records["sent_ns"] += 5 * MS
    assert exit_code(analyse(run), judged(run, {"p50_ms": 9})) == EXIT_VOID
