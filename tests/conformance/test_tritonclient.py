"""The unmodified published client works: each check of `tritonclient_script.py` passes against a running server.

The client and our generated messages register the same protobuf package, so it runs in a process and an environment of
its own.
"""

from __future__ import annotations

import ast
import functools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from onnx import helper

from tests.support import onnx_models
from tests.support.onnx_models import write_model
from tests.support.server import running_server
from tests.support.venvs import python_with

SCRIPT = Path(__file__).with_name("tritonclient_script.py")
# The newest, and one from before most users' services were written. Each with what it needs besides.
CURRENT, OLD = "2.73.0", "2.34.0"
REQUIREMENTS = {
    CURRENT: ["tritonclient[grpc]==2.73.0"],
    OLD: ["tritonclient[grpc]==2.34.0", "numpy==1.26.4", "ml-dtypes==0.5.4"],
}
# The whole script; the slowest check takes a second.
SCRIPT_TIMEOUT_S = 120.0

CHECKS = [
    node.name
    for node in ast.parse(SCRIPT.read_text()).body
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("check_")
]
# What the old client itself cannot do: it has no BF16, no parameters of type float, no handle to cancel a call by, and
# its asyncio half forgot to import json.
NOT_IN_OLD = {
    "check_bf16",
    "check_headers_and_parameters_of_the_client_are_let_through",
    "check_cancelled_call",
    "check_aio",
}
CASES = [
    *((CURRENT, check) for check in CHECKS),
    *((OLD, check) for check in CHECKS if check not in NOT_IN_OLD),
]


def _times(factor: int) -> Any:
    """`x` FP32 [N, 4] -> `y`, the sum of `factor` copies of x."""
    nodes = [helper.make_node("Sum", ["x"] * factor, ["y"])]
    tensors = [onnx_models.value(name, "FP32", ["N", 4]) for name in "xy"]
    return onnx_models.make_model("times", nodes, tensors[:1], tensors[1:])


def write_repository(directory: Path) -> None:
    """The models that the script talks to."""
    for datatype in onnx_models.ELEMENT_TYPES:
        name = f"identity_{datatype.lower()}"
        write_model(directory, name, onnx_models.identity(datatype))
    both = "max_batch_size: 8\nversion_policy { all {} }\ndynamic_batching {}\n"
    both += 'output { name: "y" data_type: TYPE_FP32 dims: 4 label_filename: "labels.txt" }\n'
    write_model(directory, "double", _times(2), 1, both)
    write_model(directory, "double", _times(3), 2)
    (directory / "double" / "labels.txt").write_text("one\ntwo\n")
    write_model(directory, "counted", onnx_models.identity())
    for name in ("scalar_sum", "empty_rows", "text_encoder", "image_identity", "poison"):
        write_model(directory, name, getattr(onnx_models, name)())
    # The parameter: measured at load, so that a deadline of 10 ms is known to be out of reach.
    write_model(directory, "slow", onnx_models.slow_for(200), config="max_batch_size: 8\n")
    ranked = "max_batch_size: 1\ndynamic_batching { priority_levels: 2 default_priority_level: 2 }\n"
    write_model(directory, "ranked", onnx_models.slow_for(50), config=ranked)
    write_model(directory, "probe", onnx_models.sequence_probe(), config=onnx_models.PROBE_CONFIG)
    write_model(directory, "named", onnx_models.named_sequences(), config=onnx_models.NAMED_CONFIG)
    (directory / "broken" / "1").mkdir(parents=True)
    (directory / "broken" / "1" / "model.onnx").write_bytes(b"this is no model")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, dict[str, Any]]]:
    """What each check of the script reported with a version of the client; the script is run once for each."""

    @functools.cache
    def run(version: str) -> dict[str, dict[str, Any]]:
        python = python_with(*REQUIREMENTS[version])
        repository = tmp_path_factory.mktemp("repository")
        write_repository(repository)
        traces = tmp_path_factory.mktemp("traces") / "trace.json"
        with (
            running_server(repository, "--trace-file", str(traces), "--allow-client-shm", "true") as server,
            running_server(repository, "--model-control-mode", "explicit") as explicit,
        ):
            done = subprocess.run(
                [str(python), str(SCRIPT), server.address, str(traces), explicit.address, str(repository)],
                capture_output=True,
                text=True,
                timeout=SCRIPT_TIMEOUT_S,
                check=False,
            )
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if not lines:
            pytest.fail(f"the script ended with {done.returncode} before its first check:\n{done.stderr}")
        return {line["check"]: line for line in lines}

    return run


@pytest.mark.parametrize(("version", "check"), CASES)
def test_client(version: str, check: str, outcomes: Callable[[str], dict[str, dict[str, Any]]]) -> None:
    """What the check's name says works with the published client."""
    reported = outcomes(version)
    assert check in reported, f"the script ended before {check}; it did {list(reported)}"
    assert reported[check]["ok"], reported[check]["error"]
