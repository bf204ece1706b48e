"""The most requests anybody could have answered on time: the exact clairvoyant optimum to divide goodput by.

One server, identical requests with one relative deadline, batch latencies from a table, everything known in advance.
For such requests first-come order and contiguous batches lose nothing (exchange argument), so with H(m, d) the least
finish time after disposing of the first m requests, d of them dropped,

    H(m, d) = min( H(m-1, d-1),  min over j of max(H(m-j, d), r(m)) + l(j)  if that is <= r(m-j+1) + T )

and the optimum is n - min{d : H(n, d) finite}. It is free of noise and knows the future: 1.0 cannot be reached.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

TOLERANCE_S = 1e-12


def linear_table(setup_s: float, per_row_s: float, max_rows: int) -> Floats:
    """l(b) = setup + per_row x b for b = 1 .. `max_rows`, in seconds."""
    return setup_s + per_row_s * np.arange(1, max_rows + 1, dtype=np.float64)


def padded_table(points: dict[int, float]) -> Floats:
    """l(b) for every b up to the largest bucket, when a batch is padded up to the next bucket of `points`."""
    buckets = sorted(points)
    sizes = np.arange(1, buckets[-1] + 1)
    values = np.array([points[bucket] for bucket in buckets], dtype=np.float64)
    return np.maximum.accumulate(values[np.searchsorted(np.array(buckets), sizes)])


def clairvoyant(arrivals_s: Floats, table_s: Floats, slo_s: float) -> int:
    """The largest number of requests that can be answered within `slo_s` of their arrival.

    `arrivals_s` ascending seconds; `table_s[b-1]` the latency of a batch of b, non-decreasing. About 0.15 s of CPU for
    6,000 arrivals. Raises `ValueError` when either does not ascend.
    """
    arrivals = np.asarray(arrivals_s, dtype=np.float64)
    table = np.asarray(table_s, dtype=np.float64)
    if np.any(np.diff(arrivals) < 0):
        raise ValueError("arrival times must ascend")
    if np.any(np.diff(table) < 0):
        raise ValueError("batch latencies must not fall as batches grow")
    count = len(arrivals)
    table = table[: int((table <= slo_s + TOLERANCE_S).sum())]
    most = len(table)
    if not count or not most:
        return 0
    finish = np.full((most + 1, count + 2), np.inf)  # H of the last `most` + 1 requests, by dropped
    finish[0, 0] = 0.0
    sizes = np.arange(1, most + 1)
    latest = arrivals + slo_s + TOLERANCE_S
    fewest, beyond, oldest = 0, 1, 0  # H(m-1, d) is finite and worth keeping for fewest <= d < beyond
    for m in range(1, count + 1):
        arrived = arrivals[m - 1]
        # A batch that ends with request m cannot begin before `oldest`: too large, or too late whatever came before.
        while oldest < m - 1 and (m - oldest > most or arrived + table[m - oldest - 1] > latest[oldest]):
            oldest += 1
        reach = m - oldest
        previous = finish[(m - 1) % (most + 1), fewest:beyond]
        here = np.full(beyond + 1 - fewest, np.inf)
        here[1:] = previous
        batches = finish[(m - sizes[:reach]) % (most + 1), fewest : beyond + 1]
        ends = np.maximum(batches, arrived) + table[:reach, None]
        ends[ends > latest[m - sizes[:reach]][:, None]] = np.inf
        np.minimum(here, ends.min(axis=0), out=here)
        row = finish[m % (most + 1)]
        row[max(0, fewest - 2) : beyond + 2] = np.inf
        row[fewest : beyond + 1] = here
        first = fewest + int(np.flatnonzero(here < np.inf)[0])
        # Dropping more than what frees the server by the next arrival buys nothing.
        enough = np.flatnonzero(here <= (arrivals[m] if m < count else np.inf))
        if len(enough):
            last = fewest + int(enough[0]) + 1
            row[last : beyond + 1] = np.inf
            beyond = max(last, first + 1)
        else:
            beyond += 1
        fewest = first
    return count - fewest
