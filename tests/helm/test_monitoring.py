"""What the chart has for Prometheus and Grafana: rules that are right, of metrics that exist, with a runbook each."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from service.errors import ServiceError
from service.scheduler import RefusalReason
from tests.helm import tools
from tests.helm.chart import (
    CHART,
    Object,
    Rendered,
    dashboard_queries,
    dashboards,
    metrics_of,
    render,
    rendered_set,
    rule_groups,
    series_names,
)

pytestmark = pytest.mark.skipif(
    os.environ.get(tools.SKIP) == "skip", reason=f"{tools.SKIP}=skip: the chart is not tested here"
)

EVERYTHING = CHART / "ci" / "everything-values.yaml"
MONITORED = CHART / "ci" / "hpa-monitoring-values.yaml"
MINIMAL = CHART / "ci" / "cpu-minimal-values.yaml"


def recorded() -> set[str]:
    """The names of the recorded series."""
    return {
        rule["record"] for group in rule_groups(rendered_set(MONITORED)) for rule in group["rules"] if "record" in rule
    }


def alerts(rendered: Rendered) -> list[Object]:
    """The alerting rules."""
    return [rule for group in rule_groups(rendered) for rule in group["rules"] if "alert" in rule]


def test_rules_use_metrics_that_exist() -> None:
    """Of the server, or recorded by the rules themselves; and every recorded series is used."""
    queries = [rule["expr"] for group in rule_groups(rendered_set(MONITORED)) for rule in group["rules"]]
    used = frozenset().union(*map(metrics_of, queries))
    assert used - series_names() - {"up"} == recorded()
    assert len(used) > 15


def test_dashboards_use_metrics_that_exist() -> None:
    """No recorded series either: a dashboard works without the rules."""
    assert len(dashboards()) >= 2
    for name, dashboard in dashboards().items():
        for panel, query in dashboard_queries(dashboard):
            assert metrics_of(query), f"{name}: {panel}: {query}"
            assert metrics_of(query) <= series_names(), f"{name}: {panel}"


def test_the_reader_of_queries_sees_every_metric() -> None:
    """Else the two tests above would prove nothing."""
    query = (
        'sum by (pod) (rate(onclock_made_up_total{reason="onclock_x"}[5m])) / nv_other > on (model) model:onclock_y:z'
    )
    assert metrics_of(query) == {"onclock_made_up_total", "nv_other", "model:onclock_y:z"}
    assert "onclock_made_up_total" not in series_names()
    assert "onclock_request_duration_seconds_bucket" in series_names()


def test_reasons_in_queries_exist() -> None:
    """A reason that the server never says would silently select nothing."""
    known = {reason.value for reason in RefusalReason} | {"draining", "REJECTED", "CANCELED", "BACKEND", "OTHER"}
    classes = [ServiceError]
    while classes:
        kind = classes.pop()
        classes += kind.__subclasses__()
        known.add(kind.reason)
    queries = [rule["expr"] for group in rule_groups(rendered_set(MONITORED)) for rule in group["rules"]]
    queries += [query for dashboard in dashboards().values() for _, query in dashboard_queries(dashboard)]
    asked = {
        part for query in queries for found in re.findall(r'reason=~?"([^"]*)"', query) for part in found.split("|")
    }
    assert asked
    assert asked <= known


@pytest.mark.parametrize("name", sorted(dashboards()))
def test_dashboards_are_whole(name: str) -> None:
    """Every panel says what it means, has its own number and place, and uses variables that there are."""
    dashboard = dashboards()[name]
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        if panel["type"] not in ("row", "text"):
            assert panel["description"], panel["title"]
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    built_in = {"__rate_interval", "__range"}
    queries = [query for _, query in dashboard_queries(dashboard)]
    assert {found for query in queries for found in re.findall(r"\$(\w+)", query)} <= variables | built_in


def test_dashboards_are_config_maps_for_grafana() -> None:
    """Each file as it is, with the label that the sidecar looks for, where the sidecar looks."""
    found = [
        item for item in rendered_set(EVERYTHING).all("ConfigMap") if "grafana_dashboard" in item["metadata"]["labels"]
    ]
    assert {name: json.loads(text) for item in found for name, text in item["data"].items()} == dashboards()
    assert {item["metadata"]["namespace"] for item in found} == {"monitoring"}


def sections(page: str) -> set[str]:
    """The headings of a page of docs, as anchors."""
    text = (tools.ROOT / "docs" / page).read_text()
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_alert_has_a_section_of_the_runbook() -> None:
    """docs/operations.md says of each what it means and what to do, under its own name; and of no other."""
    found = alerts(rendered_set(EVERYTHING))
    assert len(found) >= 12
    for alert in found:
        page, _, anchor = alert["annotations"]["runbook_url"].partition("#")
        assert page == "docs/operations.md"
        assert anchor == alert["alert"].lower()
        assert anchor in sections("operations.md")
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert alert["labels"]["deployment"]
    text = (tools.ROOT / "docs" / "operations.md").read_text()
    written = set(re.findall(r"^### (Onclock\w+)$", text, flags=re.MULTILINE))
    assert written == {alert["alert"] for alert in found}
    for name in written:
        section = re.split(r"^#+ ", text.split(f"### {name}\n")[1], flags=re.MULTILINE)[0]
        assert "**Symptom.**" in section
        assert "**What to look at.**" in section
        assert "**What to do.**" in section, name


def test_anchors_in_the_pages_exist() -> None:
    """Links within and between operations.md and kubernetes.md lead somewhere."""
    for page in ("operations.md", "kubernetes.md"):
        text = (tools.ROOT / "docs" / page).read_text()
        for target, anchor in re.findall(r"\]\(([\w./-]*)#([\w-]+)\)", text):
            assert anchor in sections(target or page), f"{page}: {target}#{anchor}"
        for target in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text):
            assert (tools.ROOT / "docs" / target).exists(), f"{page}: {target}"


def test_alerts_can_be_left_out_and_labelled() -> None:
    """`disabled`, `alertLabels`, `objective` and `runbookUrl` do what they say."""
    found = {alert["alert"]: alert for alert in alerts(rendered_set(MONITORED))}
    assert "OnclockUnbalanced" not in found
    fast = found["OnclockSloFastBurn"]
    assert fast["labels"]["team"] == "serving"
    assert "14.4 * (1 - 0.995)" in fast["expr"]
    assert fast["annotations"]["runbook_url"] == "https://runbooks.example/onclock/operations.md#onclockslofastburn"


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run promtool."""
    command = [str(tools.promtool()), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=tools.RUN_TIMEOUT_S, check=False)


