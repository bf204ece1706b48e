"""The server's settings: one class for flags, environment variables and their documentation.

Promise: a setting has one name in three spellings (`grpc_port`, `--grpc-port`, `ONCLOCK_GRPC_PORT`), a unit in that
name where it has one, a bound, and a description that is also its `--help` text and its line in the documentation.
A flag wins over the environment, the environment over the default. A wrong value raises `SettingsError`, which names
the setting in both spellings, what was given and what is accepted.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.config.otlp import TelemetryError, parse_endpoint
from service.config.tls import TlsFiles

ENV_PREFIX = "ONCLOCK_"
METRICS_OFF = -1

# Variables with our prefix that other parts of the project read.
_OTHER_VARIABLES = frozenset({"ONCLOCK_CACHE"})
# What Kubernetes adds for a Service whose name starts with "onclock" (`enableServiceLinks: false` turns it off).
_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT)|_PORT$|_PORT_\d+_(TCP|UDP)")
# gRPC cannot carry a longer message: the length is a signed 32-bit integer in its core.
_MAX_GRPC_MESSAGE_BYTES = 2**31 - 1


class SettingsError(Exception):
    """A setting has a value that is not accepted, or is missing. `str(error)` is one line per wrong setting."""


def _split_paths(value: object) -> object:
    """Paths in one environment variable are separated as in PATH."""
    if isinstance(value, str):
        return [part for part in value.split(os.pathsep) if part]
    return [value] if isinstance(value, Path) else value


def _port_or_off(value: object) -> object:
    return METRICS_OFF if isinstance(value, str) and value.strip().lower() == "off" else value


def _split_names(value: object) -> object:
    return tuple(name for name in value.split(",") if name) if isinstance(value, str) else value


def _none_or(value: object) -> object:
    return None if isinstance(value, str) and value.strip().lower() == "none" else value


def _integer_or_auto(value: object) -> object:
    return 0 if isinstance(value, str) and value.strip().lower() == "auto" else value


def default_profile_cache() -> Path:
    """`$XDG_CACHE_HOME/onclock/profiles`, by default under `~/.cache` (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "onclock" / "profiles"


# Marks a path that is not a directory's.
A_FILE: dict[str, JsonValue] = {"path": "file"}


class Settings(BaseSettings):
    """Every setting of `onclock serve`. Frozen; construct with `load_settings` to get readable errors."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, frozen=True, extra="forbid", validate_default=True, protected_namespaces=()
    )

    model_repository: Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_split_paths)] = Field(
        min_length=1,
        description="Directory with the models to serve: DIR/MODEL/VERSION/model.onnx. The flag may be repeated; "
        f"the environment variable separates directories with '{os.pathsep}'.",
        examples=["/srv/models"],
    )
    model_control_mode: Literal["none", "poll", "explicit"] = Field(
        "none",
        description="Who changes what is served. none: nobody, it is what is there at the start. poll: the files, "
        "which are followed. explicit: clients, by RepositoryModelLoad and RepositoryModelUnload.",
    )
    repository_poll_secs: float = Field(
        15.0, ge=0.1, le=86_400, description="With poll: how often the repository is looked at, seconds."
    )
    load_model: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_names)] = Field(
        (),
        description="With explicit: a model to load at the start; * = all. The flag may be repeated; the environment "
        "variable separates names with commas.",
    )
    strict_readiness: bool = Field(
        False,
        description="Report ready only when every model of the repository has loaded. Otherwise the server is ready "
        "with the models that did load, and a model that failed is not ready by itself.",
    )
    exit_on_error: bool = Field(
        False, description="Stop with exit code 1 when a model fails to load at start, instead of serving the others."
    )

    host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address that the gRPC port listens on, and the metrics port unless metrics_host says otherwise. "
        "0.0.0.0 (or [::]) is every interface: whoever reaches it may do everything, unless tls_certificate and "
        "api_keys say otherwise.",
    )
    grpc_port: int = Field(8001, ge=0, le=65535, description="gRPC port. 0 = any free port, printed at start.")
    metrics_port: Annotated[int, BeforeValidator(_port_or_off)] = Field(
        8002,
        ge=METRICS_OFF,
        le=65535,
        description="HTTP port of /metrics. 0 = any free port, printed at start; off (or -1) = no metrics port.",
    )
    metrics_host: Annotated[str | None, BeforeValidator(_none_or)] = Field(
        None, min_length=1, description="Address that the metrics port listens on. none = the same as host."
    )
    status_page: bool = Field(
        True, description="Serve a page for people on the metrics port, at /: what promise is kept, and if not, why."
    )
    status_attainment: float = Field(
        0.99,
        ge=0.01,
        le=0.9999,
        description="Share of requests to be answered in time for the status page to call a promise kept.",
    )
    metrics_tls: bool = Field(
        False, description="Serve the metrics port by TLS as well, with the same certificate and client authorities."
    )
    tls_certificate: Annotated[Path | None, BeforeValidator(_none_or)] = Field(
        None,
        json_schema_extra=A_FILE,
        description="Certificate chain in PEM, the server's own first: the gRPC port then speaks TLS (1.2 or 1.3) "
        "only. Read again when it changes; none = no TLS.",
    )
    tls_key: Annotated[Path | None, BeforeValidator(_none_or)] = Field(
        None, json_schema_extra=A_FILE, description="Private key of the certificate, in PEM, without a passphrase."
    )
    tls_client_ca: Annotated[Path | None, BeforeValidator(_none_or)] = Field(
        None,
        json_schema_extra=A_FILE,
        description="Authorities in PEM: clients need a certificate of one of them (mutual TLS). none = they need not.",
    )
    api_keys: Annotated[Path | None, BeforeValidator(_none_or)] = Field(
        None,
        json_schema_extra=A_FILE,
        description="TOML file of API keys and what each may call ('onclock key' makes one). What it does not allow is "
        "denied. Read again when it changes; none = everybody may call everything.",
    )
    security_poll_secs: float = Field(
        5.0,
        ge=0.1,
        le=3600,
        allow_inf_nan=False,
        description="How often certificates and API keys are looked at for changes, seconds.",
    )
    max_connections: int = Field(
        10_000,
        ge=1,
        le=1_000_000,
        description="Connections of clients at once; one more is closed at once. Native ingress only: gRPC's core has "
        "no such limit.",
    )
    idle_timeout_s: float = Field(
        3600.0,
        ge=0,
        le=30 * 86400,
        allow_inf_nan=False,
        description="Connections without a call for so many seconds are ended; clients open another when they need it. "
        "0 = never.",
    )
    max_connection_age_s: float = Field(
        0.0,
        ge=0,
        le=30 * 86400,
        allow_inf_nan=False,
        description="Connections that are so many seconds old, give or take a tenth, are ended, in use or not: clients "
        "connect again, perhaps to another server. Calls and streams in progress get grace_period_s to finish. 0 = "
        "never.",
    )
    ingress: Literal["auto", "native", "core"] = Field(
        "auto",
        description="What reads and writes the connections: native (C++ and nghttp2, built with the package where a "
        "compiler and the library are there; several times cheaper for each call), core (gRPC's own), or auto: native "
        "if it was built.",
    )
    max_message_bytes: int = Field(
        256 * 2**20,
        ge=2**16,
        le=_MAX_GRPC_MESSAGE_BYTES,
        description="Largest request or answer, bytes. The default holds a batch of 400 images of 3x224x224 float32; "
        "what all requests together may hold is max_in_flight_bytes.",
    )
    max_in_flight: int = Field(
        8192,
        ge=1,
        le=1_000_000,
        description="Inference calls in progress at once (queued, running or being answered); more are refused before "
        "their message is read (UNAVAILABLE). A call costs memory, not a thread; a model's own queue is usually full "
        "long before.",
    )
    max_in_flight_bytes: int = Field(
        2 * 2**30,
        ge=2**20,
        le=2**40,
        description="Bytes of requests in progress at once; more are refused (UNAVAILABLE). Bounds the memory that "
        "clients can make the server hold.",
    )
    max_streams: int = Field(
        512,
        ge=1,
        le=4096,
        description="Inference streams open at once, and as many health watches and reflection streams. Each holds "
        "threads of its own, so that it cannot starve unary calls; more are refused.",
    )
    allow_client_shm: bool = Field(
        False,
        description="Let clients pass tensors in POSIX shared memory (system_shared_memory). Whoever can reach the "
        "port can then have the server read and write objects of its user below /dev/shm.",
    )
    control_threads: int = Field(
        4,
        ge=1,
        le=64,
        description="Threads for everything but inference: metadata, configuration, statistics, repository, health.",
    )
    grace_period_s: float = Field(
        30.0,
        ge=0,
        le=3600,
        allow_inf_nan=False,
        description="On SIGTERM or SIGINT: seconds that accepted requests get to finish before they are cancelled. "
        "Keep it below the orchestrator's own limit (Kubernetes: terminationGracePeriodSeconds, 30 by default).",
    )

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="Where models run. auto: every visible NVIDIA GPU when a driver and the libraries are there, "
        "otherwise the CPU; it says which. cuda: fail when there is no GPU. Models can ask otherwise (instance_group).",
    )
    cpu_run_slots: int = Field(
        1,
        ge=1,
        le=64,
        description="Batches that run at once on the CPU. One gives each batch all the cores: the lowest latency.",
    )
    gpu_run_slots: int = Field(
        1,
        ge=1,
        le=8,
        description="Batches that run at once on each GPU. Two hide copies behind computing, at some cost in latency.",
    )
    hung_run_timeout_s: float = Field(
        120.0,
        ge=0.5,
        le=3600,
        allow_inf_nan=False,
        description="Seconds after which a batch that is still running counts as hanging (never before twenty times "
        "what it was expected to take). The server then answers what waits with UNAVAILABLE and ends with exit code "
        "75, so that it is replaced.",
    )
    intra_op_threads: Annotated[int, BeforeValidator(_integer_or_auto)] = Field(
        0,
        ge=0,
        le=1024,
        description="Threads that one batch computes with on the CPU. 0 (or auto) = the cores this process may use "
        "(affinity and container limit) divided by cpu_run_slots.",
    )
    default_max_batch_size: int = Field(
        64,
        ge=1,
        le=65536,
        description="Largest batch, rows, of a batchable model whose configuration does not say (max_batch_size).",
    )

    load_parallelism: int = Field(
        1,
        ge=1,
        le=64,
        description="Models loaded at once at start. More than one starts faster, but models that are measured at the "
        "same time on the same device measure each other as well.",
    )
    profile_budget_ms: int = Field(
        2000,
        ge=0,
        le=3_600_000,
        description="Time to measure one model's latency per batch size while loading, milliseconds. 0 = do not "
        "measure: the first requests teach it, and deadlines may be missed meanwhile.",
    )
    profile_cache: Annotated[Path | None, BeforeValidator(_none_or)] = Field(
        default_factory=default_profile_cache,
        description="Directory of measured latencies, kept per model file, device and library version, so that a "
        "restart need not measure again. none = off.",
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe level that is logged. debug has one line per request."
    )
    log_format: Literal["json", "text"] = Field(
        "json", description="json: one JSON object per line on stderr. text: the same for people."
    )

    trace_file: Annotated[Path | None, BeforeValidator(_none_or)] = Field(
        None,
        json_schema_extra=A_FILE,
        description="File for traces of sampled requests: when each arrived, was batched, ran and was answered, in "
        "Triton's format. none = no request can be traced.",
    )
    trace_level: Literal["OFF", "TIMESTAMPS"] = Field(
        "OFF", description="Whether requests are traced from the start. Clients can change it (TraceSetting)."
    )
    trace_rate: int = Field(1000, ge=1, le=2**31 - 1, description="Every so many requests one is traced.")
    trace_count: int = Field(
        -1, ge=-1, le=2**31 - 1, description="How many requests are traced in all. -1 = without end."
    )
    trace_log_frequency: int = Field(
        0,
        ge=0,
        le=2**31 - 1,
        description="Traces per file, which are then named TRACE_FILE.0, TRACE_FILE.1 and so on. 0 = all in one file.",
    )

    otlp_endpoint: Annotated[str | None, BeforeValidator(_none_or)] = Field(
        None,
        description="URL of an OpenTelemetry collector that spans of traced requests are sent to, such as "
        "http://collector:4318 (HTTP) or http://collector:4317 (gRPC). none = what OTEL_EXPORTER_OTLP_ENDPOINT says, "
        "or no spans. Needs the extra 'otlp'.",
    )
    trace_sample_ratio: float = Field(
        0.01,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Share of the requests that spans are sent of, among those whose client says nothing (no "
        "traceparent). A client's own decision is followed.",
    )
    trace_client_limit: int = Field(
        1000,
        ge=0,
        le=1_000_000,
        description="Requests a second, at most, that are traced because their client says so; more are served "
        "without spans, and counted.",
    )

    @field_validator("otlp_endpoint")
    @classmethod
    def _url(cls, endpoint: str | None) -> str | None:
        try:
            return endpoint if endpoint is None or parse_endpoint(endpoint, "") else None
        except TelemetryError as error:
            raise ValueError(str(error).removeprefix(": ")) from None

    @field_validator("model_repository")
    @classmethod
    def _existing_directories(cls, paths: tuple[Path, ...]) -> tuple[Path, ...]:
        resolved = tuple(path.expanduser() for path in paths)
        for path in resolved:
            if not path.is_dir():
                raise ValueError(f"'{path}' is not a directory")
        if len({path.resolve() for path in resolved}) != len(resolved):
            raise ValueError("the same directory is given twice")
        return resolved

    @field_validator("max_in_flight_bytes")
    @classmethod
    def _holds_a_message(cls, limit: int, info: ValidationInfo) -> int:
        largest = info.data.get("max_message_bytes", 0)
        if limit < largest:
            raise ValueError(f"{limit} is less than one message of max_message_bytes ({largest})")
        return limit

    @field_validator("profile_cache", "trace_file", "tls_certificate", "tls_key", "tls_client_ca", "api_keys")
    @classmethod
    def _expanded(cls, path: Path | None) -> Path | None:
        return None if path is None else path.expanduser()

    @model_validator(mode="after")
    def _whole_tls(self) -> Settings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            missing = "tls_key" if self.tls_key is None else "tls_certificate"
            raise ValueError(f"{flag_name(missing)} (or {env_name(missing)}) is missing: TLS needs both")
        for name in ("tls_client_ca", "metrics_tls"):
            if getattr(self, name) and self.tls_certificate is None:
                raise ValueError(f"{flag_name(name)} needs {flag_name('tls_certificate')} and {flag_name('tls_key')}")
        return self

    @property
    def tls_files(self) -> TlsFiles | None:
        """Where the server's certificate is; None: no TLS."""
        if self.tls_certificate is None or self.tls_key is None:
            return None
        return TlsFiles(self.tls_certificate, self.tls_key, self.tls_client_ca)

    @property
    def metrics_enabled(self) -> bool:
        """Whether there is a metrics port at all."""
        return self.metrics_port != METRICS_OFF

    @property
    def cpu_threads_per_slot(self) -> int:
        """`intra_op_threads`, or this process's share of cores per CPU run slot when that is 0. At least 1."""
        return self.intra_op_threads or max(1, available_cores() // self.cpu_run_slots)


def load_settings(flags: Mapping[str, Any] | None = None) -> Settings:
    """Settings from `flags` (field name to value, text or typed), then the environment, then defaults.

    Raises `SettingsError` with one line per wrong or missing setting.
    """
    try:
        return Settings(**dict(flags or {}))
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(detail) for detail in error.errors())) from None


