"""Whether a model can be batched, decided from its file and what its configuration says.

The rule, for a configuration that leaves it open (`max_batch_size` 0 or unset): every input and every output has a free
first dimension, and those that are named have the same name. Then the first dimension is the batch. One exception: an
output declared `[1, ...]` beside free inputs (converters of tree ensembles write that) is taken for a batch too, and
reported as unverified: whoever runs the model must check that it returns one row per row.

Dims that the configuration lists decide as well: as many as the tensor has dimensions means that none is the batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from service.config.signature import GraphTensor
from service.errors import ConfigError

# More rows than any accelerator gains from; guards against a size in the wrong field.
MAX_BATCH_SIZE = 65_536


@dataclass(frozen=True, slots=True)
class Declared:
    """What the configuration says about batching. `ranks`: dims listed per tensor; `side`: `unbatched_inputs`."""

    max_batch_size: int = 0
    dynamic_batching: bool = False
    batching: bool | None = None
    side: tuple[str, ...] = ()
    ranks: Mapping[str, int] | None = None


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The decision. `max_batch_size` 0: no batch dimension. `join`: rows of several requests share an execution.

    `unverified`: outputs of which only running the model can tell whether they have one row per row.
    """

    max_batch_size: int
    join: bool
    unverified: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def plan_batching(
    inputs: Sequence[GraphTensor],
    outputs: Sequence[GraphTensor],
    declared: Declared,
    dynamic_quantisation: Collection[str],
    default_max_batch_size: int,
) -> BatchPlan:
    """Decide. Raises `ConfigError` when the configuration demands what the graph cannot do."""
    _check_declared(inputs, declared)
    rows = [tensor for tensor in inputs if tensor.name not in declared.side]
    if declared.max_batch_size > 0:
        _demand_batchable(rows, outputs, declared)
        size, notes = declared.max_batch_size, []
    else:
        obstacle = _listed_whole(rows, outputs, declared.ranks or {}) or _obstacle(rows, outputs)
        if not obstacle and not default_max_batch_size:
            obstacle = "max_batch_size is unset and the server's default is 0"
        if obstacle and (declared.batching or declared.side):
            key = "batching" if declared.batching else "unbatched_inputs"
            raise ConfigError(f"parameters[{key}]", f"the model cannot be batched: {obstacle}")
        size = 0 if obstacle else default_max_batch_size
        notes = [f"served unbatched: {obstacle}"] if obstacle else []
    if size == 0:
        return BatchPlan(0, join=False, notes=tuple(notes))
    unverified = tuple(tensor.name for tensor in outputs if not _follows(tensor, rows))
    notes += [
        f"output '{name}' is not declared with the inputs' first dimension; taken for one row per row until it is run"
        for name in unverified
    ]
    join, why = _join(size, declared, dynamic_quantisation)
    return BatchPlan(size, join, unverified, tuple(notes + why))


def _check_declared(inputs: Sequence[GraphTensor], declared: Declared) -> None:
    if not 0 <= declared.max_batch_size <= MAX_BATCH_SIZE:
        raise ConfigError("max_batch_size", f"{declared.max_batch_size} is not in the range 0 to {MAX_BATCH_SIZE}")
    names = [tensor.name for tensor in inputs]
    for name in declared.side:
        if name not in names:
            raise ConfigError(
                "parameters[unbatched_inputs]", f"the model has no input '{name}'; it has {', '.join(names) or 'none'}"
            )
    if declared.batching is False and declared.dynamic_batching:
        raise ConfigError("parameters[batching]", "'off' contradicts dynamic_batching; remove one of the two")


def _demand_batchable(rows: Sequence[GraphTensor], outputs: Sequence[GraphTensor], declared: Declared) -> None:
    if not rows:
        raise ConfigError("max_batch_size", "no input of the model can carry a batch; remove it")
    for kind, tensor in _ends(rows, outputs):
        if tensor.shape == () or (kind == "input" and tensor.shape and isinstance(tensor.first, int)):
            raise ConfigError(
                "max_batch_size",
                f"{declared.max_batch_size} asks for a batch dimension, but {kind} {tensor} has none; "
                f"set it to 0 or remove it{_hint(kind, tensor, rows)}",
            )


def _ends(
    rows: Sequence[GraphTensor], outputs: Sequence[GraphTensor]
) -> Iterator[tuple[Literal["input", "output"], GraphTensor]]:
    for tensor in rows:
        yield "input", tensor
    for tensor in outputs:
        yield "output", tensor


def _listed_whole(rows: Sequence[GraphTensor], outputs: Sequence[GraphTensor], ranks: Mapping[str, int]) -> str:
    """Why the dims in the configuration rule a batch out; empty when they do not."""
    for tensor in (*rows, *outputs):
        if tensor.shape and ranks.get(tensor.name) == len(tensor.shape):
            return f"the configuration lists all {len(tensor.shape)} dims of '{tensor.name}' and no max_batch_size"
    return ""


def _obstacle(rows: Sequence[GraphTensor], outputs: Sequence[GraphTensor]) -> str:
    """Why the first dimension is not a batch; empty when it is."""
    if not rows:
        return "no input has a free first dimension"
    symbols: dict[str, str] = {}
    for kind, tensor in _ends(rows, outputs):
        if tensor.shape is None:
            if kind == "input":
                return f"input '{tensor.name}' has no stated rank"
            continue
        if not tensor.shape:
            return f"{kind} {tensor} has no dimension" + _hint(kind, tensor, rows)
        first = tensor.first
        if isinstance(first, int) and not (kind == "output" and first == 1):
            return f"the first dimension of {kind} {tensor} is fixed" + _hint(kind, tensor, rows)
        if isinstance(first, str):
            symbols.setdefault(first, tensor.name)
    if len(symbols) > 1:
        named = " and ".join(f"'{symbol}' of '{name}'" for symbol, name in symbols.items())
        return f"the first dimensions {named} are not the same"
    return ""


def _hint(kind: str, tensor: GraphTensor, rows: Sequence[GraphTensor]) -> str:
    """Advice for a scalar or vector beside inputs with rows: likely a setting, not data."""
    small = tensor.shape is not None and len(tensor.shape) <= 1
    beside = any(other.shape and not isinstance(other.first, int) for other in rows if other is not tensor)
    if kind != "input" or not small or not beside:
        return ""
    return f" (to batch the others, name '{tensor.name}' in parameters[unbatched_inputs])"


def _follows(output: GraphTensor, rows: Sequence[GraphTensor]) -> bool:
    """Whether the file itself says that `output` has one row per row of the inputs."""
    if not output.shape or isinstance(output.first, int):
        return False
    symbols = {tensor.first for tensor in rows if tensor.shape} - {None}
    return output.first is None or not symbols or output.first in symbols


def _join(size: int, declared: Declared, dynamic_quantisation: Collection[str]) -> tuple[bool, list[str]]:
    operators = ", ".join(sorted(dynamic_quantisation))
    asked = declared.batching is True or declared.dynamic_batching
    if operators and asked:
        return True, [f"batching is on although {operators} makes an answer depend on the other rows of its batch"]
    if operators:
        return False, [
            f"requests are not joined: {operators} makes an answer depend on the other rows of its batch; "
            f"parameters[batching] 'on' joins them all the same"
        ]
    # With one row there is nothing to join; a declared queue policy still applies.
    return declared.batching is not False and (size > 1 or asked), []
