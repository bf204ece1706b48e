"""A real Prometheus scrapes real servers as the chart says: a broken promise calls somebody, a kept one nobody."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import grpc
import numpy as np
import pytest
import yaml

from tests.helm import tools
from tests.helm.chart import (
    CHART,
    RELEASE,
    Object,
    Rendered,
    dashboard_queries,
    dashboards,
    metrics_of,
    render,
    rule_groups,
)
from tests.helm.prometheus import Prometheus, running_prometheus, scaled, scrape_config
from tests.support import onnx_models
from tests.support.client import Client, request
from tests.support.onnx_models import write_model
from tests.support.server import ROOT, RunningServer, running_server

pytestmark = [
    pytest.mark.timed,
    pytest.mark.skipif(os.environ.get(tools.SKIP) == "skip", reason=f"{tools.SKIP}=skip: the chart is not tested here"),
]

# A minute of the rules is a second here.
FACTOR = Fraction(60)
# The longest `for` of an alert, 15 minutes, and something over.
QUIET_S = 20.0
ALERT_S = 30.0
# The time of a run, and what is promised: one that the model keeps, and one that no server could keep. Two servers,
# two load testers and Prometheus share the cores of a test machine: more of them, and the model would be slower than it
# was when it was measured, which is an alert of its own.
RUN_MS = 5
OBJECTIVE_MS = {"kept": 1000, "broken": 2}

# Not there, and why: everything else that rules and dashboards use is.
ABSENT = {
    "a GPU": r"nv_gpu_\w+|nv_energy_consumption|onclock_cuda_graphs",
    "TLS": r"onclock_certificate_end_timestamp_seconds",
    "keys or TLS": r"onclock_security_changes_total",
}


def rendered(name: str) -> Rendered:
    """A release in a namespace `name`, monitored."""
    flags = ("--namespace", name)
    values = ["serviceMonitor.enabled=true", "prometheusRule.enabled=true"]
    values.append('config={"model_control_mode":"explicit","load_model":"m"}')
    return render(CHART / "ci" / "cpu-minimal-values.yaml", *values, flags=flags)


def test_scaled_back_the_rules_are_the_chart_s() -> None:
    """So that what fires here is what would fire in a cluster, later."""
    groups = rule_groups(rendered("kept"))
    fast = scaled(groups, FACTOR)
    assert fast != scaled(groups, Fraction(1))
    assert scaled(fast, 1 / FACTOR) == scaled(groups, Fraction(1))
    text = yaml.safe_dump(fast)
    assert not re.search(r"[\[ ]\d+[smhd]\b", text), "a duration that was not divided"
    assert " 60 * model:onclock_offered:rate1h" in text


@contextlib.contextmanager
def serving(name: str, directory: Path) -> Iterator[RunningServer]:
    """A server with the chart's settings, whose one model promises what `OBJECTIVE_MS` says."""
    promised = f'parameters {{ key: "latency_slo_ms" value {{ string_value: "{OBJECTIVE_MS[name]}" }} }}\n'
    write_model(directory, "m", onnx_models.slow_for(RUN_MS), config=promised)
    # Loaded later. A stateful model has metrics of its own.
    write_model(directory, "counter", onnx_models.sequence_probe(), config=onnx_models.PROBE_CONFIG)
    flags = ("--host", "127.0.0.1", "--metrics-port", "0", "--profile-budget-ms", "1000")
    with running_server(directory, *flags, environment=rendered(name).environment) as server:
        yield server


