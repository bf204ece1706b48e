"""Warm-up: which inputs are tried, what is believed of the answers, and how latencies are measured."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from service.clock import NS_PER_MS, NS_PER_S
from service.engine import warmup
from service.engine.warmup import (
    MAX_GENERATED,
    OPEN_DIMENSIONS,
    TIMED_RUNS,
    Sample,
    batch_arrays,
    cost_of_change,
    first_run,
    measure,
    requests,
    run_configured,
    samples,
    vary,
)
from service.errors import ExecutionFailed, ModelLoadError
from service.scheduler import bucket_ladder
from tests.support import onnx_models
from tests.unit.engine.served import Puppet, X, Y, config_of
from tests.unit.engine.support import Instance, double_instance, instance_of
from tests.unit.engine.support import config_of as config_of_model


def warmed(name: str, dims: str, data: str, rows: int = 1, count: int = 1, datatype: str = "TYPE_FP32") -> str:
    values = f'inputs {{ key: "{name}" value {{ data_type: {datatype} {dims} {data} }} }}'
    return f"model_warmup {{ name: 'w' batch_size: {rows} count: {count} {values} }}\n"


def values(sample: Sample, index: int = 0, dtype: str = "float32") -> np.ndarray:
    data = sample.inputs[index]
    assert data is not None
    return np.frombuffer(data, dtype)


# What is tried


def test_fixed_shapes_have_one_shape_to_try(tmp_path: Path) -> None:
    """Ordinary numbers for floating point, of the model's own shape."""
    config, _ = config_of_model(tmp_path, onnx_models.mlp())
    tried = samples(config, tmp_path)
    assert {sample.shape.shapes for sample in tried} == {((8,),)}
    assert len({id(sample.shape) for sample in tried}) == 1
    assert np.std(values(tried[0])) > 0.1


def test_open_dimensions_are_tried_in_order(tmp_path: Path) -> None:
    """A short sequence first, then pictures, then single elements; integers are zeros before ones."""
    config, _ = config_of_model(tmp_path, onnx_models.text_encoder())
    tried = samples(config, tmp_path)
    assert [sample.shape.shapes[0] for sample in tried] == [(size,) for size in OPEN_DIMENSIONS for _ in (0, 1)]
    assert not values(tried[0], dtype="int64").any()
    assert values(tried[1], dtype="int64").all()


def test_many_open_dimensions_are_not_multiplied_out(tmp_path: Path) -> None:
    """Four of them at 224 would be 20 gigabytes: such a size is not tried."""
    config, _ = config_of_model(tmp_path, onnx_models.identity("FP32", ("N", "A", "B", "C", "D")))
    tried = samples(config, tmp_path)
    assert [sample.shape.cost for sample in tried] == [32**4, 32**4, 8**4, 8**4, 1, 1]
    assert all(sample.shape.cost <= MAX_GENERATED for sample in tried)


@pytest.mark.parametrize("datatype", sorted(onnx_models.ELEMENT_TYPES))
def test_every_datatype_has_a_first_try(tmp_path: Path, datatype: str) -> None:
    """Generated rows of each datatype run."""
    instance, config = instance_of(tmp_path, onnx_models.identity(datatype, ("N", 3)))
    sample, reason = first_run(instance, config, samples(config, tmp_path))
    assert sample is not None, reason


def test_optional_inputs_are_left_out(tmp_path: Path) -> None:
    """The model's default is the likeliest value."""
    text = (
        'max_batch_size: 4\ninput { name: "scale" optional: true }\n'
        'parameters { key: "unbatched_inputs" value { string_value: "scale" } }\n'
    )
    config, _ = config_of_model(tmp_path, onnx_models.default_input(), text)
    assert samples(config, tmp_path)[0].shape.shapes == ((4,), None)


def test_what_the_configuration_states_is_tried_alone(tmp_path: Path) -> None:
    """zero_data and random_data, rows and count; equal shapes are one shape class."""
    text = (
        "max_batch_size: 8\n"
        + warmed("x", "dims: 8", "zero_data: true", 4, 3)
        + warmed("x", "dims: 8", "random_data: true")
    )
    config, _ = config_of_model(tmp_path, onnx_models.mlp(), text)
    zero, random = samples(config, tmp_path)
    assert (zero.rows, zero.count, random.rows, random.count) == (4, 3, 1, 1)
    assert zero.shape is random.shape
    assert not values(zero).any()
    assert np.std(values(random)) > 0.1


