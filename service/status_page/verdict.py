"""Is the promise kept, and if not, why: from what was counted in the last minute to a level and a sentence.

Theory. A promise is broken by an answer that is late, refused or failed for the server's own reasons. The share kept in
the last minute against `target` gives the level; what most of the broken ones have in common gives the cause:

    nothing asked                                          IDLE
    share >= target                                        KEEPING, or AT_RISK when
                                                             - half of what may be lost is lost,
                                                             - the last 15 s alone were below the target,
                                                             - its device is asked for more than 90 % of what it can,
                                                             - or a change of it failed to load
    share <  target                                        BREACHING, or AT_RISK when the last 15 s kept the target
    its device is lost                                     BREACHING, whatever was asked
    not ready: LOADING, FAILED or OFF, as the repository says

Everything is a value in, a value out; texts are plain, and hold names and reasons as they came: whoever shows them
escapes them.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from service.clock import NS_PER_MS
from service.status_page.causes import FULL, likely_cause
from service.status_page.facts import Facts, State
from service.status_page.words import duration, many, percent

# The part of what may be lost that is worth a warning.
HALF = 0.5


class Level(enum.Enum):
    """How well a promise is kept; in the order in which they deserve attention, least first."""

    OFF = "not loaded"
    IDLE = "idle"
    KEEPING = "keeping"
    LOADING = "loading"
    AT_RISK = "at risk"
    FAILED = "failed"
    BREACHING = "breaching"


HEADLINES: Mapping[Level, str] = {
    Level.OFF: "Nothing is loaded",
    Level.IDLE: "Idle",
    Level.KEEPING: "Keeping the promise",
    Level.LOADING: "Loading",
    Level.AT_RISK: "At risk",
    Level.FAILED: "A model failed to load",
    Level.BREACHING: "Breaching the promise",
}
# Nobody needs to look.
_FINE = frozenset({Level.OFF, Level.IDLE, Level.KEEPING})
SEVERITY: Mapping[Level, int] = {level: number for number, level in enumerate(Level)}


@dataclass(frozen=True, slots=True)
class Verdict:
    """`cause` in a few words, empty where nothing is wrong; `text`: a sentence or two with the figures."""

    level: Level
    cause: str
    text: str


def judge(facts: Facts, target: float) -> Verdict:
    """The verdict on a model version whose promise is kept when the share `target` is answered in time."""
    if facts.lost and facts.state in (State.READY, State.RETIRING):
        return Verdict(Level.BREACHING, "device lost", f"Device {', '.join(facts.lost)} is lost: nothing is answered.")
    match facts.state:
        case State.LOADING:
            return Verdict(Level.LOADING, "", "Loading, warming up and being measured.")
        case State.FAILED:
            return Verdict(Level.FAILED, "failed to load", facts.reason)
        case State.OFF:
            return Verdict(Level.OFF, "", facts.reason or "Not loaded.")
    share = facts.minute.attainment
    if share is None:
        text = "Nothing was asked for in the last minute."
        return _noted(facts, Verdict(Level.IDLE, "", text))
    kept = f"{percent(share)} of {many(facts.minute.offered, 'request')} {_promise(facts)} in the last minute"
    now = facts.recent.attainment
    cause, why = likely_cause(facts)
    if share < target:
        if now is not None and now >= target:
            return Verdict(Level.AT_RISK, cause, f"Recovering: {kept}, {percent(now)} in the last 15 s. Before: {why}")
        return Verdict(Level.BREACHING, cause, f"{kept}; {percent(target)} is the aim. {why}".rstrip())
    if now is not None and now < target:
        return Verdict(Level.AT_RISK, cause, f"{kept}, but {percent(now)} in the last 15 s. {why}".rstrip())
    if 1 - share > HALF * (1 - target):
        return Verdict(Level.AT_RISK, cause, f"{kept}: more than half of what may be lost. {why}".rstrip())
    if facts.saturation >= FULL:
        return Verdict(Level.AT_RISK, *_full(kept, facts.saturation))
    return _noted(facts, Verdict(Level.KEEPING, "", f"{kept}."))


def _full(kept: str, saturation: float) -> tuple[str, str]:
    if saturation < 1:
        return "device nearly full", f"{kept}, but the device is nearly full: saturation {saturation:.2f}."
    return "device full", f"{kept}, but the device is asked for more than it can do: saturation {saturation:.2f}."


def overall(phase: str, failure: str, verdicts: Iterable[tuple[str, Verdict]]) -> Verdict:
    """The verdict on the server: the worst of its (name, verdict) pairs, unless it is not serving at all.

    `phase`: where the server is in its life (`service.state`); `failure`: what broke it, empty while it is whole.
    """
    every = list(verdicts)
    if failure:
        return Verdict(Level.BREACHING, "device lost", f"The server is ending, to be replaced: {failure}.")
    if phase == "draining":
        return Verdict(Level.AT_RISK, "stopping", "The server is stopping: it answers what it accepted, and no more.")
    worst = max((SEVERITY[verdict.level] for _, verdict in every), default=SEVERITY[Level.OFF])
    level = next(level for level in Level if SEVERITY[level] == worst)
    named = [(name, verdict) for name, verdict in every if verdict.level is level]
    if phase == "starting" and (level in _FINE or level is Level.LOADING):
        return Verdict(Level.LOADING, "", "The server is starting: models are being loaded.")
    match level:
        case Level.OFF:
            return Verdict(Level.IDLE, "", "No model is loaded.")
        case Level.IDLE:
            return Verdict(Level.IDLE, "", "Nothing was asked for in the last minute.")
        case Level.KEEPING:
            busy = many(len(named), "model")
            return Verdict(Level.KEEPING, "", f"{busy} asked for in the last minute, each within its promise.")
        case Level.LOADING:
            return Verdict(Level.LOADING, "", f"{many(len(named), 'model')} loading; the others keep their promise.")
    name, first = named[0]
    text = f"{name}, and {len(named) - 1} more" if len(named) > 1 else name
    if level is not Level.FAILED and first.cause:
        text += f": {first.cause}"
    if len(named) < len(every) and all(v.level in _FINE for _, v in every if v.level is not level):
        text += ". The others keep their promise"
    return Verdict(level, first.cause, f"{text}.")


def _promise(facts: Facts) -> str:
    """What was promised: an objective, or only the deadlines that clients state themselves."""
    if facts.slo_ns is None:
        return "answered in time"
    return f"answered within {duration(facts.slo_ns / NS_PER_MS)}"


def _noted(facts: Facts, verdict: Verdict) -> Verdict:
    """`verdict`, unless a change of the version failed: it serves, but it is not what somebody wanted it to be."""
    if not facts.reason:
        return verdict
    return Verdict(Level.AT_RISK, "a change failed to load", f"{verdict.text} It {facts.reason}")
