"""The ModelStatistics values, computed from hand-made records."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from service.batch import BatchRecord, CloseReason
from service.clock import NEVER_NS, NS_PER_MS, NS_PER_S
from service.metrics import ModelMetrics, ModelShard, StatisticDuration
from service.metrics.model import add_up
from service.metrics.shard import WINDOW_STEP_NS
from tests.unit.metrics.records import Request, batch

MS = NS_PER_MS


def test_each_request_of_a_batch_adds_the_whole_batchs_compute_times() -> None:
    """Triton's meaning: two requests in one 10 ms execution are 20 ms of compute_infer."""
    metrics = ModelMetrics("m", "1")
    metrics.shard().record_batch(
        batch(100, rows=5, requests=2), [Request(arrival_ns=90 * MS, rows=2), Request(arrival_ns=97 * MS, rows=3)]
    )
    seen = metrics.statistics(epoch_offset_ns=1_000 * MS)
    assert seen.success == StatisticDuration(2, (23 + 16) * MS)
    assert seen.queue == StatisticDuration(2, (10 + 3) * MS)
    assert seen.compute_input == StatisticDuration(2, 2 * MS)
    assert seen.compute_infer == StatisticDuration(2, 20 * MS)
    assert seen.compute_output == StatisticDuration(2, 4 * MS)
    assert seen.inference_count == 5
    assert seen.execution_count == 1
    assert seen.last_inference_ms == 1_113
    assert seen.fail == seen.cache_hit == seen.cache_miss == StatisticDuration(0, 0)


def test_batch_statistics_count_executions_per_number_of_rows() -> None:
    """Two batches of one row and one of four; times are per execution, not per request."""
    metrics = ModelMetrics("m", "1")
    shard = metrics.shard()
    shard.record_batch(batch(0), [Request(0)])
    shard.record_batch(batch(20), [Request(0)])
    shard.record_batch(batch(40, rows=4, requests=4, infer_ms=30), [Request(0)] * 4)
    one, four = metrics.statistics(0).batch_stats
    assert (one.batch_size, one.compute_infer) == (1, StatisticDuration(2, 20 * MS))
    assert (four.batch_size, four.compute_infer) == (4, StatisticDuration(1, 30 * MS))
    assert four.compute_input == StatisticDuration(1, 1 * MS)
    assert four.compute_output == StatisticDuration(1, 2 * MS)


def test_refusals_failures_and_cancellations_are_failed_requests() -> None:
    """`fail` counts them all, with the time from arrival to that answer."""
    metrics = ModelMetrics("m", "1")
    shard = metrics.shard()
    shard.record_refusal("overloaded", 0, 1 * MS)
    shard.record_failure("execution", 0, 2 * MS)
    shard.record_cancelled(0, 4 * MS)
    assert metrics.statistics(0).fail == StatisticDuration(3, 7 * MS)
    assert metrics.statistics(0).success == StatisticDuration(0, 0)


def test_a_model_that_did_nothing_has_no_last_inference() -> None:
    """0, not the offset of the clocks."""
    assert ModelMetrics("m", "1").statistics().last_inference_ms == 0


def test_an_execution_that_answers_nobody_counts_as_an_execution() -> None:
    """The first part of a request larger than a batch: rows and answers come with the last part."""
    metrics = ModelMetrics("m", "1")
    shard = metrics.shard()
    shard.record_batch(batch(0, rows=64, requests=1), [])
    shard.record_batch(batch(20, rows=36, requests=1), [Request(0, rows=100)])
    seen = metrics.statistics(0)
    assert (seen.execution_count, seen.inference_count, seen.success.count) == (2, 100, 1)
    assert [b.batch_size for b in seen.batch_stats] == [36, 64]


def test_attainment_is_the_share_of_offered_requests_answered_in_time() -> None:
    """In time: 2. Offered: those, one late answer, one refusal, one failure, one given up after its deadline."""
    metrics = ModelMetrics("m", "1")
    shard = metrics.shard()
    shard.record_batch(
        batch(0, requests=3),
        [Request(0, deadline_ns=13 * MS), Request(0, deadline_ns=NEVER_NS), Request(0, deadline_ns=13 * MS - 1)],
    )
    shard.record_refusal("overloaded", 0, 1 * MS)
    shard.record_failure("execution", 0, 1 * MS)
    shard.record_cancelled(0, 2 * MS, deadline_ns=1 * MS)
    assert metrics.attainment(20 * MS) == 2 / 6


def test_the_clients_own_faults_break_no_promise() -> None:
    """Invalid requests, and those given up before their deadline, are not offered load."""
    metrics = ModelMetrics("m", "1")
    shard = metrics.shard()
    shard.record_failure("invalid", 0, 1 * MS)
    shard.record_cancelled(0, 2 * MS, deadline_ns=10 * MS)
    assert metrics.attainment(20 * MS) is None


def test_attainment_forgets_after_a_minute() -> None:
    """What was refused 61 s ago counts no more; the ring of cells is reused without mixing minutes."""
    metrics = ModelMetrics("m", "1")
    shard = metrics.shard()
    shard.record_refusal("overloaded", 0, 1 * MS)
    assert metrics.attainment(59 * NS_PER_S) == 0.0
    assert metrics.attainment(61 * NS_PER_S) is None
    shard.record_batch(batch(65_000), [Request(65 * NS_PER_S)])
    assert metrics.attainment(66 * NS_PER_S) == 1.0


