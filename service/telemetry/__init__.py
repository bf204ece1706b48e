"""Spans of sampled requests, sent to an OpenTelemetry collector by OTLP."""

from service.telemetry.exporter import Counts
from service.telemetry.spans import SpanTracer, make_tracer

__all__ = ["Counts", "SpanTracer", "make_tracer"]
