"""Completing a configuration from the graph: what is batched, what is checked, what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from service.config.complete import Completed, complete
from service.config.model import All, InstanceKind, Latest
from service.config.pbtxt import parse_text
from service.config.signature import Dimension, GraphTensor
from service.errors import ConfigError
from service.tensor import DataType


def tensor(name: str, *shape: Dimension, kind: str = "float", optional: bool = False) -> GraphTensor:
    return GraphTensor(name, f"tensor({kind})", shape, optional)


def completed(
    text: str = "",
    inputs: Sequence[GraphTensor] = (tensor("x", "N", 4),),
    outputs: Sequence[GraphTensor] = (tensor("y", "N", 2),),
    quantised: Sequence[str] = (),
    size: int = 64,
    gpus: Sequence[int] | None = None,
) -> Completed:
    """The result, after checking that completing it again changes nothing."""
    config = parse_text(text) if text else None
    result = complete(config, "m", inputs, outputs, quantised, size, gpus)
    again = complete(result.proto, "m", inputs, outputs, quantised, size, gpus)
    assert (again.proto, again.config) == (result.proto, result.config)
    return result


def refused(text: str = "", **graph: object) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        completed(text, **graph)  # type: ignore[arg-type]
    return caught.value


def test_nothing_configured_is_completed_as_triton_does() -> None:
    """The ModelConfig answer: batch dimension left out of dims, absent messages unset, Triton's names."""
    result = completed(gpus=())
    assert result.config.max_batch_size == 64
    assert result.config.joins_requests
    assert [spec.full_shape for spec in (*result.config.inputs, *result.config.outputs)] == [(-1, 4), (-1, 2)]
    assert result.proto == parse_text(
        """
        name: "m" platform: "onnxruntime_onnx" backend: "onnxruntime" default_model_filename: "model.onnx"
        max_batch_size: 64 dynamic_batching {} version_policy { latest { num_versions: 1 } }
        input { name: "x" data_type: TYPE_FP32 dims: 4 } output { name: "y" data_type: TYPE_FP32 dims: 2 }
        instance_group { name: "m_0" kind: KIND_CPU count: 1 }
        """
    )
    assert not result.proto.HasField("sequence_batching")
    assert not result.proto.HasField("optimization")
    assert result.notes == ()


@pytest.mark.parametrize(
    ("inputs", "outputs", "batch"),
    [
        ([tensor("x", None, 3)], [tensor("y", None, 3)], 64),
        ([tensor("x", "unk__1", 3), tensor("z", "unk__2")], [tensor("y", "unk__7")], 64),
        ([tensor("x", "N", 3)], [tensor("y", "Gemmy_dim_0", 3)], 64),
        ([tensor("x", "N", "S")], [tensor("y", "N", "T")], 64),
        ([tensor("x", "N")], [tensor("y", "N")], 64),
        ([tensor("x", "N", 0)], [tensor("y", "N", 0)], 64),
        ([tensor("x", -1, 3)], [tensor("y", -1, 3)], 64),
        ([tensor("x", "N", 3), tensor("z", "M", 3)], [tensor("y", "N", "M")], 0),
        ([tensor("x", 1, 3)], [tensor("y", 1, 3)], 0),
        ([tensor("x")], [tensor("y")], 0),
        ([tensor("x", "N", 3)], [tensor("y")], 0),
        ([tensor("x", "N", 3)], [tensor("y", 3)], 0),
        ([tensor("x", "N", 3)], [tensor("y", "M", 3)], 0),
        ([tensor("x", "N", 3), tensor("sr", kind="int64")], [tensor("y", "N")], 0),
        ([], [tensor("y", 3)], 0),
    ],
)
def test_batchable_is_a_free_first_dimension_everywhere(
    inputs: list[GraphTensor], outputs: list[GraphTensor], batch: int
) -> None:
    """Unnamed or made-up symbols are free, different names are not the same batch, and why not is noted."""
    result = completed(inputs=inputs, outputs=outputs)
    assert result.config.max_batch_size == batch
    assert result.config.joins_requests == (batch > 0)
    assert bool(result.notes) == (batch == 0)
    for spec, source in zip(result.config.inputs, inputs, strict=True):
        assert source.shape is not None
        assert len(spec.full_shape) == len(source.shape)


