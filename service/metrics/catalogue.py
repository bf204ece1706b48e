"""Every metric of a model version, in one table: name, kind, meaning, and how its value is read.

The `nv_inference_*` names, labels and units are Triton's (`docs/user_guide/metrics.md` of its server repository), so
that its dashboards and autoscalers work unchanged. What is new has the prefix `onclock_` and Prometheus' base units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from service.clock import NS_PER_S, NS_PER_US
from service.metrics.buckets import DURATION_BOUNDS_NS, RATIO_BOUNDS, ROWS_BOUNDS, SLACK_BOUNDS_NS
from service.metrics.exposition import exemplar_text, format_number, histogram_lines, label_text, sample_line
from service.metrics.model import ModelState, ShardSum
from service.metrics.shard import Tally, Totals

# Triton's four words for why a request failed, and our reasons that mean the same. All others are OTHER.
TRITON_FAILURE_REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
_TRITON_REASON = {
    "refused": "REJECTED",
    "unreachable": "REJECTED",
    "overloaded": "REJECTED",
    "queue_full": "REJECTED",
    "draining": "REJECTED",
    "expired": "REJECTED",
    "cancelled": "CANCELED",
    "execution": "BACKEND",
    "out_of_memory": "BACKEND",
    "device_failed": "BACKEND",
}
# What happens to any model's requests sooner or later.
_REFUSALS = ("draining", "expired", "overloaded", "queue_full", "unreachable")
_FAILURES = ("cancelled", "execution", "invalid", "out_of_memory")


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model version as a scrape sees it. `labels` are its `model` and `version` labels, ready to print. `epoch_ns`:
    time since 1970 minus the monotonic clock, where exemplars are wanted."""

    labels: str
    state: ModelState
    sums: ShardSum
    attainment: float | None
    epoch_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """One metric family. `lines(name, view)` are its samples for one model version, none when it does not apply."""

    name: str
    kind: str
    documentation: str
    lines: Callable[[str, ModelView], Iterable[str]]


def _seconds(ns: float) -> float:
    return ns / NS_PER_S


def _counter(name: str, documentation: str, read: Callable[[Totals], float]) -> Family:
    def lines(name: str, view: ModelView) -> Iterable[str]:
        return (sample_line(name, view.labels, read(view.sums.totals)),)

    return Family(name, "counter", documentation, lines)


def _gauge(name: str, documentation: str, read: Callable[[ModelView], float | None], kind: str = "gauge") -> Family:
    def lines(name: str, view: ModelView) -> Iterable[str]:
        value = read(view)
        return () if value is None else (sample_line(name, view.labels, value),)

    return Family(name, kind, documentation, lines)


def _by_reason(name: str, documentation: str, read: Callable[[ModelView], Iterable[tuple[str, int]]]) -> Family:
    def lines(name: str, view: ModelView) -> Iterable[str]:
        for reason, count in read(view):
            yield sample_line(name, f"{view.labels},{label_text([('reason', reason)])}", count)

    return Family(name, "counter", documentation, lines)


def _histogram(
    name: str,
    documentation: str,
    bounds: Sequence[float],
    read: Callable[[ShardSum], tuple[list[int], float]],
    exemplars: Callable[[ModelView], Sequence[str]] = lambda _view: (),
) -> Family:
    texts = [format_number(bound) for bound in bounds]

    def lines(name: str, view: ModelView) -> Iterable[str]:
        # A version that has run nothing has no histograms: with thousands of idle models they would be most of a
        # scrape, and they say nothing.
        if view.sums.totals.batches == 0:
            return ()
        cells, total = read(view.sums)
        return histogram_lines(name, view.labels, texts, cells, total, exemplars(view))

    return Family(name, "histogram", documentation, lines)


