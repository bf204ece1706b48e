"""The flags of `onclock serve`, made from the settings class, so that the two cannot differ.

Every setting is one flag; its help is the setting's description with what is accepted, the default and the
environment variable. Values are passed on as text: the settings class is the only place that judges them.
"""

from __future__ import annotations

import argparse
from typing import Any

from pydantic_core import PydanticUndefined

from service.config.settings import METRICS_OFF, Settings, accepted_values, env_name, flag_name

# Order and headings of the help page. A test checks that every setting is in exactly one group.
GROUPS: dict[str, tuple[str, ...]] = {
    "models": (
        "model_repository",
        "model_control_mode",
        "repository_poll_secs",
        "load_model",
        "strict_readiness",
        "exit_on_error",
    ),
    "network": (
        "host",
        "grpc_port",
        "metrics_port",
        "metrics_host",
        "status_page",
        "status_attainment",
        "ingress",
        "max_message_bytes",
        "max_in_flight",
        "max_in_flight_bytes",
        "max_streams",
        "max_connections",
        "idle_timeout_s",
        "max_connection_age_s",
        "control_threads",
        "allow_client_shm",
        "grace_period_s",
    ),
    "security": (
        "tls_certificate",
        "tls_key",
        "tls_client_ca",
        "metrics_tls",
        "api_keys",
        "security_poll_secs",
    ),
    "devices": (
        "device",
        "cpu_run_slots",
        "gpu_run_slots",
        "hung_run_timeout_s",
        "intra_op_threads",
        "default_max_batch_size",
    ),
    "loading and measuring": ("load_parallelism", "profile_budget_ms", "profile_cache"),
    "logs and traces": (
        "log_level",
        "log_format",
        "trace_file",
        "trace_level",
        "trace_rate",
        "trace_count",
        "trace_log_frequency",
        "otlp_endpoint",
        "trace_sample_ratio",
        "trace_client_limit",
    ),
}

_PLACEHOLDERS = {
    "model_repository": "DIR",
    "profile_cache": "DIR",
    "trace_file": "FILE",
    "load_model": "NAME",
    "otlp_endpoint": "URL",
    "host": "ADDRESS",
    "metrics_host": "ADDRESS",
    "tls_certificate": "FILE",
    "tls_key": "FILE",
    "tls_client_ca": "FILE",
    "api_keys": "FILE",
    "idle_timeout_s": "SECONDS",
    "max_connection_age_s": "SECONDS",
    "grace_period_s": "SECONDS",
}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add every setting to `parser`."""
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            _add_setting(group, name)


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given as flags, by field name: what is absent is left to the environment."""
    return {
        name: value for name, value in vars(arguments).items() if name in Settings.model_fields and value is not None
    }


def default_text(name: str) -> str:
    """The default of a setting as one would type it; empty when it has none."""
    field = Settings.model_fields[name]
    if name == "profile_cache":
        return "~/.cache/onclock/profiles"
    if field.default is PydanticUndefined:
        return ""
    if field.default is None:
        return "none"
    if field.default == ():
        return "(none)"
    if isinstance(field.default, bool):
        return str(field.default).lower()
    return "off" if name == "metrics_port" and field.default == METRICS_OFF else str(field.default)


def _add_setting(group: argparse._ArgumentGroup, name: str) -> None:
    field = Settings.model_fields[name]
    default = default_text(name)
    facts = [accepted_values(field), f"default {default}" if default else "required", env_name(name)]
    # argparse expands % in help texts
    text = f"{field.description}\n[{'; '.join(facts)}]".replace("%", "%%")
    if field.annotation is bool:
        # `--flag`, `--flag=false` (as Triton spells it)
        group.add_argument(flag_name(name), dest=name, nargs="?", const="true", metavar="true|false", help=text)
        return
    group.add_argument(
        flag_name(name),
        dest=name,
        action="append" if name in ("model_repository", "load_model") else "store",
        metavar=_PLACEHOLDERS.get(name) or accepted_metavar(name),
        help=text,
    )


def accepted_metavar(name: str) -> str:
    """What stands for the value in the usage line: the choices, or N."""
    field = Settings.model_fields[name]
    accepted = accepted_values(field)
    return accepted.replace(" or ", "|") if not accepted.startswith("a") or " or " in accepted else "N"
