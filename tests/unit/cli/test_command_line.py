"""`onclock` as a process: help, errors, exit codes, and each command once."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import onnx
import pytest

from service.cli.settings_flags import GROUPS
from service.config.settings import Settings, env_name, flag_name
from tests.support.onnx_models import mlp

ROOT = Path(__file__).parents[3]


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without settings of its own, and with a wide terminal."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ONCLOCK_")}
    return {**kept, "COLUMNS": "200", "TERM": "dumb", **variables}


def onclock(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "service", *map(str, arguments)],
        cwd=ROOT,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one small model."""
    root = tmp_path_factory.mktemp("repository")
    (root / "tiny" / "1").mkdir(parents=True)
    onnx.save(mlp(4, 4, 2), root / "tiny" / "1" / "model.onnx")
    return root


def test_the_help_page_lists_every_command_with_examples_and_exit_codes() -> None:
    """What a newcomer types first."""
    done = onclock("--help")
    assert done.returncode == 0
    for command in ("serve", "check", "profile", "simulate", "version"):
        assert re.search(rf"^    {command} ", done.stdout, flags=re.MULTILINE)
    assert "examples:" in done.stdout
    assert "exit codes: 0 done, 1 failed, 2 wrong usage" in done.stdout


def test_the_help_page_of_serve_explains_every_setting() -> None:
    """Flag, description, what is accepted, default and variable."""
    text = " ".join(onclock("serve", "--help").stdout.split())
    for name, field in Settings.model_fields.items():
        assert flag_name(name) in text
        assert env_name(name) in text
        assert " ".join((field.description or "").split()) in text


def test_every_setting_is_in_one_group_of_the_help_page() -> None:
    """A new setting cannot be forgotten."""
    listed = [name for names in GROUPS.values() for name in names]
    assert sorted(listed) == sorted(Settings.model_fields)


@pytest.mark.parametrize("command", ["check", "profile", "simulate"])
def test_each_command_has_a_help_page_with_examples(command: str) -> None:
    """And its exit codes."""
    done = onclock(command, "--help")
    assert done.returncode == 0
    assert f"examples:\n  onclock {command}" in done.stdout
    assert "exit codes: 0" in done.stdout


def test_without_a_command_the_help_page_is_shown() -> None:
    """As wrong usage."""
    done = onclock()
    assert done.returncode == 2
    assert "commands:" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["serve", "--grpc-prt", "1"], "onclock serve does not know '--grpc-prt'; did you mean --grpc-port?"),
        (["--vesion"], "onclock does not know '--vesion'; did you mean --version?"),
        (["serve"], "--model-repository (or ONCLOCK_MODEL_REPOSITORY) is missing"),
        (["serve", "--model-repository", "/nonexistent"], "'/nonexistent' is not a directory"),
        (["serve", "--model-repository", "/", "--device", "tpu"], "expected auto or cpu or cuda"),
        (["profile", "m", "--slo-ms", "0"], "'0' is not accepted; expected a number above 0"),
        (["profile", "m", "--slo-ms", "nan"], "'nan' is not accepted; expected a number from 0"),
        (["profile", "m", "--budget-ms", "1.5"], "'1.5' is not accepted; expected a whole number from 1"),
        (["simulate", "--slo-ms", "5"], "one of the arguments --profile --latency is required"),
        (["nothing"], "invalid choice: 'nothing'"),
    ],
)
def test_wrong_usage_is_explained_with_exit_code_2(arguments: list[str], expected: str) -> None:
    """On stderr, without a traceback."""
    done = onclock(*arguments)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_wrong_variable_is_named_like_a_wrong_flag() -> None:
    """Both spellings are in the message."""
    done = onclock("serve", "--model-repository", "/", ONCLOCK_GRPC_PORT="80x")
    assert done.returncode == 2
    assert "--grpc-port (or ONCLOCK_GRPC_PORT): '80x' is not accepted" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["profile", "/nonexistent"],
        ["profile", "tests"],
        ["check", "/nonexistent"],
        ["simulate", "--profile", "/nonexistent", "--slo-ms", "5"],
        ["simulate", "--latency", "nonsense", "--slo-ms", "5"],
    ],
)
def test_what_cannot_be_done_is_one_line_with_exit_code_1(arguments: list[str]) -> None:
    """No traceback for a path that is wrong."""
    done = onclock(*arguments)
    assert done.returncode == 1
    assert re.fullmatch(r"onclock: error: .+\n", done.stderr)


