"""The text that a scrape shows, read back by the client library's parser and by perf_analyzer's pattern."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from service.batch import CloseReason
from service.clock import NS_PER_MS, NS_PER_S
from service.engine.nvml import GpuReading
from service.metrics import MetricsRegistry, ModelMetrics, ModelState
from service.metrics.buckets import DURATION_BOUNDS_NS
from service.metrics.catalogue import MODEL_FAMILIES
from service.metrics.exposition import format_number, histogram_lines, label_text, sample_line
from tests.unit.metrics.records import Request, batch

# From perf_analyzer's metrics manager: what follows a name is one label and a number without an exponent.
PERF_ANALYZER = r"\n{name}\{{gpu_uuid\=\"([^\"]+)\"\}} (\d+\.?\d*)"

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(registry: MetricsRegistry) -> tuple[str, Samples]:
    text = registry.render().decode()
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            # The parser appends _total to every counter's name, also where the text has none.
            name = sample.name if f"\n{sample.name}" in text else sample.name.removesuffix("_total")
            key = (name, frozenset(sample.labels.items()))
            assert key not in samples, f"{key} is there twice"
            samples[key] = sample.value
    return text, samples


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset({"model": "m", "version": "1", **labels}.items())]


@pytest.fixture
def busy() -> MetricsRegistry:
    """One model with something of everything."""
    registry = MetricsRegistry(clock=lambda: 1 * NS_PER_S)
    state = ModelState(True, 3, 7, 20 * NS_PER_MS, 1_500 * NS_PER_MS, 1.25, 0.98, 0.03, 48, 4096, 5, 2, 512, 9)
    metrics = ModelMetrics("m", "1", lambda: state)
    shard, other = metrics.shard(), metrics.shard()
    shard.record_batch(
        batch(100, rows=5, requests=2, reason=CloseReason.DEADLINE, expected_ms=10, slack_ms=-2),
        [Request(arrival_ns=90 * NS_PER_MS, rows=2), Request(97 * NS_PER_MS, deadline_ns=110 * NS_PER_MS, rows=3)],
    )
    other.record_batch(batch(200, rows=1), [Request(200 * NS_PER_MS)])
    registry.spans = lambda: {"exported": 3}
    other.record_refusal("overloaded", 0, 1)
    other.record_refusal("expired", 0, 1)
    other.record_failure("out_of_memory", 0, 1)
    other.record_failure("invalid", 0, 1)
    other.record_cancelled(0, 0, deadline_ns=1)
    registry.add(metrics)
    registry.add_device("cpu", "CPUExecutionProvider")
    registry.record_unrouted("unknown_model")
    registry.refused = lambda: {"unknown_model": 2, "control_plane": 1}
    registry.load_failures = lambda: [("m", False), ("n", True)]
    registry.security_watched("certificate")
    registry.record_load("m", succeeded=True)
    registry.security_reloaded("keys", fine=True)
    registry.connections = lambda: (3, 0)
    registry.certificate_end_s = lambda: 1_900_000_000
    registry.gpus = lambda: [GpuReading("GPU-1", 0.5, 1, 2, 3.0, 4.0, 5.0)]
    return registry


def test_tritons_counters_have_tritons_names_labels_and_units(busy: MetricsRegistry) -> None:
    """No _total suffix; microseconds, summed over requests."""
    text, samples = scrape(busy)
    assert "# TYPE nv_inference_request_success counter\n" in text
    assert value(samples, "nv_inference_request_success") == 3
    assert value(samples, "nv_inference_count") == 6
    assert value(samples, "nv_inference_exec_count") == 2
    assert value(samples, "nv_inference_request_duration_us") == (23 + 16 + 13) * 1000
    assert value(samples, "nv_inference_queue_duration_us") == (10 + 3 + 0) * 1000
    assert value(samples, "nv_inference_compute_input_duration_us") == 3_000
    assert value(samples, "nv_inference_compute_infer_duration_us") == 30_000
    assert value(samples, "nv_inference_compute_output_duration_us") == 6_000
    assert value(samples, "nv_inference_pending_request_count") == 3
    for reason, count in {"REJECTED": 2, "CANCELED": 1, "BACKEND": 1, "OTHER": 1}.items():
        assert value(samples, "nv_inference_request_failure", reason=reason) == count


def test_what_is_ours_has_its_values(busy: MetricsRegistry) -> None:
    """Each value follows from the fixture's records."""
    _, samples = scrape(busy)
    assert value(samples, "onclock_request_duration_seconds_count") == 3
    assert value(samples, "onclock_request_duration_seconds_sum") == pytest.approx(0.052)
    assert value(samples, "onclock_request_duration_seconds_bucket", le="0.025") == 3
    assert value(samples, "onclock_request_duration_seconds_bucket", le="0.01") == 0
    assert value(samples, "onclock_queue_duration_seconds_bucket", le="0.0025") == 1
    assert value(samples, "onclock_queue_duration_seconds_bucket", le="0.01") == 3
    assert value(samples, "onclock_batch_rows_bucket", le="4") == 1
    assert value(samples, "onclock_batch_rows_sum") == 6
    assert value(samples, "onclock_batches_total", reason="deadline") == 1
    assert value(samples, "onclock_batches_total", reason="drained") == 1
    assert value(samples, "onclock_goodput_total") == 2
    assert value(samples, "onclock_deadline_misses_total") == 1
    assert value(samples, "onclock_refusals_total", reason="overloaded") == 1
    assert value(samples, "onclock_failures_total", reason="cancelled") == 1
    # In time 2; offered: 3 answered, 2 refused, 1 failed (the invalid and the early cancelled one do not count)
    assert value(samples, "onclock_slo_attainment") == pytest.approx(2 / 6)
    assert value(samples, "onclock_slack_seconds_bucket", le="0") == 1
    assert value(samples, "onclock_prediction_ratio_bucket", le="1") == 1
    assert value(samples, "onclock_prediction_ratio_sum") == pytest.approx(2.3)
    assert value(samples, "onclock_predicted_seconds_total") == pytest.approx(0.023)
    assert value(samples, "onclock_actual_seconds_total") == pytest.approx(0.026)
    assert value(samples, "onclock_slo_seconds") == 0.02
    assert value(samples, "onclock_queue_rows") == 7
    assert value(samples, "onclock_latency_scale") == 1.25
    assert value(samples, "onclock_model_load_seconds") == 1.5
    assert value(samples, "onclock_batch_rows_limit") == 48
    assert value(samples, "onclock_staging_bytes") == 4096
    assert value(samples, "onclock_cuda_graphs") == 5
    assert value(samples, "onclock_sequences") == 2
    assert value(samples, "onclock_sequence_state_bytes") == 512
    assert value(samples, "onclock_sequences_expired_total") == 9
    assert value(samples, "onclock_model_ready") == 1
    assert samples["onclock_device_healthy", frozenset({("device", "cpu")})] == 1
    assert samples["onclock_device_info", frozenset({("device", "cpu"), ("provider", "CPUExecutionProvider")})] == 1
    for reason, count in {"unknown_model": 3, "control_plane": 1, "unauthenticated": 0}.items():
        assert samples["onclock_unrouted_requests_total", frozenset({("reason", reason)})] == count
    for model, failed in {"m": 0, "n": 1}.items():
        assert samples["onclock_model_load_failed", frozenset({("model", model)})] == failed
    for labels in ({"what": "certificate", "result": "used"}, {"what": "certificate", "result": "failed"}):
        assert samples["onclock_security_changes_total", frozenset(labels.items())] == 0
    assert value(samples, "onclock_failures_total", reason="execution") == 0
    changes = {"loaded": 1, "failed": 0}
    for result, count in changes.items():
        assert samples["onclock_model_changes_total", frozenset({("model", "m"), ("result", result)})] == count
    assert samples["onclock_streams", frozenset()] == 0
    assert samples["process_resident_memory_bytes", frozenset()] > 1e6


