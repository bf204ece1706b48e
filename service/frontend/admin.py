"""`LogSettings` and `TraceSetting`: what is logged and traced, read and changed while the server runs.

Names, values and messages are Triton's. Where files are written cannot be changed over the network: whoever can reach
the port would choose what the server overwrites.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

from service.errors import InvalidRequest, ModelNotReady, UnsupportedFeature
from service.logs import LogControl, LogSettings
from service.pb import grpc_service_pb2 as pb
from service.repository.repository import ModelRepository
from service.tracing import UNLIMITED, TraceOverrides, Tracer, TraceSettings

LOG_FORMATS = ("default", "ISO8601", "json", "text")
_LOG_SWITCHES = {"log_info": "info", "log_warning": "warning", "log_error": "error"}
# A trace's number and its settings are 64-bit integers in the protocol's other implementations.
_MAX_SETTING = 2**63 - 1
_TRACE_NUMBERS = {"trace_rate": ("rate", 1), "trace_count": ("count", UNLIMITED), "log_frequency": ("log_frequency", 0)}


class Admin:
    """Answers the two RPCs. Any thread."""

    def __init__(self, repository: ModelRepository, tracer: Tracer, logs: LogControl) -> None:
        self._repository = repository
        self._tracer = tracer
        self._logs = logs
        self._lock = threading.Lock()

    def log_settings(self, request: Any) -> Any:
        """All settings, after the changes asked for. Either all changes are made or none."""
        with self._lock:
            if request.settings:
                self._logs.apply(_changed(self._logs.settings, request.settings))
            now = self._logs.settings
        response = pb.LogSettingsResponse()
        response.settings["log_file"].string_param = ""
        for name, field in _LOG_SWITCHES.items():
            response.settings[name].bool_param = getattr(now, field)
        response.settings["log_verbose_level"].uint32_param = now.verbose
        response.settings["log_format"].string_param = now.log_format
        return response

    def trace_setting(self, request: Any) -> Any:
        """The settings of a model, or of the whole server, after the changes asked for."""
        name = request.model_name
        if name:
            self._must_be_known(name)
        if request.settings:
            cleared, overrides = _trace_changes(request.settings)
            if self._tracer.path is None and overrides.timestamps:
                raise ModelNotReady("the server does not support trace: start it with --trace-file")
            try:
                now = self._tracer.change(name, cleared, overrides)
            except ValueError as error:
                raise InvalidRequest(str(error)) from None
        else:
            now = self._tracer.settings(name)
        return _trace_response(now, self._tracer)

    def _must_be_known(self, name: str) -> None:
        try:
            self._repository.is_ready(name, "")
        except ModelNotReady:
            return


def _changed(settings: LogSettings, wanted: Any) -> LogSettings:
    for name in sorted(wanted):
        value = wanted[name]
        kind = value.WhichOneof("parameter_choice")
        if name == "log_file":
            raise UnsupportedFeature("log file location can not be updated through network protocol")
        if name in _LOG_SWITCHES:
            _expect(name, kind, "bool_param", "boolean")
            settings = replace(settings, **{_LOG_SWITCHES[name]: value.bool_param})
        elif name == "log_verbose_level":
            _expect(name, kind, "uint32_param", "unsigned int32")
            settings = replace(settings, verbose=value.uint32_param)
        elif name == "log_format":
            _expect(name, kind, "string_param", "string")
            if value.string_param not in LOG_FORMATS:
                raise InvalidRequest(
                    f"invalid argument for log_format, got: {value.string_param[:40]}; expected one of "
                    f"{', '.join(LOG_FORMATS)}"
                )
            settings = replace(settings, log_format=value.string_param)
        else:
            raise InvalidRequest(f"unknown log setting '{name[:40]}'")
    return settings


def _expect(name: str, kind: str | None, wanted: str, words: str) -> None:
    if kind != wanted:
        raise InvalidRequest(f"expect {words} for '{name}'")


def _trace_changes(wanted: Any) -> tuple[list[str], TraceOverrides]:
    """What to put back, and what to set."""
    cleared: list[str] = []
    stated: dict[str, Any] = {}
    for name in sorted(wanted):
        values = list(wanted[name].value)
        if name == "trace_file":
            raise UnsupportedFeature("trace file location can not be updated through network protocol")
        if name == "trace_mode":
            raise UnsupportedFeature("trace mode can not be updated: it is 'triton'")
        if name == "trace_level":
            if values:
                stated["timestamps"] = _levels(values)
            else:
                cleared.append("timestamps")
        elif name in _TRACE_NUMBERS:
            field, least = _TRACE_NUMBERS[name]
            if values:
                stated[field] = _number(name, values, least)
            else:
                cleared.append(field)
        else:
            raise InvalidRequest(f"unknown trace setting '{name[:40]}'")
    return cleared, TraceOverrides(**stated)


def _levels(values: list[str]) -> bool:
    if "TENSORS" in values:
        raise UnsupportedFeature("trace level TENSORS is not supported; TIMESTAMPS is")
    for value in values:
        if value not in ("OFF", "TIMESTAMPS"):
            raise InvalidRequest(f"unknown trace level '{value[:40]}'; expected OFF or TIMESTAMPS")
    if "OFF" in values and len(values) > 1:
        raise InvalidRequest("trace level OFF cannot be combined with others")
    return values != ["OFF"]


def _number(name: str, values: list[str], least: int) -> int:
    if len(values) > 1:
        raise InvalidRequest(f"expect only 1 value for '{name}'")
    text = values[0]
    digits = text.removeprefix("-")
    if not digits.isascii() or not digits.isdigit() or len(digits) > 19 or not least <= int(text) <= _MAX_SETTING:
        raise InvalidRequest(f"Unable to parse '{name}', got: {text[:40]}; expected an integer, {least} or more")
    return int(text)


def _trace_response(now: TraceSettings, tracer: Tracer) -> Any:
    response = pb.TraceSettingResponse()
    values = {
        "trace_file": "" if tracer.path is None else str(tracer.path),
        "trace_level": "TIMESTAMPS" if now.timestamps else "OFF",
        "trace_rate": str(now.rate),
        "trace_count": str(now.count),
        "log_frequency": str(now.log_frequency),
        "trace_mode": "triton",
    }
    for name, value in values.items():
        response.settings[name].value.append(value)
    return response
