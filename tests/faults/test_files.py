"""Damage on disk: what cannot be loaded is reported with its file and the reason, and the rest is served."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest

from tests.support import onnx_models
from tests.support.client import Client, arrays, request
from tests.support.onnx_models import write_model
from tests.support.server import running_server

X = np.arange(64, dtype=np.float32).reshape(1, 64)


def _model(directory: Path, name: str) -> Path:
    return write_model(directory, name, onnx_models.mlp(64)) / "1" / "model.onnx"


def _external(directory: Path, name: str) -> Path:
    """A model with its weights beside it; the file of weights."""
    onnx_models.external_data(directory / name / "1")
    (weights,) = [path for path in (directory / name / "1").iterdir() if path.name != "model.onnx"]
    return weights


def _empty(directory: Path) -> None:
    _model(directory, "empty").write_bytes(b"")


def _garbage(directory: Path) -> None:
    _model(directory, "garbage").write_bytes(bytes(range(256)) * 40)


def _truncated(directory: Path) -> None:
    path = _model(directory, "truncated")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flipped(directory: Path) -> None:
    """Valid protobuf, but a node asks for an operator that does not exist."""
    path = _model(directory, "flipped")
    path.write_bytes(path.read_bytes().replace(b"Gemm", b"Gemn"))


def _truncated_weights(directory: Path) -> None:
    weights = _external(directory, "truncated_weights")
    weights.write_bytes(weights.read_bytes()[:100])


def _no_weights(directory: Path) -> None:
    _external(directory, "no_weights").unlink()


def _weights_elsewhere(directory: Path) -> None:
    """Weights that are a link to a file outside of the model's directory, where the link's target is gone."""
    weights = _external(directory, "weights_elsewhere")
    weights.unlink()
    weights.symlink_to("/nonexistent/weights")


def _weights_are_a_directory(directory: Path) -> None:
    weights = _external(directory, "weights_are_a_directory")
    weights.unlink()
    weights.mkdir()


DAMAGES: tuple[Callable[[Path], None], ...] = (
    _empty,
    _garbage,
    _truncated,
    _flipped,
    _truncated_weights,
    _no_weights,
    _weights_elsewhere,
    _weights_are_a_directory,
)


def test_damaged_files_are_reported_and_the_others_serve(tmp_path: Path) -> None:
    """Each damaged model is UNAVAILABLE with a reason that names its place; the good ones answer."""
    _model(tmp_path, "good")
    _external(tmp_path, "good_external")
    for damage in DAMAGES:
        damage(tmp_path)
    damaged = {damage.__name__.removeprefix("_") for damage in DAMAGES}
    with running_server(tmp_path) as server:
        client = Client(server.channel())
        index = {entry.name: entry for entry in client.call("RepositoryIndex").models}
        assert {name for name, entry in index.items() if entry.state != "READY"} == damaged
        for name in damaged:
            assert str(tmp_path / name / "1") in index[name].reason, index[name].reason
            with pytest.raises(grpc.RpcError) as refused:
                client.infer(request(name, {"x": X}))
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        for name in ("good", "good_external"):
            assert arrays(client.infer(request(name, {"x": X})))["y"].shape[0] == 1
        # Known ways of being damaged are no surprise: no traceback in the log.
        assert not [line for line in server.log_lines() if "exception" in line]


def test_a_model_that_is_removed_from_disk_goes_on_serving(tmp_path: Path) -> None:
    """What is loaded needs its files no more, weights in a file of their own included."""
    _model(tmp_path, "removed")
    _external(tmp_path, "removed_external")
    with running_server(tmp_path) as server:
        client = Client(server.channel())
        names = ("removed", "removed_external")
        before = {name: arrays(client.infer(request(name, {"x": X})))["y"] for name in names}
        for name in names:
            shutil.rmtree(tmp_path / name)
        for name in names:
            several = np.concatenate([X] * 3)
            after = arrays(client.infer(request(name, {"x": several})))["y"]
            np.testing.assert_allclose(after, np.concatenate([before[name]] * 3), atol=1e-5)
            assert client.call("ModelReady", name=name).ready


def test_a_profile_cache_that_cannot_be_used_is_no_reason_not_to_serve(tmp_path: Path) -> None:
    """A file where the cache's directory should be."""
    models = tmp_path / "models"
    _model(models, "good")
    in_the_way = tmp_path / "cache"
    in_the_way.write_text("not a directory")
    with running_server(models, "--profile-cache", str(in_the_way / "profiles")) as server:
        answer = Client(server.channel()).infer(request("good", {"x": X}))
        assert arrays(answer)["y"].shape == (1, 4)
        assert server.log_lines("model ready")[0]["profile"] == "measured"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: json.dumps({"table": {"1": [0, 0, 0]}, "complete": True}),
        lambda text: json.dumps({"table": {"1": [-5, -5, 20]}, "complete": True}),
        lambda text: json.dumps({"table": {"one": "fast"}, "complete": True}),
        lambda text: "\x00" * 100,
    ],
    ids=["empty", "half", "another_type", "zeros", "negative", "words", "binary"],
)
def test_a_damaged_profile_is_measured_again(tmp_path: Path, damage: Callable[[str], str]) -> None:
    """The server starts and serves with what it measured, and leaves a good profile behind."""
    models, cache = tmp_path / "models", tmp_path / "cache"
    _model(models, "good")
    flags = ("--profile-cache", str(cache))
    with running_server(models, *flags) as server:
        assert server.log_lines("model ready")[0]["profile"] == "measured"
    (stored,) = cache.glob("*.json")
    stored.write_text(damage(stored.read_text()))
    with running_server(models, *flags) as server:
        assert server.log_lines("model ready")[0]["profile"] == "measured"
        assert arrays(Client(server.channel()).infer(request("good", {"x": X})))["y"].shape == (1, 4)
    table = json.loads(stored.read_text())["table"]
    assert all(p50 > 0 for p50, *_ in table.values())


def test_a_good_profile_is_used(tmp_path: Path) -> None:
    """The control of the tests above: nothing is measured anew when nothing has changed."""
    models, cache = tmp_path / "models", tmp_path / "cache"
    _model(models, "good")
    for expected in ("measured", "cache"):
        with running_server(models, "--profile-cache", str(cache)) as server:
            assert server.log_lines("model ready")[0]["profile"] == expected