def test_an_output_declared_as_one_row_is_believed_only_after_running() -> None:
    """Tree ensembles' `label` [1] beside [N,4]: batched, and reported for the engine to verify."""
    result = completed(outputs=[tensor("label", 1, kind="int64"), tensor("p", "N", 3)])
    assert result.config.max_batch_size == 64
    assert result.unverified_outputs == ("label",)
    assert result.config.outputs[0].full_shape == (-1,)
    assert "label" in result.notes[0]


def test_side_inputs_are_named_not_guessed() -> None:
    """A scalar beside rows leaves the model unbatched; naming it batches the rest."""
    inputs = [tensor("x", "N", 4), tensor("sr", kind="int64")]
    plain = completed(inputs=inputs)
    assert plain.config.max_batch_size == 0
    assert "name 'sr' in parameters[unbatched_inputs]" in plain.notes[0]
    named = completed('parameters { key: "unbatched_inputs" value: { string_value: "sr" } }', inputs=inputs)
    assert named.config.max_batch_size == 64
    assert [spec.name for spec in named.config.side_inputs] == ["sr"]
    assert [spec.full_shape for spec in named.config.inputs] == [(-1, 4), ()]


def test_dynamic_quantisation_is_not_joined_unless_asked() -> None:
    """The batch dimension stays, requests stay apart; `batching` on or dynamic_batching overrule it with a note."""
    apart = completed(quantised=["DynamicQuantizeLinear"])
    assert (apart.config.max_batch_size, apart.config.joins_requests) == (64, False)
    assert "DynamicQuantizeLinear" in apart.notes[0]
    for text in ('parameters { key: "batching" value: { string_value: "on" } }', "dynamic_batching {}"):
        together = completed(text, quantised=["DynamicQuantizeLinear"])
        assert together.config.joins_requests
        assert "DynamicQuantizeLinear" in together.notes[0]


def test_batching_off_keeps_the_batch_dimension() -> None:
    """A client may still send several rows in one request."""
    config = completed('parameters { key: "batching" value: { string_value: "off" } }').config
    assert (config.max_batch_size, config.joins_requests) == (64, False)


def test_listing_all_dims_means_no_batch() -> None:
    """As many dims as the tensor has, and no max_batch_size: the first is not a batch."""
    config = completed('input { name: "x" dims: [-1, 4] }').config
    assert config.max_batch_size == 0
    assert config.inputs[0].full_shape == (-1, 4)


def test_an_explicit_batch_size_overrules_names_but_not_fixed_sizes() -> None:
    """The user may know that two symbols are the same batch; a fixed size is a fact."""
    result = completed(
        "max_batch_size: 8", inputs=[tensor("x", "N", 4), tensor("z", "M", 4)], outputs=[tensor("y", "K", 4)]
    )
    assert result.config.max_batch_size == 8
    assert result.unverified_outputs == ("y",)
    assert refused("max_batch_size: 8", inputs=[tensor("x", 1, 4)]).path == "max_batch_size"
    assert refused("max_batch_size: 8", outputs=[tensor("y")]).path == "max_batch_size"
    assert refused("max_batch_size: 8", inputs=[]).path == "max_batch_size"
    assert refused("max_batch_size: -1").path == "max_batch_size"


def test_a_batch_size_of_one_joins_nothing() -> None:
    """Triton sets dynamic_batching only above 1; declared, its queue policy still counts."""
    assert completed("max_batch_size: 1").config.dynamic_batching is None
    declared = completed("max_batch_size: 1 dynamic_batching { default_queue_policy { max_queue_size: 3 } }").config
    assert declared.dynamic_batching is not None
    assert not declared.joins_requests


