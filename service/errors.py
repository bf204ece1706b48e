"""Every way a request or a model can fail, and whose fault it is.

A request passes six steps; each raises only its own errors:

    identify   Unauthenticated, Forbidden                    the caller may not
    decode     InvalidRequest, MessageTooLarge,              the client's message is wrong
               UnsupportedFeature, NotFound, AlreadyExists
    look up    UnknownModel, UnknownVersion, ModelNotReady   the name is wrong, or not ready yet
    admit      DeadlineUnreachable, Overloaded, QueueFull,   the promise cannot be kept
               Draining
    wait       Expired, Cancelled                            the promise can no longer be kept
               SequenceAborted                               a step before it was not run
    run        ExecutionFailed, OutOfMemory, DeviceFailed    the model or the device failed

Loading a model raises `ModelLoadError`, or `ConfigError` when the model's configuration is at fault. The errors know
nothing of gRPC: `service/frontend/status.py` maps each class to a status code, in one table.

`reason` is a short constant word per class: it labels metrics and log lines.
"""

from __future__ import annotations

from typing import ClassVar


class ServiceError(Exception):
    """Base of every error that is answered to a client. `str(error)` is the message sent."""

    reason: ClassVar[str] = "internal"


class Unauthenticated(ServiceError):
    """The call shows no API key where one is needed, or one that is not known."""

    reason = "unauthenticated"


class Forbidden(ServiceError):
    """The caller is known, and may not do this."""

    reason = "forbidden"


class InvalidRequest(ServiceError):
    """The request itself is wrong: a tensor, shape, datatype, parameter or encoding."""

    reason = "invalid"


class MessageTooLarge(InvalidRequest):
    """The message is larger than the server takes, compressed or not."""


class UnsupportedFeature(ServiceError):
    """The request asks for something this server does not do."""

    reason = "unsupported"


class NotFound(ServiceError):
    """What the request points to (a region of shared memory) is not there."""

    reason = "not_found"


class AlreadyExists(ServiceError):
    """A name that is to be registered is taken."""

    reason = "already_exists"


class UnknownModel(ServiceError):
    """No model of that name is in the repository."""

    reason = "unknown_model"


class UnknownVersion(ServiceError):
    """The model exists, but not in that version."""

    reason = "unknown_version"


class ModelNotReady(ServiceError):
    """The model is known but not able to answer: loading, unloading or failed to load."""

    reason = "not_ready"


class RefusedError(ServiceError):
    """Refused to keep the promise made to others. `retry_after_ns` > 0 hints when another try may succeed."""

    reason = "refused"

    def __init__(self, message: str, retry_after_ns: int = 0) -> None:
        super().__init__(message)
        self.retry_after_ns = retry_after_ns


class DeadlineUnreachable(RefusedError):
    """The deadline could not be met even by an idle server; trying again is useless."""

    reason = "unreachable"


class Overloaded(RefusedError):
    """The deadline cannot be met behind the present queue; another replica may answer."""

    reason = "overloaded"


class QueueFull(RefusedError):
    """A bound of the queue is reached."""

    reason = "queue_full"


class Draining(RefusedError):
    """The server or the model is shutting down and accepts nothing new."""

    reason = "draining"


class Expired(ServiceError):
    """The deadline passed while the request waited."""

    reason = "expired"


class Cancelled(ServiceError):
    """The client went away or cancelled."""

    reason = "cancelled"


class SequenceAborted(ServiceError):
    """The step before it of the same sequence was not run, so this one cannot be."""

    reason = "sequence_aborted"


class ExecutionFailed(ServiceError):
    """The model failed on this request's own data."""

    reason = "execution"


class OutOfMemory(ServiceError):
    """The device has too little memory to run this request, even alone."""

    reason = "out_of_memory"


class DeviceFailed(ServiceError):
    """The device is broken for good, or hangs: nothing more runs on it in this process. Another replica may answer."""

    reason = "device_failed"


class ModelLoadError(Exception):
    """A model version could not be loaded; the message says why and names the file."""


class ConfigError(ModelLoadError):
    """The configuration is wrong or asks for something unsupported. `path` is the key: `instance_group[0].kind`."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path
