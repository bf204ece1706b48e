"""The verdict on a promise, and its cause: facts in, words out."""

from __future__ import annotations

from typing import Any

import pytest

from service.clock import NS_PER_MS
from service.status_page.causes import broken, likely_cause
from service.status_page.counts import Counts
from service.status_page.facts import Facts, State
from service.status_page.history import Window
from service.status_page.verdict import Level, Verdict, judge, overall

TARGET = 0.99
SLO_NS = 20 * NS_PER_MS


def window(offered: int, in_time: int, **counts: Any) -> Window:
    return Window(offered, in_time, Counts(**{"requests": in_time, **counts}))


def facts(minute: Window, recent: Window | None = None, **others: Any) -> Facts:
    return Facts(State.READY, slo_ns=SLO_NS, minute=minute, recent=minute if recent is None else recent, **others)


def refused(offered: int, count: int, reason: str = "overloaded") -> Window:
    return window(offered, offered - count, refusals={reason: count})


def test_nothing_asked_is_idle() -> None:
    """Whatever happened before."""
    assert judge(facts(Window()), TARGET) == Verdict(Level.IDLE, "", "Nothing was asked for in the last minute.")


def test_a_promise_that_is_kept_is_said_with_its_figures() -> None:
    """Share, requests, objective."""
    verdict = judge(facts(window(1000, 998)), TARGET)
    assert verdict == Verdict(Level.KEEPING, "", "99.8 % of 1,000 requests answered within 20 ms in the last minute.")


def test_without_an_objective_only_deadlines_count() -> None:
    """No figure is invented."""
    verdict = judge(Facts(State.READY, minute=window(10, 10), recent=window(10, 10)), TARGET)
    assert verdict == Verdict(Level.KEEPING, "", "100 % of 10 requests answered in time in the last minute.")


@pytest.mark.parametrize(
    ("minute", "recent", "level"),
    [
        (refused(1000, 4), None, Level.KEEPING),
        (refused(1000, 6), refused(250, 1), Level.AT_RISK),  # more than half of the ten that may be lost
        (refused(1000, 10), refused(250, 1), Level.AT_RISK),  # all that may be lost, and no more
        (refused(1000, 11), None, Level.BREACHING),
        (refused(1000, 11), refused(250, 0), Level.AT_RISK),  # recovering
        (refused(1000, 11), Window(), Level.BREACHING),  # nothing has shown that it is over
        (refused(1000, 4), refused(100, 4), Level.AT_RISK),  # beginning
    ],
)
def test_levels(minute: Window, recent: Window | None, level: Level) -> None:
    """The last minute decides, the last 15 s warn or give hope."""
    assert judge(facts(minute, recent), TARGET).level is level


def test_the_target_is_the_operator_s() -> None:
    """What is fine for one is a breach for another."""
    minute = refused(1000, 4)
    assert judge(facts(minute), 0.999).level is Level.BREACHING
    assert judge(facts(refused(1000, 300)), 0.5).level is Level.AT_RISK


def test_a_full_device_is_at_risk_before_anything_is_lost() -> None:
    """Saturation warns."""
    for saturation, cause in ((0.93, "device nearly full"), (1.3, "device full")):
        verdict = judge(facts(window(100, 100), saturation=saturation), TARGET)
        assert (verdict.level, verdict.cause) == (Level.AT_RISK, cause)
        assert f"saturation {saturation:.2f}" in verdict.text
    assert judge(facts(window(100, 100), saturation=0.89), TARGET).level is Level.KEEPING


@pytest.mark.parametrize(
    ("minute", "others", "cause", "says"),
    [
        (refused(100, 50), {"saturation": 1.4}, "overload", "50 requests refused: more load than"),
        (refused(100, 50), {"saturation": 0.3}, "queueing", "the device is not full (saturation 0.30)"),
        (refused(100, 50), {"scale": 1.8}, "execution slower than profiled", "1.8 times as long as"),
        (refused(100, 50), {"scale": 1.8, "saturation": 1.5}, "execution slower than profiled", "1.8 times as long as"),
        (refused(100, 50), {"scale": 1.8, "saturation": 2.5}, "overload", "more load than can be answered"),
        (refused(100, 50, "expired"), {"saturation": 1.4}, "overload", "50 requests refused"),
        (refused(100, 50, "queue_full"), {"saturation": 1.4}, "overload", "50 requests refused"),
        (refused(100, 50, "unreachable"), {}, "objective too short", "shorter than the model takes"),
        (refused(100, 50, "unreachable"), {"quantile": 1.7}, "execution unsteady", "1.7 times the usual"),
        (refused(100, 50), {"quantile": 1.7}, "execution unsteady", "1.7 times the usual"),
        (refused(100, 50), {"quantile": 1.7, "saturation": 1.4}, "overload", "50 requests refused"),
        (refused(100, 50), {"quantile": 1.29, "saturation": 0.3}, "queueing", "the device is not full"),
        (refused(100, 50, "unreachable"), {"scale": 3.0}, "execution slower than profiled", "3.0 times"),
        (refused(100, 50, "draining"), {}, "stopping", "taken out of service"),
        (
            window(100, 50, failures={"execution": 49, "out_of_memory": 1}),
            {},
            "the model fails",
            "50 requests failed in the model, most of them: execution.",
        ),
        (window(100, 50, failures={"device_failed": 50}), {}, "device lost", "The device failed."),
        (window(100, 50, failures={"odd_reason": 50}), {}, "odd reason", "50 requests failed: odd reason."),
        (
            window(100, 50, requests=100, late=50, queue_ns=3000 * NS_PER_MS, compute_ns=1000 * NS_PER_MS),
            {},
            "queueing",
            "on average a request waited 30 ms and ran 10 ms",
        ),
        (
            window(100, 50, requests=100, late=50, queue_ns=0, compute_ns=3000 * NS_PER_MS),
            {},
            "execution slower than predicted",
            "50 requests answered late",
        ),
        (window(100, 50, late=50), {"scale": 2.0}, "execution slower than profiled", "2.0 times"),
        (window(100, 50, failures={"cancelled": 50}), {}, "given up by clients", "Clients gave up"),
    ],
)
def test_causes(minute: Window, others: dict[str, Any], cause: str, says: str) -> None:
    """What most of the broken promises have in common."""
    verdict = judge(facts(minute, **others), TARGET)
    assert (verdict.level, verdict.cause) == (Level.BREACHING, cause)
    assert says in verdict.text
    assert "50 % of 100 requests answered within 20 ms in the last minute; 99 % is the aim." in verdict.text


