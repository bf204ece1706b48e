"""Arrivals of the past: trace files as sorted nanoseconds from the first arrival, and what such arrivals are like.

Known formats, told apart by their first line, gzip'ed when the name ends in `.gz`:

- `plain`: a time in seconds per line, or a CSV without a header whose first column is one; `#` begins a comment line.
- `azure2019`: Azure Functions 2019, `invocations_per_function_md.anon.d*.csv`. Invocations per minute; where in the
  minute they fall is drawn (`PerMinute`).
- `azure2021`: Azure Functions 2021, one invocation per line. An arrival is `end_timestamp` less `duration`.
- `azure_llm`: Azure LLM inference 2023 and 2024, one request per line.

The traces and their descriptions are at github.com/Azure/AzurePublicDataset. Times are read to the nanosecond: seconds
since 1970 would not survive a float.
"""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Literal, TextIO

import numpy as np
import numpy.typing as npt

from loadtests.errors import LoadTestError

Times = npt.NDArray[np.int64]
Format = Literal["plain", "azure2019", "azure2021", "azure_llm"]
Row = tuple[int, list[str]]  # line number and columns

NS = 1_000_000_000
MINUTE_NS = 60 * NS
MINUTES_PER_DAY = 1440
# The largest load that is paced; a larger trace is a mistake, and would fill memory.
MAX_ARRIVALS = 20_000_000
# Where int64 nanoseconds end, and what no function is invoked in a minute (a day of it can be summed).
MAX_S = 9_000_000_000
MAX_COUNT = 1_000_000_000

# The columns that tell a format, and that it needs.
COLUMNS: dict[Format, tuple[str, ...]] = {
    "azure2019": ("HashOwner", "HashApp", "HashFunction", "Trigger", "1"),
    "azure2021": ("app", "func", "end_timestamp", "duration"),
    "azure_llm": ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
}
_STAMP = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)?")


@dataclass(frozen=True, slots=True)
class PerMinute:
    """What to take from counts per minute, and how to spread it. Raises `LoadTestError` for what makes no sense.

    `function` is one HashFunction, `top` the number of the most invoked functions; neither: all together. Only the
    minutes `first` to `last` count. Within each minute a function's arrivals have gamma gaps with the coefficient of
    variation `cv`: 1 puts them anywhere, independently.
    """

    function: str | None = None
    top: int | None = None
    first: int = 1
    last: int = MINUTES_PER_DAY
    cv: float = 1.0

    def __post_init__(self) -> None:
        if self.function is not None and self.top is not None:
            raise LoadTestError("a trace per minute: expected one function or the top ones, not both")
        if self.top is not None and self.top < 1:
            raise LoadTestError(f"a trace per minute: expected 1 or more top functions, got {self.top}")
        if not 1 <= self.first <= self.last <= MINUTES_PER_DAY:
            raise LoadTestError(
                f"a trace per minute: expected minutes within 1 to {MINUTES_PER_DAY}, got {self.first} to {self.last}"
            )
        if not 0 < self.cv <= 20:
            raise LoadTestError(f"a trace per minute: expected a cv above 0 and up to 20, got {self.cv:g}")


@dataclass(frozen=True, slots=True)
class TraceFacts:
    """What arrivals are like. Rates are per second; nan is what so few arrivals do not say.

    An index of dispersion is the variance of the counts in windows of that length over their mean: 1 for Poisson, 0 for
    even arrivals, more for bursts (Cox & Lewis, "The Statistical Analysis of Series of Events", 1966).
    """

    count: int
    duration_s: float  # from the first to the last
    mean_rate: float
    gap_cv: float
    dispersion_10ms: float
    dispersion_100ms: float
    dispersion_1s: float
    peak_rate: float  # the most in any one second

    def __str__(self) -> str:
        return (
            f"{self.count:,} arrivals in {self.duration_s:,.1f} s: {self.mean_rate:,.1f}/s on average, "
            f"{self.peak_rate:,.0f} in the busiest second; CV of the gaps {self.gap_cv:.2f}; index of dispersion "
            f"{self.dispersion_10ms:.2f} (10 ms), {self.dispersion_100ms:.2f} (100 ms), {self.dispersion_1s:.2f} (1 s)"
        )


def read(path: Path, form: Format | None, rng: np.random.Generator, per_minute: PerMinute | None = None) -> Times:
    """The arrivals of a trace file, in ns from the first one, ascending. `form` None: told by the first line.

    `rng` and `per_minute` are for counts per minute alone. Raises `LoadTestError` naming the file, the line and what
    was expected there.
    """
    found, header = _recognise(path, form)
    if found != "azure2019":
        if per_minute is not None:
            raise LoadTestError(f"{path}: functions and minutes can be chosen from azure2019 traces only, not {found}")
        arrivals = _plain(path) if found == "plain" else _events(path, found, header)
        times = np.fromiter(islice(arrivals, MAX_ARRIVALS + 1), np.int64)
    else:
        times = _minutes(path, header, per_minute or PerMinute(), rng)
    if len(times) > MAX_ARRIVALS:
        raise _too_many(path, found)
    if not len(times):
        raise LoadTestError(f"{path}: holds no arrivals; expected one or more")
    times.sort()
    times -= times[0]
    return times


