"""Features of many examples: computed once, kept, and computed in batches with something to look at.

Kept under the digest of the network, of the preparation and of the example, in `$ONCLOCK_CACHE/features` (see
`models.zoo.fetch`): training again with another head, or with a few more pictures, takes seconds. What is kept is
replaced as a whole, so runs beside each other do not harm it, and what is damaged is computed again.
"""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.progress import Progress

from models.transfer.backbone import CutError
from models.transfer.data import Example
from models.zoo.fetch import cache_directory

Floats = npt.NDArray[np.float32]
# Examples to the inputs of a network, one row each.
Prepare = Callable[[Sequence[Example]], dict[str, npt.NDArray[Any]]]

BATCH = 16


def extract(model: bytes, prepare: Prepare, prepared_by: str, examples: Sequence[Example]) -> Floats:
    """FP32 [N, width]: the output `features` of `model` for each example. `prepared_by` tells one way to prepare
    examples from any other. Raises what `prepare` raises, and `CutError` where a row is as wide as the example is long.
    """
    network = hashlib.sha256(model).hexdigest()
    path = cache_directory().parent / "features" / f"{network[:32]}-{prepared_by}.npz"
    known = _read(path)
    missing = list({e.digest: e for e in examples if e.digest not in known}.values())
    if missing:
        session = _session(model)
        _check_alone(session, prepare, missing)
        with Progress(transient=True) as progress:
            for batch in progress.track(list(_batches(missing)), description="features"):
                rows = session.run(["features"], prepare(batch))[0]
                known |= {e.digest: np.asarray(row, np.float32) for e, row in zip(batch, rows, strict=True)}
                _check_widths(known)
        _write(path, known)
    return np.stack([known[example.digest] for example in examples])


def _check_alone(session: Any, prepare: Prepare, examples: Sequence[Example]) -> None:
    """Where inputs may be of any size, that the shortest example gives as many features as the longest: in a batch all
    are filled up to the longest of it."""
    if all(isinstance(size, int) for value in session.get_inputs() for size in value.shape[1:]):
        return
    ends = (min(examples, key=lambda e: len(e.content)), max(examples, key=lambda e: len(e.content)))
    _check_widths({name: session.run(["features"], prepare([e]))[0][0] for name, e in zip("sl", ends, strict=True)})


def _check_widths(known: Mapping[str, Floats]) -> None:
    widths = sorted({row.size for row in known.values()})
    if len(widths) > 1:
        raise CutError(
            f"the network gives {widths[0]} numbers for one example and {widths[-1]} for another; expected as many for "
            "each: cut behind what makes one row of them, or leave --cut out"
        )


def _session(model: bytes) -> Any:
    """On a GPU where there is one."""
    import onnxruntime as ort

    from service.engine.devices import find_devices

    (device, *_) = find_devices("auto", cpu_slots=1, gpu_slots=1, cpu_threads=1).taken
    return ort.InferenceSession(model, providers=list(dict.fromkeys((device.provider, "CPUExecutionProvider"))))


def _batches(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    for first in range(0, len(examples), BATCH):
        yield examples[first : first + BATCH]


def _read(path: Path) -> dict[str, Floats]:
    try:
        with np.load(path) as kept:
            return dict(zip(kept["digests"].tolist(), kept["rows"], strict=True))
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile):
        return {}  # not there, or damaged: computed again


def _write(path: Path, known: dict[str, Floats]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as scratch:
        whole = Path(scratch) / path.name
        np.savez(whole, digests=np.array(list(known)), rows=np.stack(list(known.values())))
        whole.replace(path)
