"""The `parameters` of a model's configuration: which keys exist, what they accept and what they mean.

Two families share the map. Ours state what Triton's schema has no field for: the latency objective first of all.
Triton's are those its ONNX Runtime backend reads, so that a tuned repository keeps its tuning. Triton hands unknown
keys to the backend, which ignores them; here an unknown key is refused: a misspelt objective is no objective.

`PARAMETERS` is the one table: the parser, the error messages and `docs/configuration.md` are made from it.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from service.clock import NS_PER_MS
from service.config.model import BackboneReference, LatePolicy, Objective, SessionTuning
from service.errors import ConfigError

# An objective beyond an hour is a typing error (seconds or microseconds taken for milliseconds), not a promise.
MAX_MS = 3_600_000.0
# ONNX Runtime starts this many threads per session without asking; more than the largest machines have cores is a typo.
MAX_THREADS = 1024


@dataclass(frozen=True, slots=True)
class Parameter:
    """One key. `parse` returns the value or raises ValueError, whose text completes "expected ..."."""

    accepts: str
    meaning: str
    parse: Callable[[str], object]
    ours: bool = False


def _milliseconds(lowest_exclusive: float) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = float(text)
        if not (math.isfinite(value) and lowest_exclusive < value <= MAX_MS) or "_" in text:
            raise ValueError
        return round(value * NS_PER_MS)

    return parse


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,20}", text) or not low <= int(text) <= high:
            raise ValueError
        return int(text)

    return parse


def _share(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise ValueError
    return value


def _one_of(words: Mapping[str, object]) -> Callable[[str], object]:
    def parse(text: str) -> object:
        if text not in words:
            raise ValueError
        return words[text]

    return parse


def _names(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if not all(names) or len(set(names)) != len(names):
        raise ValueError
    return names


def _reference(text: str) -> tuple[str, int | None]:
    name, separator, version = text.partition("/")
    if not name or (separator and not re.fullmatch(r"[1-9][0-9]{0,17}", version)):
        raise ValueError
    return name, int(version) if separator else None


def _sha256(text: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise ValueError
    return text.lower()


def _axes(text: str) -> Mapping[str, int]:
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, separator, axis = (text.strip() for text in part.rpartition("="))
        if not separator or not name or name in axes or not re.fullmatch(r"[0-9]{1,2}", axis):
            raise ValueError
        axes[name] = int(axis)
    return MappingProxyType(axes)


def _shrinkage(text: str) -> str:
    if not re.fullmatch(r"(cpu|gpu):\d+(;(cpu|gpu):\d+)*", text):
        raise ValueError
    return text


def _any_text(text: str) -> str:
    if not text or len(text) > 1024:
        raise ValueError
    return text


_boolean = _one_of({"0": False, "1": True, "false": False, "true": True})
_zero_one = _one_of({"0": "0", "1": "1", "false": "0", "true": "1"})
_threads = _whole(0, MAX_THREADS)

PARAMETERS: Mapping[str, Parameter] = MappingProxyType(
    {
        "latency_slo_ms": Parameter(
            "milliseconds above 0, at most an hour",
            "The promise: an answer is with the client at most so long after its request was sent. 1 % of it, at most "
            "0.5 ms, is left for the way. Unset: no promise, and nothing is refused for being late.",
            _milliseconds(0.0),
            ours=True,
        ),
        "backbone": Parameter(
            "a model's name, or name/version",
            "The model file is a head: it takes an output of that model, and its clients send what that model takes. "
            "Requests for all heads on one backbone are batched together. Unset version: the newest that serves.",
            _reference,
            ours=True,
        ),
        "backbone_sha256": Parameter(
            "64 hexadecimal digits",
            "Of the backbone's model file: another one is refused, since the head was trained on this one's output.",
            _sha256,
            ours=True,
        ),
        "batching": Parameter(
            "on or off",
            "off: every request is run by itself. on: requests are joined even if the model quantises dynamically, "
            "where the answer to one request depends on its neighbours. Unset: on where the graph allows it.",
            _one_of({"on": True, "off": False}),
            ours=True,
        ),
        "unbatched_inputs": Parameter(
            "input names separated by commas",
            "Inputs without a batch dimension beside others that have one (a sampling rate, a flag). Requests are "
            "joined only when they agree on them.",
            _names,
            ours=True,
        ),
        "state_batch_axis": Parameter(
            "pairs as in state=1, separated by commas",
            "Stateful models: where the batch dimension of a state stands, by its input_name. Unset: the one place "
            "where the model file leaves room for it beside the state's dims, in front if there are several.",
            _axes,
            ours=True,
        ),
        "max_sequences": Parameter(
            "a whole number from 1 to 1000000",
            "Stateful models: sequences that may be live at once; the start of one more is refused. Default 4096, or "
            "oldest.max_candidate_sequences if that is more.",
            _whole(1, 1_000_000),
            ours=True,
        ),
        "max_queue_ms": Parameter(
            "milliseconds above 0, at most an hour",
            "Without an objective: the longest predicted wait that is still accepted. Default 30000.",
            _milliseconds(0.0),
            ours=True,
        ),
        "shed_eagerness": Parameter(
            "a number from 0 to 1",
            "How early to refuse under overload. 0 (default): only what is certainly late, the most answers in time. "
            "Towards 1: on arrival, the soonest news for clients.",
            _share,
            ours=True,
        ),
        "late_policy": Parameter(
            "shed or best_effort",
            "What cannot be answered in time is refused (shed, default), or run late when nothing else waits "
            "(best_effort).",
            _one_of({policy.value: policy for policy in LatePolicy}),
            ours=True,
        ),
        "profile_budget_ms": Parameter(
            "milliseconds, 0 or more, at most an hour",
            "Time spent at load on measuring the model; 0 learns from requests instead. Default: the server's.",
            _milliseconds(-1e-9),
            ours=True,
        ),
        "intra_op_threads": Parameter(
            f"a whole number from 0 to {MAX_THREADS}",
            "Threads that share one operator on the CPU. 0: all cores. Another name for intra_op_thread_count.",
            _threads,
            ours=True,
        ),
        "intra_op_thread_count": Parameter(
            f"a whole number from 0 to {MAX_THREADS}",
            "Threads that share one operator on the CPU. 0: all cores. Default: the server's.",
            _threads,
        ),
        "inter_op_thread_count": Parameter(
            f"a whole number from 0 to {MAX_THREADS}",
            "Threads that run different operators at once, with execution_mode 1. 0: all cores.",
            _threads,
        ),
        "execution_mode": Parameter(
            "0 or 1", "0 (default): one operator after the other. 1: branches of the graph in parallel.", _boolean
        ),
        "enable_mem_arena": Parameter(
            "0 or 1", "Whether the CPU provider keeps freed memory for itself. Default: the server's.", _boolean
        ),
        "enable_mem_pattern": Parameter(
            "0 or 1", "Whether memory is planned from the last execution of the same shape.", _boolean
        ),
        "memory.enable_memory_arena_shrinkage": Parameter(
            "devices as in cpu:0;gpu:0", "Give memory back after each execution on these devices.", _shrinkage
        ),
        "cudnn_conv_algo_search": Parameter(
            "0, 1 or 2",
            "How convolution algorithms are chosen: 0 by exhaustive trial, 1 by heuristics (the default here), "
            "2 cuDNN's fallback, which can be a hundred times slower.",
            _one_of({"0": "EXHAUSTIVE", "1": "HEURISTIC", "2": "DEFAULT"}),
        ),
        "gpu_mem_limit": Parameter(
            "bytes above 0", "The most memory the CUDA provider's arena takes.", _whole(1, 2**64 - 1)
        ),
        "arena_extend_strategy": Parameter(
            "0 or 1",
            "How that arena grows: 0 to the next power of two, 1 by what is asked for (the default here).",
            _one_of({"0": "kNextPowerOfTwo", "1": "kSameAsRequested"}),
        ),
        "do_copy_in_default_stream": Parameter(
            "0 or 1", "Whether the CUDA provider copies on the stream it computes on.", _zero_one
        ),
    }
)

# Entries of ONNX Runtime's session configuration that tune how a session runs. Those that choose files, formats, logs
# or what the server sets itself are left out. ONNX Runtime ignores names it does not know, so they are listed here.
SESSION_ENTRIES = frozenset(
    {
        "session.disable_aot_function_inlining",
        "session.disable_double_qdq_remover",
        "session.disable_prepacking",
        "session.disable_qdq_constant_folding",
        "session.disable_quant_qdq",
        "session.dynamic_block_base",
        "session.enable_dq_matmulnbits_fusion",
        "session.enable_quant_qdq_cleanup",
        "session.force_spinning_stop",
        "session.graph_optimizations_loop_level",
        "session.inter_op.allow_spinning",
        "session.inter_op.spin_backoff_max",
        "session.inter_op.spin_duration_us",
        "session.intra_op.allow_spinning",
        "session.intra_op.spin_backoff_max",
        "session.intra_op.spin_duration_us",
        "session.intra_op_thread_affinities",
        "session.prepack.enable_parallel",
        "session.qdq_matmulnbits_accuracy_level",
        "session.qdqisint8allowed",
        "session.set_denormal_as_zero",
        "session.strict_shape_type_inference",
        "session.use_deterministic_compute",
        "session.use_device_allocator_for_initializers",
        "session.x64quantprecision",
    }
)

_CUDA_KEYS = ("cudnn_conv_algo_search", "gpu_mem_limit", "arena_extend_strategy", "do_copy_in_default_stream")


@dataclass(frozen=True, slots=True)
class ParsedParameters:
    """What the map says, in the terms of the configuration. `batching` None: not stated."""

    objective: Objective
    session: SessionTuning
    cuda_options: Mapping[str, str]
    batching: bool | None
    unbatched_inputs: tuple[str, ...]
    state_axes: Mapping[str, int]
    max_sequences: int | None
    backbone: BackboneReference | None


def parse_parameters(raw: Mapping[str, str]) -> ParsedParameters:
    """Read the map. Raises `ConfigError` with the path `parameters[KEY]` for an unknown key or a wrong value."""
    values: dict[str, object] = {}
    entries: dict[str, str] = {}
    for key, text in sorted(raw.items()):
        path = f"parameters[{key}]"
        if key in SESSION_ENTRIES:
            entries[key] = _parsed(path, Parameter("text of 1 to 1024 characters", "", _any_text), text)  # type: ignore[assignment]
        elif key in PARAMETERS:
            values[key] = _parsed(path, PARAMETERS[key], text.strip())
        else:
            raise ConfigError(path, _unknown(key))
    if "intra_op_threads" in values and "intra_op_thread_count" in values:
        raise ConfigError(
            "parameters[intra_op_threads]", "intra_op_thread_count says the same and is set, too; remove one of the two"
        )
    objective = Objective()
    given = {
        "slo_ns": values.get("latency_slo_ms"),
        "max_queue_ns": values.get("max_queue_ms"),
        "shed_eagerness": values.get("shed_eagerness"),
        "late_policy": values.get("late_policy"),
        "profile_budget_ns": values.get("profile_budget_ms"),
    }
    tuning = {
        "intra_op_threads": values.get("intra_op_threads", values.get("intra_op_thread_count")),
        "inter_op_threads": values.get("inter_op_thread_count"),
        "parallel_execution": values.get("execution_mode"),
        "memory_arena": values.get("enable_mem_arena"),
        "memory_pattern": values.get("enable_mem_pattern"),
        "arena_shrinkage": values.get("memory.enable_memory_arena_shrinkage"),
    }
    return ParsedParameters(
        objective=replace(objective, **{name: value for name, value in given.items() if value is not None}),  # type: ignore[arg-type]
        session=replace(
            SessionTuning(config_entries=MappingProxyType(entries)),
            **{name: value for name, value in tuning.items() if value is not None},  # type: ignore[arg-type]
        ),
        cuda_options=MappingProxyType({key: str(values[key]) for key in _CUDA_KEYS if key in values}),
        batching=values.get("batching"),  # type: ignore[arg-type]
        unbatched_inputs=values.get("unbatched_inputs", ()),  # type: ignore[arg-type]
        state_axes=values.get("state_batch_axis", MappingProxyType({})),  # type: ignore[arg-type]
        max_sequences=values.get("max_sequences"),  # type: ignore[arg-type]
        backbone=parse_backbone(raw),
    )


def parse_backbone(raw: Mapping[str, str]) -> BackboneReference | None:
    """The backbone that the parameters name, if they do. Raises `ConfigError`."""
    keys = [key for key in ("backbone", "backbone_sha256") if key in raw]
    given = {key: _parsed(f"parameters[{key}]", PARAMETERS[key], raw[key].strip()) for key in keys}
    if "backbone" not in given:
        if given:
            raise ConfigError("parameters[backbone_sha256]", "names no backbone: set backbone, too")
        return None
    named: tuple[str, int | None] = given["backbone"]  # type: ignore[assignment]
    return BackboneReference(*named, str(given.get("backbone_sha256", "")))


def _parsed(path: str, parameter: Parameter, text: str) -> object:
    try:
        return parameter.parse(text)
    except ValueError:
        shown = text if len(text) <= 80 else f"{text[:77]}..."
        raise ConfigError(path, f"'{shown}' is not accepted; expected {parameter.accepts}") from None


def _unknown(key: str) -> str:
    known = [*PARAMETERS, *sorted(SESSION_ENTRIES)]
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else "."
    return (
        f"unknown parameter{hint} Known are {', '.join(PARAMETERS)} and these entries of ONNX Runtime's session "
        f"configuration: {', '.join(sorted(SESSION_ENTRIES))}"
    )
