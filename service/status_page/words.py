"""Figures as people read them."""

from __future__ import annotations

import math


def percent(share: float) -> str:
    """A share of 1 in percent, with two decimals at most. Never rounded to 100 % or to 0 %, which would say all or
    nothing."""
    if share in (0, 1):
        return f"{share:.0%}".replace("%", " %")
    hundredths = min(max(math.floor(share * 10_000 + 0.5), 1), 9_999)
    return f"{hundredths / 100:g} %"


def duration(ms: float) -> str:
    """Milliseconds with three digits, in the unit that suits: `0.42 ms`, `12.3 ms`, `250 ms`, `1.5 s`."""
    value, unit = (ms / 1000, "s") if ms >= 999.5 else (ms, "ms")
    return f"{value:.3g} {unit}"


def many(count: int, thing: str) -> str:
    """`1 request`, `12,345 requests`."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"
