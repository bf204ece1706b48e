"""Splitting CPU time over threads and functions."""

from __future__ import annotations

import os

import pytest

from benchmarks.profile_server import group_of, leaf_counts, split_by_group, thread_times


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("ThreadPoolExecutor-0_12", "ThreadPoolExecutor"),
        ("device-0", "device"),
        ("MainThread", "MainThread"),
        ("Thread-1 (_serve)", "Thread-1 (_serve)"),
        ("7", "7"),
    ],
)
def test_numbered_threads_are_one_group(name: str, group: str) -> None:
    """Threads of a pool differ in their number only."""
    assert group_of(name) == group


def test_time_is_split_over_groups_most_first() -> None:
    """Only time since the first reading counts; a new thread counts from zero, an unknown one as native."""
    groups = split_by_group({1: 100, 2: 50}, {1: 110, 2: 80, 3: 25, 4: 1}, {1: "main", 2: "pool_0", 3: "pool_1"})
    assert groups == {"pool": (55, 2), "main": (10, 1), "native": (1, 1)}
    assert list(groups) == ["pool", "main", "native"]


def test_stacks_are_counted_by_their_innermost_function() -> None:
    """The last frame of a stack did the work; its name may hold spaces."""
    counts = leaf_counts("a;b;run 3\na;run 2\na;write (native) 1\n\n")
    assert counts == {"run": 5, "write (native)": 1}


def test_this_process_has_thread_times() -> None:
    """The kernel reports a positive run time of the running thread."""
    assert thread_times(os.getpid())[os.getpid()] > 0
