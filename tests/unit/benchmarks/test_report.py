"""Verdicts, rendering and the record of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.harness import Settings
from benchmarks.report import Figure, Report, Sense, Table, plain, publish


@pytest.mark.parametrize(
    ("runs", "bar", "sense", "doubt", "verdict"),
    [
        ((1.0, 1.5, 9.0), 1.5, Sense.AT_MOST, "", "met"),
        ((1.0, 1.6, 1.7), 1.5, Sense.AT_MOST, "", "missed"),
        ((0.8, 0.9, 0.95), 0.9, Sense.AT_LEAST, "", "met"),
        ((0.8, 0.85, 0.95), 0.9, Sense.AT_LEAST, "", "missed"),
        ((1.0,), 1.5, Sense.AT_MOST, "send lag", "doubtful"),
        ((math.nan,), 1.5, Sense.AT_MOST, "", "doubtful"),
        ((1.0,), None, Sense.AT_MOST, "", "-"),
    ],
)
def test_the_median_is_held_against_the_bar(
    runs: tuple[float, ...], bar: float | None, sense: Sense, doubt: str, verdict: str
) -> None:
    """One wild run does not decide; a doubtful figure is neither met nor missed."""
    assert Figure("b", "f", runs, "x", bar, sense, doubt).verdict == verdict


def test_markdown_escapes_what_would_break_the_table() -> None:
    """A pipe in a cell stays in its cell."""
    text = Table("T", ("a", "b"), [["x|y", "1"]], ["note"]).markdown()
    assert "| x\\|y | 1 |" in text
    assert text.endswith("note\n")


def test_plain_values_are_json() -> None:
    """NaN becomes null, dataclasses objects, enums their value."""
    made = plain({"f": Figure("b", "n", (math.nan, 1.0)), 1: (Sense.AT_LEAST, Path("/x/y.png"))})
    assert json.loads(json.dumps(made, allow_nan=False)) == {
        "f": {"benchmark": "b", "name": "n", "runs": [None, 1.0], "unit": "", "bar": None, "sense": "<=", "doubt": ""},
        "1": [">=", "y.png"],
    }


def test_a_run_is_written_as_json_and_markdown(tmp_path: Path) -> None:
    """The document holds every figure with its runs; the Markdown opens with the summary."""
    report = Report("b", [Figure("b", "speed", (1.0, 2.0, 3.0), "x", 2.5)], [Table("Detail", ("k",), [["v"]])])
    markdown = publish(Settings(out=tmp_path), [report], "day", {"cpu": "some"})
    document = json.loads((tmp_path / "day.json").read_text())
    assert document["reports"][0]["figures"][0]["runs"] == [1.0, 2.0, 3.0]
    text = markdown.read_text()
    assert "| b | speed | <= 2.5 | 2 x | 1 to 3 | met |" in text
    assert text.index("### Summary") < text.index("### Detail")
