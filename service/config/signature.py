"""What a model file states about itself: the tensors at its ends, and facts that decide how it may be served.

Both readers of a graph speak these words: `service.config.graph` reads the file, the engine a loaded session. Types
carry ONNX Runtime's names (`tensor(float)`, `seq(map(int64,tensor(float)))`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from service.tensor import BY_ONNX_NAME, DataType

# A size, a symbol that stands for one, or nothing known.
Dimension = int | str | None

# Symbols that exporters make up for a size nobody named: tf2onnx, PyTorch's TorchScript exporter, Paddle2ONNX. Two of
# them differ even where the sizes are always equal, so they say no more than "free".
_MADE_UP = re.compile(r"unk__\d+|.*_dynamic_axes_\d+|.*_dim_\d+|.*DynamicDimension\.\d+|\?")


@dataclass(frozen=True, slots=True)
class GraphTensor:
    """One input or output of the graph. `shape` None: not even the rank is stated. `optional`: it has a default."""

    name: str
    onnx_type: str
    shape: tuple[Dimension, ...] | None
    optional: bool = False

    @property
    def datatype(self) -> DataType | None:
        """The protocol's datatype, or None for what cannot travel (sequences, maps, sparse tensors, small floats)."""
        return BY_ONNX_NAME.get(self.onnx_type)

    @property
    def first(self) -> Dimension:
        """The first dimension as a statement about the batch: a size, a symbol that means something, or None.

        Only for tensors with a first dimension.
        """
        assert self.shape
        dimension = self.shape[0]
        if isinstance(dimension, str):
            return None if not dimension or _MADE_UP.fullmatch(dimension) else dimension
        return None if dimension is None or dimension < 0 else dimension

    def sizes(self, skip: int = 0) -> tuple[int, ...]:
        """Sizes of the dimensions after the first `skip`; -1 where free. Only for tensors of known rank."""
        assert self.shape is not None
        return tuple(d if isinstance(d, int) and d >= 0 else -1 for d in self.shape[skip:])

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.name} {self.onnx_type} of unknown rank"
        return f"{self.name} {self.onnx_type} [{','.join('?' if d is None else str(d) for d in self.shape)}]"


@dataclass(frozen=True, slots=True)
class Graph:
    """What is known of a model file.

    `dynamic_quantisation`: operators that scale over the whole batch. `external_files`: data files beside the model.
    `convolutions`: whether there are any, for which ONNX Runtime plans anew on a GPU whenever their sizes change.
    """

    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]
    dynamic_quantisation: tuple[str, ...] = ()
    external_files: tuple[str, ...] = ()
    opsets: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    convolutions: bool = False
