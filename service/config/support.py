"""Which keys of `ModelConfig` are honoured and which are refused: one table, one walk.

Promise: a configuration that passes `check_supported` says nothing that the server ignores. Every field of the schema
is in `SUPPORT` (a test compares), and `docs/configuration.md` is made from it. A field set to its default is unset in
protobuf's eyes, so `decoupled: false` passes wherever it stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from service.errors import ConfigError
from service.pb import model_config_pb2


@dataclass(frozen=True, slots=True)
class Support:
    """What the server does with a key. A refused key's `text` says why and what to do instead."""

    honoured: bool
    text: str


def _yes(text: str) -> Support:
    return Support(True, text)


def _no(text: str) -> Support:
    return Support(False, text)


_TENSORRT = "for TensorRT engine files, which are not served; remove it"
_RESHAPE = "tensors travel in the model's own shape; remove it (dims may be empty: one element per row)"

SUPPORT: Mapping[str, Support] = MappingProxyType(
    {
        "name": _yes("The model's directory, or unset."),
        "platform": _yes("onnxruntime_onnx, or unset."),
        "backend": _yes("onnxruntime, or unset."),
        "runtime": _no("there is one implementation of the backend; remove it"),
        "version_policy": _yes("Which versions on disk are served. Unset: the newest."),
        "version_policy.latest": _yes("The newest ones."),
        "version_policy.latest.num_versions": _yes("How many; at least 1."),
        "version_policy.all": _yes("Every version."),
        "version_policy.specific": _yes("The listed ones."),
        "version_policy.specific.versions": _yes("Version numbers above 0. One that is not on disk is reported."),
        "max_batch_size": _yes(
            "The most rows in one execution. 0 or unset: taken from the model file, where a free first dimension of "
            "all inputs and outputs means the server's default."
        ),
        "input": _yes("Checked against the model file. Inputs left out are taken from it."),
        "input.name": _yes("As in the model file."),
        "input.data_type": _yes("As in the model file, or unset."),
        "input.format": _yes("For clients to read; the server moves no pixels. With 3 dims only."),
        "input.dims": _yes("Without the batch dimension. May fix a size that the model leaves free."),
        "input.reshape": _no(_RESHAPE),
        "input.is_shape_tensor": _no(_TENSORRT),
        "input.allow_ragged_batch": _no("requests of different shapes are batched apart; remove it"),
        "input.optional": _yes("For inputs that have a default in the model file: requests may leave them out."),
        "input.is_non_linear_format_io": _no(_TENSORRT),
        "output": _yes("Checked against the model file. When some are listed, only these are served."),
        "output.name": _yes("As in the model file."),
        "output.data_type": _yes("As in the model file, or unset."),
        "output.dims": _yes("Without the batch dimension."),
        "output.reshape": _no(_RESHAPE),
        "output.label_filename": _yes("A file in the model's directory: line i names class i."),
        "output.is_shape_tensor": _no(_TENSORRT),
        "output.is_non_linear_format_io": _no(_TENSORRT),
        "batch_input": _no("the server makes no tensors for the model; put the operation into the graph"),
        "batch_output": _no("outputs are cut along their first dimension only"),
        "optimization": _yes("How the graph is executed."),
        "optimization.graph": _yes("Rewriting of the graph."),
        "optimization.graph.level": _yes("0 or unset: all. 1: basic and extended. -1: basic. 2: none."),
        "optimization.priority": _no(
            "models of a device share it by deadlines; set dynamic_batching.priority_levels for requests"
        ),
        "optimization.cuda": _yes("How a GPU is driven."),
        "optimization.cuda.graphs": _yes(
            "On a GPU: batch sizes are recorded while the model is warmed up and replayed with one launch. The log "
            "says how many, or why not. Without `cuda`: those of models with convolutions."
        ),
        "optimization.cuda.busy_wait_events": _no("ONNX Runtime waits by itself; remove it"),
        "optimization.cuda.graph_spec": _no("the batch sizes that warm-up measures are captured; remove it"),
        "optimization.cuda.output_copy_stream": _no("ONNX Runtime chooses the streams; remove it"),
        "optimization.execution_accelerators": _yes("Execution providers to use besides the device's own."),
        "optimization.execution_accelerators.gpu_execution_accelerator": _yes("For instances on GPUs."),
        "optimization.execution_accelerators.gpu_execution_accelerator.name": _yes("cuda or tensorrt."),
        "optimization.execution_accelerators.gpu_execution_accelerator.parameters": _yes(
            "Options of the provider, under ONNX Runtime's names or Triton's."
        ),
        "optimization.execution_accelerators.cpu_execution_accelerator": _no(
            "no accelerator for the CPU is part of the ONNX Runtime build in use; remove it"
        ),
        "optimization.input_pinned_memory": _yes("Batches for a GPU are gathered in page-locked memory. Unset: yes."),
        "optimization.input_pinned_memory.enable": _yes("Yes or no."),
        "optimization.output_pinned_memory": _yes("The same for what comes back."),
        "optimization.output_pinned_memory.enable": _yes("Yes or no."),
        "optimization.gather_kernel_buffer_threshold": _no("inputs are gathered on the host; remove it"),
        "optimization.eager_batching": _yes("Always so: the next batch is prepared while one runs."),
        "dynamic_batching": _yes("Requests may be joined. Unset on a batched model: set, unless batching is off."),
        "dynamic_batching.preferred_batch_size": _yes(
            "Without an objective: sizes worth waiting for, at most max_batch_size. With one: no effect, the scheduler "
            "knows when waiting pays."
        ),
        "dynamic_batching.max_queue_delay_microseconds": _yes(
            "Without an objective: the longest wait for company. With one: no effect, as above."
        ),
        "dynamic_batching.preserve_ordering": _yes(
            "Answers on one stream always leave in the order of their requests; single calls have no order."
        ),
        "dynamic_batching.priority_levels": _yes("Number of priorities, 1 the most urgent; at most 100."),
        "dynamic_batching.default_priority_level": _yes("Needed with priority_levels."),
        "dynamic_batching.default_queue_policy": _yes("Bounds of the queue of a priority level."),
        "dynamic_batching.default_queue_policy.timeout_action": _yes("REJECT, or DELAY: run after all others."),
        "dynamic_batching.default_queue_policy.default_timeout_microseconds": _yes("The longest wait. 0: no bound."),
        "dynamic_batching.default_queue_policy.allow_timeout_override": _yes("A request may state a shorter wait."),
        "dynamic_batching.default_queue_policy.max_queue_size": _yes("The most requests that wait. 0: no own bound."),
        "dynamic_batching.priority_queue_policy": _yes("The same bounds for single priority levels."),
        "sequence_batching": _yes("The model is stateful: see [sequences.md](sequences.md). One row per request."),
        "sequence_batching.max_sequence_idle_microseconds": _yes(
            "A sequence that was silent for so long is over, and its state is dropped. 0 or unset: a second."
        ),
        "sequence_batching.control_input": _yes("Inputs that the server fills: one element per row."),
        "sequence_batching.control_input.name": _yes("As in the model file."),
        "sequence_batching.control_input.control": _yes("Exactly one per input."),
        "sequence_batching.control_input.control.kind": _yes("Each kind once. READY is always yes."),
        "sequence_batching.control_input.control.int32_false_true": _yes("The values for no and yes."),
        "sequence_batching.control_input.control.fp32_false_true": _yes("The same."),
        "sequence_batching.control_input.control.bool_false_true": _yes("The same."),
        "sequence_batching.control_input.control.data_type": _yes(
            "Of the correlation id: the model file's, one of the 32 and 64 bit integers or TYPE_STRING."
        ),
        "sequence_batching.state": _yes("Outputs that are kept for the sequence's next request."),
        "sequence_batching.state.input_name": _yes("As in the model file. Clients do not send it."),
        "sequence_batching.state.output_name": _yes("As in the model file. Clients get it only if it is in output."),
        "sequence_batching.state.data_type": _yes("As in the model file, or unset. Not TYPE_STRING."),
        "sequence_batching.state.dims": _yes(
            "Without the batch dimension, wherever that stands (parameters[state_batch_axis]). -1 for sizes that "
            "change from request to request."
        ),
        "sequence_batching.state.initial_state": _yes(
            "What a sequence begins with, one at most. Unset: zeros; needed where dims have a -1."
        ),
        "sequence_batching.state.initial_state.data_type": _yes("As the state's, or unset."),
        "sequence_batching.state.initial_state.dims": _yes("All sizes given. Unset: the state's dims."),
        "sequence_batching.state.initial_state.zero_data": _yes("Zeros."),
        "sequence_batching.state.initial_state.data_file": _yes(
            "A file under initial_state/ in the model's directory: raw elements."
        ),
        "sequence_batching.state.initial_state.name": _yes("For readers."),
        "sequence_batching.state.use_same_buffer_for_input_output": _no(
            "states are kept outside of the session, and each has its own memory; remove it"
        ),
        "sequence_batching.state.use_growable_memory": _no("a state may change its size anyway (dims -1); remove it"),
        "sequence_batching.direct": _yes(
            "The default. A sequence needs no place of its own, since its state is not in the session: any instance "
            "may run its next request."
        ),
        "sequence_batching.direct.max_queue_delay_microseconds": _yes(
            "Without an objective: the longest wait for minimum_slot_utilization. With one: no effect."
        ),
        "sequence_batching.direct.minimum_slot_utilization": _yes("The share of max_batch_size worth waiting for."),
        "sequence_batching.oldest": _yes("The same here as direct, with the knobs of dynamic_batching."),
        "sequence_batching.oldest.max_candidate_sequences": _yes(
            "At least so many sequences may be live; all that are live are candidates for every batch."
        ),
        "sequence_batching.oldest.preferred_batch_size": _yes("As in dynamic_batching."),
        "sequence_batching.oldest.max_queue_delay_microseconds": _yes("As in dynamic_batching."),
        "sequence_batching.oldest.preserve_ordering": _yes(
            "Answers on one stream always leave in the order of their requests; single calls have no order."
        ),
        "sequence_batching.iterative_sequence": _no("a request has exactly one answer; send the next step yourself"),
        "ensemble_scheduling": _no("ensembles are not supported; call the models one by one, or join the graphs"),
        "instance_group": _yes("Instances and their devices. Unset: the server's devices."),
        "instance_group.name": _yes("For logs and metrics."),
        "instance_group.kind": _yes("KIND_AUTO (GPU where there is one), KIND_GPU or KIND_CPU. Not KIND_MODEL."),
        "instance_group.count": _yes("Instances per device, at most 64. 0 or unset: 1."),
        "instance_group.rate_limiter": _no("a device's run slots bound what runs at once; remove it"),
        "instance_group.gpus": _yes(
            "CUDA numbers. Unset: all GPUs with room for the weights (or for gpu_mem_limit). Not with KIND_CPU."
        ),
        "instance_group.secondary_devices": _no("no second processor is used; remove it"),
        "instance_group.profile": _no(_TENSORRT),
        "instance_group.passive": _no("an instance without requests is none; remove the group"),
        "instance_group.host_policy": _no("pin the server with taskset, numactl or a CPU manager instead"),
        "default_model_filename": _yes("The file in a version's directory. Default model.onnx."),
        "cc_model_filenames": _no("one file serves all GPUs; make a model per compute capability instead"),
        "metric_tags": _no("metrics carry model and version; add labels in the Prometheus scrape configuration"),
        "parameters": _yes("See the table of parameters."),
        "parameters.string_value": _yes("The value, as text."),
        "model_warmup": _yes("Requests run before the model is ready, besides the server's own."),
        "model_warmup.name": _yes("For logs."),
        "model_warmup.batch_size": _yes("Rows, 1 to max_batch_size; 0 for an unbatched model."),
        "model_warmup.inputs": _yes("By input name; every input that is not optional."),
        "model_warmup.inputs.data_type": _yes("As in the model file, or unset."),
        "model_warmup.inputs.dims": _yes("One row's shape, all sizes given. Must fit the input."),
        "model_warmup.inputs.zero_data": _yes("Zeros, or empty strings."),
        "model_warmup.inputs.random_data": _yes("Random values of the type; empty strings."),
        "model_warmup.inputs.input_data_file": _yes("A file under warmup/ in the model's directory: raw elements."),
        "model_warmup.count": _yes("Repetitions, at most 1000. 0: 1."),
        "model_operations": _no("custom operator libraries are not loaded: they are code inside a model repository"),
        "model_transaction_policy": _yes("Only as decoupled: false."),
        "model_transaction_policy.decoupled": _no("a request has exactly one answer"),
        "model_repository_agents": _no("prepare the files before they are put into the repository"),
        "response_cache": _yes("Only as enable: false."),
        "response_cache.enable": _no("answers are not cached; put a cache in front"),
        "model_metrics": _no("bucket bounds are the server's; remove it"),
    }
)