def test_random_integers_are_small(tmp_path: Path) -> None:
    """Within what an index or an id may be, and within the type."""
    text = "max_batch_size: 4\n" + warmed("x", "dims: 1000", "random_data: true", datatype="TYPE_INT8")
    config, _ = config_of_model(tmp_path, onnx_models.identity("INT8", ("N", 1000)), text)
    numbers = values(samples(config, tmp_path)[0], dtype="int8")
    assert 0 <= numbers.min() < numbers.max() < 100


def test_data_from_a_file(tmp_path: Path) -> None:
    """Raw little-endian bytes below warmup/: more than one row is fine, less is an error that names the file."""
    text = "max_batch_size: 4\n" + warmed("x", "dims: 8", "input_data_file: 'row'")
    config, _ = config_of_model(tmp_path, onnx_models.mlp(), text)
    with pytest.raises(ModelLoadError, match="warmup/row: warm-up data cannot be read"):
        samples(config, tmp_path)
    (tmp_path / "warmup").mkdir()
    file = tmp_path / "warmup" / "row"
    file.write_bytes(np.arange(7, dtype=np.float32).tobytes())
    with pytest.raises(ModelLoadError, match="28 bytes, expected 32 for input 'x'"):
        samples(config, tmp_path)
    file.write_bytes(np.arange(16, dtype=np.float32).tobytes())
    assert values(samples(config, tmp_path)[0]).tolist() == list(range(8))


def test_text_from_a_file(tmp_path: Path) -> None:
    """Elements with their lengths, as on the wire; damaged ones fail the load with the file's name."""
    text = "max_batch_size: 4\n" + warmed("name", "dims: 2", "input_data_file: 'words'", datatype="TYPE_STRING")
    config, _ = config_of_model(tmp_path, onnx_models.string_labels(columns=2), text)
    (tmp_path / "warmup").mkdir()
    file = tmp_path / "warmup" / "words"
    file.write_bytes(struct.pack("<I", 3) + b"cat" + struct.pack("<I", 5) + "späd".encode())
    data = samples(config, tmp_path)[0].inputs[0]
    assert isinstance(data, np.ndarray)
    assert data.tolist() == ["cat", "späd"]
    for damaged in (b"", struct.pack("<I", 99) + b"cat", struct.pack("<I", 1) + b"\xff" + struct.pack("<I", 0)):
        file.write_bytes(damaged)
        with pytest.raises(ModelLoadError, match="warmup/words: "):
            samples(config, tmp_path)


def test_another_row_has_other_numbers_only(tmp_path: Path) -> None:
    """Floating-point inputs with rows change; integers and side inputs stay, since they may be indices or settings."""
    text = 'max_batch_size: 8\nparameters { key: "unbatched_inputs" value { string_value: "rate" } }\n'
    config, _ = config_of_model(tmp_path, onnx_models.side_input(), text)
    sample = samples(config, tmp_path)[0]
    other = vary(sample, config)
    assert other.shape is sample.shape
    assert other.inputs[0] != sample.inputs[0]
    assert other.inputs[1] == sample.inputs[1]
    feeds = batch_arrays([sample, other], config)
    assert feeds["x"][1].shape == (2, 4)
    assert feeds["rate"][1].shape == ()


def test_what_tells_the_model_which_step_it_is_stays(tmp_path: Path) -> None:
    """A model may compare a control with yes and no; a third value is none that it ever gets."""
    config, _ = config_of_model(tmp_path, onnx_models.sequence_probe(), onnx_models.PROBE_CONFIG)
    sample = samples(config, tmp_path)[0]
    other = vary(sample, config)
    changed = {
        spec.name
        for spec, one, two in zip(config.session_inputs, sample.inputs, other.inputs, strict=True)
        if one != two
    }
    assert changed == {"x", "total"}


# The first run


