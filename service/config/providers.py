"""Options of ONNX Runtime's execution providers as a model's configuration may state them.

Promise: an option that passes here has the name ONNX Runtime knows it by, and does not contradict what the server sets
itself (the device, the stream, the allocator). The names are ONNX Runtime 1.31's; the translation of TensorRT's
convenience names follows Triton's ONNX Runtime backend.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from service.errors import ConfigError

CUDA_OPTIONS = frozenset(
    {
        "arena_extend_strategy",
        "cudnn_conv1d_pad_to_nc1d",
        "cudnn_conv_algo_search",
        "cudnn_conv_use_max_workspace",
        "do_copy_in_default_stream",
        "enable_skip_layer_norm_strict_mode",
        "fuse_conv_bias",
        "gpu_mem_limit",
        "prefer_nhwc",
        "sdpa_kernel",
        "tunable_op_enable",
        "tunable_op_max_tuning_duration_ms",
        "tunable_op_tuning_enable",
        "use_ep_level_unified_stream",
        "use_tf32",
    }
)

TENSORRT_OPTIONS = frozenset(
    {
        "trt_auxiliary_streams",
        "trt_bf16_enable",
        "trt_build_heuristics_enable",
        "trt_builder_optimization_level",
        "trt_context_memory_sharing_enable",
        "trt_detailed_build_log",
        "trt_dla_core",
        "trt_dla_enable",
        "trt_engine_cache_enable",
        "trt_engine_cache_path",
        "trt_engine_cache_prefix",
        "trt_force_sequential_engine_build",
        "trt_force_timing_cache",
        "trt_fp16_enable",
        "trt_int8_calibration_table_name",
        "trt_int8_enable",
        "trt_int8_use_native_calibration_table",
        "trt_layer_norm_fp32_fallback",
        "trt_max_partition_iterations",
        "trt_max_workspace_size",
        "trt_min_subgraph_size",
        "trt_profile_max_shapes",
        "trt_profile_min_shapes",
        "trt_profile_opt_shapes",
        "trt_sparsity_enable",
        "trt_tactic_sources",
        "trt_timing_cache_enable",
        "trt_timing_cache_path",
    }
)

# Names that say the same in Triton's configuration.
_TENSORRT_ALIASES = {
    "int8_calibration_table_name": "trt_int8_calibration_table_name",
    "int8_use_native_calibration_table": "trt_int8_use_native_calibration_table",
    "max_workspace_size_bytes": "trt_max_workspace_size",
}
_PRECISION = {"FP32": None, "FP16": "trt_fp16_enable", "BF16": "trt_bf16_enable", "INT8": "trt_int8_enable"}
_SET_BY_SERVER = {
    "device_id": "list the device in instance_group.gpus",
    "enable_cuda_graph": "set optimization.cuda.graphs",
    "trt_cuda_graph_enable": "graphs are captured with the CUDA provider only; remove it",
    "has_user_compute_stream": "the server owns the stream; remove it",
    "user_compute_stream": "the server owns the stream; remove it",
}
_KNOWN = {"cuda": CUDA_OPTIONS, "tensorrt": TENSORRT_OPTIONS}
ACCELERATORS = tuple(_KNOWN)


def provider_options(path: str, name: str, raw: Mapping[str, str]) -> dict[str, str]:
    """The options of accelerator `name` under ONNX Runtime's names. Raises `ConfigError` below `path`."""
    if name not in _KNOWN:
        raise ConfigError(f"{path}.name", f"unknown accelerator '{name}'; known are {', '.join(ACCELERATORS)}")
    options: dict[str, str] = {}
    for key, value in sorted(raw.items()):
        where = f"{path}.parameters[{key}]"
        if key in _SET_BY_SERVER:
            raise ConfigError(where, f"not settable here: {_SET_BY_SERVER[key]}")
        if name == "tensorrt" and key == "precision_mode":
            if value not in _PRECISION:
                raise ConfigError(where, f"'{value}' is not accepted; expected one of {', '.join(_PRECISION)}")
            key, value = _PRECISION[value] or "", "1"
            if not key:
                continue  # FP32 is what TensorRT does unasked
        elif name == "tensorrt":
            key = _TENSORRT_ALIASES.get(key, key)
        if key not in _KNOWN[name]:
            accepted = [*_KNOWN[name], *(_TENSORRT_ALIASES if name == "tensorrt" else ())]
            close = difflib.get_close_matches(key, accepted, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else f"; known are {', '.join(sorted(accepted))}"
            raise ConfigError(where, f"unknown option of the {name} provider{hint}")
        if not value:
            raise ConfigError(where, "the value is empty")
        if options.get(key, value) != value:
            raise ConfigError(where, f"'{key}' is given twice, as '{options[key]}' and as '{value}'")
        options[key] = value
    return options
