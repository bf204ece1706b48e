"""Outputs of a batch to one request's answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from service.errors import InvalidRequest
from service.frontend.codec import encode as encode_module
from service.frontend.codec.encode import encode
from service.frontend.codec.plan import RequestPlan, make_plan
from service.pb.grpc_service_pb2 import ModelInferRequest, ModelInferResponse
from tests.support.client import arrays, words
from tests.unit.frontend.served import FakeModel, model, output, spec

ROWS = spec("rows")
TOTAL = spec("total", "INT64", (2,), batched=False)
TEXT = spec("text", "BYTES", (1,))
SERVED = model(outputs=(ROWS, TOTAL, TEXT), version=7)
BATCH = np.arange(12, dtype=np.float32).reshape(3, 4)
OUTPUTS = [
    output(ROWS, BATCH, 3),
    output(TOTAL, np.array([5, 6], np.int64), 3),
    output(TEXT, words("a", "", "zo\u00eb", shape=(3, 1)), 3),
]


def plan_for(served: FakeModel, rows: int, *wanted: str) -> RequestPlan:
    request: Any = ModelInferRequest()
    request.inputs.add(name="x", datatype="FP32", shape=[rows, 4])
    for name in wanted:
        request.outputs.add(name=name)
    return make_plan(request, served)


def answer(plan: RequestPlan, first: int, rows: int, identifier: bytes = b"") -> Any:
    return ModelInferResponse.FromString(b"".join(encode(plan, identifier, OUTPUTS, first, rows)))


def test_a_request_gets_its_own_rows() -> None:
    """Rows of batched outputs, the whole of the others; names, datatypes and shapes as they are."""
    got = answer(plan_for(SERVED, 2), 1, 2, b"42")
    assert (got.model_name, got.model_version, got.id) == ("m", "7", "42")
    assert [(t.name, t.datatype, list(t.shape)) for t in got.outputs] == [
        ("rows", "FP32", [2, 4]),
        ("total", "INT64", [2]),
        ("text", "BYTES", [2, 1]),
    ]
    values = arrays(got)
    np.testing.assert_array_equal(values["rows"], BATCH[1:3])
    np.testing.assert_array_equal(values["total"], [5, 6])
    assert values["text"].tolist() == [[b""], ["zo\u00eb".encode()]]


def test_only_what_was_asked_for_in_that_order() -> None:
    """One raw entry per output, always."""
    got = answer(plan_for(SERVED, 1, "text", "rows"), 0, 1)
    assert [t.name for t in got.outputs] == ["text", "rows"]
    assert len(got.raw_output_contents) == 2
    assert not got.id


def test_a_plan_used_again_gives_each_request_its_own() -> None:
    """What is kept with the plan is only what is the same for all of its requests."""
    plan = plan_for(SERVED, 1)
    first, second = answer(plan, 0, 1, b"a"), answer(plan, 2, 1, b"b")
    assert (first.id, second.id) == ("a", "b")
    np.testing.assert_array_equal(arrays(first)["rows"], BATCH[:1])
    np.testing.assert_array_equal(arrays(second)["rows"], BATCH[2:])


def test_shapes_that_change_between_batches_are_told_anew() -> None:
    """An output with a free dimension may differ from batch to batch under one plan."""
    free = spec("y", shape=(-1,))
    plan = plan_for(model(outputs=(free,)), 1)
    for width in (3, 5, 3):
        data = np.arange(width, dtype=np.float32).reshape(1, width)
        got = ModelInferResponse.FromString(b"".join(encode(plan, b"", [output(free, data, 1)], 0, 1)))
        assert list(got.outputs[0].shape) == [1, width]
        np.testing.assert_array_equal(arrays(got)["y"], data)


def test_an_empty_output_has_an_empty_entry() -> None:
    """Also a tensor without elements has its raw entry."""
    empty = spec("y", shape=(0,))
    parts = encode(plan_for(model(outputs=(empty,)), 2), b"", [output(empty, np.empty((2, 0), np.float32), 2)], 0, 2)
    got = ModelInferResponse.FromString(b"".join(parts))
    assert list(got.outputs[0].shape) == [2, 0]
    assert list(got.raw_output_contents) == [b""]


def test_an_answer_too_large_for_grpc_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is on the whole message: names, shapes and id count as well as the data."""
    plan = plan_for(SERVED, 1, "rows")
    message = b"".join(encode(plan, b"id", OUTPUTS, 0, 1))
    monkeypatch.setattr(encode_module, "MAX_MESSAGE", len(message))
    assert b"".join(encode(plan, b"id", OUTPUTS, 0, 1)) == message
    monkeypatch.setattr(encode_module, "MAX_MESSAGE", len(message) - 1)
    with pytest.raises(InvalidRequest, match=r"outputs of model 'm' .* request fewer outputs or fewer rows"):
        encode(plan, b"id", OUTPUTS, 0, 1)
