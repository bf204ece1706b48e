"""`docs/load-testing.md` says what is so: its scenario is accepted, its kinds of arrivals and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from loadtests.cli import build_parser
from loadtests.scenario import parse_scenario

TEXT = (Path(__file__).parents[3] / "docs" / "load-testing.md").read_text()
LEAST = {"name": "t", "duration": "1s", "capacity": 100, "load": [{"model": "m"}]}


def test_the_scenario_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands in the text, with the token in the environment."""
    monkeypatch.setenv("TOKEN", "secret")
    (block,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    scenario = parse_scenario(yaml.safe_load(block), "docs", Path())
    assert scenario.metadata == {"authorization": "Bearer secret"}
    assert [entry.title for entry in scenario.load] == ["card", "batch"]


def test_the_kinds_of_arrivals_are_accepted() -> None:
    """Every row of the table, and the closed loop."""
    kinds = re.findall(r"`(\{kind: .*?\})`", TEXT)
    assert len(kinds) >= 8
    for text in kinds:
        arrivals = yaml.safe_load(text)
        if arrivals["kind"] == "closed":
            arrivals["concurrency"] = 1
        parse_scenario({**LEAST, "arrivals": arrivals}, text, Path())


def test_the_commands_exist() -> None:
    """Those of the first block, and those of the table of questions."""
    commands = re.findall(r"^    python -m loadtests ([a-z_ ]+?)(?: +#.*)?$", TEXT, re.MULTILINE)
    commands += re.findall(r"^\| [^|]*\| `([^`]+)`", TEXT[TEXT.index("## Questions and commands") :], re.MULTILINE)
    assert len(commands) >= 7
    for command in commands:
        build_parser().parse_args(command.split())
