"""The table of live sequences against what it promises, over arbitrary histories."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.scheduler import LiveSequence, Next, SequenceTable, Step, Verdict
from service.scheduler import sequences as module

KEYS = st.sampled_from((1, 2, "1", "b"))
MAX_SEQUENCES = 3
IDLE_NS = 100


class Histories(RuleBasedStateMachine):
    """Requests are numbers in the order of their arrival. A shadow keeps for every key which steps are outstanding and
    what a run of them, one after the other, must look like."""

    def __init__(self) -> None:
        super().__init__()
        self.table: SequenceTable[int] = SequenceTable(MAX_SEQUENCES, IDLE_NS)
        self.now = 0
        self.number = 0
        self.running: dict[int, LiveSequence[int]] = {}
        # Every step that was taken in, and what became of it: exactly one of ran, failed, dropped, withdrawn.
        self.taken: dict[int, Step[int]] = {}
        self.fate: dict[int, str] = {}
        self.owner: dict[int, LiveSequence[int]] = {}
        # Of each live sequence object: whether the last step that ended left something to go on from.
        self.going: dict[int, bool] = {}

    @rule(key=KEYS, start=st.booleans(), end=st.booleans(), passed=st.integers(0, 60))
    def arrive(self, key: int | str, start: bool, end: bool, passed: int) -> None:
        self.now += passed
        self.number += 1
        step = Step(start, end, self.number)
        before = len(self.table)
        verdict, sequence = self.table.arrive(key, step, self.now)
        if verdict in (Verdict.RUN, Verdict.HELD):
            assert sequence is not None
            self.taken[self.number] = step
            self.owner[self.number] = sequence
        if verdict is Verdict.RUN:
            assert sequence is not None
            self.runs(step, sequence)
        elif verdict is Verdict.HELD:
            assert sequence is not None
            assert sequence.running is not None
            assert sequence.running is not step
        elif verdict is Verdict.NOT_STARTED:
            assert not start
            assert len(self.table) == before
        elif verdict is Verdict.TOO_MANY:
            assert start
            assert before == MAX_SEQUENCES

    def runs(self, step: Step[int], sequence: LiveSequence[int]) -> None:
        assert sequence not in self.running.values(), "one step of a sequence at a time"
        assert step.start or self.going.get(id(sequence)), "a step runs only on the state of the one before it"
        earlier = [n for n, s in self.owner.items() if s is sequence and n < step.request and n not in self.fate]
        assert not earlier, "in the order of their arrival"
        self.running[step.request] = sequence

    @precondition(lambda self: self.running)
    @rule(data=st.data(), ran=st.booleans(), passed=st.integers(0, 60))
    def finish(self, data: st.DataObject, ran: bool, passed: int) -> None:
        self.now += passed
        number = data.draw(st.sampled_from(sorted(self.running)))
        sequence = self.running.pop(number)
        step = self.taken[number]
        self.fate[number] = "ran" if ran else "failed"
        if ran:
            self.going[id(sequence)] = not step.end
        elif step.start:
            self.going[id(sequence)] = False
        following = self.table.finished(sequence, ran, self.now)
        assert isinstance(following, Next)
        self.dropped(following.dropped)
        assert not (ran and following.dropped), "what follows a step that ran is not lost"
        if following.run is not None:
            self.runs(following.run, sequence)

    def dropped(self, steps: Sequence[Step[int]]) -> None:
        for step in steps:
            assert step.request not in self.fate
            assert step.request not in self.running
            self.fate[step.request] = "dropped"

    @precondition(lambda self: len(self.fate) < len(self.taken))
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(n for n in self.taken if n not in self.fate)))
        sequence, step = self.owner[number], self.taken[number]
        held = [s.request for s in sequence.held]
        gone = self.table.withdraw(sequence, step)
        if number in self.running:
            assert gone == ()
            return
        assert gone[0] is step
        assert [s.request for s in gone] == held[held.index(number) :][: len(gone)]
        assert not any(s.start for s in gone[1:]), "a start needs nobody before it"
        lost = {s.request for s in gone}
        assert [s.request for s in sequence.held] == [n for n in held if n not in lost], "the others, in their order"
        behind = [s for s in sequence.held if s.request > number]
        assert not behind or behind[0].start, "what is behind it needs it, up to the next start"
        self.dropped(gone)

    @rule(passed=st.integers(0, 250))
    def expire(self, passed: int) -> None:
        self.now += passed
        before = self.table.live()
        silent = [s for s in before if not s.busy and self.now - s.last_ns >= IDLE_NS]
        gone = self.table.expire(self.now)
        assert set(map(id, gone)) == set(map(id, silent)), "all that are silent, and no other"
        for sequence in gone:
            assert not sequence.held
            self.going.pop(id(sequence), None)

    @rule()
    def clear(self) -> None:
        held = self.table.clear()
        self.dropped(held)
        assert len(self.table) == 0

    @invariant()
    def bounded_and_nobody_is_forgotten(self) -> None:
        assert len(self.table) <= MAX_SEQUENCES
        held = {s.request for sequence in self.table.live() for s in sequence.held}
        outstanding = {n for n in self.taken if n not in self.fate}
        assert outstanding == held | set(self.running)
        for sequence in self.table.live():
            assert sequence.busy or (sequence.begun and not sequence.held), "what is over is not kept"


Histories.TestCase.settings = settings(max_examples=300, stateful_step_count=60, deadline=None)
test_histories = Histories.TestCase


def table() -> SequenceTable[str]:
    return SequenceTable(2, IDLE_NS)


def test_held_steps_run_one_after_the_other() -> None:
    live = table()
    verdict, sequence = live.arrive(7, Step(True, False, "a"), 0)
    assert (verdict, live.arrive(7, Step(False, False, "b"), 1)[0]) == (Verdict.RUN, Verdict.HELD)
    assert live.arrive(7, Step(False, True, "c"), 1)[0] is Verdict.HELD
    assert sequence is not None
    assert live.arrive(7, Step(False, False, "d"), 1)[0] is Verdict.NOT_STARTED, "behind the end"
    for wanted in ("b", "c"):
        following = live.finished(sequence, True, 2)
        assert following.run is not None
        assert following.run.request == wanted
    assert live.finished(sequence, True, 3) == Next()
    assert len(live) == 0


def test_a_refused_step_leaves_no_hole() -> None:
    """What is held behind it is handed back up to the next start; the sequence is where it was."""
    live = table()
    _, sequence = live.arrive(7, Step(True, False, "a"), 0)
    assert sequence is not None
    live.finished(sequence, True, 0)
    live.arrive(7, Step(False, False, "b"), 0)
    for name, start in (("c", False), ("d", False), ("e", True), ("f", False)):
        assert live.arrive(7, Step(start, False, name), 0)[0] is Verdict.HELD
    following = live.finished(sequence, False, 1)
    assert [step.request for step in following.dropped] == ["c", "d"]
    assert following.run is not None
    assert following.run.request == "e"
    following = live.finished(sequence, False, 1)
    assert ([step.request for step in following.dropped], following.run) == (["f"], None)
    assert len(live) == 0, "a start that was not run began nothing"


def test_a_failed_end_can_be_sent_again() -> None:
    live = table()
    _, sequence = live.arrive(7, Step(True, False, "a"), 0)
    assert sequence is not None
    live.finished(sequence, True, 0)
    assert live.arrive(7, Step(False, True, "b"), 0)[0] is Verdict.RUN
    live.finished(sequence, False, 1)
    assert live.arrive(7, Step(False, True, "b"), 2)[0] is Verdict.RUN
    live.finished(sequence, True, 3)
    assert len(live) == 0


def test_a_busy_sequence_is_not_silent() -> None:
    live = table()
    live.arrive(7, Step(True, False, "a"), 0)
    assert live.expire(10 * IDLE_NS) == []
    assert len(live) == 1


def test_the_steps_held_are_bounded() -> None:
    live = table()
    live.arrive(7, Step(True, False, "a"), 0)
    for number in range(module.MAX_HELD):
        assert live.arrive(7, Step(False, False, str(number)), 0)[0] is Verdict.HELD
    assert live.arrive(7, Step(False, False, "more"), 0)[0] is Verdict.TOO_LONG
    assert live.arrive(7, Step(True, False, "more"), 0)[0] is Verdict.TOO_LONG
