"""What goodput is measured against, from the latency table of the bare session: R2 and the fluid line.

The table is l(1), l(2), ... l(B), the seconds a batch of that many rows takes; T is the objective. The exact optimum
for a recorded arrival process is `service.simulation.optimum.clairvoyant`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Seconds = npt.NDArray[np.float64]


def capacity(table_s: Seconds, slo_s: float) -> float:
    """R2, the classical capacity in rows per second: the best b / l(b) with 2 l(b) <= T (one batch waits, one runs).

    Nexus (Shen et al., SOSP 2019) and Symphony plan with it. It is not an upper bound: under overload larger batches
    are full at once. With 2 l(1) > T it is 1 / l(1).
    """
    fits = np.flatnonzero(2 * table_s <= slo_s)
    if not len(fits):
        return float(1 / table_s[0])
    return float(((fits + 1) / table_s[fits]).max())


def fluid(table_s: Seconds, slo_s: float, rate: float) -> float:
    """Goodput at `rate` if arrivals flowed evenly: the best b / l(b) with l(b) + b / rate <= T, at most `rate`.

    Not a bound: bursts of arrivals batch better than a flow, and leave gaps. 0 when not even l(1) fits.
    """
    rows = np.arange(1, len(table_s) + 1)
    fits = table_s + rows / rate <= slo_s
    if not fits.any():
        return min(rate, float(1 / table_s[0])) if table_s[0] <= slo_s else 0.0
    return min(rate, float((rows[fits] / table_s[fits]).max()))


def draw(kind: str, rate: float, duration_s: float, seed: int) -> Seconds:
    """Arrival times in seconds within [0, duration_s) from a seed: `poisson`, or `gamma3` (renewal, gap CV 3).

    Gamma gaps with CV > 1 are the burstiness model of AlpaServe (Li et al., OSDI 2023).
    """
    random = np.random.default_rng(seed)
    count = int(rate * duration_s * 1.5 + 20 * np.sqrt(rate * duration_s) * (3 if kind == "gamma3" else 1) + 100)
    if kind == "poisson":
        gaps = random.exponential(1 / rate, count)
    elif kind == "gamma3":
        shape = 1 / 3.0**2
        gaps = random.gamma(shape, 1 / (rate * shape), count)
    else:
        raise ValueError(f"arrivals '{kind}': expected 'poisson' or 'gamma3'")
    times: Seconds = np.cumsum(gaps)
    if times[-1] < duration_s:  # 20 standard deviations short: cannot happen by chance
        raise AssertionError(f"{count} gaps end at {times[-1]:.3f} s, before {duration_s} s")
    return times[times < duration_s]