def test_every_histogram_is_cumulative_and_ends_with_its_count(busy: MetricsRegistry) -> None:
    """As the format demands: le ascending, +Inf equal to _count."""
    text, _ = scrape(busy)
    histograms = [f for f in text_string_to_metric_families(text) if f.type == "histogram"]
    assert len(histograms) == 8
    for family in histograms:
        buckets = [s for s in family.samples if s.name.endswith("_bucket")]
        bounds = [float(s.labels["le"]) for s in buckets]
        assert bounds == sorted(bounds)
        assert bounds[-1] == float("inf")
        counts = [s.value for s in buckets]
        assert counts == sorted(counts)
        assert counts[-1] == next(s.value for s in family.samples if s.name.endswith("_count"))


def test_no_number_of_a_scrape_has_an_exponent(busy: MetricsRegistry) -> None:
    """perf_analyzer reads 1.5e+11 as 1.5."""
    for line in busy.render().decode().splitlines():
        if not line.startswith("#"):
            assert re.fullmatch(r"-?\d+(\.\d+)?", line.rpartition(" ")[2]), line


def test_an_idle_model_has_counters_but_no_histograms() -> None:
    """rate() needs counters from 0; empty histograms of a thousand idle models are only weight."""
    registry = MetricsRegistry()
    registry.add(ModelMetrics("m", "1"))
    text, samples = scrape(registry)
    assert value(samples, "nv_inference_request_success") == 0
    assert not any("_bucket" in name for name, _ in samples)
    assert "onclock_slo_seconds{" not in text
    assert "onclock_slo_attainment{" not in text


