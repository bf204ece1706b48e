"""A real Prometheus with the chart's rules and scrape settings, in a time of its own that goes faster.

Every length of time in the rules is divided by one number: ranges, offsets, `for`, intervals, and the factors that turn
rates into counts. So a window holds as many scrapes and evaluations as in a cluster, and nothing else is changed.
`scaled(scaled(rules, s), 1 / s)` gives the rules back.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from tests.container.podman import free_ports
from tests.helm import tools
from tests.helm.chart import Object, Rendered

START_S = 30.0
_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
# `[5m]` and `offset 30m` of an expression; `3600 * ` before a recorded rate of requests.
_RANGES = re.compile(r"(\[|\boffset )(\d+)(ms|s|m|h|d)\b")
_SECONDS = re.compile(r"(?<![\w.])(\d+) \* (?=model:onclock_offered:rate)")
# Prometheus Operator's default for groups that say nothing.
OPERATOR_INTERVAL = "30s"


def _divided(number: str, unit: str, factor: Fraction) -> str:
    divided = Fraction(int(number) * _MS[unit]) / factor
    assert divided.denominator == 1, f"{number}{unit} cannot be divided by {factor}"
    return f"{divided}ms"


def duration(text: str, factor: Fraction) -> str:
    """A duration of Prometheus, divided; in milliseconds."""
    found = re.fullmatch(r"(\d+)(ms|s|m|h|d)", text)
    assert found, text
    return _divided(found[1], found[2], factor)


def _count(found: re.Match[str], factor: Fraction) -> str:
    divided = Fraction(found[1]) / factor
    assert divided.denominator == 1
    return f"{divided} * "


def scaled(groups: Sequence[Object], factor: Fraction) -> list[Object]:
    """Groups of rules whose time goes `factor` times as fast; every duration in milliseconds."""
    made = []
    for group in groups:
        rules = []
        for rule in group["rules"]:
            expression = _RANGES.sub(lambda found: found[1] + _divided(found[2], found[3], factor), rule["expr"])
            expression = _SECONDS.sub(lambda found: _count(found, factor), expression)
            rules.append({**rule, "expr": expression})
            if "for" in rule:
                rules[-1]["for"] = duration(rule["for"], factor)
        made.append({**group, "interval": duration(group.get("interval", OPERATOR_INTERVAL), factor), "rules": rules})
    return made


def scrape_config(rendered: Rendered, pods: dict[str, str], factor: Fraction) -> Object:
    """What the Prometheus Operator makes of the ServiceMonitor: a job, with the labels that it gives to targets. `pods`
    has the address of each pod's metrics port."""
    monitor = rendered.one("ServiceMonitor")["spec"]
    (endpoint,) = monitor["endpoints"]
    assert set(endpoint) == {"port", "path", "interval", "scrapeTimeout"}, "no translation of all of it"
    (namespace,) = monitor["namespaceSelector"]["matchNames"]
    wanted = monitor["selector"]["matchLabels"].items()
    services = [item for item in rendered.all("Service") if wanted <= item["metadata"]["labels"].items()]
    (service,) = [item for item in services if endpoint["port"] in [port["name"] for port in item["spec"]["ports"]]]
    name = service["metadata"]["name"]
    common = {"namespace": namespace, "service": name, "endpoint": endpoint["port"], "container": "onclock"}
    interval = duration(endpoint["interval"], factor)
    return {
        "job_name": f"serviceMonitor/{namespace}/{name}/0",
        "metrics_path": endpoint["path"],
        "scrape_interval": interval,
        # A scrape takes as long as ever, however fast the time goes.
        "scrape_timeout": interval,
        "static_configs": [
            {"targets": [address], "labels": {**common, "job": name, "pod": pod}} for pod, address in pods.items()
        ],
    }


class Prometheus:
    """A running one."""

    def __init__(self, port: int) -> None:
        self._base = f"http://127.0.0.1:{port}"

    def ask(self, path: str, **parameters: str) -> Any:
        """The `data` of an answer of its HTTP API. Raises `OSError` and `urllib.error.HTTPError`."""
        url = f"{self._base}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[Object]:
        """The vector that an expression has now."""
        found: list[Object] = self.ask("query", query=expression)["result"]
        return found

    def firing(self, namespace: str) -> set[tuple[str, str]]:
        """(alert, model) of what fires now, as `/api/v1/alerts` has it."""
        return {
            (alert["labels"]["alertname"], alert["labels"].get("model", ""))
            for alert in self.ask("alerts")["alerts"]
            if alert["state"] == "firing" and alert["labels"]["namespace"] == namespace
        }

    def is_ready(self) -> bool:
        try:
            urllib.request.urlopen(f"{self._base}/-/ready", timeout=5).close()
        except OSError:
            return False
        return True


@contextlib.contextmanager
def running_prometheus(
    directory: Path,
    jobs: Sequence[Object],
    rules: dict[str, Sequence[Object]],
    factor: Fraction,
    features: Sequence[str] = (),
) -> Iterator[Prometheus]:
    """Prometheus with these jobs, files of rules (name: groups) and features that are off by default, ended with the
    block."""
    for name, groups in rules.items():
        (directory / f"{name}.rules.yml").write_text(yaml.safe_dump({"groups": list(groups)}))
    configuration = {
        "global": {"evaluation_interval": duration(OPERATOR_INTERVAL, factor)},
        "rule_files": [str(directory / "*.rules.yml")],
        "scrape_configs": list(jobs),
    }
    file = directory / "prometheus.yml"
    file.write_text(yaml.safe_dump(configuration))
    (port,) = free_ports(1)
    command = [str(tools.prometheus()), f"--config.file={file}", f"--storage.tsdb.path={directory / 'data'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", *(f"--enable-feature={name}" for name in features)]
    with (directory / "log").open("w") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            found = Prometheus(port)
            end = time.monotonic() + START_S
            while not found.is_ready():
                assert process.poll() is None, (directory / "log").read_text()[-2000:]
                assert time.monotonic() < end, "Prometheus does not become ready"
                time.sleep(0.05)
            yield found
        finally:
            process.terminate()
