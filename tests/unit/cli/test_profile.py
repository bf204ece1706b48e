"""What a latency table promises: the arithmetic behind `onclock profile`."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from service.cli.profile import capacity_within, find_model, shortest_promise
from service.clock import NS_PER_MS, NS_PER_S
from service.errors import ModelLoadError
from tests.support.onnx_models import mlp

# 5 ms + 0.5 ms per row
TABLE = {rows: round((5 + 0.5 * rows) * NS_PER_MS) for rows in (1, 2, 4, 8, 16, 32, 64)}


def test_the_shortest_promise_is_two_runs_of_the_smallest_efficient_batch() -> None:
    """Peak is 64 rows in 37 ms; 32 rows in 21 ms are 88 % of it, so it takes 64."""
    found = shortest_promise(TABLE)
    assert (found.rows, found.slo_ns) == (64, 74 * NS_PER_MS)
    assert found.rows_per_s == pytest.approx(64 / 0.037)


def test_a_model_that_gains_nothing_from_batching_promises_two_rows_alone() -> None:
    """Latency in proportion to rows: the smallest batch is as good as any."""
    found = shortest_promise({1: 10 * NS_PER_MS, 2: 20 * NS_PER_MS})
    assert (found.rows, found.slo_ns, found.rows_per_s) == (1, 20 * NS_PER_MS, 100.0)


def test_capacity_needs_one_row_to_fit() -> None:
    """An objective below one execution carries nothing."""
    assert capacity_within(TABLE, 5 * NS_PER_MS) is None


def test_capacity_never_exceeds_the_peak() -> None:
    """However long the objective: a queue is not throughput."""
    peak = max(rows / ns for rows, ns in TABLE.items()) * NS_PER_S
    found = capacity_within(TABLE, 500 * NS_PER_MS)
    assert found is not None
    assert 0.8 * peak < found.sustainable <= peak
    assert found.classical == pytest.approx(peak)


def test_a_model_is_found_by_directory_version_or_file(tmp_path: Path) -> None:
    """The model's directory means its newest version; names come from the path."""
    for version in ("1", "3"):
        (tmp_path / "tiny" / version).mkdir(parents=True)
        onnx.save(mlp(4, 4, 2), tmp_path / "tiny" / version / "model.onnx")
    newest = tmp_path / "tiny" / "3" / "model.onnx"
    assert find_model(tmp_path / "tiny", None) == ("tiny", None, tmp_path / "tiny", newest)
    assert find_model(tmp_path / "tiny", 1)[3].parent.name == "1"
    assert find_model(newest, None)[0] == "model"
    assert find_model(newest.parent, None)[3] == newest
    with pytest.raises(ModelLoadError, match="there is no version 2; there are: 1, 3"):
        find_model(tmp_path / "tiny", 2)
    with pytest.raises(ModelLoadError, match="leave --version out"):
        find_model(newest, 3)
    with pytest.raises(ModelLoadError, match="no such file or directory"):
        find_model(tmp_path / "nothing", None)