def describe(times_ns: Times) -> TraceFacts:
    """Facts about ascending arrivals, traced or drawn, for people."""
    count = len(times_ns)
    span_ns = int(times_ns[-1] - times_ns[0]) if count else 0
    gaps = np.diff(times_ns)
    times = times_ns - times_ns[0] if count else times_ns
    peak = int((np.searchsorted(times, times + NS) - np.arange(count)).max(initial=0))
    return TraceFacts(
        count,
        span_ns / NS,
        (count - 1) / (span_ns / NS) if span_ns else float("nan"),
        float(gaps.std() / gaps.mean()) if span_ns else float("nan"),
        _dispersion(times, span_ns, NS // 100),
        _dispersion(times, span_ns, NS // 10),
        _dispersion(times, span_ns, NS),
        peak,
    )


def _dispersion(times: Times, span_ns: int, window_ns: int) -> float:
    windows = span_ns // window_ns
    inside = times[: np.searchsorted(times, windows * window_ns)] // window_ns
    if windows < 2:
        return float("nan")
    # Nearly all windows of a long trace are empty: only the others are held.
    borders = np.flatnonzero(np.diff(inside, prepend=-1, append=-1))
    counts = np.diff(borders).astype(np.float64)
    mean = len(inside) / windows
    return float((counts**2).sum() / windows - mean**2) / mean


def _recognise(path: Path, form: Format | None) -> tuple[Format, list[str]]:
    """The format, and the columns of its header."""
    line, cells = next(_rows(path), (1, [""]))
    names = [cell.strip() for cell in cells]
    found = next((known for known, columns in COLUMNS.items() if set(columns) <= set(names)), None)
    if form is None and found is None:
        try:
            _ns(names[0])
        except ValueError:
            known = "; ".join(f"{', '.join(columns)} ({name})" for name, columns in COLUMNS.items())
            raise LoadTestError(
                f"{path}:{line}: {_short(cells)} begins no known trace; expected a time in seconds, or a header with "
                f"the columns {known}"
            ) from None
        return "plain", []
    if form not in (None, "plain", found):
        assert form is not None
        expected = ", ".join(COLUMNS[form])
        raise LoadTestError(f"{path}:{line}: {_short(cells)} is no header of {form}; expected the columns {expected}")
    return form or found or "plain", names


def _plain(path: Path) -> Iterator[int]:
    for line, cells in _rows(path):
        yield _number(path, line, cells[0], _ns, "a time in seconds")


def _events(path: Path, form: Format, header: Sequence[str]) -> Iterator[int]:
    """One arrival per line, in no particular order."""
    if form == "azure_llm":
        stamp = header.index("TIMESTAMP")
        for line, cells in _body(path, header):
            yield _number(path, line, cells[stamp], _stamp_ns, "a time such as 2023-11-16 18:15:46.6805900")
        return
    end, duration = header.index("end_timestamp"), header.index("duration")
    for line, cells in _body(path, header):
        ended = _number(path, line, cells[end], _ns, "an end_timestamp in seconds")
        yield ended - _number(path, line, cells[duration], _ns, "a duration in seconds")


def _minutes(path: Path, header: Sequence[str], wanted: PerMinute, rng: np.random.Generator) -> Times:
    """Counts per minute, spread."""
    # Column and minute; a file may have fewer minutes than a day.
    columns = [
        (column, int(name))
        for column, name in enumerate(header)
        if name.isdecimal() and wanted.first <= int(name) <= wanted.last
    ]
    starts = np.array([(minute - 1) * MINUTE_NS for _, minute in columns], np.int64)
    identity = [header.index(name) for name in COLUMNS["azure2019"][:3]]
    chosen = _chosen(path, header, wanted, columns, identity)
    pieces: list[Times] = []
    total = 0
    for line, cells in _body(path, header):
        if chosen is not None and tuple(cells[column] for column in identity) not in chosen:
            continue
        counts = _counts(path, line, cells, columns)
        total += int(counts.sum())
        if total > MAX_ARRIVALS:
            raise _too_many(path, "azure2019")
        pieces.append(_spread(starts, counts, wanted.cv, rng))
    return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


def _chosen(
    path: Path, header: Sequence[str], wanted: PerMinute, columns: Sequence[tuple[int, int]], identity: Sequence[int]
) -> set[tuple[str, ...]] | None:
    """The wanted functions by owner, app and function; None for all. One with several triggers has several lines."""
    if wanted.function is None and wanted.top is None:
        return None
    totals: dict[tuple[str, ...], int] = {}
    for line, cells in _body(path, header):
        function = tuple(cells[column] for column in identity)
        if wanted.function in (None, function[-1]):
            totals[function] = totals.get(function, 0) + int(_counts(path, line, cells, columns).sum())
    if wanted.function is not None and not totals:
        raise LoadTestError(f"{path}: has no function {wanted.function}; expected a value of its column HashFunction")
    # Of equals the first in the file.
    return set(sorted(totals, key=lambda function: -totals[function])[: wanted.top])


def _spread(starts: Times, counts: Times, cv: float, rng: np.random.Generator) -> Times:
    """So many arrivals in the minutes that start then.

    A minute is taken for a circle: gamma gaps in proportion to their sum, begun anywhere. So every moment is equally
    likely, and with a `cv` of 1 the arrivals are independent.
    """
    starts, counts = starts[counts > 0], counts[counts > 0]
    if not len(counts):
        return np.empty(0, np.int64)
    ends = np.cumsum(counts)
    gaps = rng.gamma(cv**-2, 1.0, int(ends[-1]))
    reached = np.cumsum(gaps)
    before = np.append(0.0, reached[ends - 1])
    # Gaps may all be 0 when they are few and the cv is large.
    around = np.maximum(np.diff(before), np.finfo(np.float64).tiny)
    turns = (reached - np.repeat(before[:-1], counts)) / np.repeat(around, counts)
    share = (turns + np.repeat(rng.random(len(counts)), counts)) % 1.0
    spread: Times = np.repeat(starts, counts) + np.minimum((share * MINUTE_NS).astype(np.int64), MINUTE_NS - 1)
    return spread


def _counts(path: Path, line: int, cells: Sequence[str], columns: Sequence[tuple[int, int]]) -> Times:
    try:
        counts = np.array([int(cells[column] or 0) for column, _ in columns], np.int64)
        if ((counts >= 0) & (counts <= MAX_COUNT)).all():
            return counts
    except (ValueError, OverflowError):
        pass
    # Which one it is matters to whoever has to mend the file, and only then.
    minute, cell = next((minute, cells[column]) for column, minute in columns if not _is_count(cells[column]))
    raise LoadTestError(
        f"{path}:{line}: {_short([cell])} in minute {minute} is no number of invocations; expected 0 to {MAX_COUNT:,}"
    )


def _is_count(text: str) -> bool:
    try:
        return 0 <= int(text or 0) <= MAX_COUNT
    except ValueError:
        return False


def _number(path: Path, line: int, text: str, parse: Callable[[str], int], expected: str) -> int:
    try:
        return parse(text.strip())
    except ValueError:
        raise LoadTestError(f"{path}:{line}: {_short([text])} is not {expected}") from None


def _ns(text: str) -> int:
    """Decimal seconds. Raises `ValueError`."""
    try:
        value = Decimal(text)
    except InvalidOperation:
        raise ValueError(text) from None
    if not (value.is_finite() and abs(value) < MAX_S):
        raise ValueError(text)
    return round(value * NS)


def _stamp_ns(text: str) -> int:
    """Date and time of day. Raises `ValueError`."""
    match = _STAMP.fullmatch(text)
    if match is None:
        raise ValueError(text)
    return _whole_seconds(match[1], match[3] or "Z") * NS + int((match[2] or "").ljust(9, "0"))


@lru_cache(maxsize=1024)
def _whole_seconds(stamp: str, zone: str) -> int:
    """Since 1970. Many requests share a second."""
    return round(datetime.fromisoformat(stamp + zone).timestamp())


def _body(path: Path, header: Sequence[str]) -> Iterator[Row]:
    """The rows after the header."""
    for line, cells in islice(_rows(path), 1, None):
        if len(cells) != len(header):
            raise LoadTestError(f"{path}:{line}: has {len(cells)} columns, expected {len(header)} as in the header")
        yield line, cells


def _rows(path: Path) -> Iterator[Row]:
    """All lines but empty ones and comments."""
    with _opened(path) as file:
        reader = csv.reader(file)
        for cells in reader:
            first = cells[0].lstrip() if cells else ""
            if not first.startswith("#") and (first or len(cells) > 1):
                yield reader.line_num, cells


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """The text of a file. What goes wrong while it is read is a `LoadTestError` as well."""
    try:
        # A BOM is what spreadsheets begin a CSV with.
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8-sig", newline="") as packed:
                yield packed
        else:
            with path.open(encoding="utf-8-sig", newline="") as file:
                yield file
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise LoadTestError(f"{path}: cannot be read: {error}; expected a text file, or gzip if named .gz") from error


def _short(cells: Sequence[str]) -> str:
    text = ",".join(cells[:8])
    return f"'{text[:60]}...'" if len(text) > 60 or len(cells) > 8 else f"'{text}'"


def _too_many(path: Path, form: Format) -> LoadTestError:
    hint = "choose a function, the top ones, or fewer minutes" if form == "azure2019" else "cut the file"
    return LoadTestError(f"{path}: holds more than {MAX_ARRIVALS:,} arrivals; {hint}")
