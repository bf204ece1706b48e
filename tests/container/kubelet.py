"""A pod's life as the kubelet leads it: probes, `preStop`, SIGTERM, and SIGKILL when the grace period is over.

The container is podman's, in a network namespace of its own; what it runs and how it is confined is `pod_spec.py`'s.
"""

from __future__ import annotations

import json
import os
import signal
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.container.network import Place
from tests.container.pod_spec import Cluster, Object, run_arguments
from tests.container.podman import PLAIN, podman

_POLL_S = 0.02


class Pod:
    """One pod, started at once. `ready` is what its readiness probe says. `before_term` is called between `preStop` and
    SIGTERM."""

    def __init__(
        self,
        name: str,
        spec: Object,
        image: str,
        cluster: Cluster,
        place: Place,
        directory: Path,
        before_term: Callable[[Pod], None] = lambda _pod: None,
    ) -> None:
        self.name = name
        self.address = place.address
        self.ready_since: float | None = None
        self.terminating = False
        self.restarts_due = 0
        # How it ended: the exit code, the seconds since it was deleted, and whether it had to be killed.
        self.exit_code: int | None = None
        self.ended_after_s = 0.0
        self.killed = False
        self.error: Exception | None = None
        self._spec = spec
        (self._container,) = spec["containers"]
        self._before_term = before_term
        arguments = run_arguments(spec, image, cluster, directory)
        network = (f"--network=ns:{place.path}", *PLAIN)
        self._identity = podman("run", "--detach", *network, *arguments).stdout.strip()
        # The process itself is signalled, as a runtime does: until podman has done it, nothing is in progress any more.
        self._pid = int(self._state()["Pid"])
        self._process = Path("/proc") / str(self._pid)
        self._probing = threading.Thread(target=self._probe, name=f"probe-{name}", daemon=True)
        self._ending = threading.Thread(target=self._end, name=f"end-{name}", daemon=True)
        self._probing.start()

    @property
    def ready(self) -> bool:
        """Whether it may have requests, by its probe."""
        return self.ready_since is not None

    @property
    def ended(self) -> bool:
        """Whether its container has ended after a deletion."""
        return self.exit_code is not None or self.error is not None

    def ready_for(self, seconds: float) -> bool:
        """Whether it has been ready for so long."""
        return self.ready_since is not None and time.monotonic() - self.ready_since >= seconds

    def port(self, name: str | int) -> int:
        """A port of the container, by its name."""
        if isinstance(name, int):
            return name
        return next(int(port["containerPort"]) for port in self._container["ports"] if port["name"] == name)

    def log(self) -> list[dict[str, Any]]:
        """What the server has said so far."""
        said = podman("logs", self._identity)
        return [json.loads(line) for line in (said.stdout + said.stderr).splitlines() if line.startswith("{")]

    def delete(self) -> None:
        """Begin its end; it is a thread's from here on."""
        self.terminating = True
        self._ending.start()

    def remove(self) -> None:
        """Remove the container, whatever it does."""
        self.terminating = True
        podman("rm", "--force", "--time=0", self._identity, check=False)

    def _state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(podman("inspect", self._identity).stdout)[0]["State"]
        return found

    # ---------------------------------------------------------------- probes

    def _probe(self) -> None:
        """Startup until it succeeds; then readiness and liveness, each in its own period."""
        try:
            startup = self._container["startupProbe"]
            failures = 0
            while not self._ask(startup):
                failures += 1
                assert failures < startup["failureThreshold"], f"{self.name} did not start: {self.log()[-3:]}"
                self._pause(startup["periodSeconds"])
                if self.terminating:
                    return
            probes = {kind: self._container[f"{kind}Probe"] for kind in ("readiness", "liveness")}
            failed, next_at = dict.fromkeys(probes, 0), dict.fromkeys(probes, 0.0)
            while not self.terminating:
                for kind, probe in probes.items():
                    if time.monotonic() < next_at[kind]:
                        continue
                    next_at[kind] = time.monotonic() + probe["periodSeconds"]
                    succeeded = self._ask(probe)
                    failed[kind] = 0 if succeeded else failed[kind] + 1
                    if kind == "readiness" and succeeded and not self.ready:
                        self.ready_since = time.monotonic()
                    if failed[kind] >= probe["failureThreshold"]:
                        self._failed(kind)
                self._pause(min(next_at.values()) - time.monotonic())
        except Exception as error:  # noqa: BLE001 - the boundary: whoever waits for the pod raises it
            self.error = error

    def _failed(self, kind: str) -> None:
        if kind == "readiness":
            self.ready_since = None
        else:
            self.restarts_due += 1

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.terminating:
            time.sleep(_POLL_S)

    def _ask(self, probe: Object) -> bool:
        assert self.terminating or self._process.exists(), f"{self.name} has ended: {self.log()[-3:]}"
        if "grpc" in probe:
            return self._ask_grpc(probe["grpc"], probe["timeoutSeconds"])
        asked = probe["httpGet"]
        url = f"{asked['scheme'].lower()}://{self.address}:{self.port(asked['port'])}{asked['path']}"
        # As the kubelet does: it does not verify.
        context = ssl._create_unverified_context() if asked["scheme"] == "HTTPS" else None
        try:
            with urllib.request.urlopen(url, timeout=probe["timeoutSeconds"], context=context) as answer:
                return 200 <= int(answer.status) < 400
        except OSError:
            return False

    def _ask_grpc(self, asked: Object, timeout_s: float) -> bool:
        # A connection for each question, as the kubelet's.
        options = (("grpc.use_local_subchannel_pool", 1),)
        with grpc.insecure_channel(f"{self.address}:{asked['port']}", options=options) as channel:
            request = health_pb2.HealthCheckRequest(service=asked["service"])
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
            except grpc.RpcError:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    # ---------------------------------------------------------------- the end

    def _end(self) -> None:
        try:
            began = time.monotonic()
            grace_s = self._spec["terminationGracePeriodSeconds"]
            handler = self._container.get("lifecycle", {}).get("preStop")
            if handler is not None:
                assert set(handler) == {"sleep"}, f"no translation of {handler}"
                time.sleep(handler["sleep"]["seconds"])
            self._before_term(self)
            os.kill(self._pid, signal.SIGTERM)
            while self._process.exists() and time.monotonic() < began + grace_s:
                time.sleep(_POLL_S)
            self.killed = self._process.exists()
            self.ended_after_s = time.monotonic() - began
            if self.killed:
                os.kill(self._pid, signal.SIGKILL)
            podman("wait", self._identity)
            self.exit_code = int(self._state()["ExitCode"])
        except Exception as error:  # noqa: BLE001 - the boundary: whoever waits for the pod raises it
            self.error = error
