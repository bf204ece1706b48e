"""The `parameters` map: units are converted once, unknown keys and wrong values are refused."""

from __future__ import annotations

import pytest

from service.config.model import LatePolicy, Objective
from service.config.parameters import PARAMETERS, parse_parameters
from service.errors import ConfigError


def test_an_empty_map_is_all_defaults() -> None:
    """No parameters: no objective, batching as the graph allows, the server's session settings."""
    parsed = parse_parameters({})
    assert parsed.objective == Objective()
    assert (parsed.objective.slo_ns, parsed.batching, parsed.unbatched_inputs) == (None, None, ())
    assert parsed.session.intra_op_threads is None


def test_values_arrive_in_the_units_of_the_server() -> None:
    """Milliseconds become nanoseconds, words become values."""
    parsed = parse_parameters(
        {
            "latency_slo_ms": "12.5",
            "max_queue_ms": "200",
            "shed_eagerness": "0.8",
            "late_policy": "best_effort",
            "profile_budget_ms": "0",
            "batching": "off",
            "unbatched_inputs": "sr, mode",
            "intra_op_thread_count": "2",
            "execution_mode": "1",
            "enable_mem_arena": "false",
            "cudnn_conv_algo_search": "0",
            "session.intra_op.allow_spinning": "0",
        }
    )
    assert parsed.objective == Objective(12_500_000, 200_000_000, 0.8, LatePolicy.BEST_EFFORT, 0)
    assert parsed.batching is False
    assert parsed.unbatched_inputs == ("sr", "mode")
    assert (parsed.session.intra_op_threads, parsed.session.parallel_execution) == (2, True)
    assert (parsed.session.memory_arena, parsed.session.memory_pattern) == (False, None)
    assert parsed.session.config_entries == {"session.intra_op.allow_spinning": "0"}
    assert parsed.cuda_options == {"cudnn_conv_algo_search": "EXHAUSTIVE"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("latency_slo_ms", "0"),
        ("latency_slo_ms", "-1"),
        ("latency_slo_ms", "nan"),
        ("latency_slo_ms", "inf"),
        ("latency_slo_ms", "20ms"),
        ("latency_slo_ms", "1_0"),
        ("latency_slo_ms", "3600001"),
        ("latency_slo_ms", ""),
        ("max_queue_ms", "0"),
        ("profile_budget_ms", "-1"),
        ("shed_eagerness", "1.1"),
        ("shed_eagerness", "nan"),
        ("late_policy", "drop"),
        ("batching", "yes"),
        ("unbatched_inputs", "a,,b"),
        ("unbatched_inputs", "a,a"),
        ("intra_op_threads", "1.5"),
        ("intra_op_thread_count", "9999"),
        ("execution_mode", "2"),
        ("gpu_mem_limit", "0"),
        ("arena_extend_strategy", "2"),
        ("memory.enable_memory_arena_shrinkage", "cpu"),
        ("session.disable_prepacking", ""),
    ],
)
def test_a_wrong_value_names_the_key_and_what_is_expected(key: str, value: str) -> None:
    """The path is the key, the message says what would be accepted."""
    with pytest.raises(ConfigError, match="expected") as caught:
        parse_parameters({key: value})
    assert caught.value.path == f"parameters[{key}]"


def test_an_unknown_key_is_refused_with_the_nearest_and_all_known() -> None:
    """A misspelt objective is no objective."""
    with pytest.raises(ConfigError, match="did you mean 'latency_slo_ms'") as caught:
        parse_parameters({"latency_slo": "5"})
    assert all(name in str(caught.value) for name in PARAMETERS)


def test_one_setting_under_two_names_is_refused() -> None:
    """Which of the two would win is not for the user to guess."""
    with pytest.raises(ConfigError, match="intra_op_thread_count"):
        parse_parameters({"intra_op_threads": "1", "intra_op_thread_count": "1"})