def test_an_unloaded_version_disappears_and_a_reloaded_one_starts_again() -> None:
    """Removing the old load after the new one was added leaves the new one."""
    registry = MetricsRegistry()
    old, new = ModelMetrics("m", "1"), ModelMetrics("m", "1")
    old.shard().record_batch(batch(), [Request(0)])
    registry.add(old)
    assert value(scrape(registry)[1], "nv_inference_count") == 1
    registry.add(new)
    registry.remove(old)
    assert value(scrape(registry)[1], "nv_inference_count") == 0
    registry.remove(new)
    assert 'model="m"' not in registry.render().decode()


def test_model_names_are_escaped() -> None:
    """Quotes, backslashes and line breaks in a label value read back as they were."""
    registry = MetricsRegistry()
    name = 'a"b\\c\nd'
    registry.add(ModelMetrics(name, "1"))
    _, samples = scrape(registry)
    assert ("nv_inference_count", frozenset({("model", name), ("version", "1")})) in samples


@pytest.mark.parametrize(
    ("number", "text"),
    [(150754824192.0, "150754824192"), (0.0001, "0.0001"), (1e-7, "0.0000001"), (1.5e22, "15000000000000000000000")],
)
def test_large_and_small_numbers_are_written_out(number: float, text: str) -> None:
    """And perf_analyzer's pattern reads the whole of them."""
    assert format_number(number) == text
    line = "\n" + sample_line("nv_gpu_memory_used_bytes", label_text([("gpu_uuid", "GPU-1")]), number)
    match = re.search(PERF_ANALYZER.format(name="nv_gpu_memory_used_bytes"), line)
    assert match is not None
    assert float(match[2]) == number


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**70), 2**70))
def test_a_written_number_reads_back_as_itself(number: float) -> None:
    """Without an exponent and without loss."""
    text = format_number(number)
    assert "e" not in text
    assert type(number)(text) == number if isinstance(number, int) else float(text) == number


def test_numbers_that_are_none_have_their_names() -> None:
    """As Prometheus spells them."""
    assert [format_number(float(x)) for x in ("nan", "inf", "-inf")] == ["NaN", "+Inf", "-Inf"]


@given(st.lists(st.integers(0, 20 * NS_PER_S), max_size=40))
def test_histogram_cells_count_values_up_to_their_bound(values: list[int]) -> None:
    """le is inclusive: compared with counting the slow way."""
    metrics = ModelMetrics("m", "1")
    shard = metrics.shard()
    for duration_ns in values:
        shard.record_batch(batch(0, input_ms=0, infer_ms=0, output_ms=0), [Request(-duration_ns)])
    bounds = [str(bound) for bound in DURATION_BOUNDS_NS]
    lines = histogram_lines("h", "", bounds, metrics.sum().queue_cells, 0)
    for line, bound in zip(lines, DURATION_BOUNDS_NS, strict=False):
        assert line == f'h_bucket{{le="{bound}"}} {sum(v <= bound for v in values)}'
    assert lines[-1] == f"h_count {len(values)}"


def test_the_documentation_names_exactly_what_a_scrape_shows(busy: MetricsRegistry) -> None:
    """docs/metrics.md: every family, with its type; nothing that is not there."""
    page = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()
    documented = dict(re.findall(r"^\| `([a-z_]+)(?:\{[^`]*\})?` \| (\w+) \|", page, flags=re.MULTILINE))
    shown = dict(re.findall(r"^# TYPE (\S+) (\S+)$", busy.render().decode(), flags=re.MULTILINE))
    assert documented == shown
    assert {family.name for family in MODEL_FAMILIES} <= documented.keys()


def test_the_documentation_states_the_labels_a_scrape_shows(busy: MetricsRegistry) -> None:
    """A label written in the page is on the samples, and the other way round."""
    page = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()
    stated = {
        name: set(labels.split(", ")) if labels else set()
        for name, labels in re.findall(r"^\| `([a-z_]+)(?:\{([^`}]*)\})?` \| \w+ \|", page, flags=re.MULTILINE)
    }
    _, samples = scrape(busy)
    seen: dict[str, set[str]] = {}
    for name, labels in samples:
        family = next((n for n in (name, re.sub(r"_(bucket|sum|count)$", "", name)) if n in stated), name)
        seen.setdefault(family, set()).update({key for key, _ in labels} - {"le"})
    assert seen == {name: labels for name, labels in stated.items() if name in seen}
    assert stated.keys() == seen.keys()
