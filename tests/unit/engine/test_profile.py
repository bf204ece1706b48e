"""Profiles on disk: found again when nothing changed, rescaled to the present, measured anew when in doubt."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from service.clock import NS_PER_MS, NS_PER_S
from service.engine import profile as module
from service.engine.devices import Device
from service.engine.options import plan_session
from service.engine.pool import Instance
from service.engine.profile import ProfileKey, load, model_digest, profile, profile_key, save
from service.engine.warmup import LatencySample, Measured, Sample, samples
from tests.unit.engine.served import Puppet, X, Y, config_of
from tests.unit.engine.support import CPU, double_instance

CONFIG = config_of([X], [Y], 8)
KEY = ProfileKey("a" * 64)


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    return samples(CONFIG, tmp_path)[0]


def instance_and_session() -> tuple[Instance, Puppet]:
    session = Puppet()
    return double_instance(session, (X,), (Y,), 8), session


def known(sample: Sample) -> Measured:
    table = {rows: LatencySample(rows * NS_PER_MS, rows * 2 * NS_PER_MS, 20) for rows in (1, 2, 4, 8)}
    return Measured(sample.shape, table, True)


def run(sample: Sample, cache: Path | None) -> tuple[Measured, bool, int]:
    instance, session = instance_and_session()
    found, from_cache = profile(instance, CONFIG, sample, 8, None, NS_PER_S // 4, cache, KEY)
    return found, from_cache, len(session.runs)


def test_a_profile_is_found_again(tmp_path: Path, sample: Sample) -> None:
    """The second load runs three rungs a few times instead of the whole ladder."""
    first, hit, runs = run(sample, tmp_path / "cache")
    assert not hit
    again, hit, fewer = run(sample, tmp_path / "cache")
    assert hit
    assert fewer == 15
    assert fewer < runs
    assert again.table.keys() == first.table.keys()
    assert again.complete == first.complete
    assert again.shape is sample.shape


def test_without_a_cache_everything_is_measured(tmp_path: Path, sample: Sample) -> None:
    """None: nothing is read, nothing is written."""
    assert not run(sample, None)[1]
    assert not run(sample, None)[1]
    assert list(tmp_path.iterdir()) == []


def test_saved_and_loaded_are_equal(tmp_path: Path, sample: Sample) -> None:
    """A round trip, without leftovers beside it."""
    save(tmp_path, KEY, known(sample))
    assert load(tmp_path, KEY, sample) == known(sample)
    assert [path.name for path in tmp_path.iterdir()] == [f"{KEY.digest}.json"]
    assert load(tmp_path, ProfileKey("b" * 64), sample) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"table": {}, "complete": true}',
        '{"table": {"1": [1, 2]}, "complete": true}',
        '{"table": {"1": [1, 2, 3]}}',
        '{"table": {"one": [1, 2, 3]}, "complete": true}',
        '{"table": {"1": [NaN, 2, 3]}, "complete": true}',
        '{"table": {"1": [Infinity, 2, 3]}, "complete": true}',
        '{"table": {"-1": [1, 2, 3]}, "complete": true}',
        '{"table": {"1": [0, 2, 3]}, "complete": true}',
        '{"table": [1], "complete": true}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_file_is_measured_anew(tmp_path: Path, sample: Sample, text: str | bytes) -> None:
    """And replaced by a sound one."""
    file = tmp_path / f"{KEY.digest}.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert load(tmp_path, KEY, sample) is None
    assert not run(sample, tmp_path)[1]
    assert run(sample, tmp_path)[1]


def test_a_cache_that_cannot_be_written_is_no_reason_not_to_serve(tmp_path: Path, sample: Sample) -> None:
    """A file where the directory should be: measured each time."""
    blocked = tmp_path / "cache"
    blocked.write_text("not a directory")
    assert not run(sample, blocked)[1]
    assert not run(sample, blocked)[1]


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 1.0), (3.0, 3.0), (0.5, 0.5)])
def test_a_hit_is_rescaled_to_the_present_speed(
    tmp_path: Path, sample: Sample, monkeypatch: pytest.MonkeyPatch, factor: float, expected: float
) -> None:
    """The median of the rungs looked at again: today's machine is three times slower, so is every row."""
    save(tmp_path, KEY, known(sample))
    monkeypatch.setattr(module, "time_rows", lambda i, c, s, rows: int(rows * NS_PER_MS * factor))
    found, hit, _ = run(sample, tmp_path)
    assert hit
    assert {rows: s.p50_ns for rows, s in found.table.items()} == {
        rows: int(rows * NS_PER_MS * expected) for rows in (1, 2, 4, 8)
    }
    assert found.table[8].p99_ns == int(16 * NS_PER_MS * expected)
    # What is stored stays what was measured: rescaling does not accumulate.
    assert load(tmp_path, KEY, sample) == known(sample)


def test_one_odd_rung_does_not_rescale_the_others(
    tmp_path: Path, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hiccup while one of the three is timed."""
    save(tmp_path, KEY, known(sample))
    monkeypatch.setattr(module, "time_rows", lambda i, c, s, rows: rows * NS_PER_MS * (50 if rows == 8 else 1))
    assert run(sample, tmp_path)[0].table == known(sample).table


def test_the_digest_is_of_all_files(tmp_path: Path) -> None:
    """The model's and its external data's; a changed byte changes it."""
    one, other = tmp_path / "model.onnx", tmp_path / "weights.bin"
    one.write_bytes(b"model")
    other.write_bytes(b"weights" * 500_000)
    digest = model_digest([one, other])
    assert digest == model_digest([one, other])
    assert digest != model_digest([one])
    other.write_bytes(b"weights" * 499_999 + b"weightz")
    assert digest != model_digest([one, other])


def test_the_key_changes_with_everything_that_matters(
    sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model, device, threads, session options, graph level, shape, largest batch, objective, library version."""
    plan = plan_session(CONFIG, CPU)

    def tuned(**changes: object) -> object:
        return plan_session(replace(CONFIG, session=replace(CONFIG.session, **changes)), CPU)  # type: ignore[arg-type]

    other_shape = samples(config_of([replace(X, shape=(3,))], [Y], 8), tmp_path)[0]
    keys = [
        profile_key("m", plan, sample, 8, None),
        profile_key("n", plan, sample, 8, None),
        profile_key("m", plan_session(CONFIG, Device("cpu", "cpu", 0, 1, 2)), sample, 8, None),
        profile_key("m", plan_session(CONFIG, Device("cuda:0", "gpu", 0, 1, 1)), sample, 8, None),
        profile_key("m", tuned(memory_arena=False), sample, 8, None),  # type: ignore[arg-type]
        profile_key("m", tuned(intra_op_threads=2), sample, 8, None),  # type: ignore[arg-type]
        profile_key("m", plan, other_shape, 8, None),
        profile_key("m", plan, sample, 16, None),
        profile_key("m", plan, sample, 8, 10 * NS_PER_MS),
    ]
    monkeypatch.setattr(module.ort, "get_version_string", lambda: "0.0.0")
    keys.append(profile_key("m", plan, sample, 8, None))
    assert len({key.digest for key in keys}) == len(keys)


def test_the_key_stays_for_what_does_not_matter(sample: Sample) -> None:
    """The model's name, and the process it is computed in."""
    one = profile_key("m", plan_session(CONFIG, CPU), sample, 8, None)
    renamed = profile_key("m", plan_session(replace(CONFIG, name="other"), CPU), sample, 8, None)
    assert one == renamed
    assert json.dumps(one.digest)
