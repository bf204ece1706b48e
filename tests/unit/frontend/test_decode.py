"""Bytes to a checked request: both paths, the plan cache, and every refusal that needs the data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from service.errors import InvalidRequest, ModelNotReady, ServiceError, UnknownModel
from service.frontend.codec import decode as decode_module
from service.frontend.codec.decode import Decoded, Decoder
from service.frontend.codec.wire import delimited
from service.pb.grpc_service_pb2 import ModelInferRequest
from tests.support.client import request, words
from tests.unit.frontend.served import FakeModel, FakeRepository, model, spec

X = np.arange(8, dtype=np.float32).reshape(2, 4)


def decoder(*models: FakeModel) -> Decoder:
    return Decoder(FakeRepository(*(models or (model(),))))


def refused(message: Any, *models: FakeModel) -> str:
    """The message with which a request is refused as invalid."""
    with pytest.raises(InvalidRequest) as caught:
        decoder(*models).decode(message if isinstance(message, bytes) else message.SerializeToString())
    return str(caught.value)


def slowly(message: Any) -> bytes:
    """The same message with its fields in another order: it takes the path through protobuf."""
    raws = ModelInferRequest(raw_input_contents=message.raw_input_contents)
    rest = ModelInferRequest.FromString(message.SerializeToString())
    rest.ClearField("raw_input_contents")
    reordered = raws.SerializeToString() + rest.SerializeToString()
    assert ModelInferRequest.FromString(reordered) == message
    return reordered


def test_raw_tensors_are_views_of_the_message() -> None:
    """Nothing is copied: the input is the message's own memory."""
    message = request("m", {"x": X}).SerializeToString()
    decoded = decoder().decode(message)
    (data,) = decoded.inputs
    assert isinstance(data, memoryview)
    assert data.obj is message
    assert bytes(data) == X.tobytes()
    assert decoded.plan.rows == 2


@pytest.mark.parametrize("path", ["fast", "slow"])
def test_inputs_come_in_the_models_order(path: str) -> None:
    """Whatever order the client chose, and whatever order the fields have."""
    served = model(spec("a"), spec("b", "INT64", (1,)), spec("c", optional=True))
    sent = request("m", {"b": np.array([[7]], np.int64), "a": X[:1]})
    decoded = decoder(served).decode(sent.SerializeToString() if path == "fast" else slowly(sent))
    a, b, c = decoded.inputs
    assert bytes(a) == X[:1].tobytes()
    assert bytes(b) == np.array([7], np.int64).tobytes()
    assert c is None


@pytest.mark.parametrize("identifier", ["", "42", "\u00e9\U0001f600", "x" * 500])
@pytest.mark.parametrize("path", ["fast", "slow"])
def test_the_id_is_kept_as_its_bytes(identifier: str, path: str) -> None:
    """Any text is a valid id, also none."""
    sent = request("m", {"x": X}, request_id=identifier)
    decoded = decoder().decode(sent.SerializeToString() if path == "fast" else slowly(sent))
    assert decoded.request_id == identifier.encode()


def test_typed_contents() -> None:
    """Typed contents become the bytes that raw contents would have been."""
    (data,) = decoder().decode(request("m", {"x": X}, typed=True).SerializeToString()).inputs
    assert data == X.tobytes()


def test_strings_become_text_on_every_path() -> None:
    """BYTES come out as flat arrays of `str`, in raw and typed form and in any order of fields."""
    served = model(spec("t", "BYTES", (2,)))
    array = words("a", "", "zo\u00eb", "d", shape=(2, 2))
    sent = request("m", {"t": array})
    for message in (sent.SerializeToString(), slowly(sent), request("m", {"t": array}, typed=True).SerializeToString()):
        (data,) = decoder(served).decode(message).inputs
        assert isinstance(data, np.ndarray)
        assert data.tolist() == ["a", "", "zo\u00eb", "d"]


def test_empty_tensors_need_no_data() -> None:
    """A tensor without elements may come as an empty raw entry, or with nothing at all."""
    served = model(spec("x", shape=(0,)), spec("t", "BYTES", (0,)))
    empty = {"x": np.empty((2, 0), np.float32), "t": np.empty((2, 0), object)}
    for message in (request("m", empty), request("m", empty, typed=True)):
        x, t = decoder(served).decode(message.SerializeToString()).inputs
        assert bytes(x) == b""
        assert isinstance(t, np.ndarray)
        assert t.size == 0