def test_the_most_frequent_kind_is_the_cause() -> None:
    """Reasons of one kind are counted together."""
    minute = window(100, 40, late=25, refusals={"overloaded": 15, "expired": 20})
    assert likely_cause(facts(minute, saturation=2.0))[0] == "overload"
    assert broken(minute) == {"late": 25, "expired": 20, "overloaded": 15}


def test_faults_of_the_clients_break_no_promise() -> None:
    """They are in no cause and in no count."""
    minute = window(10, 10, failures={"invalid": 7, "unknown_version": 2, "cancelled": 1})
    assert broken(minute) == {}
    assert likely_cause(facts(minute)) == ("", "")
    assert judge(facts(minute), TARGET).level is Level.KEEPING


@pytest.mark.parametrize(
    ("state", "reason", "level"),
    [
        (State.LOADING, "", Level.LOADING),
        (State.FAILED, "bad <b>file</b>", Level.FAILED),
        (State.OFF, "", Level.OFF),
        (State.RETIRING, "", Level.IDLE),
    ],
)
def test_versions_that_do_not_serve(state: State, reason: str, level: Level) -> None:
    """Their state is the verdict, and the reason its text, as it came."""
    verdict = judge(Facts(state, reason), TARGET)
    assert verdict.level is level
    assert reason in verdict.text


def test_a_lost_device_comes_before_everything() -> None:
    """Even when nothing was asked."""
    verdict = judge(facts(Window(), lost=("cuda:0",)), TARGET)
    assert verdict == Verdict(Level.BREACHING, "device lost", "Device cuda:0 is lost: nothing is answered.")


def test_a_failed_change_is_a_warning_while_the_old_version_serves() -> None:
    """It keeps its promise, but it is not what somebody wanted."""
    minute = window(100, 100)
    verdict = judge(facts(minute, reason="serves on as before, since a change failed to load: no file"), TARGET)
    assert (verdict.level, verdict.cause) == (Level.AT_RISK, "a change failed to load")
    assert verdict.text.endswith("in the last minute. It serves on as before, since a change failed to load: no file")


KEEPING = Verdict(Level.KEEPING, "", "")
IDLE = Verdict(Level.IDLE, "", "")
FAILED = Verdict(Level.FAILED, "failed to load", "no such file")
BREACHING = Verdict(Level.BREACHING, "overload", "")


@pytest.mark.parametrize(
    ("phase", "failure", "verdicts", "expected"),
    [
        ("ready", "", [], Verdict(Level.IDLE, "", "No model is loaded.")),
        ("ready", "", [IDLE], Verdict(Level.IDLE, "", "Nothing was asked for in the last minute.")),
        (
            "ready",
            "",
            [IDLE, KEEPING, KEEPING],
            Verdict(Level.KEEPING, "", "2 models asked for in the last minute, each within its promise."),
        ),
        ("ready", "", [KEEPING, FAILED], Verdict(Level.FAILED, "failed to load", "b. The others keep their promise.")),
        (
            "ready",
            "",
            [BREACHING, FAILED, BREACHING],
            Verdict(Level.BREACHING, "overload", "a, and 1 more: overload."),
        ),
        (
            "ready",
            "",
            [KEEPING, BREACHING],
            Verdict(Level.BREACHING, "overload", "b: overload. The others keep their promise."),
        ),
        ("starting", "", [IDLE], Verdict(Level.LOADING, "", "The server is starting: models are being loaded.")),
        ("starting", "", [FAILED], Verdict(Level.FAILED, "failed to load", "a.")),
        (
            "draining",
            "",
            [KEEPING],
            Verdict(Level.AT_RISK, "stopping", "The server is stopping: it answers what it accepted, and no more."),
        ),
        (
            "draining",
            "device cuda:0 has failed: lost",
            [KEEPING],
            Verdict(
                Level.BREACHING,
                "device lost",
                "The server is ending, to be replaced: device cuda:0 has failed: lost.",
            ),
        ),
    ],
)
def test_the_server_is_as_well_as_its_worst_model(
    phase: str, failure: str, verdicts: list[Verdict], expected: Verdict
) -> None:
    """Unless it is not serving at all."""
    assert overall(phase, failure, zip("abc", verdicts, strict=False)) == expected