def flag_name(field: str) -> str:
    """`grpc_port` as it is typed: `--grpc-port`."""
    return "--" + field.replace("_", "-")


def env_name(field: str) -> str:
    """`grpc_port` as an environment variable: `ONCLOCK_GRPC_PORT`."""
    return ENV_PREFIX + field.upper()


def accepted_values(field: FieldInfo) -> str:
    """What a field accepts, in words: its choices, its type and its bounds."""
    choices = getattr(field.annotation, "__args__", ()) if _is_literal(field) else ()
    if choices:
        return " or ".join(str(choice) for choice in choices)
    if field.annotation is bool:
        return "true or false"
    low, high = _bounds(field)
    if field.annotation in (int, float):
        kind = "an integer" if field.annotation is int else "a number"
        return f"{kind} from {low} to {high}"
    if "Path" in str(field.annotation):
        return "a file" if field.json_schema_extra == A_FILE else "a directory"
    return "text"


def unknown_variables(environment: Iterable[str]) -> list[tuple[str, str | None]]:
    """`ONCLOCK_*` variables that mean nothing, each with the name that was probably meant (None = no idea).

    They are worth a warning, not an error: Kubernetes adds variables of its own to every container next to a Service
    named `onclock` (those that are recognisable are left out here).
    """
    known = {env_name(name) for name in Settings.model_fields}
    unknown: list[tuple[str, str | None]] = []
    for name in sorted(environment):
        if not name.startswith(ENV_PREFIX) or name in known or name in _OTHER_VARIABLES or _SERVICE_LINK.search(name):
            continue
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        unknown.append((name, close[0] if close else None))
    return unknown


