"""The server's page, read into the few numbers that are drawn."""

from __future__ import annotations

import pytest

from loadtests.scrape import Scraper, parse

PAGE = """\
# TYPE nv_inference_request_success counter
nv_inference_request_success{model="a",version="1"} 10
nv_inference_request_success{model="b",version="1"} 5
# TYPE nv_inference_exec_count counter
nv_inference_exec_count{model="a",version="1"} 4
# TYPE process_resident_memory_bytes gauge
process_resident_memory_bytes 1048576.0
"""


def test_a_page() -> None:
    """Sums over models; what is not there is left out."""
    assert parse(PAGE) == {"requests": 15.0, "batches": 4.0, "memory_bytes": 1048576.0}


def test_garbage() -> None:
    """Is refused, not guessed at."""
    with pytest.raises(ValueError, match="could not convert"):
        parse("x {{{")


def test_a_page_that_is_not_there_is_counted() -> None:
    """And is no reason to stop."""
    scraper = Scraper("http://127.0.0.1:1/metrics")
    scraper.start(0)
    assert scraper.stop() == []
    assert scraper.failures >= 1


def test_no_page() -> None:
    """Nothing is read when nothing is asked for."""
    scraper = Scraper(None)
    scraper.start(0)
    assert scraper.stop() == []
    assert scraper.failures == 0
