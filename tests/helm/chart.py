"""The chart as tests see it: rendered objects, rules and dashboards, and the metrics that the server has."""

from __future__ import annotations

import functools
import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from service.metrics import MetricsRegistry, ModelMetrics
from service.metrics.catalogue import MODEL_FAMILIES
from tests.helm import tools

CHART = tools.ROOT / "helm" / "onclock"
VALUE_SETS = sorted((CHART / "ci").glob("*-values.yaml"))
NAMESPACE = "serving"
RELEASE = "onclock"

# What Kubernetes' own API serves; all else is somebody's extension, with a schema of its own.
EXTENSIONS = ("monitoring.coreos.com/", "keda.sh/", "serving.kserve.io/")

Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rendered:
    """What `helm template` made, or why it made nothing."""

    objects: list[Object]
    error: str

    def all(self, kind: str) -> list[Object]:
        """The objects of a kind."""
        return [found for found in self.objects if found["kind"] == kind]

    def one(self, kind: str, suffix: str = "") -> Object:
        """The one object of a kind (and whose name ends so)."""
        found = [item for item in self.all(kind) if item["metadata"]["name"].endswith(suffix)]
        assert len(found) == 1, f"{len(found)} objects of kind {kind} named *{suffix}: {self.error or found}"
        return found[0]

    @property
    def container(self) -> Object:
        """The server's container."""
        containers: list[Object] = self.one("Deployment")["spec"]["template"]["spec"]["containers"]
        return containers[0]

    @property
    def environment(self) -> dict[str, str]:
        """The ConfigMap that the server's environment comes from."""
        found = [item for item in self.all("ConfigMap") if "ONCLOCK_HOST" in item["data"]]
        assert len(found) == 1
        data: dict[str, str] = found[0]["data"]
        return data


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run helm."""
    command = [str(tools.helm()), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=tools.RUN_TIMEOUT_S, check=False)


def render(*values: Path | str, chart: Path = CHART, flags: Sequence[str] = ()) -> Rendered:
    """`helm template` with value files (paths) and settings (`key=value`, in JSON)."""
    arguments = ["template", RELEASE, str(chart), "--namespace", NAMESPACE, *flags]
    for value in values:
        arguments += ["--values", str(value)] if isinstance(value, Path) else ["--set-json", value]
    done = run(*arguments)
    if done.returncode:
        return Rendered([], done.stderr)
    return Rendered([item for item in yaml.safe_load_all(done.stdout) if item], "")


@functools.cache
def rendered_set(path: Path) -> Rendered:
    """A set of values of `ci`, rendered once."""
    return render(path)


def rule_groups(rendered: Rendered) -> list[Object]:
    """The groups of its PrometheusRule."""
    groups: list[Object] = rendered.one("PrometheusRule")["spec"]["groups"]
    return groups


def dashboards() -> dict[str, Object]:
    """The dashboards by file name."""
    return {path.name: json.loads(path.read_text()) for path in sorted((CHART / "dashboards").glob("*.json"))}


def dashboard_queries(dashboard: Object) -> Iterator[tuple[str, str]]:
    """(panel, query) of a dashboard."""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield f"variable {variable['name']}", variable["definition"]


# ---------------------------------------------------------------------------------------------------- metrics


@dataclass(frozen=True, slots=True)
class _Gpu:
    uuid: str = "GPU-1"
    utilization: float | None = 0.5
    memory_used: int | None = 1
    memory_total: int | None = 2
    power: float | None = 1.0
    power_limit: float | None = 2.0
    energy: float | None = 3.0


@functools.cache
def metric_families() -> dict[str, str]:
    """Every metric that a server can show, and its type: the catalogue's, and what the registry adds to it."""
    registry = MetricsRegistry()
    registry.add(ModelMetrics("m", "1"))
    registry.add_device("cuda:0", "CUDAExecutionProvider")
    registry.gpus = lambda: [_Gpu()]
    registry.record_load("m", succeeded=False)
    registry.record_unrouted("unknown_model")
    registry.connections = lambda: (1, 0)
    registry.certificate_end_s = lambda: 1
    registry.security_reloaded("keys", False)
    families = dict(re.findall(r"^# TYPE (\S+) (\S+)$", registry.render().decode(), flags=re.MULTILINE))
    return {**families, **{family.name: family.kind for family in MODEL_FAMILIES}}


def series_names() -> frozenset[str]:
    """The names that queries can use: histograms have three each."""
    names: set[str] = set()
    for name, kind in metric_families().items():
        names |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    return frozenset(names)


def metrics_of(query: str) -> frozenset[str]:
    """The names of metrics in a query, by their prefix: ours, Triton's, the process's; recorded series included."""
    bare = re.sub(r'"[^"]*"', "", query)  # what stands in quotes names no metric
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", bare)
    names = re.findall(r"(?<![\w:$])(?:\w+:)?(?:onclock|nv|process|python)_\w+(?::\w+)*", bare)
    return frozenset([*names, *re.findall(r"(?<![\w:])up(?=\{)", bare)])
