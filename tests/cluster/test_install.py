"""The chart on a real API server: every set of values is installed, upgraded and uninstalled by helm.

`make test-cluster` runs these; elsewhere they are skipped, since the API server has to be built first.
"""

from __future__ import annotations

import copy
import os
import subprocess
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.api_server import Api, Object, running_api
from tests.helm import tools
from tests.helm.chart import CHART, RELEASE, VALUE_SETS, render

REQUIRE = "ONCLOCK_TEST_CLUSTER"
pytestmark = pytest.mark.skipif(
    os.environ.get(REQUIRE) != "require", reason="needs an API server that is built first: make test-cluster"
)

# What the values refer to and somebody else has made.
CLUSTER_OBJECTS = {
    "/apis/scheduling.k8s.io/v1/priorityclasses": {
        "apiVersion": "scheduling.k8s.io/v1",
        "kind": "PriorityClass",
        "metadata": {"name": "serving"},
        "value": 1,
    },
    "/apis/node.k8s.io/v1/runtimeclasses": {
        "apiVersion": "node.k8s.io/v1",
        "kind": "RuntimeClass",
        "metadata": {"name": "nvidia"},
        "handler": "nvidia",
    },
}
# Dashboards can go into a namespace of Grafana's.
MONITORING = "monitoring"
CHANGED = "config.control_threads=5"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running_api(tmp_path_factory.mktemp("api")) as found:
        for path, body in CLUSTER_OBJECTS.items():
            found.ask(path, body)
        make_namespace(found, MONITORING)
        yield found


def make_namespace(api: Api, name: str) -> None:
    """One that takes no pod that is not confined."""
    labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
    api.ask("/api/v1/namespaces", body)


def helm(api: Api, namespace: str, *arguments: str) -> str:
    """What helm says, warnings of the API server included. Raises `AssertionError` when it fails."""
    command = [str(tools.helm()), "--kubeconfig", str(api.kubeconfig), "--namespace", namespace, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=tools.RUN_TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def names(objects: list[Object]) -> set[tuple[str, str]]:
    return {(item["kind"], item["metadata"]["name"]) for item in objects}


def is_test(item: Object) -> bool:
    """Whether helm makes it for `helm test` only."""
    return "helm.sh/hook" in item["metadata"].get("annotations", {})


def without_guests(spec: Object) -> Object:
    """A pod without the containers that the values bring: whoever writes them confines them."""
    own = copy.deepcopy(spec)
    own["containers"] = [item for item in own["containers"] if item["name"] in ("onclock", "loadtest")]
    own["initContainers"] = [item for item in own.get("initContainers", ()) if item["name"] == "models"]
    return own


@pytest.mark.parametrize("path", VALUE_SETS, ids=lambda path: path.stem.removesuffix("-values"))
def test_a_set_of_values_comes_changes_and_goes(api: Api, path: Path) -> None:
    """Everything is accepted, and is what was rendered; the pods pass `restricted`; an upgrade changes what it should;
    afterwards nothing is left but what is to be kept."""
    namespace = path.stem
    make_namespace(api, namespace)
    rendered = render(path, flags=("--namespace", namespace))
    wanted = [item for item in rendered.objects if not is_test(item)]

    said = helm(api, namespace, "install", RELEASE, str(CHART), "--values", str(path))
    assert "unknown field" not in said
    there = {*api.listed(namespace), *api.listed(MONITORING)}
    assert names(wanted) <= there
    assert {kind for kind, _ in there - names(wanted)} <= {"Secret"}, "what helm keeps of a release"

    pods = [rendered.one("Deployment")["spec"]["template"], *filter(is_test, rendered.all("Pod"))]
    for number, pod in enumerate(pods):
        metadata = {"name": f"pod-{number}", "labels": pod["metadata"]["labels"]}
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": without_guests(pod["spec"])}
        api.ask(f"/api/v1/namespaces/{namespace}/pods?dryRun=All", body)

    deployment = f"/apis/apps/v1/namespaces/{namespace}/deployments/{rendered.one('Deployment')['metadata']['name']}"
    before = api.ask(deployment)
    helm(api, namespace, "upgrade", RELEASE, str(CHART), "--values", str(path), "--set", CHANGED)
    after = api.ask(deployment)
    assert after["metadata"]["generation"] == before["metadata"]["generation"] + 1
    checksum = [item["spec"]["template"]["metadata"]["annotations"]["checksum/config"] for item in (before, after)]
    assert checksum[0] != checksum[1]
    assert api.listed(namespace) >= {*names(wanted)} - api.listed(MONITORING)

    helm(api, namespace, "uninstall", RELEASE)
    policy = "helm.sh/resource-policy"
    kept = [item for item in wanted if item["metadata"].get("annotations", {}).get(policy) == "keep"]
    assert api.listed(namespace) == names(kept)
    assert api.listed(MONITORING) == set()


def test_an_unconfined_pod_is_refused(api: Api) -> None:
    """Else the test above would say nothing of Pod Security."""
    make_namespace(api, "open")
    spec = copy.deepcopy(render(VALUE_SETS[0]).one("Deployment")["spec"]["template"]["spec"])
    spec["containers"][0]["securityContext"].pop("capabilities")
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "open"}, "spec": spec}
    with pytest.raises(urllib.error.HTTPError, match="403"):
        api.ask("/api/v1/namespaces/open/pods?dryRun=All", body)


def test_a_definition_refuses_what_it_does_not_know(api: Api) -> None:
    """Else the extensions' objects would be accepted whatever is in them."""
    make_namespace(api, "wrong")
    body = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "wrong"},
        "spec": {"groups": [{"name": "g", "rules": [{"alert": "A"}]}]},
    }
    with pytest.raises(urllib.error.HTTPError, match="422"):
        api.ask("/apis/monitoring.coreos.com/v1/namespaces/wrong/prometheusrules", body)
