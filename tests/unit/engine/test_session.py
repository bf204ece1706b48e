"""Sessions: the providers asked for or a refusal, and ONNX Runtime's errors in our words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import helper

from service.engine.options import SessionPlan, plan_session
from service.engine.session import OnnxSession, OtherShapeError, _translate
from service.errors import DeviceFailed, ExecutionFailed, ModelLoadError, OutOfMemory
from service.tensor import DataType, TensorSpec
from tests.support import onnx_models
from tests.unit.engine.support import CPU, GPU, config_of, session_of

WITHOUT_GPU = pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="needs a machine on which CUDA cannot work")


@WITHOUT_GPU
def test_a_provider_that_cannot_be_had_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """CUDA on a machine without a GPU: the load fails and says so; nothing falls back to the CPU or is printed."""
    config, path = config_of(tmp_path, onnx_models.mlp())
    plan = SessionPlan(GPU, config, (("CUDAExecutionProvider", {}), ("CPUExecutionProvider", {})))
    with pytest.raises(ModelLoadError) as error:
        OnnxSession(path, plan)
    assert str(path) in str(error.value)
    assert "CUDA" in str(error.value)
    assert "EP Error" not in capfd.readouterr().out


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_this_build_does_not_have_is_refused(tmp_path: Path) -> None:
    """A name that ONNX Runtime passes over with a warning is a refusal here."""
    config, path = config_of(tmp_path, onnx_models.mlp())
    plan = SessionPlan(CPU, config, (("OpenVINOExecutionProvider", {}), ("CPUExecutionProvider", {})))
    with pytest.raises(ModelLoadError, match="OpenVINOExecutionProvider"):
        OnnxSession(path, plan)


def test_a_damaged_file_is_refused_with_its_name(tmp_path: Path) -> None:
    """Half a model is no model; the message names the file and stays on one line."""
    config, path = config_of(tmp_path, onnx_models.mlp())
    data = path.read_bytes()
    for damage in (data[: len(data) // 2], b"not a model", b""):
        path.write_bytes(damage)
        with pytest.raises(ModelLoadError, match="ONNX Runtime cannot load it") as error:
            OnnxSession(path, plan_session(config, CPU))
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(ModelLoadError, match="cannot load it"):
        OnnxSession(path, plan_session(config, CPU))


def test_bf16_outputs_beside_text_inputs_are_refused(tmp_path: Path) -> None:
    """ONNX Runtime's Python interface cannot do it: said when the model is loaded, with what to do."""
    nodes = [helper.make_node("Identity", ["t"], ["u"]), helper.make_node("Identity", ["x"], ["y"])]
    inputs = [onnx_models.value("t", "BYTES", ["N", 1]), onnx_models.value("x", "BF16", ["N", 1])]
    outputs = [onnx_models.value("u", "BYTES", ["N", 1]), onnx_models.value("y", "BF16", ["N", 1])]
    with pytest.raises(ModelLoadError, match="cast them to FP32"):
        session_of(tmp_path, onnx_models.make_model("both", nodes, inputs, outputs))


def test_a_session_knows_its_ends_and_providers(tmp_path: Path) -> None:
    """Names, types and shapes as in the file."""
    session, _ = session_of(tmp_path, onnx_models.mlp())
    assert session.providers == ("CPUExecutionProvider",)
    assert session.inputs == (("x", "tensor(float)", ["N", 8]),)
    assert session.outputs == (("y", "tensor(float)", ["N", 4]),)


def test_a_failing_run_is_execution_failed_with_the_cause(tmp_path: Path) -> None:
    """The first line of the reason for the client, the whole of it for whoever looks."""
    session, config = session_of(tmp_path, onnx_models.poison())
    feeds = {"index": (config.inputs[0], np.array([[12345]], np.int64))}
    with pytest.raises(ExecutionFailed, match="12345") as error:
        session.run(feeds, config.outputs)
    assert error.value.__cause__ is not None
    assert len(str(error.value)) <= 400
    assert not isinstance(error.value, OtherShapeError)


