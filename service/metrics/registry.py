"""What a scrape shows: every registered model version, the devices, the process.

Promise: a model version appears when it is added and disappears, with its counters, when it is removed. A scrape
takes no lock that a request could wait for, and lets go of the interpreter every few models, so that a thousand
models do not delay an answer by the length of a scrape.
"""

from __future__ import annotations

import importlib.metadata
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector
from prometheus_client.metrics_core import Metric

from service.clock import now_ns
from service.metrics.catalogue import MODEL_FAMILIES, ModelView
from service.metrics.exposition import family_lines, header_lines, label_text, sample_line
from service.metrics.gpu import Reading, gpu_lines
from service.metrics.model import ModelMetrics
from service.metrics.openmetrics import openmetrics_lines
from service.metrics.saturation import saturation

# Models handled between two pauses: about a millisecond of work, a fraction of the interpreter's switch interval.
_MODELS_PER_TURN = 32
_LINES_PER_TURN = 4096
# Any sleep makes the interpreter available to others; the shortest that the kernel honours is enough.
_TURN_S = 50e-6

_T = TypeVar("_T")

_CHANGES_HELP = "Changes of models while serving: loaded, or failed to load"
_UNROUTED_HELP = "Calls that reached no model, by reason: unknown names, undecodable messages, draining, no key"
# Those that happen to any server: they are there from the start, so that their first increase is seen.
_UNROUTED_REASONS = (
    "draining",
    "forbidden",
    "invalid",
    "not_ready",
    "queue_full",
    "unauthenticated",
    "unknown_model",
    "unknown_version",
    "unsupported",
)
_LOAD_FAILED_HELP = "1 = the last attempt to load the model, or a version of it, failed; what served before serves on"
_RELOADS_HELP = "Changes of certificates and API keys while serving: used, or failed (what was in force still is)"
_TURNED_AWAY_HELP = "Connections that were closed at once, since there were max_connections"
_END_HELP = "When the server's certificate ends, seconds since 1970"
_SATURATION_HELP = "What was asked for in the last 15 s over what the busiest device could answer within the objectives"
_TRACED_HELP = "Requests that were traced, by what became of their spans"
_HEALTHY_HELP = "0 = the device is broken or hangs, and the server is ending to be replaced"


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A device that models run on, and the execution provider that drives it."""

    device: str
    provider: str
    slots: int = 1


class MetricsRegistry:
    """The set of metrics behind one port. `clock` gives monotonic nanoseconds."""

    def __init__(self, clock: Callable[[], int] = now_ns) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._models: dict[tuple[str, str], ModelMetrics] = {}
        self._devices: dict[DeviceInfo, None] = {}
        self._failed_devices: set[str] = set()
        self._unrouted: dict[str, int] = dict.fromkeys(_UNROUTED_REASONS, 0)
        # Asked at each scrape for those that others count.
        self.refused: Callable[[], Mapping[str, int]] = dict
        # And which models there are, and whether the last attempt to load each failed.
        self.load_failures: Callable[[], Iterable[tuple[str, bool]]] = tuple
        # Model -> loads that succeeded and that failed, since the start.
        self._loads: dict[str, list[int]] = {}
        # Asked at each scrape what the GPUs are doing.
        self.gpus: Callable[[], Iterable[Reading]] = tuple
        # And how many inference streams are open.
        self.streams: Callable[[], int] = int
        # How many connections of clients there are, and how many were one too many; None where that is not known.
        self.connections: Callable[[], tuple[int, int] | None] = lambda: None
        # When the server's certificate ends, seconds since 1970; None without one.
        self.certificate_end_s: Callable[[], int | None] = lambda: None
        # What became of traced requests: result -> how many; None: nothing is traced.
        self.spans: Callable[[], Mapping[str, int] | None] = lambda: None
        # What was read again ("certificate", "keys") -> changes that could be used, and that could not.
        self._reloads: dict[str, list[int]] = {}
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        GCCollector(registry=self._process)

    def add(self, metrics: ModelMetrics) -> None:
        """Show a model version from now on, in place of an earlier load of the same one."""
        with self._lock:
            self._models[metrics.name, metrics.version] = metrics

    def remove(self, metrics: ModelMetrics) -> None:
        """Show it no more; nothing happens when another load of the same version has taken its place."""
        with self._lock:
            if self._models.get((metrics.name, metrics.version)) is metrics:
                del self._models[metrics.name, metrics.version]

    def add_device(self, device: str, provider: str, slots: int = 1) -> None:
        """Show that models run on `device` through the execution provider `provider`, `slots` batches at once."""
        with self._lock:
            self._devices[DeviceInfo(device, provider, slots)] = None

    def devices(self) -> list[tuple[DeviceInfo, bool]]:
        """The devices that models run on, and whether each is whole."""
        with self._lock:
            return [(info, info.device not in self._failed_devices) for info in self._devices]

    def device_failed(self, device: str) -> None:
        """Show that `device` is broken for good."""
        with self._lock:
            self._failed_devices.add(device)

    def record_load(self, model: str, succeeded: bool) -> None:
        """Count a change of a model that was loaded, or that could not be, while the server serves."""
        with self._lock:
            self._loads.setdefault(model, [0, 0])[0 if succeeded else 1] += 1

    def security_watched(self, what: str) -> None:
        """Show the changes of certificates or keys, of which there are none yet."""
        with self._lock:
            self._reloads.setdefault(what, [0, 0])

    def security_reloaded(self, what: str, fine: bool) -> None:
        """Count a change of certificates or keys that is in force, or that could not be used."""
        with self._lock:
            self._reloads.setdefault(what, [0, 0])[0 if fine else 1] += 1

    def record_unrouted(self, reason: str) -> None:
        """Count a call that was answered with an error before a model version was found for it."""
        with self._lock:
            self._unrouted[reason] = self._unrouted.get(reason, 0) + 1

    def unrouted(self) -> Mapping[str, int]:
        """Calls that reached no model, by reason."""
        with self._lock:
            counts = Counter(self._unrouted)
        # `update` and not `+`, which leaves zeros out.
        counts.update(self.refused())
        return counts

    def models(self) -> list[ModelMetrics]:
        """The registered model versions, by name and version."""
        with self._lock:
            return [self._models[key] for key in sorted(self._models)]

    def render(self, openmetrics: bool = False) -> bytes:
        """All metrics in the Prometheus text format, or in OpenMetrics' with exemplars."""
        epoch_ns = time.time_ns() - now_ns() if openmetrics else None
        at_ns = self._clock()
        models = self.models()
        lines = _model_lines(models, at_ns, epoch_ns)
        lines += family_lines(
            "onclock_unrouted_requests_total",
            "counter",
            _UNROUTED_HELP,
            (([("reason", reason)], count) for reason, count in sorted(self.unrouted().items())),
        )
        lines += self._device_lines(models, at_ns)
        lines += self._change_lines()
        lines += gpu_lines(self.gpus())
        lines += family_lines("onclock_streams", "gauge", "Inference streams that are open", [((), self.streams())])
        lines += self._connection_lines()
        spans = (self.spans() or {}).items()
        lines += family_lines(
            "onclock_traced_requests_total",
            "counter",
            _TRACED_HELP,
            (([("result", result)], count) for result, count in spans),
        )
        version = [("version", importlib.metadata.version("onclock"))]
        lines += family_lines("onclock_build_info", "gauge", "Version of the server; always 1", [(version, 1)])
        for metric in self._process.collect():
            lines += _process_lines(metric)
        if openmetrics:
            lines = list(openmetrics_lines(_in_turns(lines, _LINES_PER_TURN)))
        return ("\n".join(lines) + "\n").encode()

    def _device_lines(self, models: Sequence[ModelMetrics], at_ns: int) -> list[str]:
        with self._lock:
            devices = list(self._devices)
            broken = self._failed_devices.copy()
        lines = family_lines(
            "onclock_device_info",
            "gauge",
            "Devices that models run on; always 1",
            (([("device", info.device), ("provider", info.provider)], 1) for info in devices),
        )
        demands = [demand for metrics in _in_turns(models) if (demand := metrics.demand(at_ns)) is not None]
        ratio = saturation(demands, {info.device: info.slots for info in devices})
        lines += family_lines("onclock_saturation_ratio", "gauge", _SATURATION_HELP, [((), ratio)])
        names = dict.fromkeys([*(info.device for info in devices), *sorted(broken)])
        lines += family_lines(
            "onclock_device_healthy",
            "gauge",
            _HEALTHY_HELP,
            (([("device", name)], int(name not in broken)) for name in names),
        )
        return lines

    def _change_lines(self) -> list[str]:
        """What changed while the server serves: models, certificates, keys."""
        with self._lock:
            none = {name: [0, 0] for name, _ in self._models}
            loads = sorted((model, counts.copy()) for model, counts in {**none, **self._loads}.items())
            reloads = sorted((what, counts.copy()) for what, counts in self._reloads.items())
        lines = family_lines(
            "onclock_model_changes_total", "counter", _CHANGES_HELP, _results("model", ("loaded", "failed"), loads)
        )
        lines += family_lines(
            "onclock_model_load_failed",
            "gauge",
            _LOAD_FAILED_HELP,
            (([("model", name)], int(failed)) for name, failed in _in_turns(self.load_failures())),
        )
        lines += family_lines(
            "onclock_security_changes_total", "counter", _RELOADS_HELP, _results("what", ("used", "failed"), reloads)
        )
        return lines

    def _connection_lines(self) -> list[str]:
        lines: list[str] = []
        connections = self.connections()
        if connections is not None:
            open_now, turned_away = connections
            lines += family_lines("onclock_connections", "gauge", "Connections of gRPC clients", [((), open_now)])
            lines += family_lines(
                "onclock_connections_refused_total", "counter", _TURNED_AWAY_HELP, [((), turned_away)]
            )
        end_s = self.certificate_end_s()
        if end_s is not None:
            lines += family_lines("onclock_certificate_end_timestamp_seconds", "gauge", _END_HELP, [((), end_s)])
        return lines


