"""Together, or one alone: never both, and nobody waits for ever."""

from __future__ import annotations

import threading

import pytest

from service.engine.gate import Gate

WAIT_S = 10.0


def test_many_pass_together() -> None:
    """All are inside at once: each waits there for the others."""
    gate, inside = Gate(), threading.Barrier(4)

    def pass_through() -> None:
        with gate.shared:
            inside.wait(WAIT_S)

    threads = [threading.Thread(target=pass_through) for _ in range(3)]
    for thread in threads:
        thread.start()
    with gate.shared:
        inside.wait(WAIT_S)
    for thread in threads:
        thread.join(WAIT_S)
    assert not any(thread.is_alive() for thread in threads)


def test_alone_waits_for_those_inside_and_keeps_others_out() -> None:
    """One who came after it comes in after it."""
    gate, order = Gate(), []
    waiting = threading.Event()

    def alone() -> None:
        with gate.alone:
            order.append("alone")

    def late() -> None:
        waiting.set()
        with gate.shared:
            order.append("late")

    with gate.shared:
        first = threading.Thread(target=alone)
        first.start()
        while not gate.waiting:
            pass
        second = threading.Thread(target=late)
        second.start()
        assert waiting.wait(WAIT_S)
        assert order == []
    first.join(WAIT_S)
    second.join(WAIT_S)
    assert order == ["alone", "late"]


def test_never_both_under_load() -> None:
    """Eight threads, both ways, many times."""
    gate, state = Gate(), {"shared": 0, "alone": 0}
    wrong: list[dict[str, int]] = []
    lock = threading.Lock()

    def enter(kind: str, step: int) -> None:
        with lock:
            state[kind] += step
            if state["alone"] > 1 or (state["alone"] and state["shared"]):
                wrong.append(dict(state))

    def work(number: int) -> None:
        for turn in range(200):
            alone = (turn + number) % 10 == 0
            with gate.alone if alone else gate.shared:
                enter("alone" if alone else "shared", 1)
                enter("alone" if alone else "shared", -1)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


def test_who_is_alone_may_pass_again() -> None:
    """A capture runs the session, which passes by itself. An error leaves the gate open."""
    gate = Gate()
    with pytest.raises(ValueError, match="x"), gate.alone, gate.shared:
        raise ValueError("x")
    with gate.shared:
        pass
    with gate.alone:
        pass
