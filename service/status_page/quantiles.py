"""Quantiles and shares out of counts. A quantile of a histogram is as exact as its cells are narrow.

Inside a cell values are taken to be spread evenly, as Prometheus' `histogram_quantile` does, so that this page and a
dashboard over the same stretch of time say the same.
"""

from __future__ import annotations

from collections.abc import Sequence


def quantile(share: float, cells: Sequence[int], bounds: Sequence[float]) -> float | None:
    """The value that `share` (0 to 1) of the counted values do not exceed, in the unit of `bounds`.

    `cells[i]` counts values up to `bounds[i]`, the last cell those beyond all bounds: a quantile there is told as the
    last bound, which is all that is known of it. None when nothing was counted.
    """
    total = sum(cells)
    if total == 0:
        return None
    rank = share * total
    below = 0
    for cell, bound, lower in zip(cells, bounds, (0.0, *bounds), strict=False):
        if cell and below + cell >= rank:
            return lower + (bound - lower) * max(0.0, rank - below) / cell
        below += cell
    return float(bounds[-1])


def ratio(part: float, whole: float) -> float | None:
    """`part / whole`; None of nothing."""
    return part / whole if whole else None


def rounded(value: float | None) -> float | None:
    """To four digits: more than any chart shows, and half the bytes."""
    return None if value is None else float(f"{value:.4g}")