def _durations(
    name: str, documentation: str, histogram: str, read: Callable[[ShardSum], tuple[list[int], int]]
) -> Family:
    """`histogram`: what its exemplars are kept under."""

    def in_seconds(sums: ShardSum) -> tuple[list[int], float]:
        cells, total_ns = read(sums)
        return cells, _seconds(total_ns)

    def exemplars(view: ModelView) -> Sequence[str]:
        cells = view.sums.exemplars.get(histogram)
        if view.epoch_ns is None or cells is None:
            return ()
        epoch_ns = view.epoch_ns
        return [
            ""
            if cell is None
            else exemplar_text(cell.trace_id, _seconds(cell.value_ns), _seconds(cell.at_ns + epoch_ns))
            for cell in cells
        ]

    return _histogram(name, documentation, [_seconds(bound) for bound in DURATION_BOUNDS_NS], in_seconds, exemplars)


def _triton_failures(view: ModelView) -> Iterable[tuple[str, int]]:
    counts = dict.fromkeys(TRITON_FAILURE_REASONS, 0)
    for tallies in (view.sums.failures, view.sums.refusals):
        for reason, tally in tallies.items():
            counts[_TRITON_REASON.get(reason, "OTHER")] += tally.requests
    return counts.items()


def _tallies(view: ModelView, tallies: Mapping[str, Tally], usual: Iterable[str]) -> Iterable[tuple[str, int]]:
    """How many requests each reason had. The `usual` reasons are there from the model's first batch on, so that their
    first increase is seen; before that they say nothing (see `_histogram`)."""
    counts = dict.fromkeys(usual, 0) if view.sums.totals.batches else {}
    counts.update((reason, tally.requests) for reason, tally in tallies.items())
    return sorted(counts.items())


def _optional_seconds(ns: int | None) -> float | None:
    return None if ns is None else _seconds(ns)


