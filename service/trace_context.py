"""W3C Trace Context: what `traceparent` and `tracestate` say, and where a request stands in a trace.

https://www.w3.org/TR/trace-context-2/. Pure functions of text that strangers send: whatever is not as the specification
has it counts as absent, which starts a trace of our own, as the specification asks.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# Longest `tracestate` that is passed on, and longest member that stays when it is longer: the specification's numbers.
MAX_STATE = 512
MAX_MEMBER = 128
MAX_MEMBERS = 32

# Ids of zeros only are not valid.
_PARENT = re.compile(
    r"([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f][0-9a-f])(-.*)?", re.ASCII | re.DOTALL
)
_MEMBER = re.compile(r"[a-z0-9][a-z0-9_\-*/@]{0,255}=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]")
# Hexadecimal digits whose lowest bit is set.
_SAMPLED = frozenset("13579bdf")


class Parent(NamedTuple):
    """The caller's span. `trace_id` has 16 bytes, `span_id` 8, neither all zero."""

    trace_id: bytes
    span_id: bytes
    sampled: bool


class RequestTrace(NamedTuple):
    """A request that is traced: its own span (`span_id`) in a trace, below `parent_id` (empty: it is the first span).
    `state` is the caller's `tracestate`; `method` what was called, such as `ModelInfer`."""

    trace_id: bytes
    span_id: bytes
    parent_id: bytes
    state: str
    method: str


def parse_parent(text: str) -> Parent | None:
    """What `traceparent` says; None when it is not valid. Later versions are read as far as they are like this one."""
    match = _PARENT.fullmatch(text)
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == "ff" or (version == "00" and more):
        return None
    return Parent(bytes.fromhex(trace_id), bytes.fromhex(span_id), flags[1] in _SAMPLED)


def parse_state(text: str) -> str:
    """`tracestate` as it is passed on: its members without blanks between them, at most `MAX_STATE` characters (long
    members go first, then the last ones). Empty when it is not valid."""
    members = [member for part in text.split(",") if (member := part.strip(" \t"))]
    keys = {member.partition("=")[0] for member in members}
    if len(members) > MAX_MEMBERS or len(keys) < len(members) or not all(map(_MEMBER.fullmatch, members)):
        return ""
    if _length(members) > MAX_STATE:
        members = [member for member in members if len(member) <= MAX_MEMBER]
    while _length(members) > MAX_STATE:
        members.pop()
    return ",".join(members)


def _length(members: list[str]) -> int:
    return sum(map(len, members)) + max(0, len(members) - 1)