@pytest.mark.parametrize("path", [MONITORED, EVERYTHING], ids=lambda path: path.stem)
def test_promtool_accepts_the_rules(path: Path, tmp_path: Path) -> None:
    """`promtool check rules`: syntax, names, templates."""
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": rule_groups(rendered_set(path))}))
    done = promtool("check", "rules", str(file))
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_fire_when_they_should(tmp_path: Path) -> None:
    """`promtool test rules` with rules_test.yaml: each alert on what it is for, and not on what is fine."""
    rendered = render(MINIMAL, "prometheusRule.enabled=true")
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": rule_groups(rendered)}))
    tests = Path(__file__).with_name("rules_test.yaml")
    (tmp_path / tests.name).write_text(tests.read_text())
    done = promtool("test", "rules", str(tmp_path / tests.name))
    assert done.returncode == 0, done.stdout + done.stderr
    tried = {
        case["alertname"] for test in yaml.safe_load(tests.read_text())["tests"] for case in test["alert_rule_test"]
    }
    assert tried == {alert["alert"] for alert in alerts(rendered)}, "an alert without a test"


def test_promtool_accepts_the_dashboards_queries(tmp_path: Path) -> None:
    """With Grafana's variables filled in, each is PromQL."""
    rules: list[dict[str, str]] = []
    for dashboard in dashboards().values():
        for panel, query in dashboard_queries(dashboard):
            if not panel.startswith("variable "):
                filled = query.replace("$__rate_interval", "1m").replace("$__range", "3h").replace("$objective", "0.99")
                filled = re.sub(r"\$(cpu|gpu)_run_slots", "1", filled)
                rules.append({"record": f"panel:{len(rules)}", "expr": re.sub(r"\$\w+", ".*", filled)})
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = promtool("check", "rules", "--lint=none", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