def test_a_model_without_inputs() -> None:
    """A request without inputs and without data is complete."""
    served = FakeModel("m", (), (spec("y", batched=False),), max_batch_size=0)
    assert decoder(served).decode(request("m", {}, request_id="1").SerializeToString()).inputs == []


# What needs the data to be refused


@pytest.mark.parametrize("path", ["fast", "slow"])
@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_wrong_size_is_told_with_the_right_one(path: str, size: int) -> None:
    """Model, input, expected and given size are in the message."""
    sent = request("m", {"x": X})
    sent.raw_input_contents[0] = bytes(size)
    text = refused(sent.SerializeToString() if path == "fast" else slowly(sent))
    assert text == f"input byte size mismatch for input 'x' for model 'm'. Expected 32, got {size}"


@pytest.mark.parametrize("path", ["fast", "slow"])
def test_too_few_and_too_many_raw_tensors(path: str) -> None:
    """The input that has no data is named; too many are counted."""
    served = model(spec("a"), spec("b"))
    sent = request("m", {"a": X, "b": X})
    sent.raw_input_contents.pop()
    text = refused(sent.SerializeToString() if path == "fast" else slowly(sent), served)
    assert text == "unable to find data for input tensor 'b' for model 'm': 2 inputs, 1 raw_input_contents"
    sent.raw_input_contents.extend([b"", b""])
    text = refused(sent.SerializeToString() if path == "fast" else slowly(sent), served)
    assert text == "3 raw_input_contents for the 2 inputs given for model 'm'"


def test_no_data_at_all() -> None:
    """A header alone is told which input is missing its data."""
    sent = request("m", {"x": X})
    sent.ClearField("raw_input_contents")
    assert "unable to find data for input tensor 'x' for model 'm'" in refused(sent)


@pytest.mark.parametrize("path", ["fast", "slow"])
def test_raw_and_typed_together(path: str) -> None:
    """Both forms in one request contradict each other."""
    sent = request("m", {"x": X}, typed=True)
    sent.raw_input_contents.append(X.tobytes())
    text = refused(sent.SerializeToString() if path == "fast" else slowly(sent))
    assert "contents field must not be specified when using raw_input_contents for 'x' for model 'm'" in text


@pytest.mark.parametrize("path", ["fast", "slow"])
@pytest.mark.parametrize("bad", [2, 255])
def test_bool_is_zero_or_one(path: str, bad: int) -> None:
    """Any other byte is refused before a kernel can see it."""
    served = model(spec("x", "BOOL", (2,)))
    sent = request("m", {"x": np.array([[True, False]])})
    fine = sent.SerializeToString() if path == "fast" else slowly(sent)
    assert bytes(decoder(served).decode(fine).inputs[0]) == b"\x01\x00"
    sent.raw_input_contents[0] = bytes([1, bad])
    text = refused(sent.SerializeToString() if path == "fast" else slowly(sent), served)
    assert text == "input 'x' for model 'm': BOOL elements must be 0 or 1"


@pytest.mark.parametrize(
    ("raw", "fragment"),
    [
        (b"", "expected 2 BYTES elements, but 0 bytes hold at most 0"),
        (b"\x01\x00\x00\x00a", "expected 2 BYTES elements, but 5 bytes hold at most 1"),
        (b"\x08\x00\x00\x00abcdefgh", "expected 2 BYTES elements, but the data ends after 1"),
        (b"\x00\x00\x00\x00\x05\x00\x00\x00a", "BYTES element 1 states 5 bytes, but only 1 are left"),
        (b"\xff\xff\xff\xff\x00\x00\x00\x00", "BYTES element 0 states 4294967295 bytes, but only 4 are left"),
        (b"\x00\x00\x00\x00\x00\x00\x00\x00!", "1 bytes left over after the 2 BYTES elements"),
        (b"\x00\x00\x00\x00\x01\x00\x00\x00\xff", "BYTES element 1 is not valid UTF-8 (at byte 0)"),
    ],
)
@pytest.mark.parametrize("path", ["fast", "slow"])
def test_strings_must_fill_their_data_exactly(raw: bytes, fragment: str, path: str) -> None:
    """Lengths, count and bytes must agree, and elements must be text."""
    served = model(spec("t", "BYTES", (2,)))
    sent = request("m", {"t": words("", "", shape=(1, 2))})
    sent.raw_input_contents[0] = raw
    text = refused(sent.SerializeToString() if path == "fast" else slowly(sent), served)
    assert text.startswith("input 't': ")
    assert fragment in text


