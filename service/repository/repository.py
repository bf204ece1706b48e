"""The models of this server: which versions are known, in what state, and which one answers a request.

Loading happens in threads of its own, several at a time; a model that fails is kept with the reason while the others
serve. A lookup reads dictionaries that are replaced whole, so it takes no lock. `generation` changes with every
replacement: what was derived from a lookup is derived again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from service.clock import NS_PER_S, now_ns
from service.config.heads import backbone_of
from service.config.model import BackboneReference
from service.errors import (
    DeviceFailed,
    InvalidRequest,
    ModelLoadError,
    ModelNotReady,
    UnknownModel,
    UnknownVersion,
)
from service.metrics import MetricsRegistry
from service.model import Model
from service.repository.files import files_below
from service.repository.layout import ModelFiles, VersionFiles, scan
from service.repository.loader import Loaded, Loader
from service.repository.neighbours import conflicts
from service.repository.retire import retire
from service.repository.version_policy import (
    Event,
    VersionState,
    missing_versions,
    transition,
    versions_to_serve,
)

log = logging.getLogger(__name__)

_MEBIBYTE = 1 << 20

# One slow model among a thousand is said a few times, not a thousand.
MAX_CONFLICTS = 3


# What the index says of a version that a failed change left alone, before the reason.
SERVES_ON = "serves on as before, since a change failed to load: "


class LoadProgress(Protocol):
    """What is told about loading a repository. Called from several threads."""

    def started(self, total: int) -> None: ...

    def loaded(self, name: str, version: str, seconds: float) -> None: ...

    def failed(self, name: str, version: str, reason: str) -> None: ...

    def finished(self) -> None: ...


@dataclass(slots=True)
class Entry:
    """A version (or, with None, a model that has none) and its state. `reason` says why it is not ready;
    `wanted`: the model's version policy asks for it."""

    name: str
    version: int | None
    state: VersionState
    reason: str = ""
    loaded: Loaded | None = None
    wanted: bool = False
    # What the loaded version was made of.
    digest: str = ""
    # Whether anybody wants the model served: not those that a client has unloaded or has yet to load.
    asked: bool = True


