"""A Deployment as its controller runs it: a rolling update by `maxSurge`, `maxUnavailable` and `minReadySeconds`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.container.kubelet import Pod
from tests.container.names import Names
from tests.container.network import Network
from tests.container.pod_spec import Cluster, Object

_POLL_S = 0.02
# Twice what it takes on a machine that does nothing else.
MOST_ROLLOUT_S = 120.0


class Deployment:
    """The pods of a Deployment, and its headless Service's name. `apply` is called with one object after the other."""

    def __init__(
        self,
        network: Network,
        names: Names,
        image: str,
        directory: Path,
        before_term: Callable[[Pod], None] = lambda _pod: None,
    ) -> None:
        self._network = network
        self._names = names
        self._image = image
        self._directory = directory
        self._before_term = before_term
        self._of: dict[str, tuple[Object, Any]] = {}
        self.pods: list[Pod] = []

    @property
    def live(self) -> list[Pod]:
        """Those that were not deleted."""
        return [pod for pod in self.pods if not pod.terminating]

    def apply(self, wanted: Object, cluster: Cluster) -> list[Pod]:
        """Bring the pods to what `wanted` says; the pods that went meanwhile, ended. Raises `AssertionError` when a pod
        fails, or it takes too long."""
        spec = wanted["spec"]
        replicas, quiet_s = int(spec["replicas"]), float(spec["minReadySeconds"])
        surge, unavailable = _allowed(spec["strategy"], replicas)
        old = self.live
        new: list[Pod] = []
        end = time.monotonic() + MOST_ROLLOUT_S
        while True:
            assert time.monotonic() < end, "the rollout takes too long"
            for pod in self.pods:
                if pod.error is not None:
                    raise pod.error
                assert not pod.restarts_due, f"{pod.name} fails its liveness probe"
            while len(new) < replicas and len(self.live) < replicas + surge:
                new.append(self._start(spec["template"]["spec"], cluster))
            self._endpoints()
            going = [pod for pod in old if not pod.terminating]
            spare = sum(pod.ready_for(quiet_s) for pod in self.live) - (replicas - unavailable)
            for pod in going[: max(spare, 0)]:
                pod.delete()
                self._endpoints()
            if all(pod.ended for pod in old) and len(new) == replicas and all(pod.ready_for(quiet_s) for pod in new):
                return old
            time.sleep(_POLL_S)

    def close(self) -> None:
        """Remove every pod."""
        for pod in self.pods:
            pod.remove()

    def _start(self, spec: Object, cluster: Cluster) -> Pod:
        name = f"pod-{len(self.pods)}"
        directory = self._directory / name
        pod = Pod(name, spec, self._image, cluster, self._network.place(), directory, self._before_term)
        self.pods.append(pod)
        return pod

    def _endpoints(self) -> None:
        """A Service has those that are ready and were not deleted."""
        self._names.publish([pod.address for pod in self.live if pod.ready])


def _allowed(strategy: Object, replicas: int) -> tuple[int, int]:
    """(pods beyond `replicas`, pods that may be missing)."""
    assert strategy["type"] == "RollingUpdate"
    rolling = strategy["rollingUpdate"]
    return _count(rolling["maxSurge"], replicas, math.ceil), _count(rolling["maxUnavailable"], replicas, math.floor)


def _count(value: int | str, replicas: int, around: Callable[[float], int]) -> int:
    return value if isinstance(value, int) else around(int(value.removesuffix("%")) / 100 * replicas)