@pytest.mark.parametrize(
    "message",
    [
        b"\xff\xff\xff",
        b"\x0a",
        b"\x0a\x05ab",
        delimited(1, b"\xff") + delimited(7, b""),
        delimited(1, b"m") + delimited(3, b"\xff\xfe") + delimited(7, b"abcd"),
        delimited(1, b"m") + delimited(5, b"\xff\xff") + delimited(7, b"abcd"),
        delimited(1, b"m") + delimited(5, b"\xff\xff"),
    ],
)
def test_what_is_no_message_is_said_to_be_none(message: bytes) -> None:
    """Bytes that protobuf does not read are refused as such, wherever the fault is."""
    with pytest.raises(Exception, match=r"Error parsing message"):
        ModelInferRequest.FromString(message)
    plain = model(spec("x", shape=(1,)))
    assert "not a valid ModelInferRequest" in refused(message, plain)


def test_a_bad_id_is_refused_also_behind_a_known_header() -> None:
    """The id is not part of the plan: it is checked for every request."""
    head = request("m", {"x": X})
    served = decoder()
    served.decode(head.SerializeToString())
    head.ClearField("raw_input_contents")
    message = head.SerializeToString() + delimited(3, b"\xff") + delimited(7, X.tobytes())
    with pytest.raises(InvalidRequest, match="id is not valid UTF-8"):
        served.decode(message)


def test_an_unknown_model_is_not_the_decoders_error() -> None:
    """Errors of the look-up pass through, on both paths."""
    with pytest.raises(UnknownModel, match="'nobody'"):
        decoder().decode(request("nobody", {"x": X}).SerializeToString())
    with pytest.raises(UnknownModel, match="'nobody'"):
        decoder().decode(request("nobody", {"x": X}, typed=True).SerializeToString())
    with pytest.raises(UnknownModel, match="''"):
        decoder().decode(b"")


# The plan cache


def test_requests_with_one_header_share_a_plan() -> None:
    """The second request with the same header costs no look-up; id and data may differ."""
    repository = FakeRepository(model())
    served = Decoder(repository)
    first = served.decode(request("m", {"x": X}, request_id="1").SerializeToString())
    second = served.decode(request("m", {"x": X + 1}, request_id="2").SerializeToString())
    assert repository.lookups == 1
    assert second.plan is first.plan
    assert second.shape is first.shape
    assert bytes(second.inputs[0]) == (X + 1).tobytes()
    assert (first.request_id, second.request_id) == (b"1", b"2")


def test_another_header_is_another_plan() -> None:
    """Rows, parameters and outputs are part of the header."""
    served = decoder(model(priority_levels=2))
    plans = [
        served.decode(sent.SerializeToString()).plan
        for sent in (
            request("m", {"x": X}),
            request("m", {"x": X[:1]}),
            request("m", {"x": X}, parameters={"priority": 2}),
            request("m", {"x": X}, outputs=["y"]),
        )
    ]
    assert len(set(map(id, plans))) == 4
    assert [plan.rows for plan in plans] == [2, 1, 2, 2]
    assert plans[2].priority == 2


def test_a_plan_dies_with_the_generation_it_was_made_in() -> None:
    """After a change in the repository the model is looked up again."""
    old, new = model(version=1), model(version=2)
    repository = FakeRepository(old)
    served = Decoder(repository)
    message = request("m", {"x": X}).SerializeToString()
    assert served.decode(message).plan.model is old
    repository.models["m"] = new
    repository.generation += 1
    assert served.decode(message).plan.model is new
    repository.loading.add("m")
    repository.generation += 1
    with pytest.raises(ModelNotReady):
        served.decode(message)


def test_a_change_during_the_look_up_does_not_keep_the_old_model() -> None:
    """The repository may change between the look-up and the plan: the next request must see the new model."""
    old, new = model(version=1), model(version=2)

    class Changing(FakeRepository):
        def lookup(self, name: str, version: str) -> FakeModel:
            found = super().lookup(name, version)
            if self.generation == 0:
                self.models[name] = new
                self.generation = 1
            return found

    served = Decoder(Changing(old))
    message = request("m", {"x": X}).SerializeToString()
    assert served.decode(message).plan.model is old
    assert served.decode(message).plan.model is new


