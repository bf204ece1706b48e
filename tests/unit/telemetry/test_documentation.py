"""docs/tracing.md says what is: attributes, variables and numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from service.config.otlp import Destination, TelemetryError, find_destination, ignored_variables
from service.config.settings import Settings
from service.telemetry.encoding import MAX_LINKS
from service.telemetry.finished import TracedBatch, TracedFailure
from tests.unit.metrics.records import batch
from tests.unit.telemetry.test_encoding import attributes, encoded, request

PAGE = (Path(__file__).parents[3] / "docs" / "tracing.md").read_text()
OTLP = "OTEL_EXPORTER_OTLP_"


def test_attributes() -> None:
    """Every one that is sent is in the page, and no other."""
    answered = TracedBatch("m", 1, batch(100), [request(deadline_ns=10**12)])
    refused = TracedFailure("m", 1, request(), "UNAVAILABLE", "overloaded", "why", 10**9)
    invalid = TracedFailure("", 0, request(), "INVALID_ARGUMENT", "invalid", "why", 10**9)
    sent = {name for span in encoded(answered, refused, invalid) for name in attributes(span)}
    assert sent == set(re.findall(r"`((?:rpc|error|onclock)\.[a-z_.]+)`", PAGE))


def test_variables() -> None:
    """Each that is honoured changes something or is refused; each that is not is told of."""
    named = set(re.findall(r"`(OTEL_[A-Z_]+[A-Z])`", PAGE))
    ignored = {name for name in named if ignored_variables({name: "x"})}
    assert len(ignored) == 3
    before = find_destination(None, {f"{OTLP}TRACES_ENDPOINT": "http://a"})
    for name in named - ignored - {f"{OTLP}TRACES_ENDPOINT"}:
        value = {"OTEL_SDK_DISABLED": "true", "OTEL_SERVICE_NAME": "x", f"{OTLP}ENDPOINT": "http://b"}.get(name, "1")
        endpoint = {} if name == f"{OTLP}ENDPOINT" else {f"{OTLP}TRACES_ENDPOINT": "http://a"}
        said = ""
        try:
            after = find_destination(None, {**endpoint, name: value})
        except TelemetryError as error:
            said, after = str(error), None
        assert name in said or (not said and after != before), name


def test_numbers() -> None:
    """Defaults, as the page has them."""
    to = find_destination("http://a", {})
    assert isinstance(to, Destination)
    assert f"up to {to.batch_spans} spans at once" in PAGE
    assert f"{to.queue_spans:,} spans may wait" in PAGE
    assert f"for {to.timeout_s:.0f} s." in PAGE
    assert to.delay_s == 1.0
    assert "after a second" in PAGE
    assert f"at most {MAX_LINKS}" in PAGE
    fields = Settings.model_fields
    assert f"`--trace-client-limit` a second ({fields['trace_client_limit'].default};" in PAGE
    assert f"`--trace-sample-ratio` of them ({fields['trace_sample_ratio'].default})" in PAGE


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL))
def test_files(block: str) -> None:
    """What is to be copied can be read."""
    assert yaml.safe_load(block)
