"""The one table from domain errors to gRPC status codes, and the one place where an exception becomes an answer.

Codes and message fragments follow Triton where existing clients match on them. A refusal that another replica may
answer is UNAVAILABLE and carries `grpc-retry-pushback-ms` (gRPC A6, client retries) so that retries spread out instead
of storming.
"""

from __future__ import annotations

import logging

import grpc

from service.clock import NS_PER_MS
from service.errors import (
    AlreadyExists,
    Cancelled,
    DeadlineUnreachable,
    DeviceFailed,
    Draining,
    ExecutionFailed,
    Expired,
    Forbidden,
    InvalidRequest,
    MessageTooLarge,
    ModelNotReady,
    NotFound,
    OutOfMemory,
    Overloaded,
    QueueFull,
    RefusedError,
    SequenceAborted,
    ServiceError,
    Unauthenticated,
    UnknownModel,
    UnknownVersion,
    UnsupportedFeature,
)

log = logging.getLogger(__name__)

STATUS: dict[type[ServiceError], grpc.StatusCode] = {
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    Forbidden: grpc.StatusCode.PERMISSION_DENIED,
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    MessageTooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnsupportedFeature: grpc.StatusCode.UNIMPLEMENTED,
    NotFound: grpc.StatusCode.NOT_FOUND,
    AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    UnknownModel: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownVersion: grpc.StatusCode.NOT_FOUND,
    ModelNotReady: grpc.StatusCode.UNAVAILABLE,
    DeadlineUnreachable: grpc.StatusCode.DEADLINE_EXCEEDED,
    Overloaded: grpc.StatusCode.UNAVAILABLE,
    QueueFull: grpc.StatusCode.UNAVAILABLE,
    Draining: grpc.StatusCode.UNAVAILABLE,
    Expired: grpc.StatusCode.DEADLINE_EXCEEDED,
    Cancelled: grpc.StatusCode.CANCELLED,
    SequenceAborted: grpc.StatusCode.ABORTED,
    ExecutionFailed: grpc.StatusCode.INTERNAL,
    OutOfMemory: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeviceFailed: grpc.StatusCode.UNAVAILABLE,
}

# A status message travels percent-encoded in an HTTP/2 header, and peers bound the size of all headers together (gRPC's
# default is 8 KiB, beyond which the client gets RESOURCE_EXHAUSTED instead of the message). Bytes, as encoded.
MAX_DETAILS = 1024
# What percent-encoding makes of one byte that is not printable ASCII.
_ESCAPED = 3

Trailers = tuple[tuple[str, str], ...]


def status_of(error: ServiceError) -> tuple[grpc.StatusCode, str, Trailers | None]:
    """The status code, the message and the trailing metadata that answer `error`."""
    code = STATUS.get(type(error), grpc.StatusCode.INTERNAL)
    details = str(error)
    if len(details) * _ESCAPED > MAX_DETAILS or not details.isascii():
        details = _shortened(details)
    if isinstance(error, RefusedError) and error.retry_after_ns > 0:
        milliseconds = max(1, -(-error.retry_after_ns // NS_PER_MS))
        return code, details, (("grpc-retry-pushback-ms", str(milliseconds)),)
    return code, details, None


def _shortened(details: str) -> str:
    """`details` as text that can be encoded, cut to `MAX_DETAILS` bytes of a header. Characters stay whole."""
    text = details.encode(errors="replace").decode()
    size = 0
    kept = 0  # characters that leave room for the dots
    for index, character in enumerate(text):
        plain = " " <= character <= "~" and character != "%"
        size += 1 if plain else _ESCAPED * len(character.encode())
        if size > MAX_DETAILS:
            return text[:kept] + "..."
        if size <= MAX_DETAILS - 3:
            kept = index + 1
    return text


def as_service_error(error: Exception, doing: str) -> ServiceError:
    """Turn what escaped a handler into an answer: a `ServiceError` as it is, anything else logged as the bug it is."""
    if isinstance(error, ServiceError):
        return error
    log.error("unexpected error while %s", doing, exc_info=error)
    return ServiceError(f"internal error while {doing}: {type(error).__name__}")
