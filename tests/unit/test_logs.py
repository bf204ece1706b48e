"""Logs: fields, formats, levels, and the limiter of repeated incidents."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from service import logs
from service.clock import NS_PER_S


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before, level = list(root.handlers), logging.getLogger(logs.ROOT).level
    yield io.StringIO()
    root.handlers[:] = before
    logging.getLogger(logs.ROOT).setLevel(level)


def test_a_json_line_has_its_fields_first_and_the_extra_ones_after(stream: io.StringIO) -> None:
    """ts, level, logger, message, then what the caller passed."""
    logs.configure("info", "json", stream)
    logging.getLogger("service.model").warning("loading %s failed", "digits", extra={"model": "digits", "version": 1})
    line = json.loads(stream.getvalue())
    assert list(line) == ["ts", "level", "logger", "message", "model", "version"]
    assert line["level"] == "warning"
    assert line["logger"] == "service.model"
    assert line["message"] == "loading digits failed"
    assert line["version"] == 1


def test_an_extra_field_never_replaces_one_of_the_line_itself(stream: io.StringIO) -> None:
    """`level` of the caller is printed as `level_`."""
    logs.configure("info", "json", stream)
    logging.getLogger("service.x").info("m", extra={"level": "mine", "ts": "mine"})
    line = json.loads(stream.getvalue())
    assert line["level"] == "info"
    assert line["level_"] == "mine"
    assert line["ts_"] == "mine"


def test_timestamps_are_rfc3339_in_utc_with_milliseconds() -> None:
    """Even at a whole second."""
    assert logs.timestamp(0.0) == "1970-01-01T00:00:00.000Z"
    assert logs.timestamp(1_700_000_000.1239) == "2023-11-14T22:13:20.123Z"


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_a_message_with_line_breaks_stays_on_one_line(stream: io.StringIO, log_format: logs.LogFormat) -> None:
    """A client cannot forge a log line by sending a line break."""
    logs.configure("info", log_format, stream)
    logging.getLogger("service.x").info("one\ntwo", extra={"model": "a\nb"})
    assert stream.getvalue().count("\n") == 1


def test_an_exception_is_in_the_line(stream: io.StringIO) -> None:
    """The traceback is a field of the JSON line."""
    logs.configure("info", "json", stream)
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("service.x").exception("it failed")
    line = json.loads(stream.getvalue())
    assert "ValueError: broken" in line["exception"]


def test_a_value_json_does_not_know_is_written_as_text(stream: io.StringIO) -> None:
    """Logging never fails for the type of a field."""
    logs.configure("info", "json", stream)
    logging.getLogger("service.x").info("m", extra={"error": ValueError("e"), "shape": (1, 2)})
    line = json.loads(stream.getvalue())
    assert line["error"] == "e"
    assert line["shape"] == [1, 2]


def test_text_quotes_what_could_be_misread(stream: io.StringIO) -> None:
    """A value with a blank or an equals sign is quoted, an empty one too."""
    logs.configure("info", "text", stream)
    logging.getLogger("service.x").info("m", extra={"a": "plain", "b": "two words", "c": "x=y", "d": ""})
    assert stream.getvalue().rstrip().endswith('INFO    service.x: m a=plain b="two words" c="x=y" d=""')


def test_lines_below_the_level_are_not_written(stream: io.StringIO) -> None:
    """And the check that hot callers make says so."""
    log = logging.getLogger("service.frontend")
    logs.configure("info", "json", stream)
    log.debug("request")
    assert stream.getvalue() == ""
    assert not log.isEnabledFor(logging.DEBUG)
    logs.configure("debug", "json", stream)
    log.debug("request", extra={"outcome": "ok"})
    assert json.loads(stream.getvalue())["outcome"] == "ok"


def test_configuring_twice_does_not_write_twice(stream: io.StringIO) -> None:
    """The second call replaces the first."""
    logs.configure("info", "json", io.StringIO())
    logs.configure("info", "text", stream)
    logging.getLogger("service.x").info("once")
    assert stream.getvalue().count("once") == 1


def test_the_limiter_lets_one_through_per_interval_and_says_what_it_held_back() -> None:
    """The count covers exactly the lines held back since the last one."""
    limiter = logs.IncidentLimiter(interval_ns=NS_PER_S)
    answers = [limiter.allow("k", at * NS_PER_S // 10) for at in (0, 1, 9, 10, 11, 25)]
    assert answers == [0, None, None, 2, None, 1]


def test_the_limiter_keeps_keys_apart() -> None:
    """A flood of one incident does not hide another."""
    limiter = logs.IncidentLimiter(interval_ns=NS_PER_S)
    assert limiter.allow(("m", "overloaded"), 0) == 0
    assert limiter.allow(("m", "execution"), 0) == 0
    assert limiter.allow(("m", "overloaded"), 1) is None


def test_the_limiter_remembers_a_bounded_number_of_keys() -> None:
    """A new key beyond the bound takes the place of the oldest."""
    limiter = logs.IncidentLimiter(interval_ns=NS_PER_S, max_keys=2)
    for key in "abc":
        assert limiter.allow(key, 0) == 0
    assert limiter.allow("c", 1) is None
    assert limiter.allow("b", 1) is None
    assert limiter.allow("a", 1) == 0


def test_lines_go_to_what_stderr_is_at_that_moment(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """A progress bar replaces sys.stderr while it is shown, and log lines have to follow."""
    logs.configure("info", "text")
    monkeypatch.setattr("sys.stderr", stream)
    logging.getLogger("service.x").info("after the bar appeared")
    assert "after the bar appeared" in stream.getvalue()
