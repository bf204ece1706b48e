"""`LogSettings` and `TraceSetting`: what can be changed, and what is refused with which words."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service import logs
from service.errors import InvalidRequest, ModelNotReady, ServiceError, UnknownModel, UnsupportedFeature
from service.frontend.admin import Admin
from service.logs import LogControl
from service.pb import grpc_service_pb2 as pb
from service.tracing import Tracer


class Repository:
    """Knows `m`, which is ready, and `broken`, which is not."""

    def is_ready(self, name: str, _version: str) -> bool:
        if name == "broken":
            return False
        if name != "m":
            raise UnknownModel(f"Request for unknown model: '{name}' is not found")
        return True


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before, level = list(root.handlers), logging.getLogger(logs.ROOT).level
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    yield stream
    root.handlers[:] = before
    logging.getLogger(logs.ROOT).setLevel(level)


def make_admin(tracer: Tracer) -> Admin:
    repository: Any = Repository()
    return Admin(repository, tracer, LogControl("info", "json"))


@pytest.fixture
def admin(tmp_path: Path) -> Iterator[Admin]:
    tracer = Tracer(tmp_path / "trace.json")
    yield make_admin(tracer)
    tracer.close(5)


def change_logs(admin: Admin, **values: Any) -> dict[str, Any]:
    request = pb.LogSettingsRequest()
    for name, value in values.items():
        kind = {bool: "bool_param", int: "uint32_param", str: "string_param"}[type(value)]
        setattr(request.settings[name], kind, value)
    answer = admin.log_settings(request)
    return {name: getattr(v, v.WhichOneof("parameter_choice")) for name, v in answer.settings.items()}


def change_traces(admin: Admin, model: str = "", **values: list[str]) -> dict[str, list[str]]:
    request = pb.TraceSettingRequest(model_name=model)
    for name, value in values.items():
        request.settings[name].value.extend(value)
        request.settings[name].SetInParent()
    return {name: list(v.value) for name, v in admin.trace_setting(request).settings.items()}


STARTED = {
    "log_file": "",
    "log_info": True,
    "log_warning": True,
    "log_error": True,
    "log_verbose_level": 0,
    "log_format": "default",
}


def test_log_settings_are_read(admin: Admin) -> None:
    """An empty request changes nothing."""
    assert change_logs(admin) == STARTED


def test_severities_are_switched_one_by_one(admin: Admin, stream: io.StringIO) -> None:
    """Errors off and warnings on is possible; debug is the verbose level."""
    log = logging.getLogger("service.x")
    assert change_logs(admin, log_info=False, log_error=False) == {**STARTED, "log_info": False, "log_error": False}
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        log.log(level, "line %d", level)
    assert [line for line in stream.getvalue().splitlines() if "line" in line] == [
        line for line in stream.getvalue().splitlines() if '"line 30"' in line
    ]
    assert '"line 30"' in stream.getvalue()
    change_logs(admin, log_verbose_level=1)
    log.debug("deep")
    assert '"deep"' in stream.getvalue()
    change_logs(admin, log_verbose_level=0, log_warning=False)
    assert not log.isEnabledFor(logging.ERROR)


def test_the_format_changes_and_goes_back(admin: Admin, stream: io.StringIO) -> None:
    """`default` is what the server was started with."""
    log = logging.getLogger("service.x")
    assert change_logs(admin, log_format="ISO8601")["log_format"] == "ISO8601"
    log.warning("as text")
    assert stream.getvalue().rstrip().endswith("WARNING service.x: as text")
    change_logs(admin, log_format="default")
    log.warning("as json")
    assert '"message": "as json"' in stream.getvalue()


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"log_file": "/etc/passwd"}, UnsupportedFeature, "log file location can not be updated"),
        ({"log_info": "yes"}, InvalidRequest, "expect boolean for 'log_info'"),
        ({"log_verbose_level": True}, InvalidRequest, "expect unsigned int32 for 'log_verbose_level'"),
        ({"log_format": 1}, InvalidRequest, "expect string for 'log_format'"),
        ({"log_format": "xml"}, InvalidRequest, "invalid argument for log_format, got: xml"),
        ({"log_colour": "red"}, InvalidRequest, "unknown log setting 'log_colour'"),
    ],
)
def test_wrong_log_settings(admin: Admin, values: dict[str, Any], error: type[ServiceError], words: str) -> None:
    """Nothing of a request that is wrong in one setting is done."""
    with pytest.raises(error, match=words):
        change_logs(admin, log_warning=False, **values)
    assert change_logs(admin) == STARTED


def test_trace_settings_are_read_and_changed(admin: Admin, tmp_path: Path) -> None:
    """Per server and per model; cleared ones fall back."""
    started = {
        "trace_file": [str(tmp_path / "trace.json")],
        "trace_level": ["OFF"],
        "trace_rate": ["1000"],
        "trace_count": ["-1"],
        "log_frequency": ["0"],
        "trace_mode": ["triton"],
    }
    assert change_traces(admin) == started
    changed = {**started, "trace_level": ["TIMESTAMPS"], "trace_rate": ["5"], "trace_count": ["-1"]}
    assert change_traces(admin, "m", trace_level=["TIMESTAMPS"], trace_rate=["5"], trace_count=["-1"]) == changed
    assert change_traces(admin, "m") == changed
    assert change_traces(admin) == started
    assert change_traces(admin, "m", trace_level=[], trace_rate=[], trace_count=[]) == started
    assert change_traces(admin, "broken") == started


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda a: change_traces(a, "nobody"), UnknownModel, "'nobody'"),
        (lambda a: change_traces(a, trace_file=["x"]), UnsupportedFeature, "trace file location can not be updated"),
        (lambda a: change_traces(a, trace_mode=["opentelemetry"]), UnsupportedFeature, "trace mode"),
        (lambda a: change_traces(a, trace_level=["TENSORS"]), UnsupportedFeature, "TENSORS"),
        (lambda a: change_traces(a, trace_level=["MAX"]), InvalidRequest, "unknown trace level 'MAX'"),
        (lambda a: change_traces(a, trace_level=["OFF", "TIMESTAMPS"]), InvalidRequest, "OFF cannot be combined"),
        (lambda a: change_traces(a, trace_rate=["0"]), InvalidRequest, "Unable to parse 'trace_rate', got: 0"),
        (lambda a: change_traces(a, trace_rate=["1", "2"]), InvalidRequest, "expect only 1 value for 'trace_rate'"),
        (lambda a: change_traces(a, trace_count=["-2"]), InvalidRequest, "Unable to parse 'trace_count'"),
        (lambda a: change_traces(a, trace_count=["9" * 30]), InvalidRequest, "Unable to parse 'trace_count'"),
        (lambda a: change_traces(a, log_frequency=["x"]), InvalidRequest, "Unable to parse 'log_frequency'"),
        (lambda a: change_traces(a, trace_colour=["x"]), InvalidRequest, "unknown trace setting"),
    ],
)
def test_wrong_trace_settings(admin: Admin, act: Callable[[Admin], Any], error: type[ServiceError], words: str) -> None:
    """Each with what was expected; nothing is changed."""
    before = change_traces(admin)
    with pytest.raises(error, match=words):
        act(admin)
    assert change_traces(admin) == before


def test_a_server_without_a_trace_file_says_so() -> None:
    """Reading works, switching on does not; that is what clients are told by servers without tracing."""
    admin = make_admin(Tracer(None))
    assert change_traces(admin)["trace_file"] == [""]
    with pytest.raises(ModelNotReady, match="does not support trace"):
        change_traces(admin, trace_level=["TIMESTAMPS"])
