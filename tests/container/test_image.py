"""The real image, built from the real `Dockerfile` and run as an orchestrator would: not root, nothing to write to."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import numpy as np
import pytest

from service.config.keys import Group, entry_text, new_key
from tests.container.podman import LOCKED, PLAIN, ROOT, podman, running
from tests.support.certificates import Authority
from tests.support.client import Client, arrays, request

# They build for minutes, and one runs a load test: not beside tests that measure.
pytestmark = pytest.mark.timed

# Seen with `--log-cli-level=INFO`.
LOG = logging.getLogger(__name__)

EXAMPLES = f"{ROOT / 'models' / 'examples'}:/models:ro"
# Of what is not the base: a guard against what creeps in, not a goal.
MOST_BYTES = 450 << 20
MOST_START_S = 20.0


def digits(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((1, 64), dtype=np.float32)


def test_what_is_in_it(image: str) -> None:
    """Not root, by number; no shell, no compiler, no package manager; not larger than it has to be."""
    described = json.loads(podman("inspect", "--type=image", image).stdout)[0]
    assert described["Config"]["User"] == "65532:65532"
    assert described["Config"]["StopSignal"] == "SIGTERM"
    LOG.info("%.0f MB", described["Size"] / 1e6)
    assert described["Size"] < MOST_BYTES, f"{described['Size'] >> 20} MiB"
    quiet = ("run", "--rm", "--network=none", *PLAIN, *LOCKED)
    tools = ("sh", "bash", "g++", "apt", "dpkg", "pip")
    code = f"import shutil, os; print([tool for tool in {tools} if shutil.which(tool)], os.getuid())"
    found = podman(*quiet, "--entrypoint=/opt/onclock/bin/python", image, "-c", code)
    assert found.stdout.split() == ["[]", "65532"]
    assert podman(*quiet, image, "--version").stdout.startswith("onclock ")


def test_it_serves_the_examples_with_nothing_to_write_to(image: str) -> None:
    """By the native ingress, ready within seconds; it ends by SIGTERM with exit code 0."""
    began = time.monotonic()
    # What sends spans is in the image, too; that nobody takes them is no matter.
    with running(image, "--otlp-endpoint", "http://127.0.0.1:9", mounts=[EXAMPLES]) as container:
        assert container.wait_for_log("spans")["protocol"] == "http/protobuf"
        assert container.wait_for_log("listening")["ingress"] == "native"
        container.wait_for_log("ready")
        took_s = time.monotonic() - began
        LOG.info("%.1f s from start to ready", took_s)
        assert took_s < MOST_START_S
        with grpc.insecure_channel(container.address) as channel:
            client = Client(channel)
            metadata = client.call("ModelMetadata", name="digits")
            sent = digits()
            answer = arrays(client.infer(request("digits", {metadata.inputs[0].name: sent})))
        assert all(np.isfinite(values).all() for values in answer.values() if values.dtype.kind == "f")
        assert container.stop() == 0
        assert container.log()[-1]["message"] == "stopped"


def test_it_passes_a_load_scenario(image: str, tmp_path: Path) -> None:
    with running(image, mounts=[EXAMPLES]) as container:
        container.wait_for_log("ready")
        metrics = f"http://127.0.0.1:{container.metrics_port}/metrics"
        command = [sys.executable, "-m", "loadtests", "run", "steady", "--server", container.address]
        more = ["--metrics", metrics, "--duration", "10s", "--warm-up", "2s", "--quiet", "--retry-void", "3"]
        done = subprocess.run([*command, *more, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_what_it_was_given_is_answered_when_it_is_stopped(image: str) -> None:
    """Clients that ask all the while get answers, or are told that the server is stopping: nothing is cut off."""
    outcomes: list[str] = []
    with running(image, mounts=[EXAMPLES]) as container:
        container.wait_for_log("ready")
        with grpc.insecure_channel(container.address) as channel:
            client = Client(channel)
            name = client.call("ModelMetadata", name="digits").inputs[0].name
            over = threading.Event()

            def ask() -> None:
                while not over.is_set():
                    try:
                        client.infer(request("digits", {name: digits()}))
                        outcomes.append("OK")
                    except grpc.RpcError as error:
                        outcomes.append(error.code().name)
                        return

            threads = [threading.Thread(target=ask) for _ in range(4)]
            for thread in threads:
                thread.start()
            while len(outcomes) < 200:
                time.sleep(0.01)
            code = container.stop()
            over.set()
            for thread in threads:
                thread.join()
    assert code == 0
    assert set(outcomes) <= {"OK", "UNAVAILABLE"}, set(outcomes)


def test_secured_with_files_of_a_volume(image: str, tmp_path: Path) -> None:
    """TLS and keys in the image, whose OpenSSL is the base's."""
    authority, key = Authority(tmp_path / "secrets"), new_key()
    (tmp_path / "secrets" / "keys.toml").write_text(entry_text("a", key, (Group.INFERENCE, Group.METADATA), ("*",)))
    for path in (tmp_path, *tmp_path.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    flags = ("--tls-certificate", "/secrets/server.pem", "--tls-key", "/secrets/server.key", "--api-keys")
    mounts = [EXAMPLES, f"{tmp_path / 'secrets'}:/secrets:ro"]
    with running(image, *flags, "/secrets/keys.toml", mounts=mounts) as container:
        container.wait_for_log("ready")
        with grpc.secure_channel(container.address, authority.credentials()) as channel:
            method = Client(channel).method("ModelMetadata")
            from service.pb import grpc_service_pb2 as pb

            asked = pb.ModelMetadataRequest(name="digits")
            with pytest.raises(grpc.RpcError) as caught:
                method(asked, timeout=10)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert method(asked, timeout=10, metadata=(("authorization", f"Bearer {key}"),)).name == "digits"