def test_listed_tensors_narrow_the_graph() -> None:
    """Free sizes may be fixed, types and the rest are filled in, inputs left out are added."""
    result = completed(
        'max_batch_size: 4 input { name: "z" dims: 7 format: FORMAT_NONE }',
        inputs=[tensor("x", "N", 4), tensor("z", "N", "S", kind="string")],
    )
    assert [(spec.name, spec.datatype, spec.full_shape) for spec in result.config.inputs] == [
        ("x", DataType.FP32, (-1, 4)),
        ("z", DataType.BYTES, (-1, 7)),
    ]
    assert [io.name for io in result.proto.input] == ["z", "x"]


def test_listed_outputs_are_the_ones_served() -> None:
    """Leaving an output out of the list saves computing it."""
    outputs = [tensor("y", "N", 2), tensor("features", "N", 1280)]
    assert [spec.name for spec in completed(outputs=outputs).config.outputs] == ["y", "features"]
    assert [spec.name for spec in completed('output { name: "y" }', outputs=outputs).config.outputs] == ["y"]


@pytest.mark.parametrize(
    ("text", "path", "said"),
    [
        ('name: "other"', "name", "the name of the model's directory"),
        ('platform: "tensorrt_plan"', "platform", "onnxruntime_onnx"),
        ('backend: "python"', "backend", "onnxruntime"),
        ('default_model_filename: "../model.onnx"', "default_model_filename", "version's directory"),
        ('input { name: "q" }', "input[0].name", "it has x"),
        ('input { name: "x" } input { name: "x" }', "input[1].name", "twice"),
        ('input { name: "x" data_type: TYPE_INT64 }', "input[0].data_type", "TYPE_INT64 is not the model's TYPE_FP32"),
        ('max_batch_size: 4 input { name: "x" dims: 5 }', "input[0].dims[0]", "5 is not the model's 4"),
        ('max_batch_size: 4 input { name: "x" dims: [-1, 4] }', "input[0].dims", "without the batch dimension"),
        ('input { name: "x" dims: -2 }', "input[0].dims", "-1 for any"),
        ('input { name: "x" optional: true }', "input[0].optional", "no default"),
        ('input { name: "x" format: FORMAT_NCHW }', "input[0].format", "3 dims"),
        ('output { name: "q" }', "output[0].name", "it has y"),
        ('output { name: "y" label_filename: "/etc/passwd" }', "output[0].label_filename", "inside"),
        (
            'parameters { key: "unbatched_inputs" value: { string_value: "q" } }',
            "parameters[unbatched_inputs]",
            "it has x",
        ),
        (
            'dynamic_batching {} parameters { key: "batching" value: { string_value: "off" } }',
            "parameters[batching]",
            "contradicts",
        ),
        ("instance_group { kind: KIND_MODEL }", "instance_group[0].kind", "KIND_CPU"),
        ("instance_group { kind: KIND_CPU gpus: 0 }", "instance_group[0].gpus", "KIND_CPU takes no GPUs"),
        ("instance_group { gpus: [1, 1] }", "instance_group[0].gpus", "different"),
        ("instance_group { count: 65 }", "instance_group[0].count", "64"),
        ("instance_group { count: -1 }", "instance_group[0].count", "range"),
        ("version_policy { specific {} }", "version_policy.specific.versions", "above 0"),
        ("version_policy { specific { versions: [0] } }", "version_policy.specific.versions", "above 0"),
        ("version_policy { latest {} }", "version_policy.latest.num_versions", "1 or more"),
        ("optimization { graph { level: 3 } }", "optimization.graph.level", "-1, 0, 1 or 2"),
        ("dynamic_batching { preferred_batch_size: 65 }", "dynamic_batching.preferred_batch_size", "(64)"),
        ("dynamic_batching { preferred_batch_size: 0 }", "dynamic_batching.preferred_batch_size", "1 to"),
        ("dynamic_batching { priority_levels: 2 }", "dynamic_batching.default_priority_level", "1 to"),
        ("dynamic_batching { default_priority_level: 2 }", "dynamic_batching.default_priority_level", "set, too"),
        (
            "dynamic_batching { priority_levels: 101 default_priority_level: 1 }",
            "dynamic_batching.priority_levels",
            "100",
        ),
        (
            "dynamic_batching { priority_queue_policy { key: 3 value {} } }",
            "dynamic_batching.priority_queue_policy[3]",
            "0 priority levels",
        ),
        (
            "dynamic_batching { preserve_ordering: true priority_levels: 2 default_priority_level: 1 }",
            "dynamic_batching.preserve_ordering",
            "contradicts priority_levels",
        ),
        (
            "dynamic_batching { preserve_ordering: true "
            "default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 5 } }",
            "dynamic_batching.preserve_ordering",
            "DELAY",
        ),
        (
            "dynamic_batching { default_queue_policy { default_timeout_microseconds: 999999999999 } }",
            "dynamic_batching.default_queue_policy.default_timeout_microseconds",
            "a day",
        ),
        (
            'optimization { execution_accelerators { gpu_execution_accelerator { name: "openvino" } } }',
            "optimization.execution_accelerators.gpu_execution_accelerator[0].name",
            "cuda, tensorrt",
        ),
        ('input { name: "x" data_type: 99 }', "input[0].data_type", "unknown data type 99"),
        ('input { name: "x" format: 99 }', "input[0].format", "unknown format"),
        (
            "dynamic_batching { default_queue_policy { timeout_action: 9 } }",
            "dynamic_batching.default_queue_policy.timeout_action",
            "9",
        ),
        (
            "dynamic_batching { max_queue_delay_microseconds: 999999999999 }",
            "dynamic_batching.max_queue_delay_microseconds",
            "a day",
        ),
        (
            'model_warmup { batch_size: 1 count: 1001 inputs { key: "x" value { zero_data: true } } }',
            "model_warmup[0].count",
            "1000",
        ),
        (
            'model_warmup { batch_size: 1 inputs { key: "x" value { zero_data: true } } inputs { key: "q" value {} } }',
            "model_warmup[0].inputs[q]",
            "no such input",
        ),
        ('model_warmup { name: "w" batch_size: 0 }', "model_warmup[0].batch_size", "1 to 64"),
        ('model_warmup { name: "w" batch_size: 1 }', "model_warmup[0].inputs", "no value for input x"),
    ],
)
def test_contradictions_are_refused_with_their_path(text: str, path: str, said: str) -> None:
    """Every error names the key, and says what was expected."""
    error = refused(text)
    assert error.path == path
    assert said in str(error)


