"""Every request gets exactly one outcome, in any schedule: real scheduler, real threads, a puppet for the model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from service.clock import NEVER_NS, NS_PER_MS, now_ns
from service.errors import Draining, ExecutionFailed, OutOfMemory, RefusedError
from tests.unit.engine.served import POISON, Puppet, Served, X, Y, config_of, rows
from tests.unit.engine.support import ANSWER_S, double_instance

MAX_ROWS = 6


@dataclass(frozen=True)
class Send:
    rows: int
    poisoned: bool
    budget_ms: int | None
    priority: int


@dataclass(frozen=True)
class Cancel:
    which: int


@dataclass(frozen=True)
class Act:
    """Start the workers, let a puppet that holds its runs go on, or hold it."""

    what: str


actions = st.one_of(
    st.builds(
        Send,
        rows=st.integers(1, 9),
        poisoned=st.integers(0, 5).map(lambda n: n == 0),
        budget_ms=st.sampled_from([None, None, 0, 1, 5, 1000]),
        priority=st.integers(1, 2),
    ),
    st.builds(Cancel, which=st.integers(0, 30)),
    st.builds(Act, what=st.sampled_from(["start", "hold", "go"])),
)


@settings(max_examples=150, deadline=None)
@given(
    actions=st.lists(actions, min_size=1, max_size=30),
    slots=st.integers(1, 3),
    batch_rows=st.integers(1, MAX_ROWS),
    memory=st.sampled_from([1, 2, 3, 100, 100]),
    close=st.booleans(),
)
def test_every_request_has_one_outcome(
    actions: list[Send | Cancel | Act], slots: int, batch_rows: int, memory: int, close: bool
) -> None:
    """Poison, too little memory, parts, deadlines, cancellations, closing: one answer each, and the right one. Only a
    request that was cancelled in the queue gets none."""
    session = Puppet(memory)
    instances = [double_instance(session, (X,), (Y,), MAX_ROWS) for _ in range(slots)]
    served = Served(
        config_of([X], [Y], MAX_ROWS), instances, max_batch_rows=batch_rows, priority_levels=2, default_priority=1
    )
    sent, wanted, started = [], [], False
    try:
        for index, action in enumerate(actions):
            if isinstance(action, Send):
                content = rows(action.rows, 100.0 * index)
                if action.poisoned:
                    content[action.rows // 2] = POISON
                budget_ms = action.budget_ms
                deadline_ns = NEVER_NS if budget_ms is None else now_ns() + budget_ms * NS_PER_MS
                sent.append(served.send(content, deadline_ns=deadline_ns, priority=action.priority))
                wanted.append(None if action.poisoned else content * 2)
            elif isinstance(action, Cancel) and sent:
                served.model.cancel(sent[action.which % len(sent)])
            elif isinstance(action, Act) and action.what == "start" and not started:
                served.start()
                started = True
            elif isinstance(action, Act) and action.what in ("hold", "go"):
                (session.gate.clear if action.what == "hold" else session.gate.set)()
        if close:
            served.model.close()
        session.gate.set()
        if not started:
            served.start()
        served.settle()
    finally:
        session.gate.set()
        assert served.runtime.stop(ANSWER_S)
    check(served, sent, wanted)


def check(served: Served, sent: list, wanted: list) -> None:
    cancelled = served.failures.get("cancelled", 0)
    assert len(served.answers.outputs) + len(served.answers.errors) == len(sent) - cancelled
    answered = [id(request) for request, _ in (*served.answers.outputs, *served.answers.errors)]
    assert len(set(answered)) == len(answered)
    for request, (output,) in served.answers.outputs:
        expected = wanted[sent.index(request)]
        assert expected is not None
        assert np.array_equal(output, expected)
    for request, error in served.answers.errors:
        poisoned = wanted[sent.index(request)] is None
        if isinstance(error, ExecutionFailed):
            assert poisoned
        else:
            assert not isinstance(error, OutOfMemory), "one row always fits"
            assert isinstance(error, RefusedError | Draining) or error.reason == "expired"
    totals = served.metrics.sum()
    assert totals.totals.requests == len(served.answers.outputs)
    assert totals.totals.rows == sum(request.rows for request, _ in served.answers.outputs)
    queue = served.model.queue
    assert (queue.pending_requests, queue.pending_rows) == (0, 0)
    assert len(served.pool._free) == len(served.pool.instances)