@contextlib.contextmanager
def load(server: RunningServer, directory: Path) -> Iterator[subprocess.Popen[str]]:
    """The load tester, sending for as long as the block runs."""
    directory.mkdir()
    scenario = {
        "name": "live",
        "duration": "10m",
        "arrivals": {"kind": "poisson", "rate": 20},
        "slo": "1s",
        "load": [{"model": "m"}],
    }
    (directory / "live.yaml").write_text(yaml.safe_dump(scenario))
    command = [sys.executable, "-m", "loadtests", "run", str(directory / "live.yaml"), "--quiet", "--warm-up", "0s"]
    command += ["--server", server.address, "--metrics", "off", "--workers", "1", "--out", str(directory / "out")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


def eventually(what: str, found: Callable[[], bool], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not found():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.2)


def ask_for_all(server: RunningServer) -> None:
    """What has metrics of its own and breaks no promise: no such model, a wrong request, calls that are given up, and a
    model that is loaded."""
    client = Client(server.channel())
    for model, inputs in (("nobody", {"x": np.ones((1, 4), np.float32)}), ("m", {"y": np.ones((1, 4), np.float32)})):
        with pytest.raises(grpc.RpcError):
            client.infer(request(model, inputs))
    client.call("RepositoryModelLoad", model_name="counter")

    def given_up() -> bool:
        calls = [client.infer_future(request("m", {"x": np.ones((1, 4), np.float32)})) for _ in range(10)]
        for call in calls:
            call.cancel()
        with urllib.request.urlopen(server.metrics_url) as page:
            return b'onclock_failures_total{model="m",version="1",reason="cancelled"}' in page.read()

    eventually("a call that was given up is counted", given_up, ALERT_S)


def test_a_broken_promise_calls_somebody_and_a_kept_one_nobody(tmp_path: Path) -> None:
    """Two releases under the same load. The alerts of the one fire, in Prometheus' own list of alerts; none of the
    other's ever does. Targets are up, rules are healthy, and every metric that is asked for is there."""
    releases = {name: rendered(name) for name in OBJECTIVE_MS}
    rules = {name: scaled(rule_groups(release), FACTOR) for name, release in releases.items()}
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(serving(name, tmp_path / name)) for name in releases}
        jobs: list[Object] = []
        for name, release in releases.items():
            pods = {f"{RELEASE}-{name}": f"127.0.0.1:{servers[name].metrics_port}"}
            jobs.append(scrape_config(release, pods, FACTOR))
        ask_for_all(servers["kept"])
        (tmp_path / "prometheus").mkdir()
        prometheus = stack.enter_context(running_prometheus(tmp_path / "prometheus", jobs, rules, FACTOR))
        senders = [stack.enter_context(load(server, tmp_path / f"load-{name}")) for name, server in servers.items()]
        began = time.monotonic()

        fast_burn = ("OnclockSloFastBurn", "m")
        eventually("the fast burn fires", lambda: fast_burn in prometheus.firing("broken"), ALERT_S)
        (alert,) = [
            alert for alert in prometheus.ask("alerts")["alerts"] if alert["labels"]["alertname"] == fast_burn[0]
        ]
        assert alert["labels"]["severity"] == "critical"
        assert alert["annotations"]["summary"] == "Model m breaks its promise"
        reason = ("OnclockDeadlinesUnreachable", "m")
        eventually("the reason fires, too", lambda: reason in prometheus.firing("broken"), ALERT_S)
        eventually("no alert could still be pending", lambda: time.monotonic() > began + QUIET_S, QUIET_S + 1)

        assert all(sender.poll() is None for sender in senders)
        ever = prometheus.query(
            'count by (alertname) (count_over_time(ALERTS{namespace="kept",alertstate="firing"}[1h]))'
        )
        assert {found["metric"]["alertname"] for found in ever} == set()
        assert not prometheus.firing("kept")
        offered = prometheus.query('model:onclock_offered:rate5m{namespace="kept",model="m"}')
        assert float(offered[0]["value"][1]) > 10, "a promise that nobody asks for is not kept"
        assert_scraped(prometheus, set(releases))


def assert_scraped(prometheus: Prometheus, releases: set[str]) -> None:
    """Every target is up, every rule is healthy, every metric that rules and dashboards use is there."""
    targets = prometheus.ask("targets", state="active")["activeTargets"]
    assert {target["labels"]["namespace"] for target in targets} == releases
    assert {(target["health"], target["lastError"]) for target in targets} == {("up", "")}
    groups = prometheus.ask("rules")["groups"]
    unhealthy = [(rule["name"], rule) for group in groups for rule in group["rules"] if rule["health"] != "ok"]
    assert not unhealthy
    queries = [rule["query"] for group in groups for rule in group["rules"]]
    queries += [query for dashboard in dashboards().values() for _, query in dashboard_queries(dashboard)]
    used = frozenset().union(*map(metrics_of, queries))
    there = set(prometheus.ask("label/__name__/values"))
    missing = used - there
    expected = {name for name in used for pattern in ABSENT.values() if re.fullmatch(pattern, name)}
    assert missing == expected
    assert len(used - missing) > 40