def test_version_says_what_decides_behaviour() -> None:
    """Our version, the runtime's, and the device it would take."""
    done = onclock("version")
    assert done.returncode == 0
    assert re.search(r"^onclock \d", done.stdout)
    assert "onnxruntime" in done.stdout
    assert re.search(r"^device: ", done.stdout, flags=re.MULTILINE)
    assert onclock("--version").stdout == done.stdout.splitlines()[0] + "\n"


def test_check_tells_what_would_load(repository: Path, tmp_path: Path) -> None:
    """0 when everything would, 1 when something would not; --run loads for real."""
    good = onclock("check", repository, "--run", "--device", "cpu")
    assert good.returncode == 0, good.stderr
    assert "tiny" in good.stdout
    (tmp_path / "broken" / "1").mkdir(parents=True)
    (tmp_path / "broken" / "1" / "model.onnx").write_bytes(b"nonsense")
    bad = onclock("check", tmp_path)
    assert bad.returncode == 1
    assert "broken" in bad.stdout


def test_a_profile_is_what_simulate_reads(repository: Path, tmp_path: Path) -> None:
    """profile --json | simulate --profile: the two commands fit together."""
    picture = tmp_path / "tiny.png"
    done = onclock(
        "profile", repository / "tiny", "--device", "cpu", "--budget-ms", "300", "--slo-ms", "20", "--json",
        "--plot", picture,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model"] == "tiny"
    assert found["table"]["1"] > 0
    assert found["promise"]["slo_ms"] == pytest.approx(2 * found["table"][str(found["promise"]["rows"])], rel=1e-3)
    assert found["capacity"]["sustainable_rows_per_s"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "tiny.json").write_text(done.stdout)
    simulated = onclock("simulate", "--profile", tmp_path / "tiny.json", "--slo-ms", "20", "--requests", "500")
    assert simulated.returncode == 0, simulated.stderr


def test_profile_prints_a_table_and_the_promise(repository: Path) -> None:
    """For people: rows, latencies, throughput, and the objective worth stating."""
    done = onclock("profile", repository / "tiny" / "1" / "model.onnx", "--device", "cpu", "--budget-ms", "300")
    assert done.returncode == 0, done.stderr
    assert re.search(r"rows\s+p50 ms\s+p99 ms\s+rows/s", done.stdout)
    assert "shortest objective worth promising: latency_slo_ms" in done.stdout


def test_profile_names_the_versions_there_are(repository: Path) -> None:
    """When the one asked for is not."""
    done = onclock("profile", repository / "tiny", "--version", "7")
    assert done.returncode == 1
    assert "there is no version 7; there are: 1" in done.stderr


def test_serve_serves_until_it_is_told_to_stop(repository: Path, tmp_path: Path) -> None:
    """It says which ports it took, answers a scrape, and ends with 0 on SIGTERM. A mistyped variable is a warning."""
    process = subprocess.Popen(
        [
            sys.executable, "-m", "service", "serve", "--model-repository", str(repository), "--grpc-port", "0",
            "--metrics-port", "0", "--device", "cpu", "--profile-cache", "none", "--profile-budget-ms", "100",
        ],
        cwd=ROOT,
        env=environment(ONCLOCK_GRPC_PRT="1"),
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        lines = []
        for text in process.stderr:
            lines.append(json.loads(text))
            if lines[-1]["message"] == "ready":
                break
        listening = next(line for line in lines if line["message"] == "listening")
        with urllib.request.urlopen(f"http://127.0.0.1:{listening['metrics_port']}/metrics", timeout=10) as answer:
            assert b'onclock_model_ready{model="tiny",version="1"} 1\n' in answer.read()
        socket.create_connection(("127.0.0.1", listening["grpc_port"]), timeout=10).close()
        assert any("did you mean ONCLOCK_GRPC_PORT?" in line["message"] for line in lines)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_serve_fails_with_a_reason_when_a_port_is_taken(repository: Path) -> None:
    """Exit code 1; the log line names the address."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flag, other in (("--metrics-port", "--grpc-port"), ("--grpc-port", "--metrics-port")):
            done = onclock("serve", "--model-repository", repository, "--device", "cpu", flag, str(port), other, "0")
            assert done.returncode == 1
            assert f"127.0.0.1:{port}" in done.stderr
