"""Where the latency table of a sweep may end."""

from __future__ import annotations

import numpy as np
import pytest

from loadtests.outcome import CONNECTION_LOST, DEADLINE_EXCEEDED, OK, UNAVAILABLE
from loadtests.sweep import refused_for_time


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ([DEADLINE_EXCEEDED] * 3, True),
        ([DEADLINE_EXCEEDED, UNAVAILABLE], True),
        ([DEADLINE_EXCEEDED, OK], False),
        ([DEADLINE_EXCEEDED, 3], False),  # INVALID_ARGUMENT: too many rows is no matter of time
        ([CONNECTION_LOST], False),
        ([], False),
    ],
)
def test_a_size_that_is_only_refused_for_time(statuses: list[int], expected: bool) -> None:
    """Every request of it, and there were some: then no batch of that size can be in time."""
    assert refused_for_time(np.array(statuses, np.int16)) is expected
