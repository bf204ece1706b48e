"""Keeps the last minutes of every model, and says what the page shows: `observe` once a step, `document` when asked.

Promise: what a step costs grows with the models that were busy in it, hardly with those that are loaded. What is made
for those who look does not grow with their number: an answer is made once a step, or when a state has changed, and
kept. Neither takes a lock that a request could wait for, and both let go of the interpreter every few models.

An observer runs from the start of the server, watched or not: whoever opens the page in an incident sees how it began.
"""

from __future__ import annotations

import importlib.metadata
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

from service.clock import NS_PER_MS, NS_PER_S, now_ns
from service.metrics import MetricsRegistry
from service.metrics.model import DEMAND_STEPS
from service.metrics.saturation import Demand, device_loads
from service.metrics.shard import WINDOW_STEP_NS, WINDOW_STEPS
from service.model import Model
from service.repository.repository import Entry
from service.repository.version_policy import VersionState
from service.state import ServerState
from service.status_page.counts import NO_COUNTS, Counts, counts_of
from service.status_page.document import RECENT_STEPS, DeviceView, ModelView, ServerView, head, model, urgent_first
from service.status_page.facts import Facts, State
from service.status_page.history import KEPT_STEPS, History
from service.status_page.verdict import judge

# What ended in a step is recorded a little after its end: when the answer has been sent.
LAG_NS = 250 * NS_PER_MS
# A model that counted nothing for so long has nothing that ended in a step, and none of the demand that saturation
# looks back at. (What is counted in the lag belongs to the step that follows.)
_IDLE_STEPS = DEMAND_STEPS + 1
# How long an answer is given again unseen: states on the page are this old at most.
_FRESH_NS = NS_PER_S
# As the scrape does (`service.metrics.registry`): about a millisecond of work, then others may run.
_MODELS_PER_TURN = 4
_TURN_S = 50e-6

_T = TypeVar("_T")
_Key = tuple[str, int | None]

_STATES = {
    VersionState.READY: State.READY,
    VersionState.LOADING: State.LOADING,
    VersionState.UNLOADING: State.RETIRING,
}


class Models(Protocol):
    """What is read of the repository."""

    def index(self) -> list[Entry]: ...


