"""An API server of Kubernetes with its etcd, and nothing else of a cluster: it says whether it takes what it is sent.

The API server is built from its Go module. `python -m tests.cluster.api_server` builds it, which takes a quarter of an
hour on two cores, and 4 GiB of disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.container.podman import free_ports
from tests.helm import tools

VERSION = "1.34.4"
START_S = 120.0
# Where the definitions of the objects that are not Kubernetes' own are published: module, files in it.
EXTENSIONS = {
    "github.com/prometheus-operator/prometheus-operator@v0.85.0": (
        "example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml",
        "example/prometheus-operator-crd/monitoring.coreos.com_prometheusrules.yaml",
    ),
    "github.com/kedacore/keda/v2@v2.17.2": ("config/crd/bases/keda.sh_scaledobjects.yaml",),
}

_MAIN = """package main

import (
	"os"

	"k8s.io/component-base/cli"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
)

func main() { os.Exit(cli.Run(app.NewAPIServerCommand())) }
"""
Object = dict[str, Any]


def api_server() -> Path:
    """`kube-apiserver`, built once. Raises `ToolError`."""
    return tools.installed(f"kube-apiserver-{VERSION}", "kube-apiserver", _build)


def definitions() -> list[Object]:
    """The CustomResourceDefinitions of what the chart can make besides Kubernetes' own objects."""
    found = []
    for module, files in EXTENSIONS.items():
        directory = _module(module)
        found += [yaml.safe_load((directory / file).read_text()) for file in files]
    return found


def _build(into: Path) -> None:
    """Kubernetes' own go.mod refers to modules in its own tree; they are published under numbers of their own."""
    published = f"v0.{VERSION.partition('.')[2]}"
    text = (_module(f"k8s.io/kubernetes@v{VERSION}") / "go.mod").read_text()
    staged = re.findall(r"^\t(k8s\.io/\S+) => \./staging/", text, flags=re.MULTILINE)
    (version,) = re.findall(r"^go (\S+)$", text, flags=re.MULTILINE)
    source = into / "source"
    source.mkdir()
    (source / "main.go").write_text(_MAIN)
    lines = ["module apiserver", f"go {version}", f"require k8s.io/kubernetes v{VERSION}"]
    lines += [
        f"require k8s.io/component-base {published}",
        *(f"replace {name} => {name} {published}" for name in staged),
    ]
    (source / "go.mod").write_text("\n".join(lines) + "\n")
    package = "k8s.io/component-base/version"
    major, minor, _ = VERSION.split(".")
    variables = f"-X {package}.gitVersion=v{VERSION} -X {package}.gitMajor={major} -X {package}.gitMinor={minor}"
    environment = {**os.environ, "GOFLAGS": "-mod=mod -trimpath", "CGO_ENABLED": "0"}
    said = f"kube-apiserver {VERSION} cannot be built"
    tools.run([_go(), "mod", "tidy"], tools.BUILD_TIMEOUT_S, environment, said, cwd=source)
    build = [_go(), "build", "-ldflags", f"-s -w {variables}", "-o", str(into / "kube-apiserver"), "."]
    tools.run(build, tools.BUILD_TIMEOUT_S, environment, said, cwd=source)
    shutil.rmtree(source)


def _go() -> str:
    found = shutil.which("go")
    if found is None:
        raise tools.ToolError("an API server of Kubernetes cannot be built: there is no `go` on PATH")
    return found


def _module(module: str) -> Path:
    """The directory of a Go module, fetched through the proxy that Go is set to."""
    command = [_go(), "mod", "download", "-json", module]
    done = subprocess.run(command, capture_output=True, text=True, timeout=tools.BUILD_TIMEOUT_S, check=False, cwd="/")
    if done.returncode:
        raise tools.ToolError(f"{module} cannot be fetched: {done.stdout[-500:]}{done.stderr[-500:]}")
    return Path(json.loads(done.stdout)["Dir"])


