"""A thread of one's own: results, errors, and its end."""

from __future__ import annotations

import gc
import threading

import pytest

from service.engine.home import Home

WAIT_S = 10.0


class Owner:
    """Something that has a home."""

    def __init__(self) -> None:
        self.home = Home("test", self)


def test_everything_is_done_on_one_thread() -> None:
    """Whoever asks; from within, at once."""
    owner = Owner()
    seen = {owner.home.call(threading.get_ident) for _ in range(3)}
    others: list[int] = []
    asking = threading.Thread(target=lambda: others.append(owner.home.call(threading.get_ident)))
    asking.start()
    asking.join(WAIT_S)
    assert seen == set(others)
    assert seen != {threading.get_ident()}
    assert owner.home.call(lambda: owner.home.call(threading.get_ident)) in seen


def test_errors_are_the_callers() -> None:
    """And the next call works."""
    owner = Owner()
    with pytest.raises(ZeroDivisionError):
        owner.home.call(lambda: 1 // 0)
    assert owner.home.call(lambda: 7) == 7


def test_it_ends_with_its_owner() -> None:
    """Models come and go; their threads do as well."""
    owner = Owner()
    thread = owner.home._thread
    owner.home.call(lambda: None)
    del owner
    gc.collect()
    thread.join(WAIT_S)
    assert not thread.is_alive()
