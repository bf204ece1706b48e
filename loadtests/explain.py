"""Every key of a scenario, from the classes that check it: what is printed is what is accepted."""

from __future__ import annotations

import inspect
import re
from typing import Any

from pydantic import BaseModel

from loadtests import scenario as s

PARTS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("a scenario", s.Scenario),
    ("load[i]", s.Entry),
    ("load[i].payload", s.Payload),
    ("load[i].cancel", s.CancelPlan),
    ("load[i].slow", s.Slow),
    ("pass, load[i].pass", s.Criteria),
    ("pass.recovery", s.Recovery),
    ("tls", s.TlsSettings),
    ("arrivals: {kind: constant}", s.Constant),
    ("arrivals: {kind: poisson}", s.Poisson),
    ("arrivals: {kind: gamma}", s.Gamma),
    ("arrivals: {kind: mmpp}", s.Mmpp),
    ("arrivals: {kind: ramp}", s.Ramp),
    ("arrivals: {kind: steps}", s.Steps),
    ("arrivals.steps[i]", s.Step),
    ("arrivals: {kind: replay}", s.Replay),
    ("arrivals: {kind: serverless}", s.Serverless),
    ("arrivals: {kind: closed}", s.Closed),
)
# A field as it is written: its name, the type's words, and the comment that says what they cannot.
_FIELD = re.compile(r"^    (\w+): (.*?)(?: = .*?)?(?:  # (.*))?$")
_WORDS = {
    "RateField": "rate", "Duration": "duration", "Weights": "number, or {number: weight}", "Share": "share, 0 to 1",
    "Process": "poisson, gamma or constant", "float": "number", "int": "whole number", "str": "text",
    "bool": "true or false", "Path": "path", "Arrivals": "{kind: ...}", "OpenArrivals": "{kind: ...}",
}  # fmt: skip


def explanation() -> str:
    """The manual of a scenario file."""
    lines = [
        "Durations have units (50ms, 20s, 2m). Rates are requests/s (500) or multiples of the capacity (0.8x).",
        "",
    ]
    for title, part in PARTS:
        lines += [title, "  " + " ".join((part.__doc__ or "").split())]
        written = _written(part)
        for name, field in part.model_fields.items():
            if name == "kind":
                continue
            kind, comment = written[name]
            default = "" if field.is_required() else _plain(field.get_default(call_default_factory=True))
            text = f"    {field.alias or name:<20} {kind:<28} {'required' if field.is_required() else default}"
            lines.append(f"{text.rstrip()}{'  -- ' + comment if comment else ''}")
        lines.append("")
    return "\n".join(lines).rstrip()


def _written(part: type[BaseModel]) -> dict[str, tuple[str, str]]:
    """Of each field the type in words, and the comment behind it."""
    found: dict[str, tuple[str, str]] = {}
    for line in inspect.getsource(part).splitlines():
        match = _FIELD.match(line)
        if match:
            kinds = [kind.strip() for kind in match[2].split(" | ") if kind.strip() != "None"]
            words = re.sub(r"Literal\[(.*)\]", r"\1", " or ".join(_WORDS.get(kind, kind) for kind in kinds))
            found[match[1]] = (re.sub(r'["]', "", _simple(words)), match[3] or "")
    return found


def _simple(words: str) -> str:
    """Containers in words."""
    words = re.sub(r"dict\[str, (.*)\]", r"{name: \1}", words)
    words = re.sub(r"tuple\[(.*), \.\.\.\]", r"list of \1", words)
    return re.sub(r"tuple\[(.*)\]", r"[\1]", words).replace("str", "text").replace("Path", "path")


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return "" if isinstance(value, (BaseModel, dict, tuple)) and not isinstance(value, bool) else f"[{value}]"
