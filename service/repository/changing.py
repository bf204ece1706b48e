"""Models that change while the server serves: loaded beside what is there, swapped in one step, or unloaded.

`ModelControl` does it for the RPCs of `--model-control-mode explicit` and for the thread that follows the files in
`poll`.

Promise: what serves goes on serving until what replaces it can answer; from then on new requests go to the new one, and
the old one answers what it was given and goes. A load that fails changes nothing but the index, a metric and the log.
Changes of one model are made one after the other.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from service.clock import NS_PER_S, now_ns
from service.errors import ModelLoadError, ModelNotReady, UnknownModel
from service.repository.changes import Files, Watcher
from service.repository.files import files_below
from service.repository.layout import ModelFiles, scan, scan_model, valid_name
from service.repository.overrides import NONE, OverrideFiles, Overrides
from service.repository.repository import ModelRepository

log = logging.getLogger(__name__)

# A copy that pauses for longer than this is taken for complete, tried, found wanting, and tried again when it goes on.
QUIET_NS = 2 * NS_PER_S
# What is changing is looked at again after this long, however seldom the repository is polled.
LOOK_AGAIN_S = 1.0
# How much less than the server's other threads those that load may run (nice values): they work beside requests.
LOAD_NICENESS = 10
LOCKS = 64


class ModelControl:
    """Brings models to what their files, or a client, say. Any thread."""

    def __init__(self, repository: ModelRepository, directories: Sequence[Path]) -> None:
        self._repository = repository
        self._directories = tuple(directories)
        # One would do, but a model that takes minutes to load should not keep others waiting; clients choose the names.
        self._locks = [threading.Lock() for _ in range(LOCKS)]
        self._override_files = OverrideFiles()
        self._stop = threading.Event()
        self._poller: threading.Thread | None = None

    # ---------------------------------------------------------------- what clients ask for

    def load(self, name: str, overrides: Overrides = NONE) -> None:
        """Serve `name` as its files and `overrides` say, or go on as before. Returns when it is ready.

        Raises `UnknownModel`, or `ModelNotReady` with the reason why it cannot be loaded.
        """
        with self._changing(name), _stepping_back():
            written: Path | None = None
            try:
                if overrides.files:
                    written = self._override_files.write(name, overrides.files)
                files = self._files_of(name, written, overrides)
                self._repository.bring(files, overrides.digest)
            except (ModelLoadError, OSError) as error:
                if written is not None:
                    self._override_files.remove(written)
                raise ModelNotReady(f"failed to load '{name}', {error}") from error
            self._override_files.keep(name, written)

    def unload(self, name: str) -> None:
        """Stop serving `name`; its requests are answered first. Raises `UnknownModel`."""
        with self._changing(name):
            self._repository.unload(name)
            self._override_files.keep(name, None)

    def _files_of(self, name: str, written: Path | None, overrides: Overrides) -> ModelFiles:
        if written is not None:
            return scan_model(written, overrides.config)[0]
        found = scan(self._directories).model(name)
        if found is None:
            raise UnknownModel(f"failed to load '{name}', failed to poll from model repository: there is no such model")
        if overrides.config is None:
            # What is wrong with it, if anything, is for `bring` to say, in the index as well.
            return found
        return scan_model(found.directory, overrides.config)[0]

    @contextlib.contextmanager
    def _changing(self, name: str) -> Iterator[None]:
        if not valid_name(name):
            raise UnknownModel(f"failed to load '{name[:60]}', no model can have this name")
        with self._locks[hash(name) % LOCKS]:
            yield

    # ---------------------------------------------------------------- what the files say

    def watch(self, interval_s: float, loaded: Mapping[str, Files]) -> None:
        """Follow the files from now on, looking every `interval_s`; `loaded` is what they were before they were
        loaded."""
        watcher = Watcher(QUIET_NS)
        for name, files in loaded.items():
            watcher.brought(name, files)
        self._poller = threading.Thread(target=self._poll, args=(watcher, interval_s), name="poll", daemon=True)
        self._poller.start()

    def close(self) -> None:
        """Begin no more changes."""
        self._stop.set()
        self._override_files.close()

    def _poll(self, watcher: Watcher, interval_s: float) -> None:
        wait_s = interval_s
        while not self._stop.wait(wait_s):
            try:
                self._look(watcher)
            except ModelLoadError as error:
                log.warning("the model repository cannot be read", extra={"reason": str(error)})
            except Exception:
                # The thread must live on; what it was doing is tried again.
                log.exception("unexpected error while following the model repository")
            wait_s = min(interval_s, LOOK_AGAIN_S) if watcher.unsettled else interval_s

    def _look(self, watcher: Watcher) -> None:
        facts = self.facts()
        changed = watcher.look(facts, now_ns())
        if not changed:
            return
        found = scan(self._directories)
        heads = {model.name: model.backbone for model in found.models if model.backbone is not None}
        # Heads after all others: what they build on may have come with them.
        for name in sorted(changed, key=lambda name: (name in heads, name)):
            if self._stop.is_set():
                return
            before = facts.get(name, {})
            with contextlib.suppress(ModelNotReady, UnknownModel):
                # Whatever was wrong is in the log and in the index.
                if before:
                    self.load(name)
                else:
                    self.unload(name)
                    self._repository.forget(name)
            # Files that changed while they were read are looked at again.
            if self.facts().get(name, {}) == before:
                watcher.brought(name, before)
        for name, backbone in heads.items():
            # What could not be loaded for want of its backbone.
            if backbone.name in changed and not self._repository.ready_versions(name):
                with contextlib.suppress(ModelNotReady, UnknownModel):
                    self.load(name)

    def facts(self) -> dict[str, Files]:
        """The files of every model. Raises `ModelLoadError` for a repository that cannot be read."""
        return {model.name: files_below(model.directory) for model in scan(self._directories).models}


@contextlib.contextmanager
def _stepping_back() -> Iterator[None]:
    """Let this thread run behind those that serve, where the system has priorities per thread (Linux)."""
    thread = threading.get_native_id()
    try:
        before = os.getpriority(os.PRIO_PROCESS, thread)
        os.setpriority(os.PRIO_PROCESS, thread, before + LOAD_NICENESS)
    except (AttributeError, OSError):
        yield
        return
    try:
        yield
    finally:
        # Raising it again needs a privilege; without it the thread stays where it is, which is right for its next load.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, before)
