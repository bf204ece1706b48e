"""The table from errors to status codes, and what travels with a refusal."""

from __future__ import annotations

import inspect
import logging
from urllib.parse import quote

import grpc
import pytest

from service import errors
from service.clock import NS_PER_MS
from service.errors import InvalidRequest, Overloaded, QueueFull, RefusedError, ServiceError
from service.frontend.status import MAX_DETAILS, STATUS, as_service_error, status_of

LEAVES = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, ServiceError) and kind not in (ServiceError, RefusedError)
]

# Where existing clients match on the code, it is Triton's.
EXPECTED = {
    "Unauthenticated": "UNAUTHENTICATED",
    "Forbidden": "PERMISSION_DENIED",
    "AlreadyExists": "ALREADY_EXISTS",
    "NotFound": "NOT_FOUND",
    "DeviceFailed": "UNAVAILABLE",
    "InvalidRequest": "INVALID_ARGUMENT",
    "MessageTooLarge": "RESOURCE_EXHAUSTED",
    "UnsupportedFeature": "UNIMPLEMENTED",
    "UnknownModel": "INVALID_ARGUMENT",
    "UnknownVersion": "NOT_FOUND",
    "ModelNotReady": "UNAVAILABLE",
    "DeadlineUnreachable": "DEADLINE_EXCEEDED",
    "Overloaded": "UNAVAILABLE",
    "QueueFull": "UNAVAILABLE",
    "Draining": "UNAVAILABLE",
    "Expired": "DEADLINE_EXCEEDED",
    "Cancelled": "CANCELLED",
    "SequenceAborted": "ABORTED",
    "ExecutionFailed": "INTERNAL",
    "OutOfMemory": "RESOURCE_EXHAUSTED",
}


def test_every_error_has_its_code() -> None:
    """No error that can be answered is without a line in the table, and each has the code that clients expect."""
    assert {kind.__name__: STATUS[kind].name for kind in LEAVES} == EXPECTED


def test_code_message_and_no_trailers() -> None:
    """An ordinary error has its message and nothing else."""
    assert status_of(InvalidRequest("wrong")) == (grpc.StatusCode.INVALID_ARGUMENT, "wrong", None)


def test_an_error_the_table_does_not_know_is_internal() -> None:
    """The base class stands for the server's own faults."""
    assert status_of(ServiceError("bug"))[0] is grpc.StatusCode.INTERNAL


@pytest.mark.parametrize(
    ("retry_ns", "milliseconds"), [(1, "1"), (NS_PER_MS, "1"), (NS_PER_MS + 1, "2"), (10**9, "1000")]
)
def test_a_refusal_says_when_to_come_back(retry_ns: int, milliseconds: str) -> None:
    """Whole milliseconds, rounded up: never sooner than asked, never 0."""
    assert status_of(Overloaded("later", retry_ns))[2] == (("grpc-retry-pushback-ms", milliseconds),)


def test_no_hint_no_trailer() -> None:
    """A refusal that another try would not help says nothing about trying again."""
    assert status_of(QueueFull("full"))[2] is None


@pytest.mark.parametrize(
    "text", ["a" * 5000, "\u00e9" * 5000, "\U0001f600" * 5000, "\n\0%" * 2000, "a" * 1023 + "\U0001f600"]
)
def test_a_long_message_is_cut_to_what_a_header_holds(text: str) -> None:
    """gRPC percent-encodes the message into a header: what counts is its size there, also for other alphabets."""
    details = status_of(InvalidRequest(text))[1]
    encoded = quote(details, safe="".join(chr(c) for c in range(0x20, 0x7F) if chr(c) != "%"))
    assert len(encoded) <= MAX_DETAILS
    assert len(encoded) > MAX_DETAILS - 16
    assert details.endswith("...")
    assert text.startswith(details[:-3])


@pytest.mark.parametrize("text", ["", "a" * MAX_DETAILS, "zo\u00eb"])
def test_a_message_that_fits_is_left_alone(text: str) -> None:
    """Up to the limit nothing is cut."""
    assert status_of(InvalidRequest(text))[1] == text


def test_text_that_cannot_be_encoded_is_answered_all_the_same() -> None:
    """A lone surrogate (file names can bring one) must not turn an answer into an exception."""
    details = status_of(InvalidRequest("a\udcffb"))[1]
    assert details.encode() == b"a?b"


def test_what_is_no_service_error_is_logged_and_hidden(caplog: pytest.LogCaptureFixture) -> None:
    """The client learns that it was the server's fault and what kind, the log has the traceback."""
    with caplog.at_level(logging.ERROR, "service.frontend.status"):
        error = as_service_error(KeyError("secret"), "serving X")
    assert str(error) == "internal error while serving X: KeyError"
    assert caplog.records[0].exc_info is not None
    assert "secret" not in str(error)


def test_a_service_error_is_passed_on_without_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    """Clients' mistakes are not the server's incidents."""
    error = InvalidRequest("wrong")
    assert as_service_error(error, "serving X") is error
    assert not caplog.records