def test_candidates_are_tried_until_one_is_accepted(tmp_path: Path) -> None:
    """A model that refuses short sequences is warmed up with a longer one."""
    instance, config = instance_of(tmp_path, onnx_models.identity("FP32", ("N", "S")))
    real = instance.session.run

    def picky(feeds: dict, outputs: object) -> list:
        if feeds["x"][1].shape[1] < 100:
            raise ExecutionFailed("too short")
        return real(feeds, outputs)  # type: ignore[arg-type]

    instance.session.run = picky  # type: ignore[method-assign]
    sample, _ = first_run(instance, config, samples(config, tmp_path))
    assert sample is not None
    assert sample.shape.shapes == ((224,),)


def test_the_last_refusal_is_the_reason(tmp_path: Path) -> None:
    """When nothing is accepted, the operator reads why."""
    session = Puppet(memory=0)
    config = config_of([X], [Y])
    sample, reason = first_run(double_instance(session, (X,), (Y,), 16), config, samples(config, tmp_path))
    assert sample is None
    assert reason == "no memory for 1 rows"
    assert first_run(double_instance(session, (X,), (Y,), 16), config, []) == (None, "no warm-up input")


def test_configured_requests_are_run_as_often_as_they_say(tmp_path: Path) -> None:
    """rows x count of each; one that the model refuses fails the load by its place in the list."""
    session = Puppet(memory=5)
    config = config_of([X], [Y])
    instance = double_instance(session, (X,), (Y,), 16)
    (first, *_) = samples(config, tmp_path)
    tried = [Sample(first.shape, first.inputs, rows, count) for rows, count in ((4, 3), (1, 2))]
    run_configured(instance, config, tried)
    assert session.runs == [4, 4, 4, 1, 1]
    with pytest.raises(ModelLoadError, match=r"model_warmup\[1\]: the model refuses it: no memory for 6 rows"):
        run_configured(instance, config, [tried[0], Sample(first.shape, first.inputs, 6, 1)])


# Measuring


class Timed:
    """A clock that only executions move: `cost_ns` by rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, instance: Instance, cost_ns: object) -> None:
        self.now = 0
        self.runs: list[int] = []
        real = instance.run

        def run(segments: object, rows: int, bucket: int) -> object:
            self.now += cost_ns(bucket)  # type: ignore[operator]
            self.runs.append(bucket)
            return real(segments, rows, bucket)  # type: ignore[arg-type]

        monkeypatch.setattr(instance, "run", run)
        monkeypatch.setattr(warmup, "now_ns", lambda: self.now)


def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cost_ns: object) -> tuple[Timed, Instance, Sample]:
    instance = double_instance(Puppet(), (X,), (Y,), 64)
    return Timed(monkeypatch, instance, cost_ns), instance, samples(config_of([X], [Y], 64), tmp_path)[0]


def test_every_rung_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With time enough: the whole ladder, the median of twenty runs each."""
    clock, instance, sample = timed(monkeypatch, tmp_path, lambda rows: NS_PER_MS + rows * 1000)
    found = measure(instance, config_of([X], [Y], 64), sample, 64, None, 100 * NS_PER_S)
    assert tuple(found.table) == bucket_ladder(64)
    assert found.complete
    assert found.shape is sample.shape
    assert {(rows, s.p50_ns, s.p99_ns, s.runs) for rows, s in found.table.items()} == {
        (rows, NS_PER_MS + rows * 1000, NS_PER_MS + rows * 1000, TIMED_RUNS) for rows in bucket_ladder(64)
    }
    first = clock.runs[: len(bucket_ladder(64))]
    assert sorted(first) == list(bucket_ladder(64))
    assert first[:7] == [1, 2, 4, 9, 18, 36, 64]


