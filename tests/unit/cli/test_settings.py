"""The settings class: defaults, the environment, and errors that say what to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.config import settings as module
from service.config.settings import (
    Settings,
    SettingsError,
    accepted_values,
    available_cores,
    env_name,
    flag_name,
    load_settings,
    unknown_variables,
)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(env_name(name), raising=False)


def message(**flags: object) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(flags)
    return str(caught.value)


def test_only_the_repository_has_to_be_given(tmp_path: Path) -> None:
    """Everything else has a default, and every default is a value that is accepted."""
    settings = load_settings({"model_repository": [tmp_path]})
    assert settings.model_repository == (tmp_path,)
    assert settings.host == "127.0.0.1"
    assert settings.metrics_enabled
    assert settings.cpu_threads_per_slot >= 1


def test_a_missing_repository_is_named_with_an_example() -> None:
    """Flag, variable, and what to type."""
    assert message() == (
        "--model-repository (or ONCLOCK_MODEL_REPOSITORY) is missing; "
        "give it, for example: --model-repository /srv/models"
    )


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("grpc_port", "80x", "'80x' is not accepted; expected an integer from 0 to 65535"),
        ("grpc_port", "70000", "'70000' is not accepted; expected an integer from 0 to 65535"),
        ("metrics_port", "-2", "'-2' is not accepted; expected an integer from -1 to 65535"),
        ("device", "tpu", "'tpu' is not accepted; expected auto or cpu or cuda"),
        ("model_control_mode", "manual", "'manual' is not accepted; expected none or poll or explicit"),
        ("strict_readiness", "maybe", "'maybe' is not accepted; expected true or false"),
        ("grace_period_s", "nan", "'nan' is not accepted; expected a number from 0 to 3600"),
        ("cpu_run_slots", "0", "'0' is not accepted; expected an integer from 1 to 64"),
        ("host", "", "'' is not accepted; expected text"),
        (
            "max_in_flight_bytes",
            str(2**20),
            "1048576 is less than one message of max_message_bytes (268435456); expected",
        ),
        (
            "grpc_port",
            "tcp://10.0.0.1:8001",
            "'tcp://10.0.0.1:8001' is not accepted; expected an integer from 0 to 65535; the value looks like a "
            "Kubernetes service link: set enableServiceLinks: false in the pod",
        ),
    ],
)
def test_a_wrong_value_is_named_with_what_is_accepted(tmp_path: Path, name: str, value: str, expected: str) -> None:
    """One line, with the setting in both spellings; the same whether it came as a flag or from the environment."""
    text = message(model_repository=[tmp_path], **{name: value})
    assert text.startswith(f"{flag_name(name)} (or {env_name(name)})")
    assert expected in text
    assert "\n" not in text


def test_every_wrong_setting_has_its_line(tmp_path: Path) -> None:
    """Not one error per attempt."""
    assert len(message(model_repository=[tmp_path], grpc_port="x", device="y").splitlines()) == 2


def test_a_directory_that_is_none_is_named(tmp_path: Path) -> None:
    """A file, or nothing at all, and the same one twice."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "nothing"):
        assert f"'{path}' is not a directory" in message(model_repository=[path])
    assert "given twice" in message(model_repository=[tmp_path, tmp_path / "." / ""])


def test_an_unknown_setting_is_answered_with_the_nearest_one(tmp_path: Path) -> None:
    """A typing error is not ignored."""
    text = message(model_repository=[tmp_path], grpc_prt=1)
    assert text == "--grpc-prt: no such setting; did you mean --grpc-port?"


