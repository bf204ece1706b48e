"""Reading config.pbtxt: syntax errors name the place, refused keys their path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.config.pbtxt import MAX_CONFIG_BYTES, parse_json, parse_text, read_config, to_text
from service.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "path", "said"),
    [
        ('nam: "x"', "config.pbtxt:1:1", "Did you mean 'name'?"),
        ("\n  max_batch_size: many", "config.pbtxt:2:19", "Couldn't parse integer"),
        ("instance_group { gpu: 1 }", "config.pbtxt:1:18", "Did you mean 'gpus'?"),
        ('name: "a" name: "b"', "config.pbtxt:1:17", 'should not have multiple "name" fields'),
        (
            "sequence_batching { iterative_sequence: true }",
            "sequence_batching.iterative_sequence",
            "exactly one answer",
        ),
        ("ensemble_scheduling {}", "ensemble_scheduling", "call the models one by one"),
        ("model_transaction_policy { decoupled: true }", "model_transaction_policy.decoupled", "exactly one answer"),
        ("response_cache { enable: true }", "response_cache.enable", "not cached"),
        ("instance_group [{}, { rate_limiter {} }]", "instance_group[1].rate_limiter", "run slots"),
        ('input { name: "x" reshape { } }', "input[0].reshape", "own shape"),
        ('input { name: "x" allow_ragged_batch: true }', "input[0].allow_ragged_batch", "batched apart"),
        ('input { name: "x" is_shape_tensor: true }', "input[0].is_shape_tensor", "TensorRT"),
        ("batch_input {}", "batch_input", "put the operation into the graph"),
        ("optimization { priority: PRIORITY_MAX }", "optimization.priority", "deadlines"),
        ("optimization { cuda { graph_spec { batch_size: 4 } } }", "optimization.cuda.graph_spec", "captured"),
        ("optimization { cuda { graph_spec {} } }", "optimization.cuda.graph_spec", "not supported"),
        ('metric_tags { key: "a" value: "b" }', "metric_tags", "scrape configuration"),
        ('cc_model_filenames { key: "8.0" value: "b" }', "cc_model_filenames", "one file"),
        ("model_repository_agents {}", "model_repository_agents", "before"),
        ('model_operations { op_library_filename: "x.so" }', "model_operations", "custom operator"),
    ],
)
def test_what_is_wrong_is_named(text: str, path: str, said: str) -> None:
    """Each error has the path of the key, or file, line and column."""
    with pytest.raises(ConfigError) as caught:
        parse_text(text)
    assert caught.value.path == path
    assert said in str(caught.value)


def test_a_value_equal_to_the_default_is_not_refused() -> None:
    """Configurations that spell out Triton's defaults load."""
    parse_text(
        "model_transaction_policy { decoupled: false } response_cache { enable: false } "
        "optimization { cuda { busy_wait_events: false } gather_kernel_buffer_threshold: 0 } "
        "instance_group { passive: false } input { allow_ragged_batch: false is_shape_tensor: false }"
    )


def test_a_parameter_given_twice_is_refused() -> None:
    """Protobuf would keep the last; which one was meant is not for the server to guess."""
    one = 'parameters { key: "latency_slo_ms" value: { string_value: "%d{" } } # parameters {\n'
    assert len(parse_text(one % 5).parameters) == 1
    listed = 'parameters: [{ key: "a" }, < key: "b" >] parameters { key: "c" }'
    assert sorted(parse_text(listed).parameters) == ["a", "b", "c"]
    for text in (one % 5 + one % 6, listed + 'parameters { key: "a" }', 'parameters [{ key: "a" }, { key: "a" }]'):
        with pytest.raises(ConfigError, match="given twice") as caught:
            parse_text(text)
        assert caught.value.path == "parameters"


def test_json_is_the_same_configuration() -> None:
    """The JSON of a load request is read and refused by the same rules."""
    assert parse_json('{"max_batch_size": 8, "dynamicBatching": {}}') == parse_text(
        "max_batch_size: 8 dynamic_batching {}"
    )
    with pytest.raises(ConfigError, match="ensemble_scheduling: not supported"):
        parse_json(json.dumps({"ensemble_scheduling": {}}))
    for text in ("[", "3", '{"nam": "x"}', "[" * 100_000, '{"max_batch_size": "many"}', "x" * (MAX_CONFIG_BYTES + 1)):
        with pytest.raises(ConfigError, match="config"):
            parse_json(text)


def test_a_missing_file_is_no_configuration(tmp_path: Path) -> None:
    """Models without config.pbtxt are completed from nothing."""
    assert read_config(tmp_path / "config.pbtxt") is None


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"name: '\xff\xfe'", "byte 7 is not UTF-8"),
        (b"#" * (MAX_CONFIG_BYTES + 1), "larger than"),
        (b"name: 3", ":1:7"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, data: bytes, said: str) -> None:
    """The error starts with the path of the file."""
    path = tmp_path / "config.pbtxt"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=said) as caught:
        read_config(path)
    assert str(caught.value).startswith(str(path))


def test_a_directory_in_the_place_of_the_file_is_named(tmp_path: Path) -> None:
    """What cannot be opened is an error, not an absent file."""
    (tmp_path / "config.pbtxt").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path / "config.pbtxt")


def test_text_form_reads_back() -> None:
    """What `check --verbose` prints can be saved as config.pbtxt."""
    config = parse_text('name: "größe" max_batch_size: 4')
    assert parse_text(to_text(config)) == config
