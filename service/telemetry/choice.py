"""Whether spans are sent, and where: the settings and OpenTelemetry's variables put to use."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from service.config.otlp import TelemetryError, find_destination, ignored_variables
from service.config.settings import Settings
from service.telemetry.spans import SpanTracer, make_tracer

log = logging.getLogger(__name__)


def chosen_spans(settings: Settings, environment: Mapping[str, str]) -> SpanTracer | None:
    """What traces to the collector that the settings name, or else the environment; None: nobody does. Raises
    `TelemetryError` only for the settings: a variable for every program of a machine must not keep this one from
    serving."""
    try:
        destination = find_destination(settings.otlp_endpoint, environment)
        if destination is None:
            return None
        tracer = make_tracer(destination, settings.trace_sample_ratio, settings.trace_client_limit)
    except TelemetryError as error:
        if settings.otlp_endpoint is not None:
            raise
        log.warning("no spans are sent", extra={"reason": str(error)})
        return None
    log.info(
        "spans",
        extra={
            "collector": str(destination),
            "protocol": destination.protocol.value,
            "ratio": settings.trace_sample_ratio,
            "clients_per_s": settings.trace_client_limit,
        },
    )
    ignored = ignored_variables(environment)
    if ignored:
        log.warning("variables of OpenTelemetry that mean nothing here", extra={"variables": ", ".join(ignored)})
    return tracer