def test_a_refused_header_is_not_kept() -> None:
    """Only what can be served is worth memory."""
    repository = FakeRepository(model())
    served = Decoder(repository)
    for _ in range(2):
        with pytest.raises(InvalidRequest):
            served.decode(request("m", {"z": X}).SerializeToString())
    assert repository.lookups == 2


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flood of different headers empties it; what is asked for again is planned again."""
    monkeypatch.setattr(decode_module, "MAX_PLANS", 3)
    repository = FakeRepository(model())
    served = Decoder(repository)
    for number in range(4):
        served.decode(request("m", {"x": X}, parameters={"tag": number}).SerializeToString())
    assert repository.lookups == 4
    served.decode(request("m", {"x": X}, parameters={"tag": 3}).SerializeToString())
    assert repository.lookups == 4
    served.decode(request("m", {"x": X}, parameters={"tag": 0}).SerializeToString())
    assert repository.lookups == 5


def test_a_very_long_header_is_served_and_not_kept() -> None:
    """Headers of megabytes must not fill the cache."""
    repository = FakeRepository(model())
    served = Decoder(repository)
    message = request("m", {"x": X}, parameters={"note": "n" * decode_module.MAX_PLAN_HEADER}).SerializeToString()
    for _ in range(2):
        assert served.decode(message).plan.rows == 2
    assert repository.lookups == 2


# Side inputs


def test_side_values_decide_who_shares_a_batch() -> None:
    """The same value is the same shape class, another value another one."""
    served = decoder(model(spec("x"), spec("rate", "INT64", (), batched=False)))

    def shape_of(rate: int, typed: bool = False) -> object:
        sent = request("m", {"x": X, "rate": np.array(rate, np.int64)}, typed=typed)
        return served.decode(sent.SerializeToString()).shape

    assert shape_of(3) is shape_of(3)
    assert shape_of(3) is shape_of(3, typed=True)
    assert shape_of(3) is not shape_of(4)


def test_side_values_belong_to_their_inputs_whatever_the_order() -> None:
    """Two side inputs whose values are exchanged must not share a batch, in any order the client names them."""
    served = decoder(model(spec("x"), spec("a", "INT64", (), batched=False), spec("b", "INT64", (), batched=False)))
    one, two = np.array(1, np.int64), np.array(2, np.int64)

    def decoded(inputs: dict[str, Any]) -> Decoded:
        return served.decode(request("m", inputs).SerializeToString())

    straight = decoded({"x": X, "a": one, "b": two})
    assert decoded({"b": two, "x": X, "a": one}).shape is straight.shape
    assert decoded({"x": X, "b": one, "a": two}).shape is not straight.shape


def test_side_strings_and_absent_sides() -> None:
    """Text decides as numbers do; an optional side input that is absent is different from any value."""
    served = decoder(model(spec("x"), spec("mode", "BYTES", (1,), batched=False, optional=True)))

    def shape_of(**sides: Any) -> object:
        return served.decode(request("m", {"x": X, **sides}).SerializeToString()).shape

    assert shape_of(mode=words("fast")) is shape_of(mode=words("fast"))
    assert shape_of(mode=words("fast")) is not shape_of(mode=words("slow"))
    assert shape_of() is shape_of()
    assert shape_of() is not shape_of(mode=words(""))


def test_an_empty_side_input() -> None:
    """A side input without elements is a value like any other."""
    served = decoder(model(spec("x"), spec("past", "FP32", (-1, 2), batched=False)))
    empty, full = np.empty((0, 2), np.float32), np.ones((1, 2), np.float32)
    shapes = [served.decode(request("m", {"x": X, "past": p}).SerializeToString()).shape for p in (empty, empty, full)]
    assert shapes[0] is shapes[1]
    assert shapes[0] is not shapes[2]


def test_duplicate_fields_follow_protobuf() -> None:
    """The last of two model names wins, on the fast path as in protobuf."""
    message = request("m", {"x": X}).SerializeToString()
    assert decoder().decode(delimited(1, b"other") + message).plan.model.name == "m"
    with pytest.raises(ServiceError, match="other"):
        decoder().decode(message[:3] + delimited(1, b"other") + message[3:])


def test_unknown_fields_are_passed_over() -> None:
    """A newer client's field does no harm."""
    message = request("m", {"x": X}).SerializeToString() + delimited(99, b"new")
    assert bytes(decoder().decode(message).inputs[0]) == X.tobytes()
