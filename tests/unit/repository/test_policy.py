"""From configuration and measurement to the values that steer a queue."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.clock import NEVER_NS, NS_PER_MS, NS_PER_S
from service.config.model import (
    DynamicBatching,
    InstanceGroup,
    LatePolicy,
    ModelConfig,
    Objective,
    QueuePolicy,
    TimeoutAction,
)
from service.engine.devices import Device
from service.engine.warmup import LatencySample, Measured
from service.repository.policy import latency_model, one_size, queue_policy
from service.request import ShapeClass
from service.scheduler import PriorityPolicy, bucket_ladder
from service.tensor import DataType, TensorSpec

CPU = Device("cpu", "cpu", 0, 1)
GPUS = (Device("cuda:0", "gpu", 0, 2), Device("cuda:1", "gpu", 1, 2))
SHAPE = ShapeClass(((4,),), (), 4)
CONFIG = ModelConfig(
    "m",
    64,
    (TensorSpec("x", DataType.FP32, (4,), True),),
    (TensorSpec("y", DataType.FP32, (4,), True),),
    (InstanceGroup("g", count=1),),
    dynamic_batching=DynamicBatching(),
)


def measured(table: dict[int, float], complete: bool = True) -> Measured:
    samples = {rows: LatencySample(int(ms * NS_PER_MS), int(2 * ms * NS_PER_MS), 20) for rows, ms in table.items()}
    return Measured(SHAPE, samples, complete)


def test_the_defaults() -> None:
    """No objective: eager, bounded by half a minute of predicted wait; the CPU runs every size as it is."""
    policy, notes = queue_policy(CONFIG, [CPU], 1, measured({1: 1.0, 64: 5.0}))
    assert (policy.name, policy.devices, policy.max_batch_rows, policy.max_concurrent) == ("m", ("cpu",), 64, 1)
    assert policy.buckets == tuple(range(1, 65))
    assert (policy.slo_ns, policy.max_queue_ns, policy.late_policy) == (None, 30 * NS_PER_S, "shed")
    assert (policy.priority_levels, policy.default_priority) == (1, 1)
    assert policy.deadline_ns(7) == NEVER_NS
    assert notes == []


def test_gpus_pad_to_a_ladder() -> None:
    """Sizes are captured or compiled there; one GPU among the devices is enough."""
    policy, _ = queue_policy(CONFIG, GPUS, 2, None)
    assert policy.buckets == bucket_ladder(64)
    assert policy.devices == ("cuda:0", "cuda:1")
    assert policy.max_concurrent == 2
    assert queue_policy(CONFIG, [CPU, *GPUS], 1, None)[0].buckets == bucket_ladder(64)


# Milliseconds of batches by their rows, of EfficientNet-Lite0 on an H200, and what a change of the size costs there.
MEASURED_MS = {1: 1.4, 2: 1.45, 4: 1.6, 8: 2.1, 16: 4.0, 32: 7.6, 64: 14.7}
CHANGE_MS = 190.0


def size_of(
    slo_ms: float | None, table: dict[int, float] = MEASURED_MS, change_ms: float = CHANGE_MS
) -> tuple[int, ...]:
    slo_ns = None if slo_ms is None else int(slo_ms * NS_PER_MS)
    return one_size({rows: int(ms * NS_PER_MS) for rows, ms in table.items()}, int(change_ms * NS_PER_MS), slo_ns)


def test_one_size_where_changing_it_costs_more_than_padding() -> None:
    """Most of the throughput with the least padding, and twice within the objective."""
    assert size_of(None) == (8,)
    assert size_of(20.0) == (8,)
    assert size_of(4.5) == (4,)
    assert size_of(1.0) == (1,)
    # Weights are read for one row as for sixty-four: the largest that fits.
    assert size_of(50.0, {1: 5.0, 16: 5.5, 32: 6.0, 64: 7.0}) == (64,)
    assert size_of(None, {4: 2.0}) == (4,)


@pytest.mark.parametrize("change_ms", [0.0, 0.4, 1.3, 1.9])
def test_every_size_where_changing_it_is_cheap(change_ms: float) -> None:
    """Nothing is padded for less than two milliseconds, or than a row takes."""
    assert size_of(20.0, change_ms=change_ms) == ()
    assert size_of(200.0, {1: 50.0, 8: 60.0}, change_ms=49.0) == ()


@given(
    st.dictionaries(st.integers(1, 512), st.floats(0.05, 500), min_size=1, max_size=20),
    st.floats(0, 1000),
    st.none() | st.floats(0.1, 1000),
)
def test_the_one_size_was_measured_and_fits(table: dict[int, float], change_ms: float, slo_ms: float | None) -> None:
    """It fits twice into the objective if any does, and is not slower than what it costs to be without it."""
    sizes = size_of(slo_ms, table, change_ms)
    assert set(sizes) <= set(table)
    if sizes and slo_ms is not None and min(table.values()) <= 0.3 * slo_ms and min(table.items())[1] <= 0.3 * slo_ms:
        assert 2 * table[sizes[0]] <= slo_ms


def test_only_some_sizes() -> None:
    """What was captured is the ladder, up to what there is memory for; a single size is said."""
    policy, notes = queue_policy(CONFIG, GPUS, 1, measured({1: 1, 64: 3}), (1, 4, 16))
    assert (policy.buckets, policy.max_batch_rows, notes) == ((1, 4, 16), 16, [])
    policy, notes = queue_policy(CONFIG, GPUS, 1, measured({1: 1, 64: 3}), (8,))
    assert (policy.buckets, policy.max_batch_rows) == ((8,), 8)
    assert "every batch is padded to 8 rows" in notes[0]
    # Requests that stay alone are not padded: their answers may depend on the rows added.
    alone = replace(CONFIG, dynamic_batching=None)
    assert queue_policy(alone, GPUS, 1, None, (8,))[0].buckets == queue_policy(alone, GPUS, 1, None)[0].buckets


def test_without_an_objective_sizes_never_run_are_not_tried_on_clients() -> None:
    """The largest measured size is the largest batch, until all were measured. Nothing measured: the configured one."""
    assert queue_policy(CONFIG, [CPU], 1, measured({1: 1, 2: 2, 20: 3}, complete=False))[0].max_batch_rows == 20
    assert queue_policy(CONFIG, [CPU], 1, measured({1: 1, 64: 3}))[0].max_batch_rows == 64
    assert queue_policy(CONFIG, [CPU], 1, None)[0].max_batch_rows == 64


def test_with_an_objective_the_estimate_decides() -> None:
    """A busy start must not bind the days after it: the configured size stays."""
    config = replace(CONFIG, objective=Objective(slo_ns=10 * NS_PER_MS))
    policy, notes = queue_policy(config, [CPU], 1, measured({1: 1, 8: 9}, complete=False))
    assert (policy.max_batch_rows, policy.slo_ns, notes) == (64, 10 * NS_PER_MS, [])
    assert policy.deadline_ns(100) == 100 + 9.9 * NS_PER_MS


def test_the_way_to_the_client_is_left_out_of_the_objective() -> None:
    """A percent, and never more than half a millisecond."""
    for slo_ms, left_ms in ((1, 0.99), (20, 19.8), (50, 49.5), (2_000, 1_999.5)):
        config = replace(CONFIG, objective=Objective(slo_ns=slo_ms * NS_PER_MS))
        policy, _ = queue_policy(config, [CPU], 1, None)
        assert policy.deadline_ns(0) == left_ms * NS_PER_MS
        assert policy.slo_ns == slo_ms * NS_PER_MS


def test_an_objective_that_cannot_be_kept_is_said() -> None:
    """One row takes longer than the promise: the operator reads both numbers."""
    config = replace(CONFIG, objective=Objective(slo_ns=int(2.5 * NS_PER_MS)))
    _, notes = queue_policy(config, [CPU], 1, measured({1: 7.25, 2: 8}))
    assert len(notes) == 1
    assert "latency_slo_ms 2.5 cannot be kept" in notes[0]
    assert "one row alone takes 7.2 ms" in notes[0]


def test_objective_values_land() -> None:
    """Queue bound, eagerness, what becomes of the late."""
    objective = Objective(max_queue_ns=5, shed_eagerness=0.8, late_policy=LatePolicy.BEST_EFFORT)
    policy, _ = queue_policy(replace(CONFIG, objective=objective), [CPU], 1, None)
    assert (policy.max_queue_ns, policy.shed_eagerness, policy.late_policy) == (5, 0.8, "best_effort")


def test_batching_knobs_land() -> None:
    """Delay and preferred sizes; preferred sizes above the largest batch are left out."""
    batching = DynamicBatching(preferred_batch_size=(4, 16, 64), max_queue_delay_ns=3 * NS_PER_MS)
    config = replace(CONFIG, dynamic_batching=batching)
    policy, _ = queue_policy(config, [CPU], 1, measured({1: 1, 20: 3}, complete=False))
    assert policy.preferred_rows == (4, 16)
    assert policy.max_queue_delay_ns == 3 * NS_PER_MS


def test_priorities_and_queue_policies_land() -> None:
    """One policy per level, the default one where none is stated."""
    batching = DynamicBatching(
        priority_levels=3,
        default_priority_level=2,
        default_queue_policy=QueuePolicy(max_queue_size=7, default_timeout_ns=9 * NS_PER_MS),
        priority_queue_policy={
            1: QueuePolicy(
                default_timeout_ns=NS_PER_MS, allow_timeout_override=True, timeout_action=TimeoutAction.DELAY
            )
        },
    )
    policy, _ = queue_policy(replace(CONFIG, dynamic_batching=batching), [CPU], 1, None)
    assert (policy.priority_levels, policy.default_priority) == (3, 2)
    common = PriorityPolicy(
        max_queue_size=7, default_timeout_ns=9 * NS_PER_MS, allow_timeout_override=False, timeout_action="REJECT"
    )
    assert policy.priorities == {
        1: PriorityPolicy(
            max_queue_size=0, default_timeout_ns=NS_PER_MS, allow_timeout_override=True, timeout_action="DELAY"
        ),
        2: common,
        3: common,
    }
    assert policy.deadline_ns(0, priority=2) == 9 * NS_PER_MS
    assert policy.deadline_ns(0, priority=1, timeout_ns=5) == 5
    assert policy.deadline_ns(0, priority=2, timeout_ns=5) == 9 * NS_PER_MS


def test_a_request_may_state_a_timeout_where_the_model_states_none() -> None:
    """Nothing is overridden then: the flag speaks of default timeouts."""
    policy, _ = queue_policy(CONFIG, [CPU], 1, None)
    assert policy.deadline_ns(0, timeout_ns=5) == 5


@pytest.mark.parametrize("config", [replace(CONFIG, dynamic_batching=None), replace(CONFIG, max_batch_size=0)])
def test_requests_that_are_not_joined_are_executions_of_their_own(config: ModelConfig) -> None:
    """As many rows as the configuration allows, whatever was measured; on a GPU without padding, since rows that are
    added may change the answer."""
    for devices in ([CPU], GPUS):
        policy, _ = queue_policy(config, devices, 1, measured({1: 1.0, 2: 5.0}, complete=False))
        assert not policy.joins
        assert policy.max_batch_rows == max(1, config.max_batch_size)
        assert policy.buckets == tuple(range(1, policy.max_batch_rows + 1))


def test_the_latency_model_starts_from_what_was_measured() -> None:
    """Medians, for the shape that was measured; sizes the queue does not use are left out."""
    policy, _ = queue_policy(CONFIG, [CPU], 1, measured({1: 1, 2: 1.5, 4: 2}, complete=False))
    model = latency_model(policy, measured({1: 1, 2: 1.5, 4: 2}))
    assert model.buckets == policy.buckets == (1, 2, 3, 4)
    assert model.curve(SHAPE, 4).profiled
    assert model.curve(SHAPE, 4).ns == [1_000_000.0, 1_500_000.0, 1_750_000.0, 2_000_000.0]
    assert model.curve(SHAPE, 4).cost == 4


def test_without_a_measurement_nothing_is_known() -> None:
    """Zero until the first requests teach it: nothing is refused for what was never seen."""
    policy, _ = queue_policy(replace(CONFIG, objective=Objective(slo_ns=NS_PER_MS)), [CPU], 1, None)
    assert latency_model(policy, None).estimate(SHAPE, 64, 4) == 0
