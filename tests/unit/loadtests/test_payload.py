"""Messages: what is in them, and that they are the same every time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtests.errors import LoadTestError
from loadtests.model_info import Input, ModelInfo
from loadtests.payload import DTYPES, Template, templates
from loadtests.scenario import Entry
from service.pb import grpc_service_pb2 as pb

BATCHED = ModelInfo("m", "", (Input("x", "FP32", (-1, 4)), Input("n", "INT64", (-1, 1))), True, 8)


def made(entry: dict[str, Any], info: ModelInfo = BATCHED, seed: int = 1) -> list[Template]:
    return templates(Entry.model_validate({"model": "m", **entry}), info, [seed])


def message(template: Template) -> Any:
    size = int.from_bytes(template.body[1:5], "big")
    assert template.body[0] == 0
    assert len(template.body) == size + 5
    return pb.ModelInferRequest.FromString(template.body[5:])


def test_random_tensors_fit_the_model() -> None:
    """Names, datatypes, shapes and sizes; floats below 1, integers below 100."""
    for template in made({"rows": {1: 1, 3: 1}, "variants": 4}):
        request = message(template)
        assert [(t.name, t.datatype, list(t.shape)) for t in request.inputs] == [
            ("x", "FP32", [template.rows, 4]),
            ("n", "INT64", [template.rows, 1]),
        ]
        x, n = (np.frombuffer(raw, kind) for raw, kind in zip(request.raw_input_contents, ("<f4", "<i8"), strict=True))
        assert x.size == 4 * template.rows
        assert ((x >= 0) & (x < 1)).all()
        assert ((n >= 0) & (n < 100)).all()


def test_the_order_is_rows_variants_priorities() -> None:
    """The plan counts on it."""
    entry = {"rows": {1: 1, 2: 1}, "priority": {1: 1, 5: 1}, "variants": 2, "parameters": {"a": True, "b": 3, "c": "d"}}
    all_of_them = made(entry)
    assert [(t.rows, t.variant, t.priority) for t in all_of_them] == [
        (rows, variant, priority) for rows in (1, 2) for variant in (0, 1) for priority in (1, 5)
    ]
    parameters = message(all_of_them[1]).parameters
    assert parameters["priority"].uint64_param == 5
    assert (parameters["a"].bool_param, parameters["b"].int64_param, parameters["c"].string_param) == (True, 3, "d")


def test_the_same_seed_the_same_bytes() -> None:
    """And another seed others; every variant differs."""
    one = [t.body for t in made({})]
    assert one == [t.body for t in made({})]
    assert one != [t.body for t in made({}, seed=2)]
    assert len(set(one)) == 16


@pytest.mark.parametrize("datatype", sorted(DTYPES))
def test_every_datatype(datatype: str) -> None:
    """Encoded with the protocol's sizes."""
    info = ModelInfo("m", "", (Input("x", datatype, (-1, 3)),), True, 0)
    (raw,) = message(made({"variants": 1, "rows": 2}, info)[0]).raw_input_contents
    if datatype == "BYTES":
        size = 0
        for _ in range(6):
            size += 4 + int.from_bytes(raw[size : size + 4], "little")
        assert size == len(raw)
    else:
        assert len(raw) == 6 * np.dtype(DTYPES[datatype]).itemsize


def test_ranges_and_open_dimensions() -> None:
    """As the scenario says."""
    info = ModelInfo("m", "", (Input("ids", "INT32", (-1, -1)),), True, 0)
    request = message(made({"payload": {"dims": {"ids": [7]}, "ranges": {"ids": [5, 6]}}}, info)[0])
    assert list(request.inputs[0].shape) == [1, 7]
    assert set(np.frombuffer(request.raw_input_contents[0], "<i4")) == {5}


