"""Scenarios: what is accepted, and that what is not is named with what was expected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from loadtests.cli import SHIPPED
from loadtests.errors import ScenarioError
from loadtests.explain import explanation
from loadtests.scenario import Rate, Scenario, load_scenario, parse_duration, parse_rate, parse_scenario

LEAST = "name: t\nduration: 5s\narrivals: {kind: poisson, rate: 10}\nload: [{model: m}]\n"


def parse(text: str, **more: Any) -> Scenario:
    return parse_scenario({**yaml.safe_load(text), **more}, "t.yaml", Path("/base"))


def test_the_least_that_can_be_said() -> None:
    """Everything else has a default."""
    scenario = parse(LEAST)
    assert (scenario.duration, scenario.warm_up, scenario.workers, scenario.seed) == (5.0, 2.0, 1, 1)
    assert scenario.load[0].rows == {1: 1.0}
    assert scenario.load[0].title == "m"


@pytest.mark.parametrize(
    ("text", "seconds"), [("20s", 20), ("50ms", 0.05), ("1.5m", 90), ("2h", 7200), ("100us", 1e-4), (0, 0)]
)
def test_durations(text: object, seconds: float) -> None:
    """With their units."""
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", [5, "5", "s", "-5s", "five", None, True, [1]])
def test_no_durations(text: object) -> None:
    """A bare number could be anything."""
    with pytest.raises(ValueError, match="is no duration; expected a number with a unit"):
        parse_duration(text)


def test_rates() -> None:
    """Per second, or in units of the capacity, which must then be known."""
    assert parse_rate(500) == parse_rate("500") == parse_rate("500/s") == Rate(500.0)
    assert parse_rate("0.8x") == Rate(0.8, of_capacity=True)
    assert Rate(0.5, True).per_second(200.0) == 100.0
    with pytest.raises(ScenarioError, match="capacity: measure"):
        Rate(0.5, True).per_second(None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"duration": None}, "duration: None is no duration"),
        ({"durration": "5s"}, "durration: unknown key"),
        ({"name": "a b"}, "name: "),
        ({"load": []}, "load: "),
        ({"load": [{"model": "m", "rowz": 1}]}, "load[0].rowz: unknown key"),
        ({"load": [{"model": "m", "rows": 0}]}, "load[0].rows: 0: 1.0 needs a number of at least 1"),
        ({"load": [{"model": "m", "rows": {1: "a"}}]}, "load[0].rows: 1: 'a' is no number with a weight"),
        ({"load": [{"model": "m"}, {"model": "m"}]}, "two load entries are called 'm'"),
        ({"load": [{}]}, "load[0].model: missing"),
        ({"arrivals": {"kind": "pois", "rate": 1}}, "arrivals: needs a `kind`, one of"),
        ({"arrivals": {"kind": "poisson"}}, "arrivals.rate: missing"),
        ({"arrivals": {"kind": "poisson", "rate": 0}}, "arrivals.rate: 0 is no rate"),
        ({"arrivals": {"kind": "gamma", "rate": 1, "cv": -1}}, "arrivals.cv: "),
        ({"arrivals": {"kind": "replay", "file": "x", "rate": 5, "speed": 2}}, "give `speed` or `rate`"),
        ({"arrivals": None}, "has no `arrivals`, and neither has the scenario"),
        ({"arrivals": {"kind": "closed", "concurrency": 0}}, "arrivals.concurrency: "),
        ({"pass": {"p99_within_slo": True}}, "`p99_within_slo` needs a `slo`"),
        ({"pass": {"goodput_of_capacity": 0.5}}, "needs a `capacity`"),
        ({"pass": {"attainment": 1.5}}, "pass.attainment: "),
        ({"metadata": {"Authorization": "x"}}, "'Authorization' is no metadata key"),
        ({"metadata": {"grpc-timeout": "1S"}}, "'grpc-timeout' is no metadata key"),
        ({"load": [{"model": "m", "payload": {"npz": "a", "texts": "b"}}]}, "a payload has one source"),
        ({"load": [{"model": "m", "payload": {"images": "a"}}]}, "`images` and `preprocess` belong together"),
        ({"load": [{"model": "m", "payload": {"npz": "a", "dims": {"x": [1]}}}]}, "for random tensors"),
        ({"workers": 1000}, "workers: "),
        ({"duration": "30h"}, "duration: "),
    ],
)
def test_faults_are_named(change: dict[str, Any], said: str) -> None:
    """With the file, the path of the key, and what was expected."""
    with pytest.raises(ScenarioError) as caught:
        parse(LEAST, **change)
    assert str(caught.value).startswith("t.yaml: ")
    assert said in str(caught.value)


def test_all_faults_at_once() -> None:
    """One line each."""
    with pytest.raises(ScenarioError) as caught:
        parse(LEAST, workers=0, seed=-1, typo=1)
    assert len(str(caught.value).splitlines()) == 3


def test_paths_and_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are relative to the file, secrets come from the environment."""
    monkeypatch.setenv("TOKEN", "abc")
    text = LEAST.replace("{model: m}", "{model: m, payload: {npz: data/a.npz}}")
    scenario = parse(text, metadata={"authorization": "Bearer ${TOKEN}"}, tls={"ca": "/etc/ca.pem"})
    assert scenario.load[0].payload.npz == Path("/base/data/a.npz")
    assert scenario.metadata == {"authorization": "Bearer abc"}
    assert scenario.tls is not None
    assert scenario.tls.ca == Path("/etc/ca.pem")
    with pytest.raises(ScenarioError, match=r"\$\{NOBODY\} is used, but the environment variable is not set"):
        parse(LEAST, metadata={"a": "${NOBODY}"})


@pytest.mark.parametrize("text", ["- a", "a: [", ""])
def test_no_scenario_at_all(text: str, tmp_path: Path) -> None:
    """A message, not a traceback."""
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ScenarioError, match=r"s\.yaml: "):
        load_scenario(tmp_path / "s.yaml")
    with pytest.raises(ScenarioError, match="cannot be read"):
        load_scenario(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_what_is_shipped_is_right(path: Path) -> None:
    """Accepted, described, named as its file, with something to judge, and the same when read from a run."""
    scenario = load_scenario(path)
    assert scenario.name == path.stem
    assert scenario.description
    if path.stem != "sweep":
        assert scenario.criteria.model_dump(exclude_defaults=True) or any(e.criteria for e in scenario.load)
    again = parse_scenario(scenario.model_dump(mode="json", by_alias=True, exclude_defaults=True), "again", Path())
    assert again == scenario


def test_what_is_asked_for_is_shipped() -> None:
    """Every situation that a service should be seen in before production."""
    wanted = {
        "steady", "burst", "ramp", "step", "mixed_models", "mixed_priorities", "soak", "slow_clients",
        "cancellation_storm", "tiny", "large",
    }  # fmt: skip
    assert wanted <= {path.stem for path in SHIPPED.glob("*.yaml")}


def test_every_key_is_explained() -> None:
    """The manual is made of the classes that check: no key is missing."""
    text = explanation()
    for key in ("duration", "p99_within_slo", "cancel", "preprocess", "weight", "concurrency", "for", "from"):
        assert f"    {key} " in text, key
    assert "duration             duration                     required" in text
