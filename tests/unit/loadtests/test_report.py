"""What people read of a run: one page that needs nothing else."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from loadtests import compare, report
from loadtests.scrape import Scrape
from loadtests.stats import Interval, analyse
from loadtests.sweep import Point, Sweep, as_json, from_json, page_of
from loadtests.verdict import Verdict
from tests.unit.loadtests.runs import records, run_of, steady

VERDICTS = [Verdict("all", "p99", "<= 50 ms", "20 ms", True), Verdict("all", "goodput", ">= 200 /s", "100 /s", False)]


class Page(HTMLParser):
    """Elements that are opened are closed in order; what is fetched from elsewhere is in `outside`."""

    VOID = frozenset({"meta", "link", "br", "img", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.outside: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.stack.append(tag)
        for name, value in attrs:
            if name in ("src", "href") and value and not value.startswith("#"):
                self.outside.append(value)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def scrapes() -> list[Scrape]:
    names = ("cpu_s", "requests", "rows", "batches", "queue_us", "memory_bytes")
    return [Scrape(float(t), {name: 10.0 * t * (i + 1) for i, name in enumerate(names)}) for t in range(10)]


def test_a_page_is_whole_and_alone() -> None:
    """Well-formed, with nothing fetched from anywhere, and texts are texts."""
    run = run_of(steady(), scrapes=scrapes())
    text = report.html(report.page_of(run, analyse(run), VERDICTS))
    page = Page(text)
    assert page.stack == []
    assert page.outside == []
    assert "<script" not in text
    assert "Made by hand &amp; &lt;checked&gt;." in text
    for svg in text.split("<svg")[1:]:
        ET.fromstring("<svg" + svg[: svg.index("</svg>") + 6])
    assert text.count("<svg") >= 5
    assert 'content="width=device-width' in text


def test_the_banner_says_what_came_of_it() -> None:
    """Failed with what was missed; void with why; done where nothing was asked."""
    run = run_of(steady())
    analysis = analyse(run)
    assert "Failed: 1 of 2" in report.html(report.page_of(run, analysis, VERDICTS))
    assert "goodput is 100 /s, bound &gt;= 200 /s" in report.html(report.page_of(run, analysis, VERDICTS))
    assert "Passed: all 1" in report.html(report.page_of(run, analysis, VERDICTS[:1]))
    assert report.state(analysis, []) == "done"
    analysis.void.append("the client was late")
    assert "Void" in report.html(report.page_of(run, analysis, VERDICTS))


def test_json_and_markdown_say_the_same() -> None:
    """For programs and for pull requests."""
    run = run_of(records([(1, 0, 1.0), (2, 13, 1.0), (3, 14, 1.0)]))
    run.info.messages = {"13": ["it | broke"]}
    analysis = analyse(run)
    document = json.loads(report.as_json(run, analysis, VERDICTS))
    assert document["state"] == "fail"
    assert document["analysis"]["total"]["outcomes"]["in_slo"] == 1
    text = report.markdown(run, analysis, VERDICTS)
    assert "| all | 3 | 1 | 0 | 1 | 0 | 0 | 0 | 1 |" in text
    assert "it \\| broke" in text


@pytest.mark.parametrize("made", [records([]), records([(1, 14, 1.0)]), records([(1, 0, 1.0)])])
def test_a_page_of_next_to_nothing(made: object) -> None:
    """No answer, or one: still a page."""
    run = run_of(made)  # type: ignore[arg-type]
    assert "Every request accounted for" in report.html(report.page_of(run, analyse(run), []))


def test_comparing_a_run_with_itself_shows_no_difference() -> None:
    """And with a slower one it does."""
    a, b = run_of(steady()), run_of(steady(latency_ms=12.0, seed=1))
    assert {d.verdict for d in compare.differences(a, a)} == {"no difference"}
    verdicts = {d.figure: d.verdict for d in compare.differences(a, b)}
    assert verdicts["p50, ms"] == "worse"
    assert {d.figure: d.verdict for d in compare.differences(b, a)}["p50, ms"] == "better"
    text = report.html(compare.page_of(a, b, ("before", "after")))
    assert Page(text).stack == []
    assert "before" in text
    assert "same plan" in text


def sweep_of(goodputs: list[float], server: str = "a 1") -> Sweep:
    shares = {"in time": 0.9, "late": 0.0, "refused": 0.1, "expired": 0.0, "error": 0.0}
    points = [
        Point(load, 100 * load, Interval(good, good - 1, good + 1), 110.0, 105.0, shares, 5.0, 20.0, 1.0)
        for load, good in zip((0.5, 1.0, 2.0), goodputs, strict=True)
    ]
    return Sweep("s", "x:1", server, "2026-01-01T00:00:00+00:00", 0.05, 100.0, {1: 5.0, 8: 9.0}, points)


def test_a_sweep_says_whether_goodput_holds() -> None:
    """Falling by a tenth below its own best is a failure, to be seen at once."""
    assert "Goodput holds" in report.html(page_of(sweep_of([50, 95, 94])))
    fallen = report.html(page_of(sweep_of([50, 95, 60])))
    assert "at 2x only 63% of the goodput at a lower load" in fallen
    both = report.html(page_of(sweep_of([50, 95, 94]), [sweep_of([50, 90, 20], "b 2")]))
    assert "b 2" in both
    assert Page(both).stack == []


def test_a_sweep_is_read_again(tmp_path: object) -> None:
    """To be drawn beside another."""
    path = tmp_path / "s.json"  # type: ignore[operator]
    path.write_text(as_json(sweep_of([1, 2, 3])))
    assert from_json(path) == sweep_of([1, 2, 3])
