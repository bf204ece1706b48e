"""Trace files: each format to the nanosecond, and a message that names file, line and what was expected otherwise."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import pytest

from loadtests import trace
from loadtests.errors import LoadTestError
from loadtests.pacer import Constant, Poisson
from loadtests.trace import Format, PerMinute, Times, describe

MS = 1_000_000
NS = 1_000_000_000
MINUTE = 60 * NS

AZURE_2021 = """app,func,end_timestamp,duration
a1,f1,100.25,0.25
a1,f2,100.5,1.5
a2,f3,101.000000001,0.5
"""
AZURE_LLM_2023 = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:46.0000001,879,55
"""
AZURE_LLM_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 23:59:59.500000+00:00,1,2
2024-05-11 00:00:00+00:00,1,2
2024-05-11 02:00:00.25+02:00,1,2
"""


def per_minute(*rows: str, minutes: int = 3) -> str:
    header = "HashOwner,HashApp,HashFunction,Trigger," + ",".join(str(minute + 1) for minute in range(minutes))
    return "\n".join([header, *rows]) + "\n"


AZURE_2019 = per_minute("o,a,f1,http,2,0,1", "o,a,f2,queue,0,5,0", "o,b,f3,timer,1,1,1", "o,a,f2,http,3,0,0")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "trace.csv"


def read(
    path: Path, text: str | bytes, form: Format | None = None, wanted: PerMinute | None = None, seed: int = 1
) -> Times:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return trace.read(path, form, np.random.default_rng(seed), wanted)


def refusal(path: Path, text: str | bytes, form: Format | None = None, wanted: PerMinute | None = None) -> str:
    with pytest.raises(LoadTestError) as caught:
        read(path, text, form, wanted)
    assert str(path) in str(caught.value)
    return str(caught.value).replace(str(path), "FILE")


def test_plain_times_are_sorted_and_begin_at_zero(file: Path) -> None:
    """Comments, empty lines, other columns and the order do not matter."""
    text = "# seconds\n\n12.5\n 11.000000001 ,extra,columns\r\n   \n1.1e1\n12.5\n"
    assert read(file, text).tolist() == [0, 1, 1_500_000_000, 1_500_000_000]


def test_seconds_since_1970_are_read_to_the_nanosecond(file: Path) -> None:
    """A double would be off by a hundred."""
    assert read(file, "1700000000.000000001\n1700000000.000000004\n").tolist() == [0, 3]


def test_negative_times_are_times(file: Path) -> None:
    assert read(file, "-1\n2\n").tolist() == [0, 3 * NS]


def test_a_named_format_and_a_recognised_one_are_the_same(file: Path) -> None:
    assert read(file, "1\n2\n", "plain").tolist() == read(file, "1\n2\n").tolist()
    assert read(file, AZURE_2021, "azure2021").tolist() == read(file, AZURE_2021).tolist()


def test_gzip_is_read(tmp_path: Path) -> None:
    assert read(tmp_path / "trace.csv.gz", gzip.compress(b"1\n2\n", mtime=0)).tolist() == [0, NS]


def test_the_mark_of_spreadsheets_is_no_part_of_the_header(file: Path) -> None:
    assert len(read(file, b"\xef\xbb\xbf" + AZURE_2021.encode())) == 3


def test_azure_2021_arrivals_are_ends_less_durations(file: Path) -> None:
    """The second line arrived first, at 99 s."""
    assert read(file, AZURE_2021).tolist() == [0, 1 * NS, 1_500_000_001]


def test_columns_are_found_by_name(file: Path) -> None:
    assert read(file, "duration,x,func,app,end_timestamp\n1,,f,a,5\n2,,f,a,5\n").tolist() == [0, NS]


def test_azure_llm_2023_has_seven_digits(file: Path) -> None:
    assert read(file, AZURE_LLM_2023).tolist() == [0, 680_589_900, 4_995_168_900]


def test_azure_llm_2024_has_zones_and_whole_seconds(file: Path) -> None:
    assert read(file, AZURE_LLM_2024).tolist() == [0, 500 * MS, 750 * MS]


def test_azure_2019_counts_fall_into_their_minutes(file: Path) -> None:
    """Summed over the functions: 6, 6 and 2. A leading gap is cut, but never moves an arrival to another minute."""
    times = read(file, AZURE_2019)
    assert len(times) == 14
    assert times[0] == 0
    assert (np.diff(times) >= 0).all()
    assert times[-1] < 3 * MINUTE
    assert [int(((times >= low) & (times < low + MINUTE)).sum()) for low in (0, MINUTE)] == pytest.approx([6, 6], abs=2)


def test_azure_2019_spreads_as_the_seed_says(file: Path) -> None:
    assert read(file, AZURE_2019).tolist() == read(file, AZURE_2019).tolist()
    assert read(file, AZURE_2019).tolist() != read(file, AZURE_2019, seed=2).tolist()


@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        (PerMinute(function="f1"), 3),
        (PerMinute(function="f2"), 8),  # both of its triggers
        (PerMinute(top=1), 8),
        (PerMinute(top=2), 11),
        (PerMinute(top=99), 14),
        (PerMinute(last=1), 6),
        (PerMinute(first=2), 8),
        (PerMinute(first=2, last=2, function="f3"), 1),
        (PerMinute(first=2, last=2, top=1), 5),
    ],
)
def test_azure_2019_functions_and_minutes_can_be_chosen(file: Path, wanted: PerMinute, count: int) -> None:
    assert len(read(file, AZURE_2019, wanted=wanted)) == count


def test_an_empty_count_is_none(file: Path) -> None:
    assert len(read(file, per_minute("o,a,f,http,,2,"))) == 2


@pytest.mark.parametrize(("cv", "low", "high"), [(1.0, 0.97, 1.03), (3.0, 2.4, 3.3)])
def test_arrivals_within_a_minute_are_as_bursty_as_asked(file: Path, cv: float, low: float, high: float) -> None:
    """20,000 in one minute, and every part of the minute alike."""
    times = read(file, per_minute("o,a,f,http,20000,0,0"), wanted=PerMinute(cv=cv))
    gaps = np.diff(times)
    assert low < gaps.std() / gaps.mean() < high
    assert np.histogram(times, 4, (0, MINUTE))[0].tolist() == pytest.approx([5000] * 4, rel=0.05 * cv)


def test_single_arrivals_are_anywhere_in_their_minute(file: Path) -> None:
    """Bursty spreading does not pull them to the borders of the minutes."""
    times = read(file, per_minute(*[f"o,a,f{i},http,1,0,0" for i in range(4000)]), wanted=PerMinute(cv=20))
    assert np.histogram(times, 4, (0, MINUTE))[0].tolist() == pytest.approx([1000] * 4, rel=0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\n2\nthree\n", "FILE:3: 'three' is not a time in seconds"),
        ("1\nnan\n", "FILE:2: 'nan' is not a time in seconds"),
        ("1\n1e30\n", "FILE:2: '1e30' is not a time in seconds"),
        ("# none\n\n", "FILE:1: '' begins no known trace; expected a time in seconds, or a header with the columns "),
        ("when,what\n1,2\n", "FILE:1: 'when,what' begins no known trace; expected a time in seconds"),
        ("app,func,end_timestamp,duration\n", "FILE: holds no arrivals; expected one or more"),
        (AZURE_2021 + "a,f,1\n", "FILE:5: has 3 columns, expected 4 as in the header"),
        (AZURE_2021 + "a,f,x,1\n", "FILE:5: 'x' is not an end_timestamp in seconds"),
        (AZURE_2021 + "a,f,1,\n", "FILE:5: '' is not a duration in seconds"),
        (
            AZURE_LLM_2023 + "16.11.2023 18:15,1,1\n",
            "FILE:5: '16.11.2023 18:15' is not a time such as 2023-11-16 18:15",
        ),
        (AZURE_LLM_2023 + "2023-13-16 18:15:46,1,1\n", "FILE:5: '2023-13-16 18:15:46' is not a time such as"),
        (per_minute("o,a,f,http,1,2"), "FILE:2: has 6 columns, expected 7 as in the header"),
        (
            per_minute("o,a,f,http,1,2,3", "o,a,f,http,1,many,3"),
            "FILE:3: 'many' in minute 2 is no number of invocations",
        ),
        (
            per_minute("o,a,f,http,1,2,-3"),
            "FILE:2: '-3' in minute 3 is no number of invocations; expected 0 to 1,000,000",
        ),
        (per_minute("o,a,f,http,1,2," + "9" * 30), "in minute 3 is no number of invocations"),
        (per_minute("o,a,f,http,0,0,0"), "FILE: holds no arrivals; expected one or more"),
        (per_minute(), "FILE: holds no arrivals; expected one or more"),
        (
            per_minute("o,a,f,http,9,9,20000000"),
            "FILE: holds more than 20,000,000 arrivals; choose a function, the top",
        ),
        (b"\xff\xfe1\n", "FILE: cannot be read: "),
    ],
)
def test_malformed_files_are_refused_by_line(file: Path, text: str | bytes, message: str) -> None:
    assert message in refusal(file, text)


@pytest.mark.parametrize("broken", [b"1\n2\n", gzip.compress(b"1\n2\n" * 1000, mtime=0)[:-9]])
def test_a_broken_gzip_is_refused(tmp_path: Path, broken: bytes) -> None:
    assert "FILE: cannot be read: " in refusal(tmp_path / "trace.gz", broken)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadTestError, match=r"none\.csv: cannot be read: .*No such file"):
        trace.read(tmp_path / "none.csv", None, np.random.default_rng())


def test_a_format_that_is_named_wrongly_is_refused(file: Path) -> None:
    expected = "FILE:1: 'app,func,end_timestamp,duration' is no header of azure_llm; expected the columns TIMESTAMP, "
    assert expected in refusal(file, AZURE_2021, "azure_llm")
    assert "FILE:1: 'app' is not a time in seconds" in refusal(file, AZURE_2021, "plain")
    assert "FILE:1: '1' is no header of azure2019; expected the columns HashOwner" in refusal(file, "1\n", "azure2019")


def test_too_many_arrivals_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "MAX_ARRIVALS", 2)
    assert refusal(file, "1\n2\n3\n") == "FILE: holds more than 2 arrivals; cut the file"


def test_an_unknown_function_is_refused(file: Path) -> None:
    message = refusal(file, AZURE_2019, wanted=PerMinute(function="f9"))
    assert message == "FILE: has no function f9; expected a value of its column HashFunction"


def test_functions_are_of_counts_per_minute_alone(file: Path) -> None:
    message = refusal(file, AZURE_2021, wanted=PerMinute(function="f1"))
    assert message == "FILE: functions and minutes can be chosen from azure2019 traces only, not azure2021"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"function": "f", "top": 1}, "expected one function or the top ones, not both"),
        ({"top": 0}, "expected 1 or more top functions, got 0"),
        ({"first": 5, "last": 4}, "expected minutes within 1 to 1440, got 5 to 4"),
        ({"last": 1441}, "expected minutes within 1 to 1440, got 1 to 1441"),
        ({"cv": 0.0}, "expected a cv above 0 and up to 20, got 0"),
    ],
)
def test_choices_that_make_no_sense_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(LoadTestError, match=message):
        PerMinute(**options)  # type: ignore[arg-type]


def test_facts_of_even_arrivals_are_exact() -> None:
    """One every 5 ms for 4 s."""
    facts = describe(Constant(200).times(4, np.random.default_rng()) + 7 * NS)
    assert (facts.count, facts.duration_s) == (800, 3.995)
    assert (facts.mean_rate, facts.peak_rate) == (200, 200)
    assert (facts.gap_cv, facts.dispersion_10ms, facts.dispersion_100ms, facts.dispersion_1s) == (0, 0, 0, 0)


def test_facts_of_a_small_case() -> None:
    """Gaps of 0, 1 and 2 s. In its three seconds 2, 1 and 0 arrive; the fourth begins with the last one."""
    facts = describe(np.array([0, 0, 1, 3]) * NS)
    assert facts.mean_rate == 1
    assert facts.gap_cv == pytest.approx(math.sqrt(2 / 3))
    assert facts.dispersion_1s == pytest.approx(2 / 3)
    assert facts.peak_rate == 2


def test_facts_of_poisson_arrivals_are_all_one() -> None:
    facts = describe(Poisson(1000).times(500, np.random.default_rng(2)))
    assert facts.mean_rate == pytest.approx(1000, rel=0.01)
    assert facts.gap_cv == pytest.approx(1, rel=0.01)
    assert facts.dispersion_10ms == pytest.approx(1, rel=0.03)
    assert facts.dispersion_100ms == pytest.approx(1, rel=0.1)
    assert facts.dispersion_1s == pytest.approx(1, rel=0.25)
    assert 1050 < facts.peak_rate < 1250


def test_a_peak_is_found_wherever_its_second_begins() -> None:
    """Ten arrivals around a whole second are in one second, though not in one of a clock."""
    assert describe(np.array([0, *range(1900, 2100, 20), 5000]) * MS).peak_rate == 10


@pytest.mark.parametrize("times", [[], [5], [5, 5]])
def test_too_few_arrivals_have_no_facts(times: list[int]) -> None:
    facts = describe(np.array(times, np.int64))
    assert facts.count == facts.peak_rate == len(times)
    assert math.isnan(facts.mean_rate)
    assert math.isnan(facts.gap_cv)
    assert math.isnan(facts.dispersion_10ms)


def test_a_long_sparse_trace_is_described_without_its_empty_windows() -> None:
    """A year at 10 ms has three billion windows."""
    facts = describe(np.array([0, 0, 365 * 86_400]) * NS)
    assert facts.dispersion_10ms == pytest.approx(2)


def test_facts_are_a_sentence_for_people() -> None:
    text = str(describe(Constant(200).times(4, np.random.default_rng())))
    assert text == (
        "800 arrivals in 4.0 s: 200.0/s on average, 200 in the busiest second; CV of the gaps 0.00; "
        "index of dispersion 0.00 (10 ms), 0.00 (100 ms), 0.00 (1 s)"
    )