def test_a_missing_or_wrongly_typed_input_is_execution_failed(tmp_path: Path) -> None:
    """Nothing that ONNX Runtime raises gets out as it is."""
    session, config = session_of(tmp_path, onnx_models.mlp())
    with pytest.raises(ExecutionFailed):
        session.run({}, config.outputs)
    with pytest.raises(ExecutionFailed):
        session.run({"x": (config.inputs[0], np.zeros((1, 8), np.float64))}, config.outputs)
    with pytest.raises(ExecutionFailed):
        session.run({"x": (config.inputs[0], np.zeros((1, 8), np.float32))}, [TensorSpec("z", DataType.FP32, (4,))])


def test_buffers_the_session_does_not_take_are_execution_failed(tmp_path: Path) -> None:
    """A binding that cannot be made is a failed execution, not a dead worker."""
    session, _ = session_of(tmp_path, onnx_models.mlp())
    array = np.zeros((1, 8), np.float32)
    with pytest.raises(ExecutionFailed):
        session.bind([(TensorSpec("no_such_input", DataType.FP32, (8,), True), array)], [])


def test_a_sequence_is_not_a_tensor(tmp_path: Path) -> None:
    """An output that no protocol can carry fails by name."""
    session, _ = session_of(tmp_path, onnx_models.zipmap_classifier(), 'output { name: "label" }')
    spec = TensorSpec("features", DataType.FP32, (4,), True)
    wanted = [TensorSpec("output_probability", DataType.FP32, (3,), True)]
    with pytest.raises(ExecutionFailed, match="output 'output_probability' is a list"):
        session.run({"features": (spec, np.zeros((1, 4), np.float32))}, wanted)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer"), OutOfMemory),
        (RuntimeError("CUDA failure 2: out of memory ; GPU=0"), OutOfMemory),
        (RuntimeError("CUDA error 2: whatever the words are"), OutOfMemory),
        (RuntimeError("CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=h"), DeviceFailed),
        (
            RuntimeError("[ONNXRuntimeError] : 1 : FAIL : ... CUDA failure 719: unspecified launch failure"),
            DeviceFailed,
        ),
        (RuntimeError("CUDA failure 214: uncorrectable ECC error encountered ; GPU=1"), DeviceFailed),
        (RuntimeError("CUDA failure 1: invalid argument ; GPU=0"), ExecutionFailed),
        (RuntimeError("CUDA failure 98: invalid device function ; GPU=0"), ExecutionFailed),
        (RuntimeError("first line\nstd::bad_alloc"), OutOfMemory),
        (MemoryError(), OutOfMemory),
        (RuntimeError("Got invalid dimensions for output: y"), OtherShapeError),
        (RuntimeError("Non-zero status code returned while running Gather"), ExecutionFailed),
        (ort.capi.onnxruntime_pybind11_state.InvalidArgument("bad input"), ExecutionFailed),
    ],
)
def test_errors_are_told_apart(error: Exception, expected: type[Exception]) -> None:
    """Memory is worth a smaller batch, another shape worth a run without buffers, the rest is the request's."""
    translated = _translate(error)
    assert type(translated) is expected
    assert str(translated)


def test_a_long_reason_is_cut() -> None:
    """A message can quote whole shapes; a client gets one line of it."""
    assert len(str(_translate(RuntimeError("x" * 5000 + "\nsecond")))) == 400


def test_memory_is_given_back_where_it_is_asked_for(tmp_path: Path) -> None:
    """The entry reaches every run, bound or not, and the answers are the same."""
    text = 'parameters { key: "memory.enable_memory_arena_shrinkage" value { string_value: "cpu:0;gpu:0" } }'
    session, config = session_of(tmp_path, onnx_models.mlp(), text)
    plain, _ = session_of(tmp_path, onnx_models.mlp())
    x = np.ones((2, 8), np.float32)
    y = np.zeros((2, 4), np.float32)
    feeds = {"x": (config.inputs[0], x)}
    (wanted,) = plain.run(feeds, config.outputs)
    assert np.array_equal(session.run(feeds, config.outputs)[0], wanted)
    session.run_bound(session.bind([(config.inputs[0], x)], [(config.outputs[0], y)]))
    assert np.array_equal(y, wanted)
