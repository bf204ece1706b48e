"""A rolling update of the chart's Deployment under load: pods as rendered, clients as documented, no request fails."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trustme

from tests.container.deployment import Deployment
from tests.container.kubelet import Pod
from tests.container.names import dns
from tests.container.network import pod_network
from tests.container.pod_spec import Cluster
from tests.helm.chart import CHART, NAMESPACE, RELEASE, Rendered, render
from tests.support import onnx_models
from tests.support.client import Client, request
from tests.support.onnx_models import write_model
from tests.support.server import ROOT

# It builds the image, and sends a steady load: not beside tests that measure.
pytestmark = pytest.mark.timed

# Seen with `--log-cli-level=INFO`.
LOG = logging.getLogger(__name__)

MINIMAL = CHART / "ci" / "cpu-minimal-values.yaml"
SERVICE = f"{RELEASE}-headless.{NAMESPACE}.svc.cluster.local"
TLS = 'tls={"enabled":true,"secretName":"serving-tls"}'
# The chart waits longer from pod to pod. Without the wait it is harder: a client has less time to learn of new pods.
AT_ONCE = "minReadySeconds=1"
QUICK = ('probes={"startup":{"periodSeconds":1},"readiness":{"periodSeconds":1}}', AT_ONCE)
# As docs/kubernetes.md has it for GPUs: a pod goes before its successor comes.
NONE_TO_SPARE = 'strategy={"type":"RollingUpdate","rollingUpdate":{"maxUnavailable":1,"maxSurge":0}}'
# Measuring the slow model takes no longer than it has to.
SHORT = "config.profile_budget_ms=200"
CHANGED = "config.control_threads=5"

CLIENTS, THREADS, RATE = 2, 4, 200
# A call may wait for a name to be looked up again, which is done once a second.
MOST_WAIT_S = 4.0
# Calls that are in progress when SIGTERM comes: this many of this length, one after the other.
SLOW, SLOW_MS = 24, 100


@dataclasses.dataclass(slots=True)
class Ends:
    """Sends slow calls to each pod right before its SIGTERM; what became of those that were still in progress."""

    credentials: grpc.ChannelCredentials | None
    calls: list[grpc.Future] = dataclasses.field(default_factory=list)
    channels: list[grpc.Channel] = dataclasses.field(default_factory=list)

    def __call__(self, pod: Pod) -> None:
        address = f"{pod.address}:{pod.port('grpc')}"
        options = (("grpc.ssl_target_name_override", SERVICE),)
        channel = (
            grpc.insecure_channel(address)
            if self.credentials is None
            else grpc.secure_channel(address, self.credentials, options=options)
        )
        infer = Client(channel).method("ModelInfer")
        message = request("slow", {"x": np.ones((1, 4), np.float32)})
        calls = [infer.future(message, timeout=30) for _ in range(SLOW)]
        calls[0].result()
        self.calls += calls[1:]
        self.channels.append(channel)

    def outcomes(self) -> list[str]:
        """Of each call, when all have ended."""
        found = [call.code().name for call in self.calls]
        for channel in self.channels:
            channel.close()
        return found


@contextlib.contextmanager
def clients(target: str, root: Path | None) -> Iterator[list[dict[str, Any]]]:
    """Load from several processes while the block runs; what they tell is in the list afterwards."""
    asked = {"target": target, "root": root and str(root), "model": "m", "threads": THREADS, "rate": RATE}
    command = [sys.executable, "-m", "tests.container.rollout_client", json.dumps(asked)]
    told: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            for _ in range(CLIENTS)
        ]
        stack.callback(lambda: [client.kill() for client in started])
        for client in started:
            assert client.stdout is not None
            assert client.stdout.readline() == b"ready\n"
        yield told
        told += [json.loads(client.communicate(timeout=60)[0]) for client in started]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("models")
    # What pytest makes only root may enter; the server is somebody else.
    repository.chmod(0o755)
    write_model(repository, "m", onnx_models.identity())
    write_model(repository, "slow", onnx_models.slow_for(SLOW_MS), config="max_batch_size: 1")
    return repository


def cluster_of(rendered: Rendered, models: Path, secrets: dict[str, dict[str, bytes]]) -> Cluster:
    config_maps = {item["metadata"]["name"]: item["data"] for item in rendered.all("ConfigMap")}
    return Cluster(config_maps, secrets, {"models": models})


@pytest.mark.parametrize(
    "values", [(SHORT, AT_ONCE), (SHORT, *QUICK, TLS, NONE_TO_SPARE)], ids=["plaintext", "tls, no pod to spare"]
)
def test_a_rolling_update_fails_no_request(image: str, models: Path, tmp_path: Path, values: tuple[str, ...]) -> None:
    """Every pod is replaced, as the Deployment says, while clients send; each old one answers what it has and ends by
    itself."""
    root, secrets, credentials = None, {}, None
    if TLS in values:
        authority = trustme.CA()
        made, root = authority.issue_cert(SERVICE), tmp_path / "root.pem"
        authority.cert_pem.write_to_path(root)
        chain = b"".join(blob.bytes() for blob in made.cert_chain_pems)
        secrets["serving-tls"] = {"tls.crt": chain, "tls.key": made.private_key_pem.bytes()}
        credentials = grpc.ssl_channel_credentials(root.read_bytes())
    before, after = render(MINIMAL, *values), render(MINIMAL, *values, CHANGED)
    spec = before.one("Deployment")["spec"]
    assert spec["template"] != after.one("Deployment")["spec"]["template"]
    ends = Ends(credentials)
    with pod_network() as network, dns(SERVICE, tmp_path) as names:
        deployment = Deployment(network, names, image, tmp_path, ends)
        try:
            assert deployment.apply(before.one("Deployment"), cluster_of(before, models, secrets)) == []
            port = deployment.pods[0].port("grpc")
            with clients(f"dns://127.0.0.1:{names.port}/{SERVICE}:{port}", root) as told:
                gone = deployment.apply(after.one("Deployment"), cluster_of(after, models, secrets))
            logs = [pod.log() for pod in gone]
        finally:
            deployment.close()
    assert len(gone) == spec["replicas"] >= 2
    failures = [failure for client in told for failure in client["failures"]]
    sent = sum(sum(client["outcomes"].values()) for client in told)
    slowest_s = max(client["slowest_s"] for client in told)
    LOG.info("%d requests, %d failed, the slowest %.2f s; %d pods replaced", sent, len(failures), slowest_s, len(gone))
    assert sent > 2000
    assert not failures, failures
    assert slowest_s < MOST_WAIT_S
    assert all(set(client["outcomes"]) == {"OK"} for client in told)
    assert ends.outcomes() == ["OK"] * (SLOW - 1) * len(gone)
    grace_s = spec["template"]["spec"]["terminationGracePeriodSeconds"]
    for pod, log in zip(gone, logs, strict=True):
        assert (pod.exit_code, pod.killed) == (0, False)
        assert pod.ended_after_s < grace_s
        (draining,) = [line for line in log if line["message"] == "draining"]
        assert draining["in_flight"] > 0
        assert log[-1]["message"] == "stopped"
