"""Models and repositories as the codec sees them, without files, sessions or threads."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.engine.buffers import batch_output
from service.errors import ModelNotReady, UnknownModel
from service.request import BatchOutput, ShapeClass
from service.tensor import Array, DataType, TensorSpec

Shapes = tuple[tuple[int, ...] | None, ...]


@dataclass
class FakeModel:
    """A served model made of its declarations alone. `classes` are the shape classes handed out so far."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    version: int = 1
    max_batch_size: int = 8
    default_priority: int = 1
    priority_levels: int = 1
    stateful: bool = False
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    classes: dict[tuple[Shapes, tuple[bytes, ...]], ShapeClass] = field(default_factory=dict)

    def shape_class(self, shapes: Shapes, sides: tuple[bytes, ...]) -> ShapeClass:
        return self.classes.setdefault((shapes, sides), ShapeClass(shapes, sides, 1))


class FakeRepository:
    """Models by name. `lookups` counts what the plan cache could not answer; `loading` names are not ready."""

    def __init__(self, *models: FakeModel) -> None:
        self.models = {model.name: model for model in models}
        self.loading: set[str] = set()
        self.generation = 0
        self.lookups = 0

    def lookup(self, name: str, version: str) -> FakeModel:
        self.lookups += 1
        if name in self.loading:
            raise ModelNotReady(f"Request for model '{name}' is not at ready state")
        if name not in self.models:
            raise UnknownModel(f"Request for unknown model: '{name}' is not found")
        return self.models[name]


def spec(
    name: str, datatype: str = "FP32", shape: tuple[int, ...] = (4,), batched: bool = True, optional: bool = False
) -> TensorSpec:
    return TensorSpec(name, DataType[datatype], shape, batched, optional)


def model(*inputs: TensorSpec, name: str = "m", max_batch_size: int = 8, **more: object) -> FakeModel:
    """A model with these inputs (by default one: `x` FP32 [-1, 4]) and the output `y`, like the first of them."""
    inputs = inputs or (spec("x"),)
    outputs = more.pop("outputs", (TensorSpec("y", inputs[0].datatype, inputs[0].shape, inputs[0].batched),))
    return FakeModel(name, inputs, outputs, max_batch_size=max_batch_size, **more)  # type: ignore[arg-type]


def output(declared: TensorSpec, array: Array, rows: int) -> BatchOutput:
    """An output of a batch of `rows`, as the engine hands it over."""
    return batch_output(declared, array, rows)
