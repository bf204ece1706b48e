"""Who may call which method, about which model: API keys applied to calls.

A key comes as `authorization: Bearer KEY`, whatever the method. Without a file of keys there is no `Access`, and
everybody may do everything. Otherwise what no rule allows is denied, a method that nobody thought of included.

Keys may change at any time (`update`), while calls are in progress: a caller keeps their number for as long as their
key is in the file, and numbers of keys that are gone mean nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import grpc

from service.config.keys import Caller, Group, Keys, digest_of
from service.errors import Forbidden, ServiceError, Unauthenticated
from service.frontend.status import status_of

ANONYMOUS = 0
_SCHEME = "bearer "
_TRITON = "inference.GRPCInferenceService"
_HEALTH = "grpc.health.v1.Health"
_REFLECTION = "grpc.reflection.v1alpha.ServerReflection"

# Every method there is; the tests compare it with what the server offers.
GROUPS: dict[str, Group] = {
    **dict.fromkeys(
        (
            f"/{_TRITON}/ServerLive",
            f"/{_TRITON}/ServerReady",
            f"/{_TRITON}/ModelReady",
            f"/{_HEALTH}/Check",
            f"/{_HEALTH}/Watch",
        ),
        Group.HEALTH,
    ),
    **dict.fromkeys(
        (
            f"/{_TRITON}/ServerMetadata",
            f"/{_TRITON}/ModelMetadata",
            f"/{_TRITON}/ModelConfig",
            f"/{_TRITON}/ModelStatistics",
            f"/{_TRITON}/RepositoryIndex",
            f"/{_REFLECTION}/ServerReflectionInfo",
        ),
        Group.METADATA,
    ),
    **dict.fromkeys((f"/{_TRITON}/ModelInfer", f"/{_TRITON}/ModelStreamInfer"), Group.INFERENCE),
    **dict.fromkeys((f"/{_TRITON}/RepositoryModelLoad", f"/{_TRITON}/RepositoryModelUnload"), Group.REPOSITORY),
    **dict.fromkeys(
        (
            f"/{_TRITON}/{kind}SharedMemory{verb}"
            for kind in ("System", "Cuda")
            for verb in ("Status", "Register", "Unregister")
        ),
        Group.SHARED_MEMORY,
    ),
    **dict.fromkeys((f"/{_TRITON}/TraceSetting", f"/{_TRITON}/LogSettings"), Group.SETTINGS),
}
# The field of a request that names its model. Empty or absent: the call is about all of them.
_MODEL_FIELDS: dict[str, str] = {
    f"/{_TRITON}/ModelReady": "name",
    f"/{_TRITON}/ModelMetadata": "name",
    f"/{_TRITON}/ModelConfig": "name",
    f"/{_TRITON}/ModelStatistics": "name",
    f"/{_TRITON}/RepositoryModelLoad": "model_name",
    f"/{_TRITON}/RepositoryModelUnload": "model_name",
    f"/{_HEALTH}/Check": "service",
    f"/{_HEALTH}/Watch": "service",
    f"/{_TRITON}/RepositoryIndex": "",
}
# What health is asked about that is no model.
_SERVICES = frozenset({"", _TRITON})
Metadata = Iterable[tuple[str, str | bytes]]


class Access:
    """The keys in force. Safe to use from several threads."""

    def __init__(self, keys: Keys) -> None:
        self._numbers: dict[bytes, int] = {}
        self._last = ANONYMOUS
        self._callers: dict[int, Caller] = {}
        # Told of every change after it is in force here: what identifies callers by itself.
        self.on_update: Callable[[], None] = lambda: None
        self.update(keys)

    def update(self, keys: Keys) -> None:
        """Use other keys from now on."""
        numbers: dict[bytes, int] = {}
        for digest in keys.callers:
            number = self._numbers.get(digest)
            if number is None:
                self._last += 1
                number = self._last
            numbers[digest] = number
        callers = {numbers[digest]: caller for digest, caller in keys.callers.items()}
        # Callers first: whoever is found by their number is known.
        self._callers = {ANONYMOUS: keys.anonymous, **callers}
        self._numbers = numbers
        self.on_update()

    def table(self) -> tuple[list[tuple[bytes, int, bool]], tuple[int, bool]]:
        """For what identifies the callers of inference itself: (digest, number, may infer) each, and whoever shows no
        key."""
        callers = self._callers
        rows = [
            (digest, number, callers[number].may(Group.INFERENCE))
            for digest, number in self._numbers.items()
            if number in callers
        ]
        return rows, (ANONYMOUS, callers[ANONYMOUS].may(Group.INFERENCE))

    def identify(self, metadata: Metadata) -> int:
        """The number of whoever sends this metadata. Raises `Unauthenticated` for a key that is not known."""
        for name, value in metadata:
            if name == "authorization":
                return self.number_of(value.decode("latin-1") if isinstance(value, bytes) else value)
        return ANONYMOUS

    def number_of(self, credentials: str) -> int:
        """The number of whoever has the key in the value of an `authorization` header. Raises `Unauthenticated`."""
        if credentials[: len(_SCHEME)].lower() == _SCHEME:
            number = self._numbers.get(digest_of(credentials[len(_SCHEME) :].strip(" ")))
            if number is not None:
                return number
        raise Unauthenticated("the API key is not known")

    def check(self, number: int, method: str) -> None:
        """Raises `Unauthenticated` or `Forbidden` unless this caller may call `method` at all."""
        group = GROUPS.get(method)
        caller = self._caller(number)
        if group is None or not caller.may(group):
            self._deny(number, f"{method}: " + ("no key may call this" if group is None else f"needs '{group}'"))

    def check_request(self, number: int, method: str, request: Any) -> None:
        """Raises `Unauthenticated` or `Forbidden` unless this caller may ask `method` for the model of `request`."""
        where = _MODEL_FIELDS.get(method)
        if where is None:
            return
        model = getattr(request, where) if where else ""
        if GROUPS[method] is Group.HEALTH and model in _SERVICES:
            return
        if not self._caller(number).reaches(model):
            self._deny(number, f"{method}: " + (f"model '{model}'" if model else "this is about all models"))

    def check_infer(self, number: int, model: str, shared_memory: bool) -> None:
        """Raises `Unauthenticated` or `Forbidden` unless this caller may have `model` infer."""
        caller = self._callers.get(number)
        if caller is None or not caller.reaches(model) or not caller.may(Group.INFERENCE):
            self._caller(number)
            self._deny(number, f"model '{model}'")
        if shared_memory and not caller.may(Group.SHARED_MEMORY):  # type: ignore[union-attr]
            self._deny(number, f"model '{model}': tensors in shared memory need '{Group.SHARED_MEMORY}'")

    def check_scrape(self, credentials: str | None) -> None:
        """Raises `Unauthenticated` or `Forbidden` unless the metrics port answers whoever sends this `authorization`
        header (None: none)."""
        number = ANONYMOUS if credentials is None else self.number_of(credentials)
        if not self._caller(number).may(Group.METRICS):
            self._deny(number, f"metrics: needs '{Group.METRICS}'")

    def _caller(self, number: int) -> Caller:
        caller = self._callers.get(number)
        if caller is None:
            raise Unauthenticated("the API key is not valid any more")
        return caller

    def _deny(self, number: int, what: str) -> None:
        if number == ANONYMOUS:
            raise Unauthenticated(f"{what}: expected an API key in 'authorization: Bearer KEY'")
        raise Forbidden(f"{what}: the API key does not allow it")


class AccessInterceptor(grpc.ServerInterceptor):  # type: ignore[misc]
    """Applies `Access` to every method of a `grpc.Server`."""

    def __init__(self, access: Access, on_denied: Callable[[str], None]) -> None:
        """`on_denied` is told why a call was denied, in a word."""
        self._access = access
        self._on_denied = on_denied

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        """See `grpc.ServerInterceptor`."""
        handler = continuation(details)
        if handler is None:
            return None
        try:
            number = self._access.identify(details.invocation_metadata)
            self._access.check(number, details.method)
        except ServiceError as error:
            self._on_denied(error.reason)
            return _refusing(handler, error)
        if handler.request_streaming or details.method not in _MODEL_FIELDS:
            return handler
        return self._guarded(handler, number, details.method)

    def _guarded(self, handler: Any, number: int, method: str) -> Any:
        """`handler`, which looks at the model of each request first."""
        inner = handler.unary_stream if handler.response_streaming else handler.unary_unary

        def guarded(request: Any, context: grpc.ServicerContext, *more: Any) -> Any:
            try:
                self._access.check_request(number, method, request)
            except ServiceError as error:
                self._on_denied(error.reason)
                _abort(context, error)
            return inner(request, context, *more)

        # How grpc runs a handler is written on the function.
        for mark in ("experimental_thread_pool", "experimental_non_blocking"):
            if hasattr(inner, mark):
                setattr(guarded, mark, getattr(inner, mark))
        make = (
            grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        )
        return make(guarded, handler.request_deserializer, handler.response_serializer)


def _abort(context: grpc.ServicerContext, error: ServiceError) -> None:
    code, details, _ = status_of(error)
    context.abort(code, details)


def _refusing(handler: Any, error: ServiceError) -> Any:
    """A handler of the same kind that answers with `error`."""

    def refuse(_request: Any, context: grpc.ServicerContext) -> Any:
        _abort(context, error)

    makers: Sequence[Callable[..., Any]] = (
        grpc.unary_unary_rpc_method_handler,
        grpc.unary_stream_rpc_method_handler,
        grpc.stream_unary_rpc_method_handler,
        grpc.stream_stream_rpc_method_handler,
    )
    make = makers[2 * bool(handler.request_streaming) + bool(handler.response_streaming)]
    return make(refuse, handler.request_deserializer, handler.response_serializer)
