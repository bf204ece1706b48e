"""Progress of loading: log lines without a terminal, a bar with one."""

from __future__ import annotations

import io
import logging

import pytest

from service.cli.progress import BarProgress, LogProgress, load_progress
from service.clock import NS_PER_S


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_the_kind_follows_the_stream() -> None:
    """A bar in a log file would be rubbish."""
    assert isinstance(load_progress(io.StringIO()), LogProgress)
    assert isinstance(load_progress(Terminal()), BarProgress)


def test_log_lines_are_few_however_many_models_there_are(caplog: pytest.LogCaptureFixture) -> None:
    """One at the start and one every five seconds: 100 models in 12.5 s make two of them."""
    caplog.set_level(logging.INFO, "service")
    now = [0]
    progress = LogProgress(clock=lambda: now[0])
    progress.started(100)
    for index in range(100):
        now[0] = index * NS_PER_S // 8
        progress.loaded(f"m{index}", "1", 0.125)
    progress.finished()
    assert [record.getMessage() for record in caplog.records] == ["loading models"] + 2 * ["still loading models"]
    assert vars(caplog.records[1])["done"] == 41
    assert vars(caplog.records[1])["model"] == "m40"


def test_a_model_that_failed_is_always_logged(caplog: pytest.LogCaptureFixture) -> None:
    """With its reason, at error."""
    progress = LogProgress()
    progress.started(1)
    progress.failed("m", "2", "no such file")
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert (vars(record)["model"], vars(record)["version"], vars(record)["reason"]) == ("m", "2", "no such file")


def test_the_bar_ends_with_a_summary_and_keeps_failures() -> None:
    """Reasons are printed as they are, whatever brackets they hold."""
    stream = Terminal()
    progress = BarProgress(stream)
    progress.started(3)
    progress.loaded("a", "1", 0.5)
    progress.failed("b", "1", "shape [-1,3] is [red]wrong[/red]")
    progress.loaded("c", "1", 0.5)
    progress.finished()
    plain = stream.getvalue()
    assert "not loaded: b version 1: shape [-1,3] is [red]wrong[/red]" in plain
    assert "loaded 2 of 3 models in " in plain.splitlines()[-1]
    progress.finished()
