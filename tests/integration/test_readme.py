"""The README is true: every snippet is run as a reader would, on ports of the test's.

A block that this test does not know fails it: whoever adds one adds it here.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import onnx_models
from tests.support.server import ROOT, RunningServer, running_server
from tests.support.venvs import python_with

BIN = Path(sys.executable).parent
COMMAND_S = 120.0
# What `pip install tritonclient[grpc]` gives, at the version that the conformance tests are about.
CLIENT = "tritonclient[grpc]==2.73.0"
# Run by CI and by people, too long to be run by a test of their own: only that they exist is checked.
LONG = (
    "make test",
    "make lint types",
    "make sim",
    "make bench",
    "make bench-gpu",
    "make classify",
    "make zoo",
    "make chart",
)


def blocks() -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks, in order."""
    text = (ROOT / "README.md").read_text()
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[str]:
    """The commands of a shell block, without their comments."""
    return [line.split(" # ")[0].strip() for line in block.splitlines() if line.strip() and not line.startswith("#")]


def run(command: list[str], where: Path = ROOT) -> str:
    """What a command prints. It must succeed."""
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stdout}\n{done.stderr}"
    return done.stdout


def replaced(text: str, old: str, new: str) -> str:
    """`text` with the port of the README replaced; it must be there."""
    assert old in text, f"the snippet no longer contains {old}"
    return text.replace(old, new)


@pytest.fixture(scope="module")
def examples() -> Iterator[RunningServer]:
    """The server of the first block."""
    with running_server(ROOT / "models" / "examples") as server:
        yield server


def test_the_blocks_are_those_tested_here() -> None:
    """A new block, or one in another place, needs a test."""
    kinds = [language or text.splitlines()[0] for language, text in blocks()]
    assert kinds == ["sh", "sh", "python", "models/", "# config.pbtxt", "sh", "sh", "sh"]


def test_make_serve_serves_the_examples() -> None:
    """What `make serve` would run is the server with the repository that the other snippets ask."""
    assert commands(blocks()[0][1]) == ["make serve"]
    planned = run(["make", "-n", "serve"])
    assert "onclock serve --model-repository models/examples" in planned


def test_the_digits_client(examples: RunningServer) -> None:
    """It asks for real digits and draws them beside the answers."""
    (command,) = commands(blocks()[1][1])
    words = shlex.split(replaced(command, ".venv/bin/python", sys.executable))
    printed = run([*words, "--url", examples.address])
    assert len(printed.splitlines()) > 8
    assert "digit" in printed.lower() or re.search(r"\b\d\b", printed)


def test_the_triton_client(examples: RunningServer) -> None:
    """The published client, in an environment that has nothing of ours."""
    snippet = replaced(blocks()[2][1], "localhost:8001", examples.address)
    printed = run([str(python_with(CLIENT)), "-c", snippet])
    assert re.fullmatch(r"\[\[?\d\]?\]\n", printed), printed


def test_a_repository_of_ones_own(tmp_path: Path) -> None:
    """Laid out and configured as shown, checked, measured, simulated and served by the commands shown."""
    layout, config, shell = (blocks()[i][1] for i in (3, 4, 5))
    assert re.findall(r"[\w./]+", layout)[:4] == ["models/", "fraud/", "config.pbtxt", "optional"]
    model = tmp_path / "models" / "fraud"
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(config)
    (model / "1" / "model.onnx").write_bytes(onnx_models.tree_classifier().SerializeToString())
    *tools, serve = commands(shell)
    for command in tools:
        words = shlex.split(command)
        assert words[0] == "onclock"
        assert run([str(BIN / "onclock"), *words[1:]], tmp_path)
    assert serve == "onclock serve --model-repository models"
    with running_server(tmp_path / "models") as server:
        (ready,) = server.log_lines("model ready")
        assert (ready["model"], ready["slo_ms"]) == ("fraud", 20.0)


def test_the_load_test(examples: RunningServer, tmp_path: Path) -> None:
    """Both commands, shortened; a busy machine may make them void (3), nothing may make them wrong."""
    make, search = commands(blocks()[6][1])
    assert make == "make load"
    where = ["--server", examples.address, "--metrics", "off", "--duration", "2s", "--warm-up", "0.5s"]
    for words in (["run", "steady", *where, "--out", str(tmp_path)], [*shlex.split(search)[3:], *where]):
        done = subprocess.run(
            [str(BIN / "python"), "-m", "loadtests", *words], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode in (0, 1, 3), done.stderr
    assert (tmp_path / "steady.html").exists()


def test_the_other_targets_exist() -> None:
    """`make` knows every target that the README names."""
    named = {command for block in (blocks()[0], blocks()[7]) for command in commands(block[1])}
    text = (ROOT / "README.md").read_text()
    named |= {f"make {target}" for target in re.findall(r"`make ([a-z ]+)`", text)}
    assert named <= {"make serve", *LONG}
    for command in sorted(named):
        run([*shlex.split(command)[:1], "-n", *shlex.split(command)[1:]])


def test_links_lead_somewhere() -> None:
    """Every file that the README links to is there."""
    text = (ROOT / "README.md").read_text()
    linked = re.findall(r"\]\((?!http)([^)#]+)", text)
    assert linked
    assert not [link for link in linked if not (ROOT / link).exists()]


def test_the_flags_that_the_text_names_exist() -> None:
    """Also where no snippet uses them."""
    printed = run([str(BIN / "onclock"), "serve", "--help"])
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"`(--[a-z-]+)", text))
    assert named
    assert not [flag for flag in named if flag not in printed]