class Api:
    """A running API server, asked as its administrator."""

    def __init__(self, port: int, token: str, kubeconfig: Path) -> None:
        self.kubeconfig = kubeconfig
        self._base = f"https://127.0.0.1:{port}"
        self._token = token

    def ask(self, path: str, body: Object | None = None) -> Object:
        """GET a path, or POST an object to it; the answer. Raises `urllib.error.HTTPError`."""
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data, headers)
        # Its certificate is one that it has just made for itself.
        with urllib.request.urlopen(request, timeout=30, context=ssl._create_unverified_context()) as answer:
            found: Object = json.load(answer)
        return found

    def is_ready(self) -> bool:
        """Whether it says so itself."""
        try:
            self.ask("/api/v1/namespaces/default")
        except OSError:
            return False
        return True

    def listed(self, namespace: str) -> set[tuple[str, str]]:
        """(kind, name) of every object in a namespace, of every kind that can be listed and deleted. Events are none:
        the server's own loops write down what they met (a service whose address they had not seen yet, say)."""
        found: set[tuple[str, str]] = set()
        groups = [
            f"/apis/{version['groupVersion']}" for group in self.ask("/apis")["groups"] for version in group["versions"]
        ]
        for group in ["/api/v1", *groups]:
            for resource in self.ask(group)["resources"]:
                if (
                    resource["namespaced"]
                    and {"list", "delete"} <= set(resource["verbs"])
                    and "/" not in resource["name"]
                    and resource["kind"] != "Event"
                ):
                    items = self.ask(f"{group}/namespaces/{namespace}/{resource['name']}")["items"]
                    found |= {(resource["kind"], item["metadata"]["name"]) for item in items}
        return found


@contextlib.contextmanager
def running_api(directory: Path) -> Iterator[Api]:
    """An API server that enforces Pod Security Standards, with the chart's extensions defined; ended with the block."""
    client_port, peer_port, port = free_ports(3)
    token = secrets.token_hex(16)
    (directory / "tokens.csv").write_text(f'{token},admin,admin,"system:masters"\n')
    key = directory / "accounts.key"
    subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
    store = f"http://127.0.0.1:{client_port}"
    etcd = [
        *(str(tools.etcd()), "--data-dir", str(directory / "etcd"), "--unsafe-no-fsync", "--log-level=error"),
        *("--listen-client-urls", store, "--advertise-client-urls", store),
        *("--listen-peer-urls", f"http://127.0.0.1:{peer_port}"),
    ]
    api = [
        *(str(api_server()), "--etcd-servers", store, "--bind-address=127.0.0.1", f"--secure-port={port}"),
        *("--cert-dir", str(directory / "certificates"), "--token-auth-file", str(directory / "tokens.csv")),
        *("--service-account-issuer=https://cluster.local", f"--service-account-key-file={key}"),
        *(f"--service-account-signing-key-file={key}", "--service-cluster-ip-range=10.96.0.0/16"),
        *("--authorization-mode=RBAC", "--disable-admission-plugins=ServiceAccount"),
    ]
    kubeconfig = directory / "kubeconfig"
    kubeconfig.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [
                    {"name": "it", "cluster": {"server": f"https://127.0.0.1:{port}", "insecure-skip-tls-verify": True}}
                ],
                "users": [{"name": "it", "user": {"token": token}}],
                "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
                "current-context": "it",
            }
        )
    )
    found = Api(port, token, kubeconfig)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((directory / "log").open("w"))
        for command in (etcd, api):
            process = stack.enter_context(subprocess.Popen(command, stdout=log, stderr=log))
            stack.callback(process.terminate)
        end = time.monotonic() + START_S
        while not found.is_ready():
            assert process.poll() is None, (directory / "log").read_text()[-2000:]
            assert time.monotonic() < end, (directory / "log").read_text()[-2000:]
            time.sleep(0.2)
        for definition in definitions():
            found.ask("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", definition)
        yield found


if __name__ == "__main__":
    sys.stdout.write(f"kube-apiserver: {api_server()}\n")
