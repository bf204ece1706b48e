"""Other people's load testers, run as `docs/load-testing-other-tools.md` says.

They are large to build or to fetch, so they are not part of every run: `ONCLOCK_TEST_LOAD_TESTERS=1` asks for them, and
what is then not on the PATH is a failure.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.server import ROOT, RunningServer, running_server

DOC = ROOT / "docs" / "load-testing-other-tools.md"
EXAMPLES = ROOT / "models" / "examples"

pytestmark = pytest.mark.skipif(
    os.environ.get("ONCLOCK_TEST_LOAD_TESTERS") != "1", reason="set ONCLOCK_TEST_LOAD_TESTERS=1 and install the tools"
)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(EXAMPLES) as running:
        yield running


def command(tool: str, address: str) -> list[str]:
    """The command of the document, aimed at the test's server."""
    (line,) = re.findall(rf"^{tool} .*$", DOC.read_text(), re.MULTILINE)
    words = [word.replace("localhost:8001", address) for word in shlex.split(line)]
    assert shutil.which(words[0]), f"{words[0]} is not on the PATH; see {DOC}"
    return words


def run(words: list[str], **environment: str) -> str:
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_ghz(server: RunningServer) -> None:
    """All of a thousand calls are answered."""
    assert re.search(r"\[OK\]\s+1000 responses", run(command("ghz", server.address)))


def test_k6(server: RunningServer) -> None:
    """The script's own thresholds hold, or k6 ends with an error."""
    printed = run(command("k6", server.address), SERVER=server.address)
    assert "checks_failed......: 0.00%" in printed


def test_perf_analyzer(tmp_path: Path) -> None:
    """A measurement, of a model without an objective."""
    model = tmp_path / "digits"
    shutil.copytree(EXAMPLES / "digits", model)
    config = model / "config.pbtxt"
    config.write_text(re.sub(r"^parameters.*$", "", config.read_text(), flags=re.MULTILINE))
    with running_server(tmp_path) as server:
        printed = run(command("perf_analyzer", server.address))
    throughput = re.search(r"throughput: ([\d.]+) infer/sec", printed)
    assert throughput
    assert float(throughput[1]) > 150