def test_the_environment_is_read_and_flags_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directories are separated as in PATH; words stand for the values that are no numbers."""
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setenv("ONCLOCK_MODEL_REPOSITORY", f"{tmp_path}:{other}")
    monkeypatch.setenv("ONCLOCK_METRICS_PORT", "off")
    monkeypatch.setenv("ONCLOCK_PROFILE_CACHE", "none")
    monkeypatch.setenv("ONCLOCK_INTRA_OP_THREADS", "auto")
    monkeypatch.setenv("ONCLOCK_STRICT_READINESS", "true")
    monkeypatch.setenv("ONCLOCK_GRPC_PORT", "9000")
    settings = load_settings({"grpc_port": "9001"})
    assert settings.model_repository == (tmp_path, other)
    assert not settings.metrics_enabled
    assert settings.profile_cache is None
    assert settings.intra_op_threads == 0
    assert settings.strict_readiness
    assert settings.grpc_port == 9001


def test_settings_do_not_change(tmp_path: Path) -> None:
    """Frozen: what was logged at start stays true."""
    settings = load_settings({"model_repository": [tmp_path]})
    with pytest.raises(ValidationError):
        settings.grpc_port = 1


def test_a_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell does it in a manifest."""
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = load_settings({"model_repository": ["~"], "profile_cache": "~/p"})
    assert settings.model_repository == (tmp_path,)
    assert settings.profile_cache == tmp_path / "p"


def test_the_profile_cache_follows_the_desktop_standard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """XDG_CACHE_HOME when set, ~/.cache otherwise."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert module.default_profile_cache() == tmp_path / "onclock" / "profiles"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert module.default_profile_cache() == Path("~/.cache/onclock/profiles").expanduser()


def test_threads_are_shared_among_run_slots(tmp_path: Path) -> None:
    """0 = the process's cores over the slots, at least one; a stated number is taken as it is."""
    many = load_settings({"model_repository": [tmp_path], "cpu_run_slots": 64})
    assert many.cpu_threads_per_slot == max(1, available_cores() // 64)
    assert load_settings({"model_repository": [tmp_path], "intra_op_threads": 3}).cpu_threads_per_slot == 3


@pytest.mark.parametrize(("quota", "cores"), [("50000 100000", 1), ("100000000 100000", None), ("max 100000", None)])
def test_a_containers_cpu_limit_counts(tmp_path: Path, quota: str, cores: int | None) -> None:
    """Half a core is one thread; a limit above the affinity, none, or an unreadable file change nothing."""
    everything = available_cores(tmp_path / "absent")
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert available_cores(tmp_path / "cpu.max") == (cores or everything)
    (tmp_path / "cpu.max").write_text("nonsense")
    assert available_cores(tmp_path / "cpu.max") == everything


def test_variables_that_mean_nothing_are_found() -> None:
    """With the one that was probably meant; what Kubernetes adds for a Service named onclock is left out."""
    found = unknown_variables(
        [
            "PATH",
            "ONCLOCK_GRPC_PRT",
            "ONCLOCK_GRPC_PORT",
            "ONCLOCK_X",
            "ONCLOCK_CACHE",
            "ONCLOCK_SERVICE_HOST",
            "ONCLOCK_PORT",
            "ONCLOCK_PORT_8001_TCP",
            "ONCLOCK_PORT_8001_TCP_ADDR",
        ]
    )
    assert found == [("ONCLOCK_GRPC_PRT", "ONCLOCK_GRPC_PORT"), ("ONCLOCK_X", None)]


def test_every_setting_is_described_and_bounded() -> None:
    """A description that ends as a sentence; both bounds for every number."""
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
        assert "any" not in accepted_values(field), name


def test_the_page_of_settings_is_up_to_date() -> None:
    """docs/configuration-server.md: every setting once, with variable, default, accepted values and meaning."""
    from service.cli.settings_flags import default_text

    page = (Path(__file__).parents[3] / "docs" / "configuration-server.md").read_text()
    rows = re.findall(r"^\| `--([a-z-]+)` \| `(\w+)` \| (.*?) \| (.*?) \| (.*) \|$", page, flags=re.MULTILINE)
    assert len(rows) == len(Settings.model_fields)
    for flag, variable, default, accepted, meaning in rows:
        name = flag.replace("-", "_")
        field = Settings.model_fields[name]
        assert variable == env_name(name)
        assert default == (f"`{default_text(name)}`" if default_text(name) else "required")
        assert accepted == accepted_values(field)
        assert meaning == field.description
