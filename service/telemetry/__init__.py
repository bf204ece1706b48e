"""Spans of sampled requests, sent to an OpenTelemetry collector by OTLP."""

from service.telemetry.choice import chosen_spans
from service.telemetry.exporter import Counts
from service.telemetry.spans import SpanTracer, make_tracer

__all__ = ["Counts", "SpanTracer", "chosen_spans", "make_tracer"]
