"""OpenMetrics: the same series as in the classic format, by the official parser's rules, with exemplars."""

from __future__ import annotations

import math
import time
from collections import Counter
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from service.clock import NS_PER_MS, NS_PER_S, now_ns
from service.metrics import MetricsRegistry, ModelMetrics
from service.metrics.openmetrics import openmetrics_lines
from service.trace_context import RequestTrace
from tests.unit.metrics.records import Request, batch
from tests.unit.metrics.test_exposition import busy  # noqa: F401 - a fixture


class Traced(Request):
    """A request that was traced."""

    def __init__(self, arrival_ns: int, trace_id: int) -> None:
        super().__init__(arrival_ns)
        self.trace = RequestTrace(trace_id.to_bytes(16, "big"), b"s" * 8, b"", "", "ModelInfer")


def families(registry: MetricsRegistry) -> dict[str, Any]:
    return {
        family.name: family for family in text_string_to_metric_families(registry.render(openmetrics=True).decode())
    }


def exemplars(registry: MetricsRegistry, name: str) -> dict[str, Any]:
    """`le` -> the exemplar of that bucket."""
    samples = families(registry)[name].samples
    return {sample.labels["le"]: sample.exemplar for sample in samples if sample.exemplar}


def test_the_official_parser_reads_it(busy: MetricsRegistry) -> None:  # noqa: F811
    """And finds Triton's counters, which have no `_total`, as `unknown`, ours as counters."""
    found = families(busy)
    assert found["nv_inference_count"].type == "unknown"
    assert found["nv_energy_consumption"].type == "unknown"
    assert found["onclock_goodput"].type == "counter"
    assert [sample.name for sample in found["onclock_goodput"].samples] == ["onclock_goodput_total"]
    assert found["onclock_request_duration_seconds"].type == "histogram"
    assert found["process_cpu_seconds"].type == "counter"


def test_the_series_are_those_of_the_classic_format(busy: MetricsRegistry) -> None:  # noqa: F811
    """Name, labels and value, letter for letter: rules and dashboards work with either. What the process itself uses
    changes meanwhile."""

    def series(text: bytes) -> Counter[str]:
        lines = (line for line in text.decode().splitlines() if not line.startswith(("#", "process_", "python_")))
        return Counter(lines)

    assert series(busy.render()) == series(busy.render(openmetrics=True))


def test_a_histogram_below_zero_has_its_sum_all_the_same(busy: MetricsRegistry) -> None:  # noqa: F811
    """OpenMetrics forbids it in the family, so the parts are families."""
    found = families(busy)
    assert "onclock_slack_seconds" not in found
    for part in ("bucket", "sum", "count"):
        assert found[f"onclock_slack_seconds_{part}"].type == "unknown"
    assert found["onclock_slack_seconds_count"].samples[0].value == 2


def test_exemplars_are_the_newest_of_each_bucket() -> None:
    """One for each cell that a traced request fell into, with its value and time; the classic format has none."""
    registry = MetricsRegistry()
    metrics = ModelMetrics("m", "1")
    registry.add(metrics)
    shard, other = metrics.shard(), metrics.shard()
    now_ms = now_ns() / NS_PER_MS
    records = [batch(now_ms - 100), batch(now_ms - 50), batch(now_ms - 75)]
    requests = [
        [Traced(record.dispatched_ns - 3 * NS_PER_MS, 10 + n), Traced(record.dispatched_ns - NS_PER_S, 20 + n)]
        for n, record in enumerate(records)
    ]
    for which, record, traced in zip((shard, shard, other), records, requests, strict=True):
        which.record_batch(record, traced)
        which.record_exemplars(record, traced)
    found = exemplars(registry, "onclock_request_duration_seconds")
    # 3 ms in the queue and 13 in the batch; a second and 13 ms.
    assert {le: exemplar.labels for le, exemplar in found.items()} == {
        "0.025": {"trace_id": f"{11:032x}"},
        "2.5": {"trace_id": f"{21:032x}"},
    }
    assert math.isclose(found["0.025"].value, 0.016)
    assert abs(float(found["0.025"].timestamp) - (time.time() - 0.05 + 0.013)) < 5
    assert list(exemplars(registry, "onclock_queue_duration_seconds")) == ["0.005", "1"]
    assert list(exemplars(registry, "onclock_compute_infer_duration_seconds")) == ["0.01"]
    assert exemplars(registry, "onclock_compute_input_duration_seconds")["0.001"].labels == {"trace_id": f"{21:032x}"}
    assert list(exemplars(registry, "onclock_compute_output_duration_seconds")) == ["0.0025"]
    assert b"trace_id" not in registry.render()


@pytest.mark.parametrize(
    ("classic", "openmetrics"),
    [
        ([], ["# EOF"]),
        (
            ['# HELP a_total A "word"', "# TYPE a_total counter", "a_total 1"],
            ['# HELP a A \\"word\\"', "# TYPE a counter", "a_total 1", "# EOF"],
        ),
        (
            ["# HELP b Untyped", "# TYPE b untyped", 'b{x="1"} 1'],
            ["# HELP b Untyped", "# TYPE b unknown", 'b{x="1"} 1', "# EOF"],
        ),
        (["# HELP c ", "# TYPE c gauge"], ["# HELP c ", "# TYPE c gauge", "# EOF"]),
    ],
)
def test_families(classic: list[str], openmetrics: list[str]) -> None:
    """Their names, types and texts, also of those without samples."""
    assert list(openmetrics_lines(classic)) == openmetrics
