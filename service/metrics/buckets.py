"""Histogram bounds: where the counting cells end. A value equal to a bound belongs to the cell that ends there.

Prometheus' `le` is inclusive, so `bisect_left(bounds, value)` is the index of a value's cell, and the last cell (index
`len(bounds)`) is everything beyond the last bound.
"""

from __future__ import annotations

from service.clock import NS_PER_MS, NS_PER_S, NS_PER_US

# 1-2.5-5 per decade from 100 us (less than any network round trip) to 10 s (more than any objective worth stating).
DURATION_BOUNDS_NS: tuple[int, ...] = (
    100 * NS_PER_US,
    250 * NS_PER_US,
    500 * NS_PER_US,
    1 * NS_PER_MS,
    2_500 * NS_PER_US,
    5 * NS_PER_MS,
    10 * NS_PER_MS,
    25 * NS_PER_MS,
    50 * NS_PER_MS,
    100 * NS_PER_MS,
    250 * NS_PER_MS,
    500 * NS_PER_MS,
    1 * NS_PER_S,
    2_500 * NS_PER_MS,
    5 * NS_PER_S,
    10 * NS_PER_S,
)

# Time left at dispatch. Below zero: dispatched although predicted late (best effort).
SLACK_BOUNDS_NS: tuple[int, ...] = (
    -100 * NS_PER_MS,
    -10 * NS_PER_MS,
    -1 * NS_PER_MS,
    0,
    *(bound for bound in DURATION_BOUNDS_NS if NS_PER_MS <= bound <= NS_PER_S),
)

# Powers of two and the halves between, as batch sizes are usually chosen.
ROWS_BOUNDS: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)

# Actual over predicted: fine around 1, where the batching decisions live.
RATIO_BOUNDS: tuple[float, ...] = (0.5, 0.75, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