def test_what_a_change_of_the_size_costs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the first batch of a size takes longer, whichever; one slow run among them is no cost."""
    before: list[int] = []

    def plans(rows: int) -> int:
        changed, first = bool(before) and before[-1] != rows, not before
        before.append(rows)
        return (190 * NS_PER_MS if changed else NS_PER_MS) + (NS_PER_S if first else 0)

    _, instance, sample = timed(monkeypatch, tmp_path, plans)
    assert cost_of_change(instance, config_of([X], [Y], 64), sample, 1, 64) == 189 * NS_PER_MS
    slow = iter([1, 1, 1, 1, 90, 1, 1, 1, 1])
    _, instance, sample = timed(monkeypatch, tmp_path, lambda _: next(slow) * NS_PER_MS)
    assert cost_of_change(instance, config_of([X], [Y], 64), sample, 1, 64) == 0


def test_the_budget_is_respected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rungs end when half of it is spent on cold runs, and the timed runs share the rest."""
    clock, instance, sample = timed(monkeypatch, tmp_path, lambda rows: rows * 10 * NS_PER_MS)
    found = measure(instance, config_of([X], [Y], 64), sample, 64, None, NS_PER_S)
    assert not found.complete
    assert 1 in found.table
    assert max(found.table) < 64
    # No more than one further run of a rung beyond the budget.
    assert clock.now <= NS_PER_S + len(found.table) * max(found.table) * 10 * NS_PER_MS


def test_a_tiny_budget_still_measures_something(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One row, one run: better than a guess."""
    _, instance, sample = timed(monkeypatch, tmp_path, lambda rows: NS_PER_MS)
    found = measure(instance, config_of([X], [Y], 64), sample, 64, None, 1)
    assert list(found.table) == [1]
    assert (found.table[1].p50_ns, found.table[1].runs) == (NS_PER_MS, 1)


def test_sizes_beyond_twice_the_objective_are_not_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They would be late anyway; the first one beyond it is the last."""
    _, instance, sample = timed(monkeypatch, tmp_path, lambda rows: rows * NS_PER_MS)
    found = measure(instance, config_of([X], [Y], 64), sample, 64, 10 * NS_PER_MS, 100 * NS_PER_S)
    ladder = bucket_ladder(64)
    first_beyond = next(rows for rows in ladder if rows > 20)
    assert list(found.table) == [rows for rows in ladder if rows <= first_beyond]
    assert not found.complete


def test_the_largest_batch_of_a_slow_model_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A model bound by its weights, 40 ms at any size: there is no time for every rung, but for the range of them."""
    _, instance, sample = timed(monkeypatch, tmp_path, lambda rows: 40 * NS_PER_MS + rows * NS_PER_MS)
    found = measure(instance, config_of([X], [Y], 64), sample, 64, None, NS_PER_S)
    assert found.complete
    assert {1, 2, 4, 9, 18, 36, 64} <= set(found.table)
    assert len(found.table) < len(bucket_ladder(64))


def test_a_slow_cold_run_is_given_a_second_chance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """First runs allocate: only a size that is slow twice is out of reach."""
    seen: set[int] = set()

    def cold(rows: int) -> int:
        first = rows not in seen
        seen.add(rows)
        return 50 * NS_PER_MS if first else NS_PER_MS

    _, instance, sample = timed(monkeypatch, tmp_path, cold)
    found = measure(instance, config_of([X], [Y], 64), sample, 64, 10 * NS_PER_MS, 100 * NS_PER_S)
    assert found.complete


def test_an_unbatched_model_is_measured_at_one(tmp_path: Path) -> None:
    """One request is one execution."""
    instance, config = instance_of(tmp_path, onnx_models.scalar_sum())
    sample, _ = first_run(instance, config, samples(config, tmp_path))
    assert sample is not None
    assert len(requests(sample, config, 5)) == 1
    found = measure(instance, config, sample, 1, None, 50 * NS_PER_MS)
    assert list(found.table) == [1]
    assert found.table[1].p50_ns > 0


def test_what_is_not_joined_is_measured_as_one_request(tmp_path: Path) -> None:
    """A model whose outputs do not follow the rows: batches of several requests would fail."""
    config = replace(config_of([X], [Y]), dynamic_batching=None)
    sample = samples(config, tmp_path)[0]
    (segment,) = requests(sample, config, 5)
    assert (segment.rows, segment.request.rows) == (5, 5)
    assert np.array_equal(np.frombuffer(segment.request.inputs[0], "float32"), np.tile(values(sample), 5))
    assert [s.rows for s in requests(sample, config_of([X], [Y]), 5)] == [1] * 5
