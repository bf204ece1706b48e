"""Which requests are traced."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.clock import NS_PER_S
from service.telemetry.sampling import Allowance, by_ratio, follows, ratio_bound
from service.trace_context import Parent

SAMPLED = Parent(b"t" * 16, b"s" * 8, True)
UNSAMPLED = Parent(b"t" * 16, b"s" * 8, False)
ids = st.integers(1, 2**128 - 1)
ratios = st.floats(0, 1)


@given(ids, ratios)
def test_a_callers_decision_is_followed(trace_id: int, ratio: float) -> None:
    """Whatever the ratio is: one that is traced is followed, one that is not is not."""
    bound = ratio_bound(ratio)
    assert follows(SAMPLED, trace_id, bound, Allowance(1), 5) is True
    assert follows(UNSAMPLED, trace_id, bound, Allowance(1), 5) is False
    assert follows(SAMPLED, trace_id, bound, Allowance(0), 5) is None


@given(ids, ratios, ratios)
def test_the_ratio_decides_by_the_id(trace_id: int, one: float, other: float) -> None:
    """All of them at 1, none at 0, and who is traced at a ratio is traced at every larger one."""
    assert by_ratio(trace_id, ratio_bound(1.0))
    assert not by_ratio(trace_id, ratio_bound(0.0))
    less, more = sorted((one, other))
    assert by_ratio(trace_id, ratio_bound(more)) or not by_ratio(trace_id, ratio_bound(less))
    assert follows(None, trace_id, ratio_bound(one), Allowance(0), 0) is by_ratio(trace_id, ratio_bound(one))


def test_the_ratio_is_opentelemetrys() -> None:
    """Who decides by OpenTelemetry's own sampler decides the same."""
    from opentelemetry.sdk.trace.sampling import Decision, TraceIdRatioBased

    for ratio in (0.001, 0.25, 0.5, 0.999):
        sampler = TraceIdRatioBased(ratio)
        for trace_id in range(1, 2**128, 2**128 // 997 + 2**61 // 7):
            theirs = sampler.should_sample(None, trace_id, "x").decision is Decision.RECORD_AND_SAMPLE
            assert by_ratio(trace_id, ratio_bound(ratio)) is theirs


@given(st.integers(0, 50), st.lists(st.integers(0, 3 * NS_PER_S), max_size=200))
def test_an_allowance_is_never_exceeded(per_s: int, times: list[int]) -> None:
    """In no second more than two seconds' worth: what was saved, and what came; overall as well."""
    allowance = Allowance(per_s)
    taken = [at for at in sorted(times) if allowance.take(at)]
    for first in taken:
        assert sum(first <= at < first + NS_PER_S for at in taken) <= 2 * per_s
    assert len(taken) <= per_s * (1 + 3)


def test_an_allowance_grows_back() -> None:
    """At its rate, up to a second's worth; a clock that goes back brings nothing."""
    allowance = Allowance(4)
    assert [allowance.take(100) for _ in range(5)] == [True] * 4 + [False]
    assert not allowance.take(0)
    assert not allowance.take(100 + NS_PER_S // 4 - 1)
    assert allowance.take(100 + NS_PER_S // 4)
    assert [allowance.take(100 * NS_PER_S) for _ in range(5)] == [True] * 4 + [False]
