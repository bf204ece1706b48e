"""Measured latencies, kept on disk: what was learned about a model on a device need not be learned again.

A profile is keyed by everything that changes it: the model's bytes (external data included), the device, the library's
version, the session's options, the shape it was measured with and the largest batch. On a hit three rungs are timed
again and the table is rescaled by their median ratio, since the same machine is not always equally fast.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort

from service.config.model import ModelConfig
from service.engine.options import SessionPlan
from service.engine.pool import Instance
from service.engine.warmup import LatencySample, Measured, Sample, measure, time_rows

# Raised whenever the meaning of the file changes: older files are then measured anew.
FORMAT = 1
# Rungs timed again on a hit: smallest, middle and largest.
CHECKED_RUNGS = 3
CHECK_RUNS = 5
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class ProfileKey:
    """What a profile depends on, as one digest."""

    digest: str


def model_digest(files: Sequence[Path]) -> str:
    """SHA-256 over the model file and its external data files, in the order given."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def profile_key(model: str, plan: SessionPlan, sample: Sample, max_rows: int, slo_ns: int | None) -> ProfileKey:
    """The key of a profile: `model` is the model's digest."""
    facts = (
        FORMAT,
        model,
        plan.device.name,
        plan.device.threads,
        ort.get_version_string(),
        plan.providers,
        repr(plan.config.session),
        repr(plan.config.optimization),
        sample.shape.shapes,
        max_rows,
        slo_ns,
    )
    return ProfileKey(hashlib.sha256(repr(facts).encode()).hexdigest())


def profile(
    instance: Instance,
    config: ModelConfig,
    sample: Sample,
    max_rows: int,
    slo_ns: int | None,
    budget_ns: int,
    cache: Path | None,
    key: ProfileKey,
) -> tuple[Measured, bool]:
    """The latency table of a model, from the cache if it is there; (what is known, whether it came from the cache)."""
    known = load(cache, key, sample) if cache is not None else None
    if known is not None:
        return _rescaled(known, instance, config, sample), True
    measured = measure(instance, config, sample, max_rows, slo_ns, budget_ns)
    # How much memory was free is no property of the model: such a profile is not kept.
    if cache is not None and measured.memory_rows is None:
        save(cache, key, measured)
    return measured, False


def load(cache: Path, key: ProfileKey, sample: Sample) -> Measured | None:
    """A stored profile, or None when there is none or it cannot be read: it is then measured again."""
    try:
        stored = json.loads((cache / f"{key.digest}.json").read_text())
        table = {int(rows): LatencySample(*map(int, values)) for rows, values in stored["table"].items()}
        complete = bool(stored["complete"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    sound = table and all(rows > 0 and s.p50_ns > 0 and s.p99_ns > 0 for rows, s in table.items())
    return Measured(sample.shape, table, complete) if sound else None


def save(cache: Path, key: ProfileKey, measured: Measured) -> None:
    """Store a profile. A cache that cannot be written (read-only root) is no reason not to serve."""
    table = {str(rows): [s.p50_ns, s.p99_ns, s.runs] for rows, s in measured.table.items()}
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Written aside and renamed: a server that starts at the same time never reads half a file.
        handle, name = tempfile.mkstemp(dir=cache, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            json.dump({"table": table, "complete": measured.complete}, file)
        Path(name).replace(cache / f"{key.digest}.json")
    except OSError:
        return


def _rescaled(known: Measured, instance: Instance, config: ModelConfig, sample: Sample) -> Measured:
    rungs = sorted(known.table)
    checked = {rungs[0], rungs[len(rungs) // 2], rungs[-1]}
    ratios = []
    for rows in sorted(checked, reverse=True):
        times = [time_rows(instance, config, sample, rows) for _ in range(CHECK_RUNS)]
        ratios.append(statistics.median(times) / max(1, known.table[rows].p50_ns))
    factor = statistics.median(ratios)
    table = {
        rows: LatencySample(int(s.p50_ns * factor), int(s.p99_ns * factor), s.runs) for rows, s in known.table.items()
    }
    return Measured(known.shape, table, known.complete)