def test_arrays_from_files(tmp_path: Path) -> None:
    """Rows of requests are samples of the arrays."""
    x = np.arange(40, dtype=np.float32).reshape(10, 4)
    np.savez(tmp_path / "a.npz", x=x, n=np.arange(10).reshape(10, 1))
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "n.npy", np.arange(10).reshape(10, 1))
    for payload in ({"npz": tmp_path / "a.npz"}, {"npy": {"x": tmp_path / "x.npy", "n": tmp_path / "n.npy"}}):
        for template in made({"payload": payload, "rows": 3}):
            request = message(template)
            rows = np.frombuffer(request.raw_input_contents[0], "<f4").reshape(3, 4)
            numbers = np.frombuffer(request.raw_input_contents[1], "<i8")
            assert np.array_equal(rows, x[numbers])


def test_texts_and_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of a file as they are, or through the user's own function; pictures likewise."""
    (tmp_path / "texts.txt").write_text("one\n\ntwo\n")
    text = ModelInfo("m", "", (Input("t", "BYTES", (-1, 1)),), True, 0)
    raws = {message(t).raw_input_contents[0][4:] for t in made({"payload": {"texts": tmp_path / "texts.txt"}}, text)}
    assert raws == {b"one", b"two"}
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "def size(path):\n    return {'x': np.full(4, path.stat().st_size, np.float32), 'n': np.array([1])}\n"
        "def bad(path):\n    raise RuntimeError('not a picture')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.jpg").write_bytes(b"123")
    payload = {"images": pictures, "preprocess": "mine:size"}
    assert np.frombuffer(message(made({"payload": payload})[0]).raw_input_contents[0], "<f4").tolist() == [3.0] * 4
    with pytest.raises(LoadTestError, match=r"mine:bad failed on .*a\.jpg: not a picture"):
        made({"payload": {"images": pictures, "preprocess": "mine:bad"}})
    with pytest.raises(LoadTestError, match=r"'mine:none' cannot be imported.*expected package\.module:function"):
        made({"payload": {"images": pictures, "preprocess": "mine:none"}})
    sys.modules.pop("mine")


@pytest.mark.parametrize(
    ("entry", "info", "said"),
    [
        ({"rows": 2}, ModelInfo("m", "", (Input("x", "FP32", (4,)),), False, 0), "does not batch, so `rows` must be 1"),
        ({"payload": {"dims": {"y": [4]}}}, BATCHED, "model m has no input 'y'; it has n, x"),
        ({"payload": {"dims": {"x": [5]}}}, BATCHED, r"dims \[5\] for input 'x', which has \[4\]"),
        ({}, ModelInfo("m", "", (Input("x", "FP32", (-1, -1)),), True, 0), r"say their sizes in payload\.dims\.x"),
        ({}, ModelInfo("m", "", (Input("x", "FP8", (-1, 2)),), True, 0), "datatype FP8, unknown here"),
        ({"rows": {1: 1, 9: 1}}, BATCHED, "9 rows in a request, and model m takes 8"),
        ({"payload": {"npz": "/nowhere.npz"}}, BATCHED, "nowhere"),
        ({"payload": {"texts": "/nowhere"}}, BATCHED, "nowhere"),
        ({"variants": 9000, "rows": 8192}, ModelInfo("m", "", BATCHED.inputs, True, 0), "lower `variants`"),
    ],
)
def test_what_does_not_fit_is_said(entry: dict[str, Any], info: ModelInfo, said: str) -> None:
    """Before anything is sent."""
    with pytest.raises(LoadTestError, match=said):
        made(entry, info)


def test_samples_of_a_wrong_shape(tmp_path: Path) -> None:
    """Named with what was expected."""
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 5), np.float32), n=np.zeros((3, 1)))
    with pytest.raises(LoadTestError, match=r"'x' has shape \[5\], expected \[4\]"):
        made({"payload": {"npz": tmp_path / "a.npz"}})
    np.savez(tmp_path / "b.npz", x=np.zeros((3, 4), np.float32), n=np.zeros((2, 1)))
    with pytest.raises(LoadTestError, match="different numbers of samples"):
        made({"payload": {"npz": tmp_path / "b.npz"}})
    np.savez(tmp_path / "c.npz", z=np.zeros((3, 4), np.float32))
    with pytest.raises(LoadTestError, match="no input 'z'; it has x, n"):
        made({"payload": {"npz": tmp_path / "c.npz"}})