def test_what_must_be_batched_and_cannot_is_refused() -> None:
    """`batching` on and `unbatched_inputs` ask for a batch; the reason against it is the message."""
    on = 'parameters { key: "batching" value: { string_value: "on" } }'
    side = 'parameters { key: "unbatched_inputs" value: { string_value: "x" } }'
    assert "fixed" in str(refused(on, inputs=[tensor("x", 1, 4)]))
    assert refused(side).path == "parameters[unbatched_inputs]"
    assert "the server's default is 0" in str(refused(on, size=0))
    assert completed(size=0).config.max_batch_size == 0


def test_what_cannot_travel_is_left_out_or_refused() -> None:
    """A map beside tensors is dropped with a note; alone, or listed, or as an input, it is an error with advice."""
    zipmap = GraphTensor("probabilities", "seq(map(int64,tensor(float)))", None)
    result = completed(outputs=[tensor("label", "N", kind="int64"), zipmap])
    assert [spec.name for spec in result.config.outputs] == ["label"]
    assert "probabilities" in result.notes[0]
    assert "zipmap" in str(refused(outputs=[zipmap]))
    assert "zipmap" in str(refused('output { name: "probabilities" }', outputs=[zipmap]))
    assert refused(inputs=[GraphTensor("x", "optional(tensor(float))", ("N",))]).path == "input"
    assert "float8e4m3fn" in str(refused(inputs=[tensor("x", "N", kind="float8e4m3fn")]))


