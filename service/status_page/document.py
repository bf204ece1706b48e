"""What the page shows, as one JSON value: `/status.json`.

Values in, values out. Times are milliseconds, of the last minute; rates per second, of the last 15 s; shares of 1; what
is not known is null. Everything that takes judgement is said here in words, so that the page only lays out what it is
given. Texts and names are as they came, never HTML.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from service.clock import NS_PER_MS, NS_PER_S
from service.metrics.buckets import ROWS_BOUNDS
from service.metrics.shard import CLIENT_FAULTS, WINDOW_STEP_NS
from service.status_page.causes import broken
from service.status_page.counts import Counts
from service.status_page.facts import State
from service.status_page.history import KEPT_STEPS, NOTHING_ASKED, Point, Window, latency_ms, mean_ms
from service.status_page.quantiles import ratio, rounded
from service.status_page.verdict import HEADLINES, SEVERITY, Verdict, overall

# Grows when a reader of an earlier one would misunderstand.
FORMAT = 1
# A person reads no more, and a page of more would take a browser seconds: the most urgent come first.
MAX_MODELS = 100
# The last 15 s, as `DEMAND_STEPS` of the saturation: what goes on now, without the noise of a single step.
RECENT_STEPS = 3
_RECENT_S = RECENT_STEPS * WINDOW_STEP_NS / NS_PER_S
_STEP_S = WINDOW_STEP_NS / NS_PER_S


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model version as it is now. `version` None: a model without one. `points`: `KEPT_STEPS` of them, or none
    where nothing was ever asked. `attainment_5m`: over all points."""

    name: str
    version: int | None
    state: State
    verdict: Verdict
    slo_ns: int | None = None
    load_ns: int | None = None
    devices: tuple[str, ...] = ()
    instances: int = 0
    pending_requests: int = 0
    batch_rows_limit: int | None = None
    scale: float | None = None
    saturation: float = 0.0
    minute: Window = NOTHING_ASKED
    recent: Window = NOTHING_ASKED
    attainment_5m: float | None = None
    points: Sequence[Point] = ()


@dataclass(frozen=True, slots=True)
class DeviceView:
    """A device: what drives it, batches at once, whether it is whole, its saturation now and at each step (oldest
    first, at most `KEPT_STEPS`)."""

    name: str
    provider: str
    slots: int
    healthy: bool
    saturation: float
    history: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ServerView:
    """The server: its version and phase, what broke it (empty while it is whole), how long it has run, and when, in
    seconds since 1970, the figures were taken. `target`: the share that is to be answered in time."""

    version: str
    phase: str
    failure: str
    up_s: float
    at_s: float
    target: float


def head(server: ServerView, models: Sequence[ModelView], devices: Sequence[DeviceView]) -> dict[str, Any]:
    """All but the models; `shown` of them follow, in the order of `urgent_first`."""
    # Of equally bad ones the one is named that fails most of its clients.
    losing_first = sorted(models, key=lambda model: model.minute.in_time - model.minute.offered)
    verdict = overall(server.phase, server.failure, [(_title(model), model.verdict) for model in losing_first])
    offered = sum(model.minute.offered for model in models)
    in_time = sum(model.minute.in_time for model in models)
    return {
        "format": FORMAT,
        "server": {
            "version": server.version,
            "phase": server.phase,
            "up_s": round(server.up_s),
            "at_s": round(server.at_s, 1),
            "target": server.target,
        },
        "step_s": _STEP_S,
        "verdict": _verdict(verdict),
        "offered_per_s": rounded(sum(model.recent.offered for model in models) / _RECENT_S),
        "in_time_per_s": rounded(sum(model.recent.in_time for model in models) / _RECENT_S),
        "attainment": _share(ratio(in_time, offered)),
        "saturation": rounded(max((device.saturation for device in devices), default=0.0)),
        "devices": [
            {
                "name": device.name,
                "provider": device.provider,
                "slots": device.slots,
                "healthy": device.healthy,
                "saturation": rounded(device.saturation),
                "history": [rounded(value) for value in device.history],
            }
            for device in devices
        ],
        "count": len(models),
        "shown": min(len(models), MAX_MODELS),
    }


