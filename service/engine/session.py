"""One ONNX Runtime session: a model on a device, run with whole batches.

Promise: the providers asked for are the providers used, or the load fails with the reason. ONNX Runtime's Python layer
can rebuild a failing session on other providers by itself; that is switched off, since a latency service must not
quietly move to a slower device. What the runtime raises becomes `ExecutionFailed` or `OutOfMemory` here, with the cause
kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from service.engine.devices import CPU_PROVIDER
from service.engine.gate import GPUS
from service.engine.options import SessionPlan
from service.errors import DeviceFailed, ExecutionFailed, ModelLoadError, OutOfMemory, ServiceError
from service.tensor import Array, DataType, TensorSpec

# Fragments of ONNX Runtime's messages (BFC arena, CUDA allocator, CPU allocator) when a device has no memory left.
_OUT_OF_MEMORY = ("Failed to allocate memory", "out of memory", "bad allocation", "std::bad_alloc", "CUDA error 2:")
# How ONNX Runtime quotes the CUDA runtime ("CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; ...").
_CUDA_CODE = re.compile(r"CUDA (?:failure|error) (\d+)")
_CUDA_OUT_OF_MEMORY = 2
# Codes of which the CUDA runtime's reference (cudaError_t) says that the process must be ended and started again, or
# that the device is gone: devices unavailable, no device, ECC and NVLink errors, a contained error, an illegal address,
# a launch that timed out, a destroyed context, a device assertion, hardware stack error, illegal instruction,
# misaligned address, invalid address space, invalid program counter, launch failure, tensor memory leak, reset needed.
_CUDA_BROKEN = frozenset({46, 100, 101, 214, 220, 226, 227, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 741})
# Fragments of its messages when a bound output buffer is not of the size that the model declares, or computes.
_OTHER_SHAPE = ("Got invalid dimensions for output", "but the computed output shape for this run is")
# A runtime message can quote whole shapes and paths; the first line says what failed.
_MAX_MESSAGE = 400


class OtherShapeError(ExecutionFailed):
    """The model computes an output of another size than the buffer bound for it; without buffers it may succeed."""


@dataclass(frozen=True, slots=True)
class Binding:
    """A session's inputs and outputs bound to fixed buffers of one size. `inputs` are the arguments of those that must
    be bound anew for every run."""

    io: Any
    inputs: tuple[tuple[Any, ...], ...] = ()


class OnnxSession:
    """A loaded model. `run` and `run_bound` may be called from several threads at once on the CPU."""

    def __init__(self, path: Path, plan: SessionPlan) -> None:
        """Load `path` as `plan` says. Raises `ModelLoadError`."""
        # What touches a GPU stands aside while somebody captures a graph on it.
        self._gate = GPUS if plan.device.kind == "gpu" else None
        try:
            with self._passing():
                # Without the fallback, which would print the reason to stdout and try the CPU.
                session = ort.InferenceSession(
                    str(path), plan.options(), providers=list(plan.providers), enable_fallback=False
                )
        except Exception as error:
            raise ModelLoadError(f"{path}: ONNX Runtime cannot load it: {_first_line(error)}") from error
        taken = session.get_providers()
        for name, _ in plan.providers:
            if name not in taken:
                raise ModelLoadError(
                    f"{path}: execution provider {name} was asked for, but the session uses {', '.join(taken)}; "
                    "install what it needs or ask for another device"
                )
        self.providers: tuple[str, ...] = tuple(taken)
        self.inputs = tuple((node.name, node.type, list(node.shape)) for node in session.get_inputs())
        self.outputs = tuple((node.name, node.type, list(node.shape)) for node in session.get_outputs())
        if any(kind == DataType.BYTES.onnx_name for _, kind, _ in self.inputs) and any(
            kind == DataType.BF16.onnx_name for _, kind, _ in self.outputs
        ):
            raise ModelLoadError(
                f"{path}: ONNX Runtime's Python interface returns no BF16 outputs for text inputs; cast them to FP32 "
                "in the graph"
            )
        self._session = session
        # The C object under the Python wrapper: its checks of names and fallbacks cost more than a tiny model.
        self._core = session._sess
        self._run_options = plan.run_options()
        self._cpu = ort.OrtDevice.make("cpu", 0)._get_c_device()
        # Binding host memory to an input that is used on another device copies it there, once, at that moment
        # (`IOBinding::BindInput`): a later run would see the old values.
        self._copies_inputs = any(name != CPU_PROVIDER for name in taken)

    def bind(self, inputs: Sequence[tuple[TensorSpec, Array]], outputs: Sequence[tuple[TensorSpec, Array]]) -> Binding:
        """Bind CPU arrays: every run reads the inputs and writes the outputs, so they must outlive the binding.

        Raises `ExecutionFailed` when the session does not take such buffers.
        """
        try:
            io = self._session.io_binding()._iobinding
            bound = [
                (spec.name, self._cpu, _element_type(spec), list(array.shape), array.ctypes.data)
                for spec, array in inputs
            ]
            for arguments in bound:
                io.bind_input(*arguments)
            for spec, array in outputs:
                io.bind_output(spec.name, self._cpu, _element_type(spec), list(array.shape), array.ctypes.data)
        except Exception as error:
            raise _translate(error) from error
        return Binding(io, tuple(bound) if self._copies_inputs else ())

    def run_bound(self, binding: Binding) -> None:
        """Run on a binding's buffers. Raises `ExecutionFailed` (`OtherShapeError` if it is the buffers' fault),
        `OutOfMemory` or `DeviceFailed`."""
        try:
            if self._gate is None:
                self._core.run_with_iobinding(binding.io, self._run_options)
                return
            with self._gate.shared:
                for arguments in binding.inputs:
                    binding.io.bind_input(*arguments)
                self._core.run_with_iobinding(binding.io, self._run_options)
        except Exception as error:
            raise _translate(error) from error

    def run_fixed(self, binding: Binding, run_options: Any, inputs: Sequence[tuple[Any, Array]]) -> None:
        """Copy arrays into the `OrtValue`s that `binding` binds, and run. Raises as `run_bound`."""
        with self.translating(), self._passing():
            for value, array in inputs:
                value.update_inplace(array)
            self._core.run_with_iobinding(binding.io, run_options)

    def bind_values(self, inputs: Sequence[tuple[str, Any]], outputs: Sequence[tuple[str, Any]]) -> Binding:
        """Bind `OrtValue`s by name: every run reads and writes them where they are."""
        binding = self._session.io_binding()
        for name, value in inputs:
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs:
            binding.bind_ortvalue_output(name, value)
        return Binding(binding._iobinding)

    def tensors_on_host(self) -> list[str]:
        """The inputs and outputs that a GPU session's kernels want in host memory all the same."""
        if self._gate is None:
            return []
        infos = (*self._session.get_input_memory_infos(), *self._session.get_output_memory_infos())
        tensors = (*self.inputs, *self.outputs)
        return [name for (name, _, _), info in zip(tensors, infos, strict=True) if info.name.startswith("Cpu")]

    @contextlib.contextmanager
    def translating(self) -> Iterator[None]:
        """What the runtime raises within, as `run_bound` would."""
        try:
            yield
        except ServiceError:
            raise
        except Exception as error:
            raise _translate(error) from error

    def _passing(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._gate is None else self._gate.shared

    def run(self, feeds: Mapping[str, tuple[TensorSpec, Array]], outputs: Sequence[TensorSpec]) -> list[Array]:
        """Run on any arrays (BF16 as uint16, BYTES as object arrays of str); the answers are new arrays.

        Raises `ExecutionFailed`, `OutOfMemory` or `DeviceFailed`.
        """
        names = [spec.name for spec in outputs]
        with self.translating(), self._passing():
            values = {name: _value(spec, array) for name, (spec, array) in feeds.items()}
            if any(spec.datatype is DataType.BF16 for spec in outputs):
                as_values = {
                    n: v if isinstance(v, ort.OrtValue) else ort.OrtValue.ortvalue_from_numpy(v)
                    for n, v in values.items()
                }
                results = self._session.run_with_ort_values(names, as_values, self._run_options)
                return [
                    _bits(r) if s.datatype is DataType.BF16 else r.numpy()
                    for s, r in zip(outputs, results, strict=True)
                ]
            answers: list[Array] = self._core.run(names, values, self._run_options)
        for spec, answer in zip(outputs, answers, strict=True):
            if not isinstance(answer, np.ndarray):
                raise ExecutionFailed(f"output '{spec.name}' is a {type(answer).__name__}, not a tensor")
        return answers


def _element_type(spec: TensorSpec) -> Any:
    return spec.datatype.onnx_type if spec.datatype is DataType.BF16 else spec.datatype.dtype


def _value(spec: TensorSpec, array: Array) -> Any:
    if spec.datatype is DataType.BF16:
        # Not `ascontiguousarray`, which makes a vector of a scalar.
        bits = np.asarray(array, order="C")
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, DataType.BF16.onnx_type)
    return array


def _bits(value: Any) -> Array:
    """The elements of a BF16 value as uint16: NumPy has no such type, so they are read where they are."""
    shape = tuple(value.shape())
    count = int(np.prod(shape))
    if count == 0:
        return np.empty(shape, np.uint16)
    source = (ctypes.c_uint16 * count).from_address(value.data_ptr())
    return np.ctypeslib.as_array(source).reshape(shape).copy()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:_MAX_MESSAGE] if lines else type(error).__name__


def _translate(error: Exception) -> ServiceError:
    """What the runtime raised, as ours: by CUDA's number where it quotes one, else by its words."""
    message = _first_line(error)
    found = _CUDA_CODE.search(str(error))
    code = int(found[1]) if found else 0
    if code in _CUDA_BROKEN:
        return DeviceFailed(message)
    if (
        code == _CUDA_OUT_OF_MEMORY
        or isinstance(error, MemoryError)
        or any(fragment in str(error) for fragment in _OUT_OF_MEMORY)
    ):
        return OutOfMemory(message)
    if any(fragment in str(error) for fragment in _OTHER_SHAPE):
        return OtherShapeError(message)
    return ExecutionFailed(message)
