"""Reading a model file's signature without its weights."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from service.config.graph import model_file, read_graph
from service.config.signature import GraphTensor
from service.errors import ModelLoadError
from tests.support import onnx_models

BUILDERS: list[Callable[[], onnx.ModelProto]] = [
    onnx_models.mlp,
    onnx_models.branching,
    onnx_models.constant_output,
    onnx_models.default_input,
    onnx_models.growing_cache,
    onnx_models.looping,
    onnx_models.odd_names,
    onnx_models.recurrent,
    onnx_models.scalar_sum,
    onnx_models.string_tfidf,
    onnx_models.text_encoder,
    onnx_models.tree_classifier,
]


def saved(path: Path, model: onnx.ModelProto) -> Path:
    file = path / "model.onnx"
    onnx.save(model, str(file))
    return file


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_the_file_says_what_a_session_says(tmp_path: Path, build: Callable[[], onnx.ModelProto]) -> None:
    """Names, types and shapes are ONNX Runtime's; inputs with a default are marked, which it hides."""
    file = saved(tmp_path, build())
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    graph = read_graph(file)
    required = [tensor for tensor in graph.inputs if not tensor.optional]
    assert [(t.name, t.onnx_type, t.shape) for t in required] == [
        (i.name, i.type, tuple(i.shape)) for i in session.get_inputs()
    ]
    assert [t.name for t in graph.inputs if t.optional] == [i.name for i in session.get_overridable_initializers()]
    assert [(t.name, t.onnx_type, t.shape) for t in graph.outputs] == [
        (o.name, o.type, tuple(o.shape)) for o in session.get_outputs()
    ]


def test_a_sequence_of_maps_has_onnx_runtimes_name(tmp_path: Path) -> None:
    """Types that cannot travel are named as the engine names them."""
    graph = read_graph(saved(tmp_path, onnx_models.zipmap_classifier()))
    assert graph.outputs[1] == GraphTensor("output_probability", "seq(map(int64,tensor(float)))", None)
    assert graph.outputs[1].datatype is None


def test_dynamic_quantisation_is_found_wherever_it_is(tmp_path: Path) -> None:
    """At the top, inside a branch, and not where there is none."""
    model = onnx_models.dynamic_quantised()
    assert read_graph(saved(tmp_path, model)).dynamic_quantisation == ("DynamicQuantizeLinear",)
    branch = helper.make_graph(
        [helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])],
        "branch",
        [],
        [helper.make_tensor_value_info("q", TensorProto.UINT8, ["N"])],
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    nested = helper.make_model(
        helper.make_graph(
            [node],
            "g",
            [helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
            [helper.make_tensor_value_info("y", TensorProto.UINT8, ["N"])],
        )
    )
    assert read_graph(saved(tmp_path, nested)).dynamic_quantisation == ("DynamicQuantizeLinear",)
    assert read_graph(saved(tmp_path, onnx_models.mlp())).dynamic_quantisation == ()


def test_convolutions_are_found_wherever_they_are(tmp_path: Path) -> None:
    """At the top, inside a branch, and not where there is none."""
    assert read_graph(saved(tmp_path, onnx_models.conv_net())).convolutions
    assert read_graph(saved(tmp_path, onnx_models.branching_conv())).convolutions
    assert not read_graph(saved(tmp_path, onnx_models.mlp())).convolutions


def test_types_outside_the_protocol_keep_their_names(tmp_path: Path) -> None:
    """Small floats, complex numbers, sparse and optional tensors are named in the refusal."""
    value = helper.make_tensor_value_info
    inputs = [
        value("f8", TensorProto.FLOAT8E4M3FN, ["N"]),
        helper.make_sparse_tensor_value_info("sparse", TensorProto.FLOAT, ["N", 3]),
        helper.make_value_info("maybe", helper.make_optional_type_proto(value("", TensorProto.FLOAT, None).type)),
        helper.make_value_info("nothing", onnx.TypeProto()),
        value("rankless", TensorProto.FLOAT, None),
        value("negative", TensorProto.FLOAT, [-1, 0, ""]),
    ]
    graph = read_graph(saved(tmp_path, helper.make_model(helper.make_graph([], "g", inputs, []))))
    assert [str(tensor) for tensor in graph.inputs] == [
        "f8 tensor(float8e4m3fn) [N]",
        "sparse sparse_tensor(float) [N,3]",
        "maybe optional(tensor(float)) of unknown rank",
        "nothing unknown of unknown rank",
        "rankless tensor(float) of unknown rank",
        "negative tensor(float) [?,0,?]",
    ]


def weights(tmp_path: Path, location: str) -> Path:
    """A model whose initializer lies in `location`."""
    initializer = numpy_helper.from_array(np.zeros(4, np.float32), "w")
    initializer.ClearField("raw_data")
    initializer.data_location = TensorProto.EXTERNAL
    initializer.external_data.add(key="location", value=location)
    initializer.external_data.add(key="length", value="16")
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [value("x", TensorProto.FLOAT, ["N", 4])],
        [value("y", TensorProto.FLOAT, ["N", 4])],
        [initializer],
    )
    return saved(tmp_path, helper.make_model(graph))


