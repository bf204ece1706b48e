"""The load from within: what is recorded of each request, and a real replay."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from benchmarks.harness import Settings
from benchmarks.inprocess import UNFINISHED, Answers, InProcess, records_of
from benchmarks.models import make_repository
from benchmarks.outcomes import classify

MS = 1_000_000


def test_a_record_counts_from_when_the_request_was_due() -> None:
    """Answered in time, answered late though quickly, refused, and never answered."""
    answers = Answers(4)
    answers.done_ns = [1_010 * MS, 1_045 * MS, 1_031 * MS, 0]
    answers.status = [0, 0, 14, UNFINISHED]
    due = [1_000 * MS, 1_010 * MS, 1_030 * MS, 1_040 * MS]
    sent = [1_000 * MS, 1_040 * MS, 1_030 * MS, 1_040 * MS]
    records = records_of(due, sent, answers, 1_000 * MS, 5_000 * MS)
    assert records["latency_ns"].tolist() == [10 * MS, 35 * MS, 1 * MS, 3_960 * MS]
    assert records["lag_ns"].tolist() == [0, 30 * MS, 0, 0]
    found = classify(records, 0.020, 0.0, 1.0)
    assert (found.offered, found.good, found.late, found.refused, found.failed) == (4, 1, 1, 1, 1)


def test_a_replay(tmp_path: Path) -> None:
    """Every request of an easy load is answered in time, by the model itself, in a process of its own; twice."""
    settings = dataclasses.replace(Settings(), out=tmp_path)
    repository = make_repository(tmp_path / "repository", settings.models, {"tiny": 200.0})
    arrivals = np.sort(np.random.default_rng(0).uniform(0, 0.3, 60))
    with InProcess(settings, repository, "tiny") as process:
        for _ in range(2):
            replay = process.replay(arrivals)
            assert replay.records["status"].tolist() == [0] * 60
            assert np.allclose(replay.records["intended_ns"] * 1e-9, arrivals, atol=1e-8)
            found = classify(replay.records, 0.2, 0.0, 1.0)
            assert (found.offered, found.failed) == (60, 0)
            assert found.good >= 50
            assert replay.cores > 0