MODEL_FAMILIES: tuple[Family, ...] = (
    _counter("nv_inference_request_success", "Requests answered", lambda t: t.requests),
    _by_reason("nv_inference_request_failure", "Requests refused, failed or cancelled", _triton_failures),
    _counter("nv_inference_count", "Rows answered (a batch of n rows counts n)", lambda t: t.rows),
    _counter("nv_inference_exec_count", "Batches run", lambda t: t.batches),
    _counter(
        "nv_inference_request_duration_us",
        "Time from arrival to answer, microseconds, summed over requests",
        lambda t: t.request_ns // NS_PER_US,
    ),
    _counter(
        "nv_inference_queue_duration_us",
        "Time from arrival to dispatch, microseconds, summed over requests",
        lambda t: t.queue_ns // NS_PER_US,
    ),
    _counter(
        "nv_inference_compute_input_duration_us",
        "Time to gather a request's batch, microseconds, summed over requests",
        lambda t: t.compute_input_ns // NS_PER_US,
    ),
    _counter(
        "nv_inference_compute_infer_duration_us",
        "Time to run a request's batch, microseconds, summed over requests",
        lambda t: t.compute_infer_ns // NS_PER_US,
    ),
    _counter(
        "nv_inference_compute_output_duration_us",
        "Time to take a request's batch apart, microseconds, summed over requests",
        lambda t: t.compute_output_ns // NS_PER_US,
    ),
    _gauge("nv_inference_pending_request_count", "Requests waiting to run", lambda v: v.state.pending_requests),
    _durations(
        "onclock_request_duration_seconds",
        "Time from arrival to answer",
        "request",
        lambda s: (s.request_cells, s.totals.request_ns),
    ),
    _durations(
        "onclock_queue_duration_seconds",
        "Time from arrival to dispatch",
        "queue",
        lambda s: (s.queue_cells, s.totals.queue_ns),
    ),
    _durations(
        "onclock_compute_input_duration_seconds",
        "Time to gather a request's batch, counted once per request",
        "input",
        lambda s: (s.input_cells, s.totals.compute_input_ns),
    ),
    _durations(
        "onclock_compute_infer_duration_seconds",
        "Time to run a request's batch, counted once per request",
        "infer",
        lambda s: (s.infer_cells, s.totals.compute_infer_ns),
    ),
    _durations(
        "onclock_compute_output_duration_seconds",
        "Time to take a request's batch apart, counted once per request",
        "output",
        lambda s: (s.output_cells, s.totals.compute_output_ns),
    ),
    _histogram(
        "onclock_batch_rows",
        "Rows per batch, without padding",
        ROWS_BOUNDS,
        lambda s: (s.batch_rows_cells, s.totals.batch_rows),
    ),
    _by_reason(
        "onclock_batches_total",
        "Batches run, by why each was closed at its size",
        lambda v: sorted(v.sums.close_reasons.items()),
    ),
    _counter("onclock_goodput_total", "Requests answered within their deadline", lambda t: t.requests - t.late),
    _counter("onclock_deadline_misses_total", "Requests answered after their deadline", lambda t: t.late),
    _by_reason(
        "onclock_refusals_total",
        "Requests refused to keep the promise made to others, or because it can no longer be kept",
        lambda v: _tallies(v, v.sums.refusals, _REFUSALS),
    ),
    _by_reason(
        "onclock_failures_total",
        "Requests that failed or were cancelled",
        lambda v: _tallies(v, v.sums.failures, _FAILURES),
    ),
    _gauge(
        "onclock_slo_attainment",
        "Share of the requests offered in the last 60 s that were answered in time (absent when there were none)",
        lambda v: v.attainment,
    ),
    _gauge("onclock_slo_seconds", "The model's latency objective", lambda v: _optional_seconds(v.state.slo_ns)),
    _histogram(
        "onclock_slack_seconds",
        "Time a batch's earliest deadline had left beyond the predicted finish, at dispatch",
        [_seconds(bound) for bound in SLACK_BOUNDS_NS],
        lambda s: (s.slack_cells, _seconds(s.totals.slack_ns)),
    ),
    _histogram(
        "onclock_prediction_ratio",
        "Actual over predicted time per batch",
        RATIO_BOUNDS,
        lambda s: (s.ratio_cells, s.totals.ratio),
    ),
    _counter(
        "onclock_predicted_seconds_total",
        "Predicted time of all batches that had a prediction",
        lambda t: _seconds(t.expected_ns),
    ),
    _counter(
        "onclock_actual_seconds_total",
        "Actual time of the same batches",
        lambda t: _seconds(t.actual_ns),
    ),
    _gauge("onclock_queue_requests", "Requests waiting to run", lambda v: v.state.pending_requests),
    _gauge("onclock_queue_rows", "Rows waiting to run", lambda v: v.state.pending_rows),
    _gauge("onclock_latency_scale", "Present speed: factor on the measured latencies", lambda v: v.state.scale),
    _gauge(
        "onclock_latency_quantile",
        "Safety factor on predictions: a steered quantile of recent actual over predicted times",
        lambda v: v.state.quantile,
    ),
    _gauge(
        "onclock_latency_prediction_cv",
        "Spread of actual over predicted time (coefficient of variation)",
        lambda v: v.state.prediction_cv,
    ),
    _gauge(
        "onclock_batch_rows_limit",
        "Largest batch: what the configuration allows, or less since the device ran out of memory (least of any shape)",
        lambda v: v.state.batch_rows_limit,
    ),
    _gauge(
        "onclock_staging_bytes",
        "Host memory of the buffers in which batches are gathered and answered, of all instances",
        lambda v: v.state.staging_bytes,
    ),
    _gauge("onclock_cuda_graphs", "Captured CUDA graphs, of all instances", lambda v: v.state.cuda_graphs),
    _gauge("onclock_sequences", "Live sequences of a stateful model", lambda v: v.state.sequences),
    _gauge(
        "onclock_sequence_state_bytes",
        "Host memory of the states of live sequences",
        lambda v: v.state.sequence_bytes,
    ),
    _gauge(
        "onclock_sequences_expired_total",
        "Sequences that were forgotten because they were silent for longer than their idle timeout",
        lambda v: v.state.sequences_expired,
        kind="counter",
    ),
    _gauge("onclock_model_ready", "1 = answers requests", lambda v: int(v.state.ready)),
    _gauge(
        "onclock_model_load_seconds",
        "Time it took to load, warm up and measure",
        lambda v: _optional_seconds(v.state.load_ns),
    ),
)
