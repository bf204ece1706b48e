"""A real Prometheus scrapes a real server: it asks for OpenMetrics, takes all of it, and knows the traces."""

from __future__ import annotations

import os
import time
import urllib.request
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tests.helm import tools
from tests.helm.prometheus import running_prometheus
from tests.support import onnx_models
from tests.support.client import Client, request
from tests.support.onnx_models import write_model
from tests.support.server import running_server
from tests.support.stream import wait_for

pytestmark = pytest.mark.skipif(
    os.environ.get(tools.SKIP) == "skip", reason=f"{tools.SKIP}=skip: tools of the chart's tests are not there"
)

HISTOGRAM = "onclock_request_duration_seconds_bucket"
PROMISED = 'max_batch_size: 8\nparameters { key: "latency_slo_ms" value { string_value: "500" } }\n'


def test_prometheus_has_the_traces_and_every_series(tmp_path: Path) -> None:
    """The exemplar that `query_exemplars` gives is the request's trace; the series are those of the classic format."""
    write_model(tmp_path / "models", "identity", onnx_models.identity(), config=PROMISED)
    # Nobody takes the spans: exemplars do not depend on it.
    flags = ("--metrics-port", "0", "--otlp-endpoint", "http://127.0.0.1:9")
    with running_server(tmp_path / "models", *flags) as server:
        client = Client(server.channel())
        target = f"127.0.0.1:{server.metrics_port}"
        job = {"job_name": "onclock", "scrape_interval": "500ms", "static_configs": [{"targets": [target]}]}
        began = time.time()
        trace = "0af7651916cd43dd8448eb211c80319c"
        metadata = (("traceparent", f"00-{trace}-b7ad6b7169203331-01"),)
        client.infer(request("identity", {"x": np.zeros((1, 4), np.float32)}), metadata=metadata)
        with running_prometheus(tmp_path, [job], {}, Fraction(1), ["exemplar-storage"]) as prometheus:

            def traces() -> set[str]:
                when = {"start": str(began - 60), "end": str(time.time() + 60)}
                found = prometheus.ask("query_exemplars", query=f'{HISTOGRAM}{{model="identity"}}', **when)
                return {exemplar["labels"]["trace_id"] for series in found for exemplar in series["exemplars"]}

            wait_for(lambda: traces() == {trace}, "the exemplar")
            (up,) = prometheus.query("up")
            assert up["value"][1] == "1"
            scraped = {series["metric"]["__name__"] for series in prometheus.query('{job="onclock"}')}
            classic = urllib.request.urlopen(server.metrics_url, timeout=10).read().decode()
            written = {line.partition("{")[0].partition(" ")[0] for line in classic.splitlines() if line[:1] != "#"}
            assert written == {name for name in scraped if name != "up" and not name.startswith("scrape_")}
