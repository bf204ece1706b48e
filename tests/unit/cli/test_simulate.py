"""`onclock simulate`: what it answers, and what it says when it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.cli.simulate import SimulateOptions, read_table, simulate
from service.errors import ModelLoadError


def test_answers_capacity_and_replicas(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """From a stated latency it prints the load of one replica and the replicas a rate needs, and draws."""
    plot = tmp_path / "plot.svg"
    code = simulate(SimulateOptions(22.0, latency="5+0.5*rows", rate=3000.0, requests=1500, plot=plot))

    output = capsys.readouterr().out
    assert code == 0
    assert "one replica answers 99 % within 22 ms up to" in output
    assert "3000 requests/s: 4 replicas" in output
    assert plot.exists()


def test_reads_a_profile_and_writes_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A profile's table may jitter; the result is JSON when asked."""
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({"table": {"4": 6.0, "1": 5.0, "2": 4.9}}))
    options = SimulateOptions(22.0, profile=profile, requests=1500, as_json=True)

    assert read_table(options) == {1: 0.005, 2: 0.005, 4: 0.006}
    assert simulate(options) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["sustainable_per_s"] > 100
    assert document["replicas"] is None
    assert len(document["points"]) == 11


def test_replays_a_trace(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """With a trace there is one line, for the arrivals in it."""
    trace = tmp_path / "trace.txt"
    trace.write_text("\n".join(str(number / 100) for number in range(500)))

    assert simulate(SimulateOptions(22.0, latency="5+0.5*rows", trace=trace)) == 0
    assert "100.00%" in capsys.readouterr().out
    assert simulate(SimulateOptions(22.0, latency="5+0.5*rows", trace=trace, as_json=True)) == 0
    assert json.loads(capsys.readouterr().out)["points"][0]["attainment"] == 1.0


def test_says_when_no_rate_is_low_enough(capsys: pytest.CaptureFixture[str]) -> None:
    """An objective of hardly one execution under bursts cannot be kept by any number of replicas: exit code 1."""
    options = SimulateOptions(6.0, latency="5+0.5*rows", process="gamma", rate=100.0, requests=1500)

    assert simulate(options) == 1
    output = capsys.readouterr().out
    assert "no rate is answered to 99 %" in output
    assert "no number of replicas carries it" in output


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "state the latency once"),
        ({"latency": "5+rows"}, r"a\+b\*rows"),
        ({"latency": "-5+1*rows"}, "times > 0"),
        ({"latency": "1.2.3+1*rows"}, r"a\+b\*rows"),
        ({"latency": "5+0.5*rows", "process": "weibull"}, "poisson, gamma"),
        ({"latency": "5+0.5*rows", "plot": Path("x.gif")}, r"\.png or \.svg"),
        ({"latency": "50+0.5*rows"}, "objective of at least 101 ms"),
        ({"latency": "5+0.5*rows", "trace": Path("/nonexistent")}, "--trace"),
        ({"profile": Path("/nonexistent")}, "onclock profile"),
    ],
)
def test_errors_say_what_to_do(fields: dict[str, object], message: str) -> None:
    """Every unusable option is named, with what is expected."""
    with pytest.raises(ModelLoadError, match=message):
        simulate(SimulateOptions(**({"slo_ms": 22.0} | fields)))


@pytest.mark.parametrize(
    "text", ["nonsense", "[]", "{}", '{"table": {"x": 1}}', '{"table": {}}', '{"table": {"1": 0}}']
)
def test_unusable_profiles(text: str, tmp_path: Path) -> None:
    """A file that is not a profile is named, with what one looks like."""
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ModelLoadError, match=r"p\.json: .*table"):
        read_table(SimulateOptions(22.0, profile=path))
