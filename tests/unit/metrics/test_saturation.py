"""Predicted saturation: what it counts, and that it grows with the load beyond what can be answered."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.clock import NS_PER_MS, NS_PER_S
from service.metrics.model import ModelMetrics
from service.metrics.saturation import Demand, device_loads, row_ns, saturation

LATENCIES = {1: 5 * NS_PER_MS, 8: 12 * NS_PER_MS, 64: 64 * NS_PER_MS}


@pytest.mark.parametrize(
    ("slo_ms", "expected_ms"),
    [(None, 1.0), (128, 1.0), (127, 1.5), (24, 1.5), (23, 5.0), (6, 5.0), (1, 1.0)],
)
def test_a_row_takes_what_it_takes_in_the_best_batch_that_fits(slo_ms: int | None, expected_ms: float) -> None:
    """Twice, since a request waits for one batch and rides in the next. Where none fits, the objective says nothing."""
    assert row_ns(LATENCIES, None if slo_ms is None else slo_ms * NS_PER_MS) == expected_ms * NS_PER_MS


def test_nothing_known_is_no_time() -> None:
    assert row_ns({}, None) == 0
    assert row_ns({1: 0, 2: 0}, 5) == 0


def test_models_on_a_device_add_up_and_the_busiest_device_counts() -> None:
    demands = [
        Demand(100.0, 2 * NS_PER_MS, ("gpu0",)),
        Demand(50.0, 4 * NS_PER_MS, ("gpu0", "gpu1")),
        Demand(1000.0, 1 * NS_PER_MS, ("cpu",)),
    ]
    assert saturation(demands[:2], {"gpu0": 1, "gpu1": 1}) == pytest.approx(0.3)
    assert saturation(demands, {"gpu0": 1, "gpu1": 1, "cpu": 2}) == pytest.approx(0.5)
    assert saturation([], {"cpu": 1}) == 0
    loads = device_loads(demands, {"gpu0": 1, "gpu1": 1, "cpu": 2})
    assert loads == pytest.approx({"gpu0": 0.3, "gpu1": 0.1, "cpu": 0.5})


@given(st.floats(0.0, 1e6), st.floats(1.0, 1e9), st.integers(1, 8))
def test_it_is_proportional_to_the_load(rate: float, ns: float, slots: int) -> None:
    """Also far beyond what can be answered."""
    once = saturation([Demand(rate, ns, ("cpu",))], {"cpu": slots})
    twice = saturation([Demand(2 * rate, ns, ("cpu",))], {"cpu": slots})
    assert twice == pytest.approx(2 * once)


def test_what_was_asked_for_lately_counts_and_what_is_over_does_not() -> None:
    """Whole steps of five seconds, three of them; refused requests as well."""
    metrics = ModelMetrics("m", "1")
    metrics.devices, metrics.row_ns = ("cpu",), lambda: 2.0 * NS_PER_MS
    shard = metrics.shard()
    for number in range(300):
        at_ns = 100 * NS_PER_S + number * NS_PER_S // 20  # 20 a second from 100 s to 115 s
        shard.record_refusal("overloaded", at_ns, at_ns)
    assert metrics.demand(115 * NS_PER_S) == Demand(20.0, 2.0 * NS_PER_MS, ("cpu",))
    later = metrics.demand(120 * NS_PER_S)
    assert later is not None
    assert later.rows_per_s == pytest.approx(200 / 15)
    assert metrics.demand(131 * NS_PER_S) is None
    assert metrics.demand(90 * NS_PER_S) is None