def test_inputs_with_a_default_are_served_when_listed() -> None:
    """Old files list their weights as inputs; a default that clients may override is named in the configuration."""
    inputs = [tensor("x", "N", 4), tensor("w", 4, 2, optional=True), tensor("t", "N", 1, optional=True)]
    assert [spec.name for spec in completed(inputs=inputs).config.inputs] == ["x"]
    listed = completed('input { name: "t" optional: true }', inputs=inputs).config.inputs
    assert [(spec.name, spec.optional) for spec in listed] == [("x", False), ("t", True)]


def test_a_rank_that_the_file_does_not_state_must_be_listed() -> None:
    """For an input; an output's shape is only information."""
    unknown = GraphTensor("x", "tensor(float)", None)
    assert refused(inputs=[unknown]).path == "input[0].dims"
    config = completed('max_batch_size: 4 input { name: "x" dims: [3] }', inputs=[unknown]).config
    assert config.inputs[0].full_shape == (-1, 3)
    result = completed(outputs=[GraphTensor("y", "tensor(float)", None)])
    assert result.unverified_outputs == ("y",)
    listed = completed('output { name: "y" dims: [2, 2] }', outputs=[GraphTensor("y", "tensor(float)", None)])
    assert listed.config.outputs[0].full_shape == (-1, 2, 2)


@pytest.mark.parametrize(
    ("text", "gpus", "expected"),
    [
        ("", (), [(InstanceKind.CPU, 1, ())]),
        ("", (0, 1), [(InstanceKind.GPU, 1, (0, 1))]),
        ("", None, [(InstanceKind.AUTO, 1, ())]),
        ("instance_group { kind: KIND_CPU count: 2 }", (0,), [(InstanceKind.CPU, 2, ())]),
        ("instance_group { kind: KIND_GPU }", (0, 1), [(InstanceKind.GPU, 1, (0, 1))]),
        ("instance_group { gpus: 1 }", (0, 1), [(InstanceKind.GPU, 1, (1,))]),
        (
            "instance_group { count: 2 kind: KIND_CPU } instance_group { kind: KIND_GPU gpus: 0 }",
            (0,),
            [(InstanceKind.CPU, 2, ()), (InstanceKind.GPU, 1, (0,))],
        ),
    ],
)
def test_instances_are_placed_where_there_is_a_device(
    text: str, gpus: Sequence[int] | None, expected: list[tuple[InstanceKind, int, tuple[int, ...]]]
) -> None:
    """KIND_AUTO becomes what the machine has; unknown machines leave it as it is."""
    groups = completed(text, gpus=gpus).config.instance_groups
    assert [(group.kind, group.count, group.gpus) for group in groups] == expected
    assert [group.name for group in groups] == [f"m_{index}" for index in range(len(groups))]


def test_a_gpu_that_is_not_there_is_refused() -> None:
    """Never a silent fallback to the CPU."""
    assert "no GPU" in str(refused("instance_group { kind: KIND_GPU }", gpus=()))
    assert "0" in str(refused("instance_group { gpus: 3 }", gpus=(0,)))
    assert refused("instance_group { gpus: 0 }", gpus=()).path == "instance_group[0].gpus"


