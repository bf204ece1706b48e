"""When a model's files are complete: a value machine that is shown what lies on disk and told the time.

A file that is being copied grows, or changes its time of modification, or is not there yet. So a model counts as
changed when its files differ from those it was last brought to, and as settled when they have been the same for
`quiet_ns`. What settles and is broken all the same (a copy that stalled for longer) fails to load, which harms nothing,
and is looked at again when its files change.

Promise: a change is reported only after its files were seen equal at two looks at least `quiet_ns` apart; every change
that stays is reported in the end, once, until `brought` says what was made of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What tells one state of a file from another without reading it."""

    size: int
    mtime_ns: int
    inode: int


# Path below the model's directory -> facts. Empty: there is no such model.
Files = Mapping[str, FileFacts]


@dataclass(slots=True)
class _Seen:
    files: Files
    since_ns: int


class Watcher:
    """Compares what is seen with what was brought into service, model by model."""

    def __init__(self, quiet_ns: int) -> None:
        self._quiet_ns = quiet_ns
        self._brought: dict[str, Files] = {}
        self._seen: dict[str, _Seen] = {}

    def brought(self, name: str, files: Files) -> None:
        """`name` serves these files now, or was found wanting with them; none: it is gone."""
        if files:
            self._brought[name] = files
        else:
            self._brought.pop(name, None)

    def look(self, models: Mapping[str, Files], now_ns: int) -> list[str]:
        """The models whose files have changed and settled, by name."""
        settled = []
        for name in sorted({*models, *self._brought}):
            files = models.get(name, {})
            if files == self._brought.get(name, {}):
                self._seen.pop(name, None)
                continue
            seen = self._seen.get(name)
            if seen is None or seen.files != files:
                self._seen[name] = _Seen(files, now_ns)
            elif now_ns - seen.since_ns >= self._quiet_ns:
                settled.append(name)
        for name in [name for name in self._seen if name not in models and name not in self._brought]:
            del self._seen[name]
        return settled

    @property
    def unsettled(self) -> bool:
        """Whether something has changed that is not in service yet: it is worth looking again soon."""
        return bool(self._seen)
