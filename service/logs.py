"""Logs: one JSON object per line on stderr, or the same as text for people.

Fields of a line: `ts` (RFC 3339, UTC, milliseconds), `level`, `logger`, `message`, then whatever the caller passed in
`extra`. One line per request at debug, incidents at warning; what can repeat thousands of times a second goes through
an `IncidentLimiter`. Logging that is off costs one check (`log.isEnabledFor`), which hot callers make themselves.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, TextIO

from service.clock import NS_PER_S

LogFormat = Literal["json", "text"]
LEVELS: dict[str, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

# The logger above all of ours: loggers are named after modules.
ROOT = "service"

# What a LogRecord has by itself: everything else in it came from `extra`.
_OWN_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
# Names of a line's own fields: an extra field of the same name is printed with an underscore after it.
_OWN_FIELDS = frozenset({"ts", "level", "logger", "message", "exception"})


def configure(level: str, log_format: LogFormat, stream: TextIO | None = None) -> None:
    """Send the project's logs to `stream` (stderr by default), from `level` (a key of LEVELS) upward.

    Calling it again replaces what an earlier call set up. Other libraries' warnings come out in the same format.
    """
    handler = _StderrHandler() if stream is None else logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h.formatter, JsonFormatter | TextFormatter)]:
        root.removeHandler(old)
    root.addHandler(handler)
    logging.getLogger(ROOT).setLevel(LEVELS[level])


@dataclass(frozen=True, slots=True)
class LogSettings:
    """What is logged, as the protocol lets it be changed while the server runs: each severity by itself; `verbose` > 0
    adds the lines of debug. `log_format`: json, text, ISO8601 (the same) or default (as the server was started)."""

    info: bool = True
    warning: bool = True
    error: bool = True
    verbose: int = 0
    log_format: str = "default"


class LogControl:
    """Changes what is logged after `configure`. Used by one thread at a time."""

    def __init__(self, level: str, log_format: LogFormat) -> None:
        number = LEVELS[level]
        self._started_with = log_format
        self.settings = LogSettings(
            number <= logging.INFO, number <= logging.WARNING, number <= logging.ERROR, int(number <= logging.DEBUG)
        )

    def apply(self, settings: LogSettings) -> None:
        """Log by `settings` from now on."""
        self.settings = settings
        stated = self._started_with if settings.log_format == "default" else settings.log_format
        formatter = JsonFormatter() if stated == "json" else TextFormatter()
        shown = {
            logging.DEBUG: settings.verbose > 0,
            logging.INFO: settings.info,
            logging.WARNING: settings.warning,
            logging.ERROR: settings.error,
            logging.CRITICAL: settings.error,
        }
        for handler in logging.getLogger().handlers:
            if isinstance(handler.formatter, JsonFormatter | TextFormatter):
                handler.setFormatter(formatter)
                for old in [f for f in handler.filters if isinstance(f, _Severities)]:
                    handler.removeFilter(old)
                handler.addFilter(_Severities(shown))
        # Hot callers ask the logger, not the handler, whether a line is worth making.
        least = min((level for level, on in shown.items() if on), default=logging.CRITICAL + 1)
        logging.getLogger(ROOT).setLevel(least)


class _Severities(logging.Filter):
    """Lets the records of chosen severities through."""

    def __init__(self, shown: dict[int, bool]) -> None:
        super().__init__()
        self._shown = shown

    def filter(self, record: logging.LogRecord) -> bool:
        return self._shown.get(record.levelno, True)


class JsonFormatter(logging.Formatter):
    """One JSON object per record, always a single line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "ts": timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update(extra_fields(record))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """`ts LEVEL logger: message key=value ...`; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {key}={_text_value(value)}" for key, value in extra_fields(record).items())
        message = record.getMessage().replace("\n", "\\n")
        line = f"{timestamp(record.created)} {record.levelname:<7} {record.name}: {message}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at that moment: a progress bar puts itself in between to stay below the lines."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def timestamp(epoch_s: float) -> str:
    """Seconds since the epoch as RFC 3339 with milliseconds: `2025-01-31T12:00:00.123Z`."""
    return datetime.fromtimestamp(epoch_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def extra_fields(record: logging.LogRecord) -> dict[str, object]:
    """What the caller passed in `extra`, in its order."""
    return {
        f"{key}_" if key in _OWN_FIELDS else key: value
        for key, value in vars(record).items()
        if key not in _OWN_ATTRIBUTES
    }


class IncidentLimiter:
    """Lets one line per key through in each interval, and counts what it held back. Told the time; not thread-safe.

    A key is whatever makes two incidents the same (model and reason, say). At most `max_keys` are remembered: the one
    that was let through longest ago is forgotten for a new one, which at worst lets a line too many through.
    """

    def __init__(self, interval_ns: int = 10 * NS_PER_S, max_keys: int = 1024) -> None:
        self._interval_ns = interval_ns
        self._max_keys = max_keys
        # key -> (when let through, held back since); oldest first
        self._seen: dict[object, tuple[int, int]] = {}

    def allow(self, key: object, now_ns: int) -> int | None:
        """None: hold this one back. Otherwise log it, with how many were held back since the last one (0 = none)."""
        before = self._seen.get(key)
        if before is not None:
            allowed_ns, held_back = before
            if now_ns - allowed_ns < self._interval_ns:
                self._seen[key] = (allowed_ns, held_back + 1)
                return None
            del self._seen[key]
        elif len(self._seen) >= self._max_keys:
            del self._seen[next(iter(self._seen))]
        self._seen[key] = (now_ns, 0)
        return before[1] if before is not None else 0


def _text_value(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or any(c.isspace() or c in '="' for c in text) else text