def test_the_rest_arrives_in_the_server_s_terms() -> None:
    """Policies, accelerators, labels and warm-up, with units converted."""
    config = completed(
        """
        version_policy { all {} }
        max_batch_size: 16
        dynamic_batching {
          preferred_batch_size: [8, 4] max_queue_delay_microseconds: 100
          priority_levels: 2 default_priority_level: 2
          default_queue_policy { max_queue_size: 10 default_timeout_microseconds: 1000 allow_timeout_override: true }
          priority_queue_policy { key: 1 value { timeout_action: DELAY } }
        }
        optimization {
          graph { level: -1 } input_pinned_memory { enable: false }
          execution_accelerators { gpu_execution_accelerator {
            name: "tensorrt" parameters { key: "precision_mode" value: "FP16" }
            parameters { key: "max_workspace_size_bytes" value: "1024" } }
            gpu_execution_accelerator { name: "cuda" parameters { key: "use_tf32" value: "0" } } }
        }
        parameters { key: "gpu_mem_limit" value: { string_value: "1000" } }
        output { name: "y" label_filename: "labels.txt" }
        model_warmup { name: "w" batch_size: 2 inputs { key: "x" value { random_data: true } } count: 3 }
        """
    ).config
    batching, optimization = config.dynamic_batching, config.optimization
    assert batching is not None
    assert config.version_policy == All()
    assert (batching.preferred_batch_size, batching.max_queue_delay_ns) == ((4, 8), 100_000)
    assert batching.queue_policy(1).timeout_action.value == "DELAY"
    assert batching.queue_policy(2).default_timeout_ns == 1_000_000
    assert optimization.graph.name == "BASIC"
    assert not optimization.input_pinned_memory
    assert optimization.output_pinned_memory
    assert optimization.gpu_accelerators[0].provider_options == {
        "trt_fp16_enable": "1",
        "trt_max_workspace_size": "1024",
    }
    assert optimization.cuda_options == {"gpu_mem_limit": "1000", "use_tf32": "0"}
    assert config.labels == {"y": "labels.txt"}
    (warmup,) = config.warmups
    assert (warmup.rows, warmup.count, warmup.inputs[0].shape) == (2, 3, (4,))


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        ("random_data: true dims: 5", "dims"),
        ("random_data: true dims: [-1]", "dims"),
        ("random_data: true data_type: TYPE_BOOL", "data_type"),
        ('input_data_file: "../../etc/passwd"', "input_data_file"),
        ("", ""),
    ],
)
def test_a_warm_up_that_does_not_fit_is_refused(entry: str, key: str) -> None:
    """Before a session is made, with the path of the value."""
    text = f'model_warmup {{ batch_size: 1 inputs {{ key: "x" value {{ {entry} }} }} }}'
    assert refused(text).path == f"model_warmup[0].inputs[x]{'.' if key else ''}{key}"


def test_provider_options_are_checked() -> None:
    """Unknown options, what the server sets itself, and contradictions with `parameters`."""
    frame = 'optimization { execution_accelerators { gpu_execution_accelerator { name: "cuda" %s } } } %s'
    option = 'parameters { key: "%s" value: "%s" }'
    assert "did you mean 'use_tf32'" in str(refused(frame % (option % ("use_tf3", "1"), "")))
    assert "instance_group.gpus" in str(refused(frame % (option % ("device_id", "1"), "")))
    assert "empty" in str(refused(frame % (option % ("use_tf32", ""), "")))
    tensorrt = frame.replace('"cuda"', '"tensorrt"')
    assert "FP32, FP16" in str(refused(tensorrt % (option % ("precision_mode", "FP8"), "")))
    twice = option % ("trt_max_workspace_size", "1") + option % ("max_workspace_size_bytes", "2")
    assert "given twice" in str(refused(tensorrt % (twice, "")))
    (plain,) = completed(tensorrt % (option % ("precision_mode", "FP32"), "")).config.optimization.gpu_accelerators
    assert plain.provider_options == {}
    twice = frame % ('} gpu_execution_accelerator { name: "cuda"', "")
    assert refused(twice).path.endswith("gpu_execution_accelerator[1].name")
    older = 'parameters { key: "gpu_mem_limit" value: { string_value: "5" } }'
    assert "contradicts" in str(refused(frame % (option % ("gpu_mem_limit", "6"), older)))


def test_the_default_policy_is_the_newest_version() -> None:
    """Unset means latest 1, in the answer and in force."""
    assert completed().config.version_policy == Latest(1)
