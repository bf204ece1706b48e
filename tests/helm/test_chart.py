"""The chart: what it renders is valid, hangs together, and says nothing that the server does not know."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from annotated_types import Ge, Le

from loadtests.scenario import parse_scenario
from service.config.settings import Settings, env_name, load_settings
from service.frontend.health import SERVICE
from tests.helm import tools
from tests.helm.chart import (
    CHART,
    EXTENSIONS,
    NAMESPACE,
    RELEASE,
    VALUE_SETS,
    Object,
    Rendered,
    render,
    rendered_set,
    run,
    series_names,
)

pytestmark = pytest.mark.skipif(
    os.environ.get(tools.SKIP) == "skip", reason=f"{tools.SKIP}=skip: the chart is not tested here"
)

# The versions whose schemas objects are checked against: the oldest that the chart's defaults need, and the newest.
KUBERNETES = ("1.30", "1.37")

# Settings that the chart makes of its own values, and their environment variables.
FROM_THE_CHART = {"model_repository", "host", "metrics_host", "grpc_port", "metrics_port", "profile_cache"}
SECURITY = {"tls_certificate", "tls_key", "tls_client_ca", "api_keys"}

# What autoscaling asks for.
SATURATION = "onclock_saturation_ratio"

EVERYTHING = CHART / "ci" / "everything-values.yaml"
MONITORED = CHART / "ci" / "hpa-monitoring-values.yaml"
MINIMAL = CHART / "ci" / "cpu-minimal-values.yaml"
SECURED = CHART / "ci" / "mtls-keys-values.yaml"
GPU = CHART / "ci" / "gpu-values.yaml"

sets = pytest.mark.parametrize("path", VALUE_SETS, ids=lambda path: path.stem.removesuffix("-values"))


def pod_of(rendered: Rendered) -> Object:
    """The Deployment's pod."""
    spec: Object = rendered.one("Deployment")["spec"]["template"]["spec"]
    return spec


# ---------------------------------------------------------------------------------------------------- valid