# Where the schema is the same in two places the table has it once.
_SAME = {"dynamic_batching.priority_queue_policy": "dynamic_batching.default_queue_policy"}


def check_supported(config: model_config_pb2.ModelConfig) -> None:
    """Raise `ConfigError` with the path of the first key that is set and refused."""
    for path, key in _set_keys(config, "", ""):
        support = SUPPORT[key]
        if not support.honoured:
            raise ConfigError(path, f"not supported: {support.text}")


def schema_keys(descriptor: Descriptor, prefix: str = "") -> Iterator[str]:
    """Every key the table must have: all fields of the schema, without those below a refused one."""
    for field in descriptor.fields:
        key = f"{prefix}{field.name}"
        if key in _SAME:
            yield key
            continue
        yield key
        below = _message_below(field)
        if below is not None and (key not in SUPPORT or SUPPORT[key].honoured):
            yield from schema_keys(below, f"{key}.")


def _message_below(field: FieldDescriptor) -> Descriptor | None:
    message: Descriptor | None = field.message_type
    if message is not None and message.GetOptions().map_entry:
        return message.fields_by_name["value"].message_type
    return message


def _set_keys(message: Any, path: str, key: str) -> Iterator[tuple[str, str]]:
    """(path as a reader writes it, key of the table) of everything set in `message`, parents before children."""
    for field, value in message.ListFields():
        where, name = f"{path}{field.name}", f"{key}{field.name}"
        yield where, name
        if not SUPPORT[name].honoured:
            continue  # the caller stops here
        name = _SAME.get(name, name)
        if field.message_type is None:
            continue
        if field.message_type.GetOptions().map_entry:
            if _message_below(field) is not None:
                for entry in sorted(value):
                    yield from _set_keys(value[entry], f"{where}[{entry}].", f"{name}.")
        elif field.is_repeated:
            for index, item in enumerate(value):
                yield from _set_keys(item, f"{where}[{index}].", f"{name}.")
        else:
            yield from _set_keys(value, f"{where}.", f"{name}.")