class Observer:
    """Of one server. `clock` gives monotonic nanoseconds, `wall_s` seconds since 1970. Safe to use from any thread."""

    def __init__(
        self,
        registry: MetricsRegistry,
        repository: Models,
        state: ServerState,
        target: float,
        clock: Callable[[], int] = now_ns,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._registry = registry
        self._repository = repository
        self._state = state
        self._target = target
        self._clock = clock
        self._wall_s = wall_s
        self._version = importlib.metadata.version("onclock")
        self._began_ns = clock()
        # Guards all below. Held for as long as a step or an answer takes, by threads that serve people.
        self._lock = threading.Lock()
        self._histories: dict[_Key, History] = {}
        # What was counted last, and at how many events, by which load of the version; the last step with any.
        self._known: dict[_Key, tuple[int, int, Counts, int]] = {}
        self._loads: dict[str, float] = {}
        self._load_history: deque[dict[str, float]] = deque(maxlen=KEPT_STEPS)
        self._step = self._last_step()
        self._seen_s = wall_s()
        self._answer = b""
        self._answer_of: object = None
        self._answered_ns: int | None = None

    def observe(self) -> None:
        """Take in the step that ended last; nothing happens when it was taken in already."""
        with self._lock:
            step, at_ns = self._last_step(), self._clock()
            if step <= self._step:
                return
            self._step = step
            self._seen_s = self._wall_s()
            demands: list[Demand] = []
            present: set[_Key] = set()
            for entry in _in_turns(self._repository.index()):
                loaded = entry.loaded
                present.add((entry.name, entry.version))
                if loaded is not None and self._take_in((entry.name, entry.version), loaded.model, step):
                    demand = loaded.model.metrics.demand(at_ns)
                    demands += [demand] if demand is not None else []
            for gone in self._histories.keys() - present:
                del self._histories[gone], self._known[gone]
            slots = {info.device: info.slots for info, _ in self._registry.devices()}
            self._loads = device_loads(demands, slots)
            self._load_history.append(self._loads)

    def document(self) -> bytes:
        """`/status.json`, from memory while nothing has changed: it is looked for that once a second at most."""
        with self._lock:
            at_ns = self._clock()
            if self._answered_ns is None or at_ns - self._answered_ns >= _FRESH_NS:
                entries = self._repository.index()
                made_of = self._made_of(entries)
                if made_of != self._answer_of:
                    self._answer = self._encoded(entries, at_ns)
                    self._answer_of = made_of
                self._answered_ns = at_ns
            return self._answer

    def _made_of(self, entries: Sequence[Entry]) -> object:
        """What an answer depends on; figures change with the step."""
        states = [(entry.name, entry.version, entry.state, entry.reason, entry.asked) for entry in entries]
        return (self._step, self._state.phase, self._state.failure, self._registry.devices(), states)

    def _last_step(self) -> int:
        return (self._clock() - LAG_NS) // WINDOW_STEP_NS - 1

    def _take_in(self, key: _Key, source: Model, step: int) -> bool:
        """Whether there was anything to take in. Nearly all of a thousand models are idle, and cost a comparison."""
        metrics = source.metrics
        serial, events, counts, busy = self._known.get(key, (0, 0, NO_COUNTS, 0))
        if serial != source.serial:
            events, counts, busy = 0, NO_COUNTS, step
        now = metrics.events()
        if now != events:
            counts, busy = counts_of(metrics.sum()), step
        elif step - busy > _IDLE_STEPS:
            return False
        offered, in_time = metrics.ended(step)
        self._known[key] = (source.serial, now, counts, busy)
        history = self._histories.setdefault(key, History())
        history.observe(step, source.serial, counts, offered, in_time, source.policy.slo_ns)
        return True

    def _encoded(self, entries: Sequence[Entry], at_ns: int) -> bytes:
        """The answer in pieces: no piece is encoded for longer than other threads may wait."""
        devices = self._devices()
        lost = frozenset(device.name for device in devices if not device.healthy)
        views = [self._view(entry, lost) for entry in _in_turns(entries)]
        server = ServerView(
            self._version,
            self._state.phase.value,
            self._state.failure,
            (at_ns - self._began_ns) / NS_PER_S,
            self._seen_s,
            self._target,
        )
        opening = json.dumps(head(server, views, devices), separators=(",", ":"), allow_nan=False)
        models = [
            json.dumps(model(view), separators=(",", ":"), allow_nan=False) for view in _in_turns(urgent_first(views))
        ]
        return f'{opening[:-1]},"models":[{",".join(models)}]}}'.encode()

    def _devices(self) -> list[DeviceView]:
        known = self._registry.devices()
        names = {info.device for info, _ in known}
        views = [
            DeviceView(
                info.device,
                info.provider,
                info.slots,
                healthy,
                self._loads.get(info.device, 0.0),
                tuple(loads.get(info.device, 0.0) for loads in self._load_history),
            )
            for info, healthy in known
        ]
        # A model may be told to run where others do not.
        others = sorted(self._loads.keys() - names)
        return views + [DeviceView(name, "", 1, True, self._loads[name]) for name in others]

    def _view(self, entry: Entry, lost: frozenset[str]) -> ModelView:
        history = self._histories.get((entry.name, entry.version)) or History()
        loaded = entry.loaded
        state = _STATES.get(entry.state) or (State.FAILED if entry.reason and entry.asked else State.OFF)
        minute = history.window(self._step, WINDOW_STEPS)
        devices = loaded.model.policy.devices if loaded is not None else ()
        present = loaded.model.state() if loaded is not None else None
        saturation = max((self._loads.get(device, 0.0) for device in devices), default=0.0)
        facts = Facts(
            state=state,
            reason=entry.reason,
            slo_ns=present.slo_ns if present is not None else None,
            minute=minute,
            recent=history.window(self._step, RECENT_STEPS),
            scale=present.scale if present is not None else None,
            quantile=present.quantile if present is not None else None,
            saturation=saturation,
            lost=tuple(device for device in devices if device in lost),
        )
        return ModelView(
            name=entry.name,
            version=entry.version,
            state=state,
            verdict=judge(facts, self._target),
            slo_ns=facts.slo_ns,
            load_ns=present.load_ns if present is not None else None,
            devices=devices,
            instances=loaded.model.instances if loaded is not None else 0,
            pending_requests=present.pending_requests if present is not None else 0,
            batch_rows_limit=present.batch_rows_limit if present is not None else None,
            scale=facts.scale,
            saturation=saturation,
            minute=minute,
            recent=facts.recent,
            attainment_5m=history.attainment(self._step, KEPT_STEPS),
            points=history.points(self._step) if history.busy(self._step) else (),
        )


def _in_turns(items: Iterable[_T]) -> Iterable[_T]:
    for number, item in enumerate(items, start=1):
        yield item
        if number % _MODELS_PER_TURN == 0:
            time.sleep(_TURN_S)
