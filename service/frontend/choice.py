"""Which ingress serves `ModelInfer`: the one asked for, or else the native one where it is built.

Promise: what the settings ask for and the ingress cannot do is an error that says so, never left out.
"""

from __future__ import annotations

import grpc

from service.clock import NS_PER_S
from service.config.settings import Settings
from service.frontend import native_ingress
from service.frontend.access import Access
from service.frontend.inference import InferenceHandler, unseen
from service.frontend.ingress import Ingress
from service.frontend.native_ingress import NativeIngress
from service.frontend.services import INFER_METHOD


class IngressError(Exception):
    """The ingress that was asked for is not there, or has not what was asked of it."""


def core_serves(settings: Settings) -> bool:
    """Whether gRPC's core takes the calls itself, by choice or for want of the native ingress."""
    return settings.ingress == "core" or bool(native_ingress.missing())


def make_ingress(
    settings: Settings, server: grpc.Server, handler: InferenceHandler, access: Access | None, traced: bool
) -> Ingress | NativeIngress:
    """An ingress before `server`, as the settings want it. Raises `IngressError`."""
    missing = native_ingress.missing()
    if settings.ingress == "native" and missing:
        raise IngressError(missing)
    if core_serves(settings):
        if "max_connections" in settings.model_fields_set:
            raise IngressError(
                "--max-connections needs the native ingress, and gRPC's core serves"
                + (f": {missing}" if missing else " (--ingress core): it has no such limit")
            )
        return Ingress(
            server,
            INFER_METHOD,
            handler,
            settings.max_in_flight,
            settings.max_in_flight_bytes,
            handler.gate,
            handler.lull,
            access,
            traced,
        )
    return NativeIngress(
        server,
        INFER_METHOD,
        handler,
        settings.max_in_flight,
        settings.max_in_flight_bytes,
        settings.max_message_bytes,
        handler.share,
        handler.lull,
        unseen(),
        settings.max_connections,
        int(settings.idle_timeout_s * NS_PER_S),
        access,
        int(settings.max_connection_age_s * NS_PER_S),
        int(settings.grace_period_s * NS_PER_S),
        traced,
    )
