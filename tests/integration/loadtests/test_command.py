"""`python -m loadtests` as it is used: against the real server with its example models."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.server import ROOT, RunningServer, running_server
from tests.support.stream import wait_for


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(ROOT / "models" / "examples", "--metrics-port", "0") as running:
        yield running


def loadtests(*arguments: str, code: int | None = 0) -> str:
    """Run the command; what it printed, both outputs together."""
    done = subprocess.run(
        [sys.executable, "-m", "loadtests", *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
    )  # fmt: skip
    if code is not None:
        assert done.returncode == code, done.stdout[-3000:]
    return done.stdout


def at(server: RunningServer) -> list[str]:
    return ["--server", server.address, "--metrics", server.metrics_url]


# A test machine may be busy: what is judged here is not speed, and a client that is late is no fault of a test.
EASY = """
name: easy
duration: 2s
warm_up: 0.5s
slo: 1s
arrivals: {kind: poisson, rate: 100}
load:
  - {model: digits, rows: {1: 0.5, 4: 0.5}}
  - {model: wine, priority: 1}
"""


def test_run_report_compare(server: RunningServer, tmp_path: Path) -> None:
    """A run leaves records and pages; the page is made again from the records; two runs are compared."""
    scenario = tmp_path / "easy.yaml"
    scenario.write_text(EASY + "pass: {attainment: 0.9, late_share: 0.1}\n")
    out = tmp_path / "out"
    printed = loadtests("run", str(scenario), *at(server), "--out", str(out), code=None)
    assert "Every request accounted for" in printed
    names = {path.name for path in out.iterdir()}
    assert names == {"easy.parquet", "easy.html", "easy.json", "easy.md"}
    document = json.loads((out / "easy.json").read_text())
    total = document["analysis"]["total"]
    assert sum(total["outcomes"].values()) == total["offered"] > 100
    assert total["outcomes"]["error"] == 0
    assert document["run"]["server_name"].startswith("onclock")
    assert document["run"]["scrapes"], "the server's metrics were not read"
    before = (out / "easy.html").read_bytes()
    loadtests("report", str(out / "easy.parquet"), code=None)
    assert (out / "easy.html").read_bytes() == before
    printed = loadtests("compare", str(out / "easy.parquet"), str(out), "--names", "one,two", "--out", str(out))
    assert "no difference" in printed
    assert (out / "compare_one_two.html").exists()


def workers_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def answered(server: RunningServer) -> int:
    with urllib.request.urlopen(server.metrics_url, timeout=10) as answer:
        text = answer.read().decode()
    return sum(int(n) for n in re.findall(r"^nv_inference_request_success\{.*\} (\d+)$", text, re.MULTILINE))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_workers_end_with_the_command(server: RunningServer, tmp_path: Path, number: int, code: int) -> None:
    """However it is ended: load that nobody watches is not sent on."""
    scenario = tmp_path / "long.yaml"
    scenario.write_text(EASY.replace("duration: 2s", "duration: 600s"))
    command = [sys.executable, "-m", "loadtests", "run", str(scenario), *at(server), "--out", str(tmp_path)]
    before = answered(server)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: answered(server) > before, "the load")
        workers = workers_of(process.pid)
        assert workers
        process.send_signal(number)
        assert process.wait(30) == code
    wait_for(lambda: not any(alive(worker) for worker in workers), "the end of the workers")


def test_streams_of_the_real_server(server: RunningServer, tmp_path: Path) -> None:
    """Requests on long streams are answered like others."""
    scenario = tmp_path / "streams.yaml"
    scenario.write_text(EASY.replace("name: easy", "name: streams").replace("{model:", "{rpc: stream, model:"))
    out = tmp_path / "out"
    loadtests("run", str(scenario), *at(server), "--out", str(out), code=None)
    total = json.loads((out / "streams.json").read_text())["analysis"]["total"]
    assert total["offered"] > 100
    assert total["outcomes"]["error"] == 0
    assert total["outcomes"]["in_slo"] > 0


def test_exit_codes(server: RunningServer, tmp_path: Path) -> None:
    """A pipeline is told: missed, wrong usage, could not run."""
    missed = tmp_path / "missed.yaml"
    missed.write_text(EASY + "pass: {p50_ms: 0.001}\n")
    assert "Failed" in loadtests("run", str(missed), *at(server), "--out", str(tmp_path), "--quiet", code=1)
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(EASY + "passs: {}\n")
    assert "passs: unknown key" in loadtests("run", str(wrong), code=2)
    assert "those are burst, " in loadtests("run", "nobody", code=2)
    assert "does not answer" in loadtests("run", "steady", "--server", "127.0.0.1:1", code=4)


def test_search(server: RunningServer, tmp_path: Path) -> None:
    """The highest load of a model that is slowed down by many rows."""
    scenario = tmp_path / "heavy.yaml"
    scenario.write_text(
        "name: heavy\nduration: 1s\nwarm_up: 0.3s\ndrain: 1s\nslo: 1s\narrivals: {kind: poisson, rate: 400}\n"
        "load: [{model: digits_svm, rows: 64}]\n"
    )
    printed = loadtests("search", str(scenario), *at(server), "--tolerance", "0.9", code=None)
    assert "in time" in printed


def test_sweep(server: RunningServer, tmp_path: Path) -> None:
    """A curve beside the optimum, with a table measured over the wire."""
    arguments = ["sweep", "sweep", *at(server), "--loads", "0.1,0.2", "--duration", "1s", "--warm-up", "0.3s"]
    printed = loadtests(*arguments, "--out", str(tmp_path), code=None)
    assert "Load by load" in printed, printed[-2000:]
    document = json.loads((tmp_path / "sweep_sweep.json").read_text())
    assert [point["load"] for point in document["points"]] == [0.1, 0.2]
    assert all(point["goodput"]["value"] <= point["offered"] + 1 for point in document["points"])
    assert all(0 < point["optimum"] <= point["offered"] * 1.001 for point in document["points"])


def test_help_is_a_manual() -> None:
    """Commands, exit codes, scenarios and every key."""
    text = loadtests("--help")
    assert "exit codes" in text
    for command in ("run", "report", "compare", "search", "sweep", "list", "explain"):
        assert f"  {command} " in text
        loadtests(command, "--help")
    assert "steady" in loadtests("list")
    assert "p99_within_slo" in loadtests("explain")
