"""A pod's specification as arguments of `podman run`: what the kubelet would ask of its container runtime.

`podman kube play` knows neither gRPC probes nor a `preStop` that sleeps; so this translates. Nothing is left out in
silence: a field that is neither translated nor listed as somebody else's is an error.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Object = dict[str, Any]

# What the scheduler, the registry and the API server make of a pod; and what only control groups could enforce here.
_ELSEWHERE_POD = {
    "serviceAccountName",
    "automountServiceAccountToken",
    "enableServiceLinks",
    "topologySpreadConstraints",
}
_ELSEWHERE_CONTAINER = {"name", "imagePullPolicy", "resources"}
# What `kubelet.py` acts on.
_LIFE = {"startupProbe", "readinessProbe", "livenessProbe", "lifecycle", "ports"}


@dataclass(frozen=True, slots=True)
class Cluster:
    """What a pod refers to by name: ConfigMaps and Secrets by their data, claims by the directory behind them."""

    config_maps: dict[str, dict[str, str]] = field(default_factory=dict)
    secrets: dict[str, dict[str, bytes]] = field(default_factory=dict)
    claims: dict[str, Path] = field(default_factory=dict)


def run_arguments(spec: Object, image: str, cluster: Cluster, directory: Path) -> list[str]:
    """`podman run`'s arguments for the one container of a pod, without the network. `image` stands for the one that is
    named; volumes are made in `directory`. Raises `AssertionError` for what has no translation."""
    handled = {"containers", "volumes", "securityContext", "terminationGracePeriodSeconds"}
    unknown = set(spec) - _ELSEWHERE_POD - handled
    assert not unknown, f"no translation of the pod's {unknown}"
    (container,) = spec["containers"]
    handled = {"command", "args", "env", "envFrom", "image", "securityContext", "volumeMounts"} | _LIFE
    unknown = set(container) - _ELSEWHERE_CONTAINER - handled
    assert not unknown, f"no translation of the container's {unknown}"
    command = [*container["command"], *container.get("args", ())]
    return [
        *_confinement(spec["securityContext"], container["securityContext"]),
        *(part for name, value in _environment(container, cluster).items() for part in ("--env", f"{name}={value}")),
        *_volumes(spec, container, cluster, directory),
        f"--entrypoint={json.dumps(command[:1])}",
        image,
        *command[1:],
    ]


def _confinement(pod: Object, container: Object) -> list[str]:
    """Of the two security contexts."""
    assert set(pod) == {
        *("runAsNonRoot", "runAsUser", "runAsGroup", "fsGroup", "fsGroupChangePolicy", "seccompProfile"),
    }
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}, "podman's default profile is that of the runtime"
    assert pod["runAsUser"]
    assert container == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    return [
        *("--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--security-opt=no-new-privileges"),
        *("--user", f"{pod['runAsUser']}:{pod['runAsGroup']}", "--group-add", str(pod["fsGroup"])),
    ]


def _environment(container: Object, cluster: Cluster) -> dict[str, str]:
    found: dict[str, str] = {}
    for source in container["envFrom"]:
        assert set(source) == {"configMapRef"}
        found |= cluster.config_maps[source["configMapRef"]["name"]]
    for variable in container["env"]:
        assert set(variable) == {"name", "value"}
        found[variable["name"]] = variable["value"]
    return found


def _volumes(spec: Object, container: Object, cluster: Cluster, directory: Path) -> list[str]:
    """Directories of this machine: made for `emptyDir` and `secret` with the group that the pod asks for."""
    group = spec["securityContext"]["fsGroup"]
    sources: dict[str, Path] = {}
    for volume in spec["volumes"]:
        name, kind = volume["name"], next(key for key in volume if key != "name")
        path = directory / name
        if kind == "persistentVolumeClaim":
            path = cluster.claims[volume[kind]["claimName"]]
        elif kind == "emptyDir":
            path.mkdir(parents=True)
            path.chmod(0o2777)
        else:
            assert kind == "secret", f"no translation of a volume of kind {kind}"
            path.mkdir(parents=True)
            for item in volume[kind]["items"]:
                file = path / item["path"]
                file.write_bytes(cluster.secrets[volume[kind]["secretName"]][item["key"]])
                file.chmod(volume[kind]["defaultMode"])
                os.chown(file, 0, group)
        if kind != "persistentVolumeClaim":
            os.chown(path, 0, group)
        sources[name] = path
    arguments: list[str] = []
    for mount in container["volumeMounts"]:
        assert set(mount) <= {"name", "mountPath", "readOnly"}, mount
        mode = "ro" if mount.get("readOnly") else "rw"
        arguments += ["--volume", f"{sources[mount['name']]}:{mount['mountPath']}:{mode}"]
    return arguments
