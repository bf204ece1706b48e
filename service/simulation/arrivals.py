"""When requests arrive: seeded random processes, and traces from files. Times are seconds from the start, ascending.

`poisson`; `gamma` renewal with a coefficient of variation (the burstiness of AlpaServe, OSDI '23); `mmpp`, a two-state
Markov-modulated Poisson process; `even`, one after another at equal distance; `diurnal`, a doubly stochastic process in
the manner of serverless traces with fan-out.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.float64]

PROCESSES = ("poisson", "gamma", "mmpp", "even", "diurnal")

# mmpp: a fifth of the time at 3x the mean rate, the rest at 0.5x; mean stays of 50 and 200 arrivals.
HOT_RATE, CALM_RATE = 3.0, 0.5
HOT_STAY, CALM_STAY = 50, 200
# diurnal: AR(1) of the log rate per step of 250 arrivals, a day of 40 steps, 2 % of the calls fan out into about 8.5.
STEP_ARRIVALS, DAY_STEPS = 250, 40
MEMORY, SPREAD, SWING = 0.9, 0.45, 0.5
FAN_OUT_SHARE, FAN_OUT_EXTRA, SINGLE_SHARE = 0.02, 7.5, 0.85
# Minutes of the per-minute format of the Azure Functions 2019 trace.
MINUTES_PER_DAY = 1440


def arrivals(process: str, rate: float, count: int, rng: np.random.Generator, cv: float = 3.0) -> Times:
    """`count` arrival times in seconds at a mean of `rate` per second; `cv` applies to `gamma` alone.

    Raises `ValueError` for an unknown process or a rate that is not positive.
    """
    if rate <= 0.0:
        raise ValueError(f"arrival rate is {rate}, expected > 0 per second")
    if process == "poisson":
        return np.cumsum(rng.exponential(1 / rate, count))
    if process == "gamma":
        shape = 1 / cv**2
        return np.cumsum(rng.gamma(shape, 1 / (rate * shape), count))
    if process == "even":
        return np.arange(1, count + 1) / rate
    if process == "mmpp":
        return _mmpp(rate, count, rng)
    if process == "diurnal":
        return _diurnal(rate, count, rng)
    raise ValueError(f"unknown arrival process '{process}'; expected one of {', '.join(PROCESSES)}")


def _mmpp(rate: float, count: int, rng: np.random.Generator) -> Times:
    pieces: list[Times] = []
    now, total, hot = 0.0, 0, False
    while total < count:
        here = rate * (HOT_RATE if hot else CALM_RATE)
        stay = float(rng.exponential((HOT_STAY if hot else CALM_STAY) / rate))
        number = int(rng.poisson(here * stay))
        pieces.append(now + np.sort(rng.random(number)) * stay)
        total += number
        now += stay
        hot = not hot
    return np.concatenate(pieces)[:count]


def _diurnal(rate: float, count: int, rng: np.random.Generator) -> Times:
    pieces: list[Times] = []
    level, now, total, step = 0.0, 0.0, 0, 0
    span = STEP_ARRIVALS / rate
    while total < count:
        level = MEMORY * level + math.sqrt(1 - MEMORY**2) * float(rng.standard_normal())
        day = 1 + SWING * math.sin(2 * math.pi * step / DAY_STEPS)
        modulation = day * math.exp(SPREAD * level - SPREAD**2 / 2)
        number = int(rng.poisson(STEP_ARRIVALS * modulation * SINGLE_SHARE))
        times = now + rng.random(number) * span
        fanning = times[rng.random(number) < FAN_OUT_SHARE]
        if len(fanning):
            times = np.concatenate([times, np.repeat(fanning, rng.poisson(FAN_OUT_EXTRA, len(fanning)) + 1)])
        pieces.append(np.sort(times))
        total += len(times)
        now += span
        step += 1
    return np.concatenate(pieces)[:count]


def fan_out(times: Times, size: int) -> Times:
    """Every arrival `size` times at once: a client call that asks for `size` answers."""
    return np.repeat(times, size)


def read_trace(path: Path, rng: np.random.Generator) -> Times:
    """Arrival times from a file: one time in seconds per line, or a CSV with the per-minute counts of the Azure
    Functions 2019 trace (columns named 1 .. 1440, summed over the functions, spread evenly at random in each minute).

    Times start at 0 and are sorted. Raises `ValueError` naming the line that is not a number.
    """
    with path.open(newline="") as file:
        first = file.readline()
        file.seek(0)
        if "," in first:
            return _read_minutes(path, csv.DictReader(file), rng)
        times: list[float] = []
        for number, line in enumerate(file, start=1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            try:
                times.append(float(text))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: '{text}' is not a time in seconds") from error
    if not times:
        raise ValueError(f"{path}: holds no arrival times")
    result = np.sort(np.array(times, dtype=np.float64))
    result -= result[0]
    return result


def _read_minutes(path: Path, rows: csv.DictReader[str], rng: np.random.Generator) -> Times:
    minutes = [name for name in rows.fieldnames or () if name.isdigit() and 1 <= int(name) <= MINUTES_PER_DAY]
    if not minutes:
        raise ValueError(f"{path}: a CSV trace needs columns named 1 .. {MINUTES_PER_DAY} with invocations per minute")
    counts = np.zeros(max(int(name) for name in minutes), dtype=np.int64)
    for row in rows:
        for name in minutes:
            counts[int(name) - 1] += int(row[name] or 0)
    pieces = [60.0 * minute + np.sort(rng.random(int(count))) * 60.0 for minute, count in enumerate(counts)]
    return np.concatenate(pieces)
