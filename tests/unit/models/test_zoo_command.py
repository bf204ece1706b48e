"""`onclock models`: what it lists, refuses and goes on after. The recipes are made up."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from models.zoo import command
from models.zoo.fetch import FetchError, Wheel
from models.zoo.publish import Entry
from models.zoo.recipe import Recipe
from service.cli import main as onclock


def recipe(name: str, error: Exception | None = None, noncommercial: bool = False) -> Recipe:
    """One that publishes an entry of its name, or fails."""

    def make() -> tuple[Entry, ...]:
        sys.stdout.write("fetching\n")
        if error is not None:
            raise error
        return (Entry(name, None, {}, {"model.onnx": b"1"}),)

    wheel = Wheel(f"{name}-package", "1.0", "0" * 64, f"licence of {name}")
    return Recipe(name, "task", "summary", (wheel,), make, noncommercial)


@pytest.fixture(autouse=True)
def recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three recipes; the first fails, the last is not for commercial use."""
    made = (recipe("broken", FetchError("no network")), recipe("free"), recipe("nc", noncommercial=True))
    monkeypatch.setattr(command, "RECIPES", {one.name: one for one in made})


def run(*arguments: str) -> int:
    return command.main(arguments)


def published(repository: Path) -> list[str]:
    return sorted(path.name for path in repository.iterdir()) if repository.exists() else []


def test_licences_are_shown_before_fetching(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each package with its licence, then the work."""
    assert run("fetch", "free", "--repository", str(tmp_path)) == 0
    said = capsys.readouterr().out
    assert said.index("free-package==1.0: licence of free") < said.index("fetching") < said.index("published")
    assert published(tmp_path) == ["free"]


def test_all_goes_on_after_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What fails is named at the end; what is not for commercial use is left out, and said to be."""
    assert run("fetch", "--all", "--repository", str(tmp_path)) == 1
    said = capsys.readouterr()
    assert published(tmp_path) == ["free"]
    assert "nc: left out" in said.out
    assert "[2/2] free" in said.out
    assert "broken: no network" in said.err
    assert "failed: broken" in said.err


def test_noncommercial_models_are_to_be_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named without the flag: wrong usage, and nothing is made. With it: made."""
    with pytest.raises(SystemExit) as stopped:
        run("fetch", "nc", "--repository", str(tmp_path))
    assert stopped.value.code == 2
    assert "--accept-noncommercial" in capsys.readouterr().err
    assert published(tmp_path) == []
    assert run("fetch", "nc", "--accept-noncommercial", "--repository", str(tmp_path)) == 0
    assert published(tmp_path) == ["nc"]


@pytest.mark.parametrize("arguments", [(), ("absent",), ("free", "absent")])
def test_a_model_that_does_not_exist_is_wrong_usage(arguments: tuple[str, ...]) -> None:
    """So is none at all."""
    with pytest.raises(SystemExit) as stopped:
        run("fetch", *arguments)
    assert stopped.value.code == 2


def test_a_missing_library_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the extra that has it."""
    failing = recipe("trained", ModuleNotFoundError("No module named 'lightgbm'"))
    monkeypatch.setattr(command, "RECIPES", {"trained": failing})
    assert run("fetch", "trained", "--repository", str(tmp_path)) == 1
    assert "No module named 'lightgbm'; install the extra: pip install 'onclock[models]'" in capsys.readouterr().err


def test_the_list_names_everything(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Model, task, package, licence, and what is not for commercial use."""
    monkeypatch.setenv("COLUMNS", "200")
    assert run("list") == 0
    said = capsys.readouterr().out
    for part in ("broken", "task", "free-package==1.0: licence of free", "not for commercial use"):
        assert part in said


def test_the_command_of_the_server_leads_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`onclock models` has a help and errors of its own."""
    assert onclock(["models", "fetch", "free", "--repository", str(tmp_path)]) == 0
    assert published(tmp_path) == ["free"]
    with pytest.raises(SystemExit) as stopped:
        onclock(["models", "fetch", "fre"])
    assert stopped.value.code == 2
    assert "did you mean free?" in capsys.readouterr().err


def test_a_card_is_that_of_the_published_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("card", "free", "--repository", str(tmp_path)) == 1
    assert f"onclock models fetch free --repository {tmp_path}" in capsys.readouterr().err
    (tmp_path / "free").mkdir()
    (tmp_path / "free" / "README.md").write_text("# free\n\nIt does nothing.\n")
    assert run("card", "free", "--repository", str(tmp_path)) == 0
    assert "It does nothing." in capsys.readouterr().out


def test_nothing_to_verify_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", "--repository", str(tmp_path)) == 1
    assert "publish models first" in capsys.readouterr().out


def test_asking_where_nobody_answers_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ask", "free", "--repository", str(tmp_path)) == 1
    assert "free has no question" in capsys.readouterr().err
