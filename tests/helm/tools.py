"""Helm, Prometheus, dnsmasq and the schemas of Kubernetes, found or installed. `python -m tests.helm.tools` says where.

Each tool is looked for on PATH first, then under `build/tools`, where it is put once. One that cannot be had is a
`ToolError` that says what was tried and what to do; tests then fail. Where the chart cannot be tested at all (no Go, no
network), `ONCLOCK_TEST_HELM=skip` skips its tests.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.venvs import VenvError, python_with

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "build" / "tools"

HELM_VERSION = "v3.19.0"
# What its own Makefile sets: its version, and the Kubernetes that it makes templates for (else 1.20).
_HELM_MODULE = "helm.sh/helm/v3"
_HELM_VARIABLES = {
    "internal/version.version": HELM_VERSION,
    "pkg/chartutil.k8sVersionMajor": "1",
    "pkg/chartutil.k8sVersionMinor": "34",
    "pkg/lint/rules.k8sVersionMajor": "1",
    "pkg/lint/rules.k8sVersionMinor": "34",
}
KUBERNETES_VALIDATE = "kubernetes-validate==1.37.0"
SKIP = "ONCLOCK_TEST_HELM"

# Compiling helm takes minutes on two cores, and longer where others compute.
BUILD_TIMEOUT_S = 1800.0
RUN_TIMEOUT_S = 120.0


class ToolError(Exception):
    """A tool is missing and cannot be installed. `str(error)` says what was tried and what to do."""


def helm() -> Path:
    """Helm 3."""
    found = shutil.which("helm")
    if found and re.match(r"v3\.", _output([found, "version", "--short"])):
        return Path(found)
    return installed(f"helm-{HELM_VERSION}", "helm", _build_helm)


def promtool() -> Path:
    """Prometheus' promtool, of any version from 2.40."""
    return _of_debian("promtool", "prometheus", "usr/bin/promtool")


def prometheus() -> Path:
    """Prometheus itself."""
    return _of_debian("prometheus", "prometheus", "usr/bin/prometheus")


def dnsmasq() -> Path:
    """A DNS server."""
    return _of_debian("dnsmasq", "dnsmasq-base", "usr/sbin/dnsmasq")


def etcd() -> Path:
    """What an API server of Kubernetes keeps its objects in."""
    return _of_debian("etcd", "etcd-server", "usr/bin/etcd")


def validator() -> Path:
    """A Python interpreter that can import `kubernetes_validate`, which carries the schemas of Kubernetes' objects."""
    try:
        return python_with(KUBERNETES_VALIDATE)
    except VenvError as error:
        raise ToolError(f"the schemas of Kubernetes cannot be had: {error}") from error


def _of_debian(name: str, package: str, path: str) -> Path:
    """`name` from PATH, or `path` of one of Debian's packages, which is not installed: it would start a server."""
    found = shutil.which(name)
    if found:
        return Path(found)
    return installed(f"{package}.deb", path, lambda into: _unpack(package, into))


def installed(directory: str, name: str, install: Callable[[Path], None]) -> Path:
    """`name` in a directory under `build/tools`; whoever asks first installs it."""
    home = TOOLS / directory
    binary = home / name
    TOOLS.mkdir(parents=True, exist_ok=True)
    with (TOOLS / f"{directory}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not binary.exists():
            fresh = TOOLS / f"{directory}.new"
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir()
            install(fresh)
            if not (fresh / name).exists():
                raise ToolError(f"installing {name} left no {fresh / name}")
            shutil.rmtree(home, ignore_errors=True)
            fresh.rename(home)
    return binary


def _build_helm(into: Path) -> None:
    go = shutil.which("go")
    wanted = f"{_HELM_MODULE}/cmd/helm@{HELM_VERSION}"
    if go is None:
        raise ToolError(
            f"helm 3 is not on PATH and cannot be built: there is no `go`. Install helm, or Go for "
            f"`go install {wanted}`, or leave the chart's tests out with {SKIP}=skip"
        )
    environment = {**os.environ, "GOBIN": str(into), "GOFLAGS": "-trimpath", "CGO_ENABLED": "0"}
    variables = " ".join(f"-X {_HELM_MODULE}/{name}={value}" for name, value in _HELM_VARIABLES.items())
    command = [go, "install", f"-ldflags=-s -w {variables}", wanted]
    run(command, BUILD_TIMEOUT_S, environment, f"helm cannot be built ({wanted})")


def _unpack(package: str, into: Path) -> None:
    if sys.platform != "linux" or shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise ToolError(f"{package} is not installed; install it (this is {platform.system()} without apt-get)")
    said = f"Debian's package {package} cannot be fetched"
    run(["apt-get", "update", "-qq"], BUILD_TIMEOUT_S, None, "apt-get cannot read its lists", cwd=into)
    run(["apt-get", "download", "-qq", package], BUILD_TIMEOUT_S, None, said, cwd=into)
    (file,) = into.glob(f"{package}_*.deb")
    run(["dpkg-deb", "-x", str(file), str(into)], RUN_TIMEOUT_S, None, said)
    file.unlink()


def run(
    command: Sequence[str], timeout_s: float, environment: dict[str, str] | None, wrong: str, cwd: Path | None = None
) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False, env=environment, cwd=cwd
        )
    except subprocess.TimeoutExpired as error:
        raise ToolError(f"{wrong}: `{' '.join(command)}` took more than {timeout_s:g} s") from error
    if done.returncode:
        raise ToolError(f"{wrong}: `{' '.join(command)}` ended with {done.returncode}:\n{done.stderr.strip()[-2000:]}")


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False)
    return done.stdout.strip()


def main() -> int:
    """Install what is missing; print where everything is."""
    try:
        for find in (helm, promtool, prometheus, dnsmasq, validator):
            sys.stdout.write(f"{find.__name__}: {find()}\n")
    except ToolError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