def urgent_first(models: Sequence[ModelView]) -> list[ModelView]:
    """The `MAX_MODELS` that need attention most; those that need none by name and version."""
    ordered = sorted(models, key=lambda m: (-SEVERITY[m.verdict.level], m.name, -(m.version or 0)))
    return ordered[:MAX_MODELS]


def model(view: ModelView) -> dict[str, Any]:
    """One model version."""
    minute = view.minute
    counts = minute.counts
    return {
        "name": view.name,
        "version": None if view.version is None else str(view.version),
        "state": view.state.value,
        "verdict": _verdict(view.verdict),
        "slo_ms": None if view.slo_ns is None else rounded(view.slo_ns / NS_PER_MS),
        "load_s": None if view.load_ns is None else rounded(view.load_ns / NS_PER_S),
        "devices": list(view.devices),
        "instances": view.instances,
        "pending": view.pending_requests,
        "batch_rows_limit": view.batch_rows_limit,
        "scale": rounded(view.scale),
        "saturation": rounded(view.saturation),
        "offered_per_s": rounded(view.recent.offered / _RECENT_S),
        "in_time_per_s": rounded(view.recent.in_time / _RECENT_S),
        "attainment": _share(minute.attainment),
        "attainment_5m": _share(view.attainment_5m),
        "latency_ms": [rounded(latency_ms(share, counts, view.slo_ns)) for share in (0.5, 0.95, 0.99)],
        "queue_ms": rounded(mean_ms(counts.queue_ns, counts.requests)),
        "compute_ms": rounded(mean_ms(counts.compute_ns, counts.requests)),
        "broken": _broken(minute),
        "client_faults": _client_faults(counts),
        "mean_rows": rounded(ratio(counts.batch_rows, counts.batches)),
        "batches": _batches(counts.batch_cells),
        "history": _history(view.points),
    }


def _broken(window: Window) -> list[dict[str, Any]]:
    """What became of the requests whose promise was broken: `kind` is late, refused or failed."""
    refusals = window.counts.refusals
    return [
        {"kind": r if r == "late" else "refused" if r in refusals else "failed", "reason": r, "requests": n}
        for r, n in broken(window).items()
    ]


def _client_faults(counts: Counts) -> list[dict[str, Any]]:
    """Requests that failed by their client's doing, or that it cancelled: no promise is broken by them."""
    faults = {r: n for r, n in counts.failures.items() if r in CLIENT_FAULTS or r == "cancelled"}
    return [{"reason": reason, "requests": n} for reason, n in sorted(faults.items())]


def _batches(cells: Sequence[int]) -> list[dict[str, Any]]:
    """Batches by rows, from the smallest size that was run to the largest: `rows` is `4`, `5-6`, or `1025+`."""
    used = [at for at, count in enumerate(cells) if count]
    if not used:
        return []
    names = []
    for lower, bound in zip((0, *ROWS_BOUNDS), ROWS_BOUNDS, strict=False):
        names.append(str(bound) if bound == lower + 1 else f"{lower + 1}-{bound}")
    names.append(f"{ROWS_BOUNDS[-1] + 1}+")
    return [{"rows": names[at], "batches": cells[at]} for at in range(used[0], used[-1] + 1)]


def _history(points: Sequence[Point]) -> dict[str, list[float | None]] | None:
    if not points:
        return None
    assert len(points) == KEPT_STEPS
    return {
        "offered_per_s": [round(point.offered / _STEP_S, 1) for point in points],
        "in_time_per_s": [round(point.in_time / _STEP_S, 1) for point in points],
        "p50_ms": [point.p50_ms for point in points],
        "p99_ms": [point.p99_ms for point in points],
        "queue_ms": [point.queue_ms for point in points],
        "compute_ms": [point.compute_ms for point in points],
    }


def _verdict(verdict: Verdict) -> dict[str, str]:
    return {
        "level": verdict.level.value,
        "headline": HEADLINES[verdict.level],
        "cause": verdict.cause,
        "text": verdict.text,
    }


def _title(view: ModelView) -> str:
    return view.name if view.version is None else f"{view.name} version {view.version}"


def _share(value: float | None) -> float | None:
    """A share is compared with 0.999...: six decimals, and 1 only of all."""
    if value is None or value in (0, 1):
        return value
    return min(max(round(value, 6), 1e-6), 1 - 1e-6)