def test_the_steps_of_the_window_add_up_to_its_attainment() -> None:
    """Of all shards; whoever reads step by step sees what the gauge shows."""
    metrics = ModelMetrics("m", "1")
    first, second = metrics.shard(), metrics.shard()
    for step in range(20):
        at_ns = step * WINDOW_STEP_NS + NS_PER_S
        first.record_refusal("overloaded", at_ns, at_ns)
        if step % 2:
            second.record_batch(batch(at_ns / NS_PER_MS - 13, requests=2), [Request(0), Request(0)])
    assert metrics.ended(18) == (1, 0)
    assert metrics.ended(19) == (3, 2)
    assert metrics.ended(20) == (0, 0)
    steps = [metrics.ended(step) for step in range(8, 20)]
    kept = sum(in_time for _, in_time in steps) / sum(offered for offered, _ in steps)
    assert metrics.attainment(19 * WINDOW_STEP_NS + NS_PER_S) == kept


def test_events_grow_with_whatever_is_recorded() -> None:
    """Batches, refusals, failures and cancellations, of every shard: nothing goes by unnoticed."""
    metrics = ModelMetrics("m", "1")
    first, second = metrics.shard(), metrics.shard()
    seen = [metrics.events()]
    for record in (
        lambda: first.record_batch(batch(), []),
        lambda: second.record_batch(batch(), [Request(0)]),
        lambda: first.record_refusal("expired", 0, 1),
        lambda: second.record_failure("invalid", 0, 1),
        lambda: second.record_cancelled(0, 1),
    ):
        record()
        seen.append(metrics.events())
    assert seen == [0, 1, 2, 3, 4, 5]


def test_a_batch_without_prediction_or_deadline_is_left_out_of_those_histograms() -> None:
    """Expected 0 = not predicted; a slack near NEVER = no deadline."""
    shard = ModelShard()
    record = batch(0, expected_ms=0)
    record.slack_ns = NEVER_NS - 10 * NS_PER_S
    shard.record_batch(record, [Request(0)])
    assert sum(shard.ratio_cells) == sum(shard.slack_cells) == 0
    assert (shard.totals.slack_ns, shard.totals.actual_ns, shard.totals.ratio) == (0, 0, 0.0)


_records = st.builds(
    batch,
    dispatched_ms=st.integers(0, 50_000),
    input_ms=st.integers(0, 5),
    infer_ms=st.integers(0, 400),
    output_ms=st.integers(0, 5),
    rows=st.integers(1, 70),
    reason=st.sampled_from(list(CloseReason)),
    # Powers of two: their ratios add up exactly in any order
    expected_ms=st.sampled_from([0, 1, 16, 256]),
    slack_ms=st.integers(-200, 2_000),
)
_requests = st.lists(
    st.builds(Request, arrival_ns=st.integers(0, 10**10), deadline_ns=st.integers(0, 10**11), rows=st.integers(1, 9)),
    max_size=5,
)
_event = st.one_of(
    st.tuples(st.just("batch"), _records, _requests),
    st.tuples(st.just("refusal"), st.sampled_from(["overloaded", "expired"]), st.integers(0, 10**10)),
    st.tuples(st.just("failure"), st.sampled_from(["execution", "invalid"]), st.integers(0, 10**10)),
    st.tuples(st.just("cancelled"), st.integers(0, 10**10), st.integers(0, 10**10)),
)


def _apply(shard: ModelShard, event: tuple[object, ...]) -> None:
    match event:
        case ("batch", BatchRecord() as record, list() as requests):
            shard.record_batch(record, requests)
        case ("refusal", str() as reason, int() as at_ns):
            shard.record_refusal(reason, 0, at_ns)
        case ("failure", str() as reason, int() as at_ns):
            shard.record_failure(reason, 0, at_ns)
        case ("cancelled", int() as deadline_ns, int() as at_ns):
            shard.record_cancelled(0, at_ns, deadline_ns)


@given(st.lists(st.tuples(st.integers(0, 3), _event), max_size=30))
def test_shards_together_say_what_one_recorder_would(events: list[tuple[int, tuple[object, ...]]]) -> None:
    """Whichever thread records what, the sum is the same."""
    events.sort(key=lambda pair: pair[1][1].dispatched_ns if isinstance(pair[1][1], BatchRecord) else 0)
    single = ModelShard()
    shards = [ModelShard() for _ in range(4)]
    for index, event in events:
        _apply(single, event)
        _apply(shards[index], event)
    merged, alone = add_up(shards), add_up([single])
    # The latest answer of the merged shards is the latest of all, that of one recorder the one recorded last.
    assert merged.totals._replace(last_ns=0) == alone.totals._replace(last_ns=0)
    for name in ("request", "queue", "input", "infer", "output", "batch_rows", "slack", "ratio"):
        assert getattr(merged, f"{name}_cells") == getattr(alone, f"{name}_cells")
    assert merged.close_reasons == alone.close_reasons
    assert merged.batch_tallies == alone.batch_tallies
    assert merged.failures == alone.failures
    assert merged.refusals == alone.refusals


def test_a_reader_never_sees_half_a_batch() -> None:
    """While a thread records, counts and sums read by another always belong together."""
    metrics = ModelMetrics("m", "1")
    shard = metrics.shard()
    record, requests = batch(10, rows=3, requests=3), [Request(0)] * 3

    def write() -> None:
        for _ in range(3_000):
            shard.record_batch(record, requests)

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive():
        seen = metrics.statistics(0)
        count = seen.success.count
        assert count == 3 * seen.execution_count == seen.inference_count
        assert seen.queue.ns == count * 10 * MS
        assert seen.compute_infer == StatisticDuration(count, count * 10 * MS)
        assert seen.compute_input.count == seen.compute_infer.count == seen.compute_output.count
    writer.join()
    assert metrics.statistics(0).success.count == 9_000
