"""What hangs is reported once, and nothing else is."""

from __future__ import annotations

from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from service.clock import NS_PER_S
from service.engine.watchdog import HUNG_FACTOR, Running, Watchdog, hung
from service.scheduler import Dispatch

LIMIT_NS = 10 * NS_PER_S


class Batch:
    """What the watchdog looks at of a batch."""

    def __init__(self, expected_ns: int) -> None:
        self.expected_ns = expected_ns


def running(expected_ns: int = 0, since_ns: int = 0) -> Running:
    return Running(cast(Dispatch, Batch(expected_ns)), since_ns)


def test_only_beyond_the_limit() -> None:
    """At the limit a batch may still end; a nanosecond later it hangs."""
    one = running()
    assert hung([one], LIMIT_NS, LIMIT_NS) == []
    assert hung([one], LIMIT_NS + 1, LIMIT_NS) == [one]


def test_what_is_expected_to_take_long_may() -> None:
    """A batch of ten seconds is not given up after eleven."""
    one = running(expected_ns=10 * NS_PER_S)
    assert hung([one], 11 * NS_PER_S, LIMIT_NS) == []
    assert hung([one], HUNG_FACTOR * 10 * NS_PER_S + 1, LIMIT_NS) == [one]


@given(
    st.lists(st.tuples(st.integers(0, 10**12), st.integers(0, 10**12)), max_size=8), st.integers(0, 10**14), st.data()
)
def test_what_hangs_goes_on_hanging(facts: list[tuple[int, int]], at_ns: int, data: Any) -> None:
    """Time only adds to what hangs, and what hangs has exceeded both bounds."""
    batches = [running(expected, since) for expected, since in facts]
    now = hung(batches, at_ns, LIMIT_NS)
    later = hung(batches, at_ns + data.draw(st.integers(0, 10**12)), LIMIT_NS)
    assert all(one in later for one in now)
    for one in now:
        assert at_ns - one.since_ns > LIMIT_NS
        assert at_ns - one.since_ns > HUNG_FACTOR * one.dispatch.expected_ns


def test_a_batch_is_reported_once() -> None:
    """However often it is looked at; one that ended and one that began are other batches."""
    reported: list[Running] = []
    present = [running(), running(since_ns=5 * NS_PER_S)]
    watchdog = Watchdog(lambda: present, reported.append, LIMIT_NS)
    for second in range(14):
        watchdog.look(second * NS_PER_S)
    assert reported == present[:1]
    present[0] = running(since_ns=15 * NS_PER_S)
    for second in range(15, 25):
        watchdog.look(second * NS_PER_S)
    assert [one.since_ns for one in reported] == [0, 5 * NS_PER_S]


def test_it_can_be_stopped_before_it_was_started() -> None:
    """A server whose start fails stops what it has."""
    Watchdog(list, lambda _: None, LIMIT_NS).stop()