class ModelRepository:
    """The models found in the repository directories."""

    def __init__(self, directories: Iterable[Path], loader: Loader, registry: MetricsRegistry) -> None:
        self._directories = tuple(directories)
        self._loader = loader
        loader.find_backbone = self._backbone
        self._registry = registry
        self._lock = threading.Lock()
        self._entries: dict[str, dict[int | None, Entry]] = {}
        # Replaced whole, read without a lock: name -> version -> model, ascending.
        self._ready: dict[str, dict[int, Model]] = {}
        self.generation = 0
        # Those of them that keep sequences: looked at often, so they are not sought among a thousand others.
        self._stateful: tuple[Model, ...] = ()
        # Models that serve no more and have not gone yet: requests and sequences of theirs may be live.
        self._retiring: frozenset[Model] = frozenset()
        # Told of every model that begins or ceases to answer.
        self.on_change: Callable[[str, bool], None] = lambda _name, _ready: None

    # ---------------------------------------------------------------- looking up

    def lookup(self, name: str, version: str) -> Model:
        """The model version that answers requests for `name` and `version` ("" = the latest ready one).

        Raises `UnknownModel`, `UnknownVersion`, `ModelNotReady`, or `InvalidRequest` for a version that is no number.
        """
        ready = self._ready.get(name)
        if not version:
            if ready:
                return ready[max(ready)]
            raise self._not_ready(name)
        number = parse_version(version, name)
        if ready and number in ready:
            return ready[number]
        entries = self._known(name)
        if number not in entries:
            raise UnknownVersion(f"Request for unknown model: '{name}' version {number} is not found")
        entry = entries[number]
        raise ModelNotReady(f"Request for model '{name}' version {number} is not at ready state{_because(entry)}")

    def is_ready(self, name: str, version: str) -> bool:
        """Whether a known model (version) is ready. Raises as `lookup` when it is not known."""
        try:
            self.lookup(name, version)
        except ModelNotReady:
            return False
        return True

    def ready_versions(self, name: str) -> list[int]:
        """The versions of a model that can answer, ascending."""
        return sorted(self._ready.get(name, {}))

    def ready_models(self) -> list[Model]:
        """Every model version that can answer, by name and version."""
        ready = self._ready
        return [ready[name][version] for name in sorted(ready) for version in sorted(ready[name])]

    def stateful_models(self) -> tuple[Model, ...]:
        """Those that can answer and keep sequences."""
        return self._stateful

    def config_message(self, model: Model) -> Any:
        """The completed `ModelConfig` message of a model."""
        with self._lock:
            entry = self._entries[model.name][model.version]
            loaded = entry.loaded
        if loaded is None:
            raise ModelNotReady(f"Request for model '{model.name}' is not at ready state: it was unloaded just now")
        return loaded.completed.proto

    def index(self) -> list[Entry]:
        """Every version found, by name and version."""
        with self._lock:
            return [
                entry
                for name in sorted(self._entries)
                for entry in sorted(self._entries[name].values(), key=lambda e: e.version or 0)
            ]

    def names(self) -> list[tuple[str, bool]]:
        """Every model found and whether it can answer."""
        with self._lock:
            known = sorted(self._entries)
        return [(name, bool(self._ready.get(name))) for name in known]

    def failed(self) -> list[Entry]:
        """What could not be loaded."""
        unavailable = [entry for entry in self.index() if entry.state is VersionState.UNAVAILABLE]
        return [entry for entry in unavailable if entry.reason and entry.asked]

    def load_failures(self) -> list[tuple[str, bool]]:
        """Every model, by name, and whether the last attempt to load it, or a version of it, failed."""
        failed: dict[str, bool] = {}
        for entry in self.index():
            failed[entry.name] = failed.get(entry.name, False) or bool(entry.reason and entry.asked)
        return list(failed.items())

    # ---------------------------------------------------------------- loading

    def load_all(
        self,
        progress: LoadProgress,
        parallelism: int,
        stopping: Callable[[], bool],
        chosen: Callable[[str], bool] = lambda _name: True,
    ) -> None:
        """Load what the directories hold, `parallelism` models at a time. Raises `ModelLoadError` only when a
        directory cannot be read; a model that fails is reported and skipped. No further model is begun once `stopping`
        says so. Models that are not `chosen` by name are listed only."""
        found = scan(self._directories)
        for warning in found.warnings:
            log.warning("not served", extra={"path": str(warning.path), "reason": warning.message})
        jobs: list[tuple[ModelFiles, VersionFiles]] = []
        for model in found.models:
            planned = self._plan(model, chosen(model.name))
            jobs += planned if chosen(model.name) else []
        hopeless = self.failed()
        progress.started(len(jobs) + len(hopeless))
        for entry in hopeless:
            progress.failed(entry.name, "" if entry.version is None else str(entry.version), entry.reason)
        with ThreadPoolExecutor(parallelism, thread_name_prefix="load") as pool:
            # Heads after all others: their backbones must be there.
            for heads in (False, True):
                wave = [job for job in jobs if (job[0].backbone is not None) is heads]
                futures = [pool.submit(self._load, model, version, progress, stopping) for model, version in wave]
                for future in futures:
                    future.result()
        progress.finished()

    def _backbone(self, reference: BackboneReference) -> Loaded:
        """What a head builds on, among what serves now. Raises `ModelLoadError`."""
        name = reference.name
        serving = self._ready.get(name, {})
        number = reference.version if reference.version is not None else max(serving, default=None)
        entry = self._entries.get(name, {}).get(number) if number in serving else None
        loaded = entry.loaded if entry is not None else None
        if loaded is None:
            which = f"'{name}'" if reference.version is None else f"'{name}' version {reference.version}"
            raise ModelLoadError(f"parameters[backbone]: no model {which} serves; load it first")
        return loaded

    def _made_of(self, model: ModelFiles, version: VersionFiles, digest: str) -> str:
        """What a version is made of: another text, another model. Raises `ModelLoadError`."""
        reference = backbone_of(model.config)
        # The same head on another backbone is another model.
        below = "" if reference is None else self._backbone(reference).model.serial
        return f"{digest} {below} {sorted(files_below(model.directory, version.directory).items())}"

    def _plan(self, model: ModelFiles, chosen: bool = True) -> list[tuple[ModelFiles, VersionFiles]]:
        """Enter a model's versions; those to load."""
        available = [files.version for files in model.versions]
        wanted = versions_to_serve(available, model.version_policy) if chosen and not model.error else ()
        entries: dict[int | None, Entry] = {
            version: Entry(model.name, version, VersionState.UNAVAILABLE, wanted=version in wanted)
            for version in available
        }
        for version in missing_versions(available, model.version_policy):
            reason = f"version_policy names version {version}, but there is no such version"
            entries[version] = Entry(model.name, version, VersionState.UNAVAILABLE, reason)
        if not chosen:
            entries = {version: replace(entry, reason="", asked=False) for version, entry in entries.items()}
        elif model.error is not None:
            for entry in entries.values():
                entry.reason = str(model.error)
        if not entries:
            entries[None] = Entry(model.name, None, VersionState.UNAVAILABLE, str(model.error or "no version"))
        with self._lock:
            self._entries[model.name] = entries
        return [(model, files) for files in model.versions if files.version in wanted]

    def _load(
        self, model: ModelFiles, version: VersionFiles, progress: LoadProgress, stopping: Callable[[], bool]
    ) -> None:
        if stopping():
            return
        entry = self._entries[model.name][version.version]
        entry.state = transition(entry.state, Event.LOAD)
        name, number = model.name, str(version.version)
        try:
            made_of = self._made_of(model, version, "")
            loaded = self._loader.load(model, version)
        except Exception as error:
            if not isinstance(error, ModelLoadError):
                log.error("unexpected error while loading model '%s' version %s", name, number, exc_info=error)
            entry.reason = str(error) or type(error).__name__
            entry.state = transition(entry.state, Event.FAILED)
            progress.failed(name, number, entry.reason)
            return
        for note in loaded.notes:
            log.info("model note", extra={"model": name, "version": number, "note": note})
        for conflict in self._conflicts(loaded)[:MAX_CONFLICTS]:
            log.warning("promises that break each other", extra={"model": name, "version": number, "detail": conflict})
        entry.digest = made_of
        self._publish(entry, loaded)
        log.info("model ready", extra={"model": name, "version": number, **_facts(loaded)})
        progress.loaded(name, number, loaded.load_ns / NS_PER_S)

    def _conflicts(self, loaded: Loaded) -> list[str]:
        """What is to be said about a new model and those that are ready."""
        if loaded.neighbour is None:
            return []
        with self._lock:
            present = [e.loaded.neighbour for entries in self._entries.values() for e in entries.values() if e.loaded]
        return conflicts(loaded.neighbour, (other for other in present if other is not None))

    def _publish(self, entry: Entry, loaded: Loaded) -> None:
        model = loaded.model
        self._registry.add(model.metrics)
        with self._lock:
            if entry.loaded is not None:
                self._retiring |= {entry.loaded.model}
            entry.loaded = loaded
            entry.reason = ""
            versions = {**self._ready.get(model.name, {}), model.version: model}
            self._set_ready(model.name, versions)
            if entry.state is VersionState.LOADING:
                entry.state = transition(entry.state, Event.LOADED)
        self.on_change(model.name, True)

    def _set_ready(self, name: str, versions: dict[int, Model]) -> None:
        """What answers for `name` from now on. The lock is held."""
        self._ready = {**self._ready, name: versions}
        self._stateful = (
            *(model for model in self._stateful if model.name != name),
            *(model for model in versions.values() if model.stateful),
        )
        self.generation += 1

    # ---------------------------------------------------------------- changing

    def bring(self, files: ModelFiles, digest: str) -> None:
        """Serve what `files` say: load what is wanted, beside what serves, and then let go what is not.

        `digest` is what the files do not tell (a client's configuration). Raises `ModelLoadError` when something that
        is wanted cannot be loaded; what served before serves on. Calls for one model come one after the other.
        """
        name = files.name
        wanted = versions_to_serve([v.version for v in files.versions], files.version_policy)
        if files.error is not None or not wanted:
            error = files.error or ModelLoadError(f"version_policy of model '{name}' serves none of its versions")
            self._blame(name, None, str(error))
            raise error
        failures: list[ModelLoadError] = []
        for version in reversed(wanted):
            found = files.version(version)
            assert found is not None
            try:
                self._bring_version(files, found, digest, wanted)
            except ModelLoadError as error:
                failures.append(error)
        if failures:
            raise failures[0]
        with self._lock:
            entries = self._entries[name]
            surplus = [e for v, e in entries.items() if v not in wanted and e.state is VersionState.READY]
            present = {v.version for v in files.versions}
            self._entries[name] = {v: e for v, e in entries.items() if v in present or e.loaded is not None}
        for entry in surplus:
            self._unload(entry)

    def unload(self, name: str) -> None:
        """Serve no version of `name` any more; requests that were accepted are answered. Raises `UnknownModel`."""
        for entry in self._known(name).copy().values():
            entry.wanted = entry.asked = False
            if entry.state is VersionState.READY:
                self._unload(entry)
            else:
                entry.reason = ""

    def forget(self, name: str) -> None:
        """List a model no more whose files are gone."""
        with self._lock:
            self._entries = {known: entries for known, entries in self._entries.items() if known != name}

    def _bring_version(self, files: ModelFiles, version: VersionFiles, digest: str, wanted: Sequence[int]) -> None:
        try:
            made_of = self._made_of(files, version, digest)
        except ModelLoadError:
            made_of = ""  # loading says the same
        with self._lock:
            entries = self._entries.setdefault(files.name, {})
            entries.pop(None, None)
            entry = entries.get(version.version)
            if entry is None or entry.state is VersionState.UNLOADING:
                # What is on its way out goes by itself; this is another load of the version.
                entry = entries[version.version] = Entry(files.name, version.version, VersionState.UNAVAILABLE)
            entry.wanted = entry.asked = True
            old = entry.loaded
            if old is None:
                entry.state = transition(entry.state, Event.LOAD)
        if old is not None and entry.digest == made_of:
            entry.reason = ""
            return
        number = str(version.version)
        ready = self._ready.get(files.name, {})
        beside = old.model if old is not None else (ready[max(ready)] if ready else None)
        start_ns = now_ns()
        try:
            loaded = self._loader.load(files, version, beside)
        except Exception as error:
            if not isinstance(error, ModelLoadError):
                log.error("unexpected error while loading model '%s' version %s", files.name, number, exc_info=error)
            reason = str(error) or type(error).__name__
            with self._lock:
                entry.reason = reason if old is None else SERVES_ON + reason
                entry.digest = entry.digest if old is not None else ""
                if old is None:
                    entry.state = transition(entry.state, Event.FAILED)
            self._registry.record_load(files.name, succeeded=False)
            log.error("model failed to load", extra={"model": files.name, "version": number, "reason": reason})
            raise ModelLoadError(reason) from error
        entry.digest = made_of
        # Another version that serves on keeps its sequences to itself.
        if beside is not None and (old is not None or beside.version not in wanted):
            loaded.model.replaces(beside)
        self._publish(entry, loaded)
        self._registry.record_load(files.name, succeeded=True)
        seconds = round((now_ns() - start_ns) / NS_PER_S, 3)
        event = "model ready" if old is None else "model replaced"
        log.info(event, extra={"model": files.name, "version": number, **_facts(loaded), "seconds": seconds})
        for note in loaded.notes:
            log.info("model note", extra={"model": files.name, "version": number, "note": note})
        if old is not None:
            self._let_go(old.model)

    def _unload(self, entry: Entry) -> None:
        assert entry.loaded is not None
        model = entry.loaded.model
        with self._lock:
            entry.state = transition(entry.state, Event.UNLOAD)
            versions = {v: m for v, m in self._ready.get(model.name, {}).items() if v != model.version}
            self._retiring |= {model}
            self._set_ready(model.name, versions)
        self.on_change(model.name, bool(versions))

        def unloaded() -> None:
            with self._lock:
                entry.loaded = None
                entry.digest = ""
                entry.reason = ""
                entry.state = transition(entry.state, Event.UNLOADED)
            log.info("model unloaded", extra={"model": model.name, "version": str(model.version)})

        self._let_go(model, unloaded)

    def _let_go(self, model: Model, done: Callable[[], None] = lambda: None) -> None:
        """Of a model that is retiring: `done` is called when it has gone."""

        def gone() -> None:
            with self._lock:
                self._retiring -= {model}
            done()

        retire(model, self._registry, gone)

    def _blame(self, name: str, version: int | None, reason: str) -> None:
        """Say in the index why a change came to nothing."""
        with self._lock:
            entries = self._entries.setdefault(name, {})
            if not entries:
                entries[version] = Entry(name, version, VersionState.UNAVAILABLE)
            serving = [entry for entry in entries.values() if entry.state is VersionState.READY]
            for entry in serving or entries.values():
                entry.reason = SERVES_ON + reason if serving else reason
        self._registry.record_load(name, succeeded=False)
        log.error("model failed to load", extra={"model": name, "reason": reason})

    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return all(model.idle() for model in self._present())

    def close(self) -> None:
        """Stop scheduling every model; what is still queued is answered as refused."""
        for model in self._present():
            model.close()

    def fail_device(self, device: str, error: DeviceFailed) -> None:
        """Answer what waits for the models on a broken device; they accept nothing more."""
        for model in self._present():
            if device in model.policy.devices:
                model.close(error)

    def _present(self) -> list[Model]:
        """Every model that may have requests. What is replaced at this moment is in it, once."""
        with self._lock:
            return [*self.ready_models(), *self._retiring]

    # ---------------------------------------------------------------- saying no

    def _known(self, name: str) -> dict[int | None, Entry]:
        with self._lock:
            entries = self._entries.get(name)
        if entries is None:
            raise UnknownModel(f"Request for unknown model: '{name}' is not found")
        return entries

    def _not_ready(self, name: str) -> ModelNotReady:
        entries = self._known(name)
        newest = max(entries.values(), key=lambda entry: (bool(entry.reason), entry.version or 0))
        return ModelNotReady(f"Request for model '{name}' is not at ready state{_because(newest)}")


def parse_version(text: str, name: str) -> int:
    """A requested version as a number. Raises `InvalidRequest`."""
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise InvalidRequest(f"model '{name}': version '{text[:40]}' is not a number; expected one such as '1'")
    return int(text)


def _because(entry: Entry) -> str:
    if entry.reason:
        return f": {entry.reason}"
    if entry.state is VersionState.LOADING:
        return ": it is loading"
    if entry.state is not VersionState.UNAVAILABLE:
        return ""
    if not entry.asked:
        return ": it is not loaded"
    return ": it waits to be loaded" if entry.wanted else ": version_policy does not serve it"


def _facts(loaded: Loaded) -> dict[str, Any]:
    """What the log says of a loaded model."""
    model = loaded.model
    policy = model.policy
    slowest = model.latency.buckets[-1]
    return {
        "seconds": round(loaded.load_ns / NS_PER_S, 3),
        "memory_mib": round(loaded.memory_bytes / _MEBIBYTE, 2),
        "devices": ",".join(policy.devices),
        "max_batch": policy.max_batch_rows,
        "slo_ms": None if policy.slo_ns is None else policy.slo_ns / 1e6,
        "profile": "cache" if loaded.profiled_from_cache else "measured",
        "buckets_up_to": slowest,
    }