def test_external_data_beside_the_model_is_found(tmp_path: Path) -> None:
    """The file is named, and not opened."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "w.bin").write_bytes(b"")
    assert read_graph(weights(tmp_path, "weights/w.bin")).external_files == ("weights/w.bin",)


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("gone.bin", "is missing; copy the file"),
        ("/etc/passwd", "not a path inside"),
        ("../w.bin", "not a path inside"),
        ("a/../../w.bin", "not a path inside"),
        ("", "not a path inside"),
        ("link.bin", "link out of"),
    ],
)
def test_external_data_elsewhere_is_refused(tmp_path: Path, location: str, said: str) -> None:
    """A model from elsewhere cannot make the server read files outside its directory."""
    outside = tmp_path / "w.bin"
    outside.write_bytes(b"0" * 16)
    inside = tmp_path / "1"
    inside.mkdir()
    (inside / "link.bin").symlink_to(outside)
    with pytest.raises(ModelLoadError, match=said) as caught:
        read_graph(weights(inside, location))
    assert str(inside / "model.onnx") in str(caught.value)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"\x00" * 100, "is no field"),
        (b"this is a text file, not a model", "is not an ONNX model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is not an ONNX model"),
        (b"\x1c\x00\x00\x00ORTM" + b"\x00" * 50, "ONNX Runtime's own format"),
        (b"\x08\x08", "it has no graph"),
        (b"\xff" * 20, "longer than 64 bits"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    """The error names the file and says why."""
    file = tmp_path / "model.onnx"
    file.write_bytes(data)
    with pytest.raises(ModelLoadError, match=said) as caught:
        read_graph(file)
    assert str(caught.value).startswith(str(file))


def test_a_model_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    """Wherever a copy was interrupted inside the graph."""
    data = onnx_models.mlp().SerializeToString()
    file = tmp_path / "model.onnx"
    # Up to the last field of the file, which is the opset.
    for end in range(1, len(data) - 4, 7):
        file.write_bytes(data[:end])
        with pytest.raises(ModelLoadError):
            read_graph(file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """With the operating system's reason."""
    with pytest.raises(ModelLoadError, match="No such file"):
        read_graph(tmp_path / "model.onnx")


def test_a_directory_stands_for_the_model_in_it(tmp_path: Path) -> None:
    """`model.onnx/model.onnx`, as large models with external data are laid out."""
    inner = tmp_path / "model.onnx"
    inner.mkdir()
    saved(inner, onnx_models.mlp())
    assert read_graph(inner).inputs[0].name == "x"
    assert model_file(inner) == inner / "model.onnx"


def test_weights_are_not_read(tmp_path: Path) -> None:
    """16 MiB of weights cost next to nothing: counted as memory that Python allocated while reading."""
    file = saved(tmp_path, onnx_models.matmul_stack(1, 2048))
    assert file.stat().st_size > 15 * 2**20
    tracemalloc.start()
    try:
        graph = read_graph(file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert graph.inputs[0].shape == ("N", 2048)
    assert peak < 2**20