def _model_lines(models: Sequence[ModelMetrics], at_ns: int, epoch_ns: int | None) -> list[str]:
    views = [_view(metrics, at_ns, epoch_ns) for metrics in _in_turns(models)]
    lines: list[str] = []
    for family in MODEL_FAMILIES:
        lines += header_lines(family.name, family.kind, family.documentation)
        for view in _in_turns(views):
            lines += family.lines(family.name, view)
    return lines


def _results(
    label: str, results: Sequence[str], counted: Iterable[tuple[str, Sequence[int]]]
) -> Iterable[tuple[list[tuple[str, str]], int]]:
    """Samples of how often each of `results` came about for each name."""
    for name, counts in counted:
        for result, count in zip(results, counts, strict=True):
            yield [(label, name), ("result", result)], count


def _view(metrics: ModelMetrics, at_ns: int, epoch_ns: int | None) -> ModelView:
    return ModelView(
        labels=label_text([("model", metrics.name), ("version", metrics.version)]),
        state=metrics.state(),
        sums=metrics.sum(),
        attainment=metrics.attainment(at_ns),
        epoch_ns=epoch_ns,
    )


def _in_turns(items: Iterable[_T], each: int = _MODELS_PER_TURN) -> Iterable[_T]:
    """`items`, with a pause after every few that lets other threads run."""
    for number, item in enumerate(items, start=1):
        yield item
        if number % each == 0:
            time.sleep(_TURN_S)


def _process_lines(metric: Metric) -> list[str]:
    name = f"{metric.name}_total" if metric.type == "counter" else metric.name
    lines = header_lines(name, metric.type, metric.documentation)
    lines += [sample_line(s.name, label_text(s.labels.items()), s.value) for s in metric.samples]
    return lines
