"""What a model version has counted, as a value: since it was loaded, or in a stretch of time.

Counts only grow, so what happened between two readings is their difference, and stretches that follow each other add
up: `difference(c, a) == added([difference(b, a), difference(c, b)])`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from types import MappingProxyType

from service.metrics.buckets import DURATION_BOUNDS_NS, ROWS_BOUNDS
from service.metrics.model import ShardSum

_NOTHING: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Counts:
    """Requests answered, those of them late, and the times of all, summed, in ns; batches and their rows.

    `request_cells` and `batch_cells` are histograms of time from arrival to answer (`DURATION_BOUNDS_NS`) and of rows
    per batch (`ROWS_BOUNDS`); no cells at all are cells of 0. `refusals` and `failures`: requests by reason.
    """

    requests: int = 0
    late: int = 0
    queue_ns: int = 0
    compute_ns: int = 0
    batches: int = 0
    batch_rows: int = 0
    request_cells: tuple[int, ...] = ()
    batch_cells: tuple[int, ...] = ()
    refusals: Mapping[str, int] = field(default_factory=lambda: _NOTHING)
    failures: Mapping[str, int] = field(default_factory=lambda: _NOTHING)


NO_COUNTS = Counts()


def counts_of(sums: ShardSum) -> Counts:
    """What the shards of a model version say together."""
    totals = sums.totals
    return Counts(
        requests=totals.requests,
        late=totals.late,
        queue_ns=totals.queue_ns,
        compute_ns=totals.compute_input_ns + totals.compute_infer_ns + totals.compute_output_ns,
        batches=totals.batches,
        batch_rows=totals.batch_rows,
        request_cells=_cells(sums.request_cells, len(DURATION_BOUNDS_NS) + 1),
        batch_cells=_cells(sums.batch_rows_cells, len(ROWS_BOUNDS) + 1),
        refusals={reason: tally.requests for reason, tally in sums.refusals.items()},
        failures={reason: tally.requests for reason, tally in sums.failures.items()},
    )


def difference(after: Counts, before: Counts) -> Counts:
    """What was counted from `before` to `after`, two readings of the same counters in this order."""
    return Counts(
        after.requests - before.requests,
        after.late - before.late,
        after.queue_ns - before.queue_ns,
        after.compute_ns - before.compute_ns,
        after.batches - before.batches,
        after.batch_rows - before.batch_rows,
        tuple(a - b for a, b in zip_longest(after.request_cells, before.request_cells, fillvalue=0)),
        tuple(a - b for a, b in zip_longest(after.batch_cells, before.batch_cells, fillvalue=0)),
        _grown(after.refusals, before.refusals),
        _grown(after.failures, before.failures),
    )


def added(parts: Iterable[Counts]) -> Counts:
    """What was counted in all `parts` together; nothing where there are none."""
    every = list(parts)
    if not every:
        return NO_COUNTS
    return Counts(
        sum(part.requests for part in every),
        sum(part.late for part in every),
        sum(part.queue_ns for part in every),
        sum(part.compute_ns for part in every),
        sum(part.batches for part in every),
        sum(part.batch_rows for part in every),
        tuple(sum(column) for column in zip_longest(*(part.request_cells for part in every), fillvalue=0)),
        tuple(sum(column) for column in zip_longest(*(part.batch_cells for part in every), fillvalue=0)),
        _together(part.refusals for part in every),
        _together(part.failures for part in every),
    )


def _cells(cells: Sequence[int], size: int) -> tuple[int, ...]:
    assert len(cells) == size, f"{len(cells)} cells where there are {size}"
    return tuple(cells)


def _grown(after: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    grown = {reason: count - before.get(reason, 0) for reason, count in after.items()}
    return {reason: count for reason, count in grown.items() if count}


def _together(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in parts:
        for reason, count in part.items():
            total[reason] = total.get(reason, 0) + count
    return total