def available_cores(cgroup: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores this process may use: its affinity, or its container's CPU quota (cgroup v2) when that is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    try:
        quota, period = cgroup.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))


def _is_literal(field: FieldInfo) -> bool:
    return str(field.annotation).startswith("typing.Literal")


def _bounds(field: FieldInfo) -> tuple[str, str]:
    low = next((m.ge for m in field.metadata if hasattr(m, "ge")), "any")
    high = next((m.le for m in field.metadata if hasattr(m, "le")), "any")
    return str(low), str(high)


def _explain(detail: Mapping[str, Any]) -> str:
    """One line for one pydantic error."""
    if not detail["loc"] and detail["type"] == "value_error":
        return str(detail["ctx"]["error"])  # of several settings together, which it names
    name = str(detail["loc"][0]) if detail["loc"] else ""
    field = Settings.model_fields.get(name)
    if field is None:
        close = difflib.get_close_matches(name, Settings.model_fields, n=1)
        return f"{flag_name(name)}: no such setting" + (f"; did you mean {flag_name(close[0])}?" if close else "")
    names = f"{flag_name(name)} (or {env_name(name)})"
    if detail["type"] in ("missing", "too_short"):
        example = field.examples[0] if field.examples else "VALUE"
        return f"{names} is missing; give it, for example: {flag_name(name)} {example}"
    given = detail["input"]
    problem = str(detail["ctx"]["error"]) if detail["type"] == "value_error" else f"{str(given)!r} is not accepted"
    hint = ""
    if isinstance(given, str) and given.startswith("tcp://"):
        hint = "; the value looks like a Kubernetes service link: set enableServiceLinks: false in the pod"
    return f"{names}: {problem}; expected {accepted_values(field)}{hint}"
