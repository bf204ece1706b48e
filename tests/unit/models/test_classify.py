"""The classify client's own part: the best labels."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("PIL", reason="install onclock[models]")
from models.classify import best


def test_the_best_labels_come_first() -> None:
    """As many as asked for, by falling probability."""
    probabilities = np.array([0.1, 0.6, 0.05, 0.25], np.float32)
    found = best(probabilities, ["a", "b", "c", "d"], 2)
    assert [label for label, _ in found] == ["b", "d"]
    assert found[0][1] == pytest.approx(0.6)


def test_labels_of_another_model_are_an_error() -> None:
    """A list of another length is not silently misread."""
    with pytest.raises(ValueError, match="3 labels for 4 probabilities"):
        best(np.zeros(4, np.float32), ["a", "b", "c"], 2)