@sets
def test_lint_finds_nothing(path: Path) -> None:
    """`helm lint --strict` with every set of values."""
    done = run("lint", "--strict", str(CHART), "--values", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout


@sets
def test_every_set_of_values_renders(path: Path) -> None:
    """To a Deployment, two Services and a ConfigMap at least, each object once."""
    rendered = rendered_set(path)
    assert not rendered.error
    rendered.one("Deployment")
    assert len(rendered.all("Service")) == 2
    assert rendered.environment
    names = [(item["kind"], item["metadata"]["name"]) for item in rendered.objects]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("version", KUBERNETES)
@sets
def test_objects_fit_the_schemas_of_kubernetes(path: Path, version: str) -> None:
    """Those of its own API, strictly: unknown keys are wrong."""
    own = [item for item in rendered_set(path).objects if not item["apiVersion"].startswith(EXTENSIONS)]
    assert own
    assert not check(own, version)


def check(objects: list[Object], version: str) -> str:
    """What is wrong with `objects` by the schemas of a version of Kubernetes."""
    done = subprocess.run(
        [str(tools.validator()), str(Path(__file__).with_name("validate.py")), version],
        input=json.dumps(objects),
        capture_output=True,
        text=True,
        timeout=tools.RUN_TIMEOUT_S,
        check=False,
    )
    assert not done.stderr, done.stderr
    assert bool(done.returncode) == bool(done.stdout)
    return done.stdout


def test_the_schemas_find_what_is_wrong() -> None:
    """Else the test above would prove nothing: an unknown key, a wrong type."""
    deployment = json.loads(json.dumps(rendered_set(MINIMAL).one("Deployment")))
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    assert "readynessProbe" in check([deployment], KUBERNETES[-1])
    deployment = json.loads(json.dumps(rendered_set(MINIMAL).one("Deployment")))
    deployment["spec"]["replicas"] = "two"
    assert "replicas" in check([deployment], KUBERNETES[-1])


@sets
def test_extensions_have_the_fields_of_their_kind(path: Path) -> None:
    """ServiceMonitor, PrometheusRule and ScaledObject use no field that their definitions do not have."""
    for item in rendered_set(path).objects:
        if item["apiVersion"].startswith(EXTENSIONS):
            assert not list(unknown_fields(item["spec"], FIELDS[item["kind"]], item["kind"]))


# What the chart may use of objects that Kubernetes' own schemas do not know. None: any value; {"*": ...}: any key.
FIELDS: dict[str, Any] = {
    "ServiceMonitor": {
        "selector": {"matchLabels": {"*": None}},
        "namespaceSelector": {"matchNames": None},
        "endpoints": [
            {
                "port": None,
                "path": None,
                "interval": None,
                "scrapeTimeout": None,
                "scheme": None,
                "authorization": {"credentials": {"name": None, "key": None}},
                "tlsConfig": {"ca": {"secret": {"name": None, "key": None}}, "serverName": None},
                "relabelings": [{"sourceLabels": None, "targetLabel": None}],
                "metricRelabelings": None,
            }
        ],
    },
    "PrometheusRule": {
        "groups": [
            {
                "name": None,
                "interval": None,
                "rules": [
                    {
                        "alert": None,
                        "record": None,
                        "expr": None,
                        "for": None,
                        "labels": {"*": None},
                        "annotations": {"*": None},
                    }
                ],
            }
        ]
    },
    "ScaledObject": {
        "scaleTargetRef": {"apiVersion": None, "kind": None, "name": None},
        "pollingInterval": None,
        "minReplicaCount": None,
        "maxReplicaCount": None,
        "fallback": {"failureThreshold": None, "replicas": None},
        "advanced": {"horizontalPodAutoscalerConfig": {"behavior": None}},
        "triggers": [
            {
                "type": None,
                "name": None,
                "metricType": None,
                "metadata": {"serverAddress": None, "query": None, "threshold": None, "ignoreNullValues": None},
                "authenticationRef": {"name": None, "kind": None},
            }
        ],
    },
}


def unknown_fields(value: Any, known: Any, path: str) -> Iterator[str]:
    """The paths in `value` that `known` does not have."""
    if isinstance(known, list):
        for index, item in enumerate(value):
            yield from unknown_fields(item, known[0], f"{path}[{index}]")
    elif isinstance(known, dict):
        for key, item in value.items():
            if key not in known and "*" not in known:
                yield f"{path}.{key}"
            else:
                yield from unknown_fields(item, known.get(key, known.get("*")), f"{path}.{key}")


# ---------------------------------------------------------------------------------------------------- settings


@sets
def test_the_server_accepts_the_environment(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ONCLOCK_* variable is a setting, and every value is accepted."""
    for name in [name for name in os.environ if name.startswith("ONCLOCK_")]:
        monkeypatch.delenv(name)
    environment = rendered_set(path).environment
    assert environment.keys() <= {env_name(name) for name in Settings.model_fields}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # Its directory exists in the container only.
    monkeypatch.setenv("ONCLOCK_MODEL_REPOSITORY", str(tmp_path))
    settings = load_settings()
    assert settings.host in ("0.0.0.0", "[::]")


def test_large_numbers_are_written_out() -> None:
    """Helm holds numbers as floats: 268435456 must not become 2.68435456e+08."""
    environment = rendered_set(MINIMAL).environment
    assert environment["ONCLOCK_MAX_MESSAGE_BYTES"] == "268435456"
    assert environment["ONCLOCK_MAX_IN_FLIGHT_BYTES"] == "2147483648"
    assert render(MINIMAL, "config.grace_period_s=12.5").environment["ONCLOCK_GRACE_PERIOD_S"] == "12.5"


def test_config_has_the_server_s_settings_and_defaults() -> None:
    """Every setting is under `config` with the server's own default, or the chart makes it of other values."""
    config = yaml.safe_load((CHART / "values.yaml").read_text())["config"]
    settings = set(Settings.model_fields) - FROM_THE_CHART - SECURITY
    assert config.keys() == settings, "values.yaml, values.schema.json and the server's settings differ"
    environment = rendered_set(MINIMAL).environment
    assert config.pop("max_connections") is None, "given, it demands the native ingress"
    for name in settings - {"max_connections"}:
        default = Settings.model_fields[name].get_default(call_default_factory=True)
        written = environment[env_name(name)]
        if default is None:
            assert written == "none"
        elif isinstance(default, bool):
            assert written == str(default).lower()
        elif isinstance(default, tuple):
            assert written == ",".join(default)
        elif isinstance(default, (int, float)):
            assert float(written) == default, name
        else:
            assert written == default


def test_the_schema_has_the_server_s_bounds() -> None:
    """What the server would refuse when the pod starts is refused before."""
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]["config"]["properties"]
    for name, stated in schema.items():
        field = Settings.model_fields[name]
        for bound, key in ((Ge, "minimum"), (Le, "maximum")):
            limits = [getattr(item, bound.__name__.lower()) for item in field.metadata if isinstance(item, bound)]
            assert [stated[key]] == limits if limits else key not in stated, name
        choices = getattr(field.annotation, "__args__", ())
        if "enum" in stated:
            assert tuple(stated["enum"]) == choices, name


def test_every_value_is_in_the_schema_and_described() -> None:
    """No key of values.yaml that the schema does not know, or the other way round; a comment above each value."""
    text = (CHART / "values.yaml").read_text()
    schema = json.loads((CHART / "values.schema.json").read_text())
    written = dict(keys_of(text, schema))
    assert set(written) == set(leaves(schema)) - {"global"}
    assert not [path for path, above in written.items() if not above.strip().startswith("#")]


def leaves(schema: Object, path: str = "") -> Iterator[str]:
    """The paths of the values that a schema knows; what is inside of a free object is Kubernetes' own."""
    for key, described in schema["properties"].items():
        below = f"{path}.{key}" if path else key
        # Objects of Kubernetes, of which the schema knows the first level only.
        if "properties" in described and key not in ("handler", "behavior", "authenticationRef", "strategy"):
            yield from leaves(described, below)
        else:
            yield below


def keys_of(text: str, schema: Object) -> Iterator[tuple[str, str]]:
    """(path, the line above) of each value in a YAML text."""
    known = set(leaves(schema))
    open_keys: list[tuple[int, str]] = []
    lines = text.splitlines()
    for number, line in enumerate(lines):
        match = re.match(r"^( *)([A-Za-z_]\w*):", line)
        if match is None:
            continue
        indent = len(match[1])
        open_keys = [(depth, key) for depth, key in open_keys if depth < indent]
        path = ".".join([*(key for _, key in open_keys), match[2]])
        if any(path.startswith(f"{leaf}.") for leaf in known):
            continue
        open_keys.append((indent, match[2]))
        if path in known or not any(leaf.startswith(f"{path}.") for leaf in known):
            yield path, lines[number - 1]


# ---------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ('replicaCount="two"', "/replicaCount': got string, want integer"),
        ("replicaCounts=2", "additional properties 'replicaCounts' not allowed"),
        ("config.grcp_port=1", "additional properties 'grcp_port' not allowed"),
        ("config.grpc_port=1", "additional properties 'grpc_port' not allowed"),
        ("config.max_in_flight=0", "/config/max_in_flight': minimum: got 0, want 1"),
        ('config.device="gpu"', "/config/device': value must be one of 'auto', 'cpu', 'cuda'"),
        ('modelRepository.type="s3"', "/modelRepository/type': value must be one of"),
        ('modelRepository.path="models"', "/modelRepository/path': 'models' does not match pattern"),
        ('modelRepository.claim.size="10 GB"', "/modelRepository/claim/size': '10 GB' does not match pattern"),
        ('image.digest="sha256:1"', "/image/digest': 'sha256:1' does not match pattern"),
        ("autoscaling.minReplicas=0", "/autoscaling/minReplicas': minimum: got 0, want 1"),
        ("autoscaling.targetSaturation=70", "/autoscaling/targetSaturation': maximum: got 70, want 1"),
        ("prometheusRule.objective=99.9", "/prometheusRule/objective'"),
        ("ports.grpc=70000", "/ports/grpc': maximum: got 70,000, want 65,535"),
        ("gpu.count=0", "/gpu/count': minimum: got 0, want 1"),
        ('probes.liveness.handler={"http": {}}', "additional properties 'http' not allowed"),
    ],
)
def test_the_schema_refuses_and_says_where(value: str, says: str) -> None:
    """A typo, a wrong type or a value out of bounds is named with its path."""
    rendered = render(MINIMAL, value)
    assert not rendered.objects
    assert says in rendered.error


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            ["autoscaling.hpa.enabled=true", 'autoscaling.keda={"enabled": true, "serverAddress": "http://p:9090"}'],
            "autoscaling.hpa.enabled and autoscaling.keda.enabled exclude each other",
        ),
        (["autoscaling.keda.enabled=true"], "needs autoscaling.keda.serverAddress"),
        (["autoscaling.minReplicas=9", "autoscaling.maxReplicas=3"], "(9) is more than autoscaling.maxReplicas (3)"),
        (["autoscaling.hpa.enabled=true", "metrics.enabled=false"], "autoscaling needs metrics.enabled"),
        (["serviceMonitor.enabled=true", "metrics.enabled=false"], "serviceMonitor.enabled needs metrics.enabled"),
        (['modelRepository.existingClaim.name=""'], "needs modelRepository.existingClaim.name"),
        (['modelRepository.type="initContainer"'], "needs modelRepository.initContainer.image.repository"),
        (
            ['modelRepository.type="initContainer"', 'modelRepository.initContainer.image.repository="a/b"'],
            "needs modelRepository.initContainer.command or args",
        ),
        (['profileCache.type="existingClaim"'], "needs profileCache.existingClaim"),
        (["tls.enabled=true"], "tls.enabled needs tls.secretName"),
        (["config.metrics_tls=true"], "config.metrics_tls needs tls.enabled"),
        (
            ['tls={"enabled": true, "secretName": "t", "clientCA": {"enabled": true}}', "config.metrics_tls=true"],
            "the kubelet has no client certificate",
        ),
        (
            ["serviceMonitor.enabled=true", 'apiKeys.secretName="k"'],
            "scrapes need a key of the group metrics",
        ),
        (['config.ingress="core"', "config.max_connections=9"], "config.ingress core has no limit of connections"),
        (["tls.clientCA.enabled=true"], "tls.clientCA.enabled needs tls.enabled"),
        (['tls={"enabled": true, "secretName": "t"}', "metrics.enabled=false"], "leaves the probes nothing to ask"),
        (["drain.terminationGracePeriodSeconds=20"], "leaves 10 s after the pre-stop pause"),
        (
            ['extraEnv=[{"name": "ONCLOCK_GRPC_PORT", "value": "1"}]'],
            "extraEnv[0]: ONCLOCK_GRPC_PORT is set by",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_in_words(values: list[str], says: str) -> None:
    """Each with what to do."""
    rendered = render(MINIMAL, *values)
    assert not rendered.objects
    assert says in rendered.error


def test_an_old_kubernetes_needs_another_way_to_wait() -> None:
    """The sleep action is from 1.30; before, a command has to be given."""
    old = ("--kube-version", "1.29.4")
    assert "has no sleep action for preStop" in render(MINIMAL, flags=old).error
    rendered = render(MINIMAL, 'drain.preStopCommand=["python", "-c", "pass"]', flags=old)
    assert rendered.container["lifecycle"]["preStop"] == {"exec": {"command": ["python", "-c", "pass"]}}
    assert not render(MINIMAL, "drain.preStopSeconds=0", flags=old).error
    assert "1.27" in render(MINIMAL, flags=("--kube-version", "1.26.0")).error


# ---------------------------------------------------------------------------------------------------- pods


@sets
def test_pods_are_confined(path: Path) -> None:
    """No root, no capabilities, read-only root, RuntimeDefault, no token, no links: the pod of `helm test` too."""
    rendered = rendered_set(path)
    pods = [pod_of(rendered), *(pod["spec"] for pod in rendered.all("Pod"))]
    for pod in pods:
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        own = {"onclock", "models", "loadtest"}
        for container in itertools.chain(pod["containers"], pod.get("initContainers", ())):
            if container["name"] in own:
                context = container["securityContext"]
                assert context["allowPrivilegeEscalation"] is False
                assert context["readOnlyRootFilesystem"] is True
                assert context["capabilities"] == {"drop": ["ALL"]}
                assert any(mount["mountPath"] == "/tmp" for mount in container["volumeMounts"])


@sets
def test_every_mount_has_its_volume(path: Path) -> None:
    """And no two mounts have one place."""
    rendered = rendered_set(path)
    for pod in [pod_of(rendered), *(pod["spec"] for pod in rendered.all("Pod"))]:
        volumes = [volume["name"] for volume in pod["volumes"]]
        assert len(volumes) == len(set(volumes))
        for container in itertools.chain(pod["containers"], pod.get("initContainers", ())):
            mounts = container.get("volumeMounts", [])
            assert {mount["name"] for mount in mounts} <= set(volumes)
            assert len({mount["mountPath"] for mount in mounts}) == len(mounts)


@sets
def test_the_end_of_a_pod_has_time_for_all_of_it(path: Path) -> None:
    """The pre-stop pause, the grace period for accepted requests, and a rest to close."""
    rendered = rendered_set(path)
    lifecycle = rendered.container.get("lifecycle", {}).get("preStop", {})
    pause = lifecycle.get("sleep", {}).get("seconds", 5 if "exec" in lifecycle else 0)
    grace = float(rendered.environment["ONCLOCK_GRACE_PERIOD_S"])
    assert pod_of(rendered)["terminationGracePeriodSeconds"] >= pause + grace + 15


def test_the_grace_period_is_computed() -> None:
    """30 + 10 + 15 by default; fractions are rounded up."""
    assert pod_of(rendered_set(MINIMAL))["terminationGracePeriodSeconds"] == 30 + 10 + 15
    rendered = render(MINIMAL, "config.grace_period_s=12.5", "drain.preStopSeconds=7")
    assert pod_of(rendered)["terminationGracePeriodSeconds"] == 13 + 7 + 15


def test_probes_ask_the_health_service() -> None:
    """Without TLS by Kubernetes' own gRPC probes, for a name that the server knows."""
    container = rendered_set(MINIMAL).container
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"]["port"] == 8001
        assert container[probe]["grpc"]["service"] in ("", SERVICE)
    startup = container["startupProbe"]
    patience = startup["periodSeconds"] * startup["failureThreshold"]
    assert patience >= 1800
    assert rendered_set(MINIMAL).one("Deployment")["spec"]["progressDeadlineSeconds"] > patience


def test_with_tls_the_metrics_port_is_asked() -> None:
    """gRPC probes speak plain text only. By HTTP, or HTTPS where that port speaks TLS as well."""
    paths = {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}
    for values, scheme in ((SECURED, "HTTP"), (EVERYTHING, "HTTPS")):
        container = rendered_set(values).container
        for probe, path in paths.items():
            if values is EVERYTHING and probe == "readinessProbe":
                assert container[probe]["grpc"]["service"] == "digits", "a handler of one's own"
                continue
            assert container[probe]["httpGet"] == {"path": path, "port": "metrics", "scheme": scheme}
            assert "grpc" not in container[probe]


def test_certificates_and_keys_are_mounted_where_the_settings_say() -> None:
    """As files that only the pod's group can read; none of them is in a ConfigMap."""
    rendered = rendered_set(SECURED)
    environment = rendered.environment
    volumes = {volume["name"]: volume for volume in pod_of(rendered)["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in rendered.container["volumeMounts"]}
    expected = {
        "ONCLOCK_TLS_CERTIFICATE": ("onclock-tls", "tls.crt"),
        "ONCLOCK_TLS_KEY": ("onclock-tls", "tls.key"),
        "ONCLOCK_TLS_CLIENT_CA": ("clients-ca", "ca.crt"),
        "ONCLOCK_API_KEYS": ("onclock-keys", "keys.toml"),
    }
    for variable, (secret, key) in expected.items():
        file = Path(environment[variable])
        mount = mounts[str(file.parent)]
        assert mount["readOnly"] is True
        volume = volumes[mount["name"]]["secret"]
        assert volume["secretName"] == secret
        assert volume["defaultMode"] == 0o440
        assert {"key": key, "path": file.name} in volume["items"]


def test_without_tls_and_keys_nothing_of_them_is_set() -> None:
    """The server then serves plain text to everybody who may reach it."""
    assert not {env_name(name) for name in SECURITY} & rendered_set(MINIMAL).environment.keys()


def test_a_pod_with_a_gpu_insists_on_it() -> None:
    """It asks for one, tolerates its nodes, and does not fall back to the CPU; others see no GPU at all."""
    rendered = rendered_set(GPU)
    resources = rendered.container["resources"]
    assert resources["limits"] == {"cpu": 4, "memory": "8Gi", "nvidia.com/gpu": 1}
    assert resources["requests"] == {"cpu": 4, "memory": "8Gi", "nvidia.com/gpu": 1}
    assert rendered.environment["ONCLOCK_DEVICE"] == "cuda"
    pod = pod_of(rendered)
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
    assert {"key": "dedicated", "operator": "Equal", "value": "serving", "effect": "NoSchedule"} in pod["tolerations"]
    assert pod["runtimeClassName"] == "nvidia"
    assert pod["priorityClassName"] == "serving"
    hidden = {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"}
    assert hidden not in rendered.container["env"]
    assert hidden in rendered_set(MINIMAL).container["env"]
    assert rendered_set(MINIMAL).environment["ONCLOCK_DEVICE"] == "auto"


@pytest.mark.parametrize(
    ("name", "volume"),
    [
        ("cpu-minimal", {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}}),
        ("claim", {"persistentVolumeClaim": {"claimName": "onclock-models", "readOnly": True}}),
        ("init-container", {"emptyDir": {"sizeLimit": "20Gi"}}),
        ("explicit-empty", {"emptyDir": {}}),
    ],
)
def test_models_come_from_where_the_values_say(name: str, volume: Object) -> None:
    """And the server's setting names the mount."""
    rendered = rendered_set(CHART / "ci" / f"{name}-values.yaml")
    (models,) = [item for item in pod_of(rendered)["volumes"] if item["name"] == "models"]
    assert models == {"name": "models", **volume}
    (mount,) = [item for item in rendered.container["volumeMounts"] if item["name"] == "models"]
    assert mount["mountPath"] == rendered.environment["ONCLOCK_MODEL_REPOSITORY"]
    assert mount["readOnly"] is True
    claims = rendered.all("PersistentVolumeClaim")
    assert len(claims) == (name == "claim")
    if name == "init-container":
        (init,) = pod_of(rendered)["initContainers"]
        assert init["image"] == "rclone/rclone:1.70"
        assert {"name": "models", "mountPath": "/models"} in init["volumeMounts"]


def test_a_changed_setting_replaces_the_pods() -> None:
    """Settings are read at the start."""

    def checksum(*values: str) -> str:
        annotations = render(MINIMAL, *values).one("Deployment")["spec"]["template"]["metadata"]["annotations"]
        found: str = annotations["checksum/config"]
        return found

    assert checksum() == checksum("service.grpcPort=9000")
    labels = rendered_set(MINIMAL).one("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert not [name for name in labels if "chart" in name or "version" in name], "a new chart alone replaces no pods"
    assert checksum() != checksum('config.log_level="debug"')


# ---------------------------------------------------------------------------------------------------- network


@sets
def test_services_select_the_servers_only(path: Path) -> None:
    """By labels that the pods have and the pod of `helm test` does not; ports by names that exist."""
    rendered = rendered_set(path)
    labels = rendered.one("Deployment")["spec"]["template"]["metadata"]["labels"]
    ports = {port["name"] for port in rendered.container["ports"]}
    for service in rendered.all("Service"):
        selector = service["spec"]["selector"]
        assert selector.items() <= labels.items()
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
        for pod in rendered.all("Pod"):
            assert not selector.items() <= pod["metadata"]["labels"].items()
    headless = rendered.one("Service", "-headless")
    assert headless["spec"]["clusterIP"] == "None"
    # A headless Service translates no ports.
    assert headless["spec"]["ports"][0]["port"] == rendered.container["ports"][0]["containerPort"]


def test_only_the_service_with_metrics_is_scraped() -> None:
    """The headless Service has other labels: else each pod would be scraped twice."""
    rendered = rendered_set(MONITORED)
    wanted = rendered.one("ServiceMonitor")["spec"]["selector"]["matchLabels"].items()
    selected = [item for item in rendered.all("Service") if wanted <= item["metadata"]["labels"].items()]
    (service,) = selected
    assert "metrics" in {port["name"] for port in service["spec"]["ports"]}
    assert service["metadata"]["name"] == RELEASE, "rules select by this job"


def test_a_network_policy_lets_in_who_is_listed_and_out_to_nowhere() -> None:
    """By default the namespace's own pods, and Prometheus for metrics; names of ports are the container's."""
    rendered = render(MINIMAL, "networkPolicy.enabled=true")
    policy = rendered.one("NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["egress"] == []
    assert [rule["ports"][0]["port"] for rule in policy["ingress"]] == ["grpc", "metrics"]
    assert policy["ingress"][0]["from"] == [{"podSelector": {}}]
    everything = rendered_set(EVERYTHING).one("NetworkPolicy")["spec"]
    assert [rule["ports"][0]["port"] for rule in everything["egress"]] == [53, 4318, 443]
    test_pod = rendered_set(EVERYTHING).one("Pod")["metadata"]["labels"]
    assert everything["ingress"][-1]["from"][0]["podSelector"]["matchLabels"].items() <= test_pod.items()


@pytest.mark.parametrize(
    ("endpoint", "port"),
    [
        ("http://collector.monitoring:4317", 4317),
        ("https://otlp.example.com/v1/traces", 443),
        ("http://collector", 80),
        ("http://[fd00::1]:4318", 4318),
        ("http://[fd00::1]", 80),
    ],
)
def test_pods_reach_the_collector_of_their_spans(endpoint: str, port: int) -> None:
    """The server is told where it is, and a network policy lets it go there, by name."""
    rendered = render(MINIMAL, "networkPolicy.enabled=true", f'config.otlp_endpoint="{endpoint}"')
    assert rendered.one("ConfigMap")["data"]["ONCLOCK_OTLP_ENDPOINT"] == endpoint
    names, collector = rendered.one("NetworkPolicy")["spec"]["egress"]
    assert {rule["port"] for rule in names["ports"]} == {53}
    assert collector["ports"] == [{"port": port, "protocol": "TCP"}]
    assert collector["to"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]


# ---------------------------------------------------------------------------------------------------- scaling


def test_the_horizontal_autoscaler_aims_at_saturation() -> None:
    """A Pods metric, as an average, of autoscaling/v2; the Deployment then says nothing about replicas."""
    rendered = rendered_set(MONITORED)
    autoscaler = rendered.one("HorizontalPodAutoscaler")
    assert autoscaler["apiVersion"] == "autoscaling/v2"
    (metric,) = autoscaler["spec"]["metrics"]
    target = {"type": "AverageValue", "averageValue": "700m"}
    assert metric == {"type": "Pods", "pods": {"metric": {"name": SATURATION}, "target": target}}
    assert autoscaler["spec"]["scaleTargetRef"]["name"] == rendered.one("Deployment")["metadata"]["name"]
    assert "replicas" not in rendered.one("Deployment")["spec"]
    assert not rendered.all("ScaledObject")


@pytest.mark.parametrize(("value", "written"), [("0.57", "570m"), ("0.7", "700m"), ("1", "1000m")])
def test_the_target_is_written_exactly(value: str, written: str) -> None:
    """0.57 x 1000 is 569.9999 in floating point."""
    rendered = render(MINIMAL, "autoscaling.hpa.enabled=true", f"autoscaling.targetSaturation={value}")
    (metric,) = rendered.one("HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metric["pods"]["target"]["averageValue"] == written


def test_keda_asks_for_the_sum_over_the_pods() -> None:
    """Of the same saturation; without an answer there are pods enough, not none."""
    rendered = rendered_set(CHART / "ci" / "keda-values.yaml")
    spec = rendered.one("ScaledObject")["spec"]
    (trigger,) = spec["triggers"]
    assert trigger["metricType"] == "AverageValue"
    assert trigger["metadata"]["threshold"] == "0.65"
    assert trigger["metadata"]["ignoreNullValues"] == "false"
    query = trigger["metadata"]["query"]
    assert query == f'sum({SATURATION}{{namespace="{NAMESPACE}",job="{RELEASE}"}})'
    assert SATURATION in series_names()
    assert spec["fallback"]["replicas"] == 6
    assert spec["minReplicaCount"] >= 1
    assert not rendered.all("HorizontalPodAutoscaler")
    assert "replicas" not in rendered.one("Deployment")["spec"]


# ---------------------------------------------------------------------------------------------------- helm test


@pytest.mark.parametrize("path", [SECURED, EVERYTHING], ids=lambda path: path.stem)
def test_the_scenario_is_one_that_the_load_tester_takes(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the addresses, certificates and key of the release."""
    monkeypatch.setenv("ONCLOCK_API_KEY", "secret")
    rendered = rendered_set(path)
    text = rendered.one("ConfigMap", "-loadtest")["data"]["scenario.yaml"]
    scenario = parse_scenario(yaml.safe_load(text), "scenario.yaml", tmp_path)
    service = next(item for item in rendered.all("Service") if not item["metadata"]["name"].endswith("-headless"))
    name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
    assert scenario.server == f"{name}.{NAMESPACE}.svc:{port}"
    # Scrapes need a key here, which the load tester does not have.
    assert scenario.metrics is None
    assert scenario.criteria.attainment is not None
    assert scenario.tls is not None
    assert "secret" not in text
    if path is SECURED:
        assert scenario.metadata == {"authorization": "Bearer secret"}
        pod = rendered.one("Pod")["spec"]
        mounts = {Path(mount["mountPath"]) for mount in pod["containers"][0]["volumeMounts"]}
        for file in (scenario.tls.ca, scenario.tls.certificate, scenario.tls.key):
            assert file is not None
            assert file.parent in mounts
    else:
        assert scenario.name == "mixed"
        assert [entry.model for entry in scenario.load] == ["digits", "wine"]


def test_helm_test_runs_the_load_tester() -> None:
    """A pod with the hook, the command of docs/load-testing.md, and an end."""
    rendered = render(MINIMAL, 'loadTest={"model": "digits", "image": {"repository": "registry.example/loadtest"}}')
    scenario = yaml.safe_load(rendered.one("ConfigMap", "-loadtest")["data"]["scenario.yaml"])
    assert scenario["metrics"] == f"http://{RELEASE}.{NAMESPACE}.svc:8002/metrics"
    pod = rendered.one("Pod")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert pod["spec"]["restartPolicy"] == "Never"
    assert pod["spec"]["activeDeadlineSeconds"] == 300
    (container,) = pod["spec"]["containers"]
    assert container["command"] == ["python", "-m", "loadtests"]
    assert container["args"][:2] == ["run", "/etc/loadtest/scenario.yaml"]
    assert container["image"] == "registry.example/loadtest:0.1.0"


def test_without_a_model_or_an_image_there_is_nothing_to_test() -> None:
    """And so no pod that could only fail."""
    assert not rendered_set(MINIMAL).all("Pod")
    assert not render(MINIMAL, 'loadTest.model="digits"').all("Pod")
    assert not render(MINIMAL, 'loadTest.image.repository="registry.example/loadtest"').all("Pod")


# ---------------------------------------------------------------------------------------------------- notes, examples


@dataclasses.dataclass(frozen=True)
class Note:
    """Values, and what NOTES.txt says of them."""

    values: tuple[str, ...]
    says: str


@pytest.mark.parametrize(
    "note",
    [
        Note((), "kubectl -n serving rollout status deployment/onclock"),
        Note(('modelRepository.type="none"',), "WARNING: modelRepository.type is none"),
        Note(
            ('modelRepository.type="claim"', 'modelRepository.claim.accessModes=["ReadWriteOnce"]'),
            "other pods will not",
        ),
        Note(('config.model_control_mode="explicit"',), "WARNING: config.model_control_mode is explicit"),
        Note(('apiKeys.secretName="k"',), "WARNING: API keys without TLS"),
        Note(("gpu.enabled=true", 'config.device="cpu"'), "WARNING: gpu.enabled gives the pods GPUs"),
        Note(('resources={"limits": {"cpu": null}}',), "WARNING: without resources.limits.cpu"),
        Note(('loadTest={"model": "m", "image": {"repository": "r"}}',), "helm -n serving test onclock"),
        Note(('loadTest.model="m"',), "NOTE: `helm test` has nothing to run"),
    ],
    ids=lambda note: note.says[:30],
)
def test_notes_warn_of_what_is_probably_not_meant(note: Note, tmp_path: Path) -> None:
    """Rendered as an object: helm shows them only where there is a cluster."""
    copy = tmp_path / "onclock"
    shutil.copytree(CHART, copy)
    (copy / "templates" / "NOTES.txt").rename(copy / "NOTES.txt")
    (copy / "templates" / "notes.yaml").write_text(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: notes}\n"
        'data: {text: {{ tpl (.Files.Get "NOTES.txt") . | quote }}}\n'
    )
    rendered = render(MINIMAL, *note.values, chart=copy)
    notes = rendered.one("ConfigMap", "notes")["data"]["text"]
    assert note.says in notes
    assert ("WARNING" in notes) == note.says.startswith(("WARNING", "other"))


def test_the_kserve_example_starts_the_server_with_settings_that_exist() -> None:
    """And the two objects belong together."""
    directory = tools.ROOT / "helm" / "examples" / "kserve"
    runtime = yaml.safe_load((directory / "serving-runtime.yaml").read_text())
    service = yaml.safe_load((directory / "inference-service.yaml").read_text())
    (container,) = runtime["spec"]["containers"]
    names = {item["name"] for item in container["env"]} - {"HOME"}
    assert names <= {env_name(name) for name in Settings.model_fields}
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    assert model["modelFormat"]["name"] in {item["name"] for item in runtime["spec"]["supportedModelFormats"]}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "runtime"},
        "spec": {"containers": runtime["spec"]["containers"], "volumes": runtime["spec"]["volumes"]},
    }
    assert not check([pod], KUBERNETES[0])
