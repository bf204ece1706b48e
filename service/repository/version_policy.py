"""Which versions of a model to serve, what state each is in, and what to do next.

Everything here is a value in, a value out: the repository's threads ask, do the one thing they are told, report what
became of it, and ask again. Policies keep no state, so asking twice gives the same answer.

Theory of operation. A version is in exactly one state. Events move it, and the table `TRANSITIONS` is all there is: an
event that has no entry for the present state is a bug of the caller and raises `IllegalTransition`.

    UNAVAILABLE --load--> LOADING --loaded--> READY --unload--> UNLOADING --unloaded--> UNAVAILABLE
                             |                                                              ^
                             +-----------------------failed----------------------------------+

READY is entered after the version can answer; UNLOADING before it no longer can. So a version that is seen as READY can
be used, whoever looks. A version that was never touched, failed or was unloaded is UNAVAILABLE; a reason tells them
apart.

Availability comes first: what is to go is unloaded only when nothing that is to come is still missing, so that a model
answers throughout a change of versions. (The preserving policy of TensorFlow Serving, `AvailabilityPreservingPolicy`.)
A version that failed is not tried again until its files or the request for it change; that is the caller's `failed`.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from service.config.model import All, Latest, Specific, VersionPolicy


class VersionState(enum.Enum):
    """State of a version; the value is what the repository index calls it."""

    UNAVAILABLE = "UNAVAILABLE"
    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"


class Event(enum.Enum):
    """What can happen to a version."""

    LOAD = "load"
    LOADED = "loaded"
    FAILED = "failed"
    UNLOAD = "unload"
    UNLOADED = "unloaded"


TRANSITIONS: Mapping[tuple[VersionState, Event], VersionState] = MappingProxyType(
    {
        (VersionState.UNAVAILABLE, Event.LOAD): VersionState.LOADING,
        (VersionState.LOADING, Event.LOADED): VersionState.READY,
        (VersionState.LOADING, Event.FAILED): VersionState.UNAVAILABLE,
        (VersionState.READY, Event.UNLOAD): VersionState.UNLOADING,
        (VersionState.UNLOADING, Event.UNLOADED): VersionState.UNAVAILABLE,
    }
)


class IllegalTransition(Exception):
    """An event that cannot happen in the present state: the caller's mistake, not the model's."""


def transition(state: VersionState, event: Event) -> VersionState:
    """The state after `event`. Raises `IllegalTransition`; the version then keeps its state."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransition(f"'{event.value}' cannot happen to a version that is {state.value}") from None


def versions_to_serve(available: Iterable[int], policy: VersionPolicy) -> tuple[int, ...]:
    """The versions among `available` that the policy wants, ascending."""
    versions = sorted(set(available))
    match policy:
        case All():
            return tuple(versions)
        case Latest(count):
            return tuple(versions[-count:]) if count > 0 else ()
        case Specific(wanted):
            return tuple(version for version in versions if version in wanted)


def missing_versions(available: Iterable[int], policy: VersionPolicy) -> tuple[int, ...]:
    """Versions that the policy names but nobody has, ascending: worth a warning."""
    if not isinstance(policy, Specific):
        return ()
    return tuple(sorted(set(policy.versions) - set(available)))


@dataclass(frozen=True, slots=True)
class Load:
    """Start loading this version."""

    version: int


@dataclass(frozen=True, slots=True)
class Unload:
    """Start unloading this version."""

    version: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that the decision depends on. `available` is what lies on disk; `states` has no entry for UNAVAILABLE ones.

    `failed` versions were tried and failed. `retired`: the model is to go, whatever the policy says.
    """

    available: tuple[int, ...]
    states: Mapping[int, VersionState]
    failed: Collection[int] = ()
    retired: bool = False

    def state(self, version: int) -> VersionState:
        """The state of a version, known or not."""
        return self.states.get(version, VersionState.UNAVAILABLE)


def next_action(snapshot: Snapshot, policy: VersionPolicy) -> Load | Unload | None:
    """The one thing to start now, or None while there is nothing to start.

    The newest wanted version is loaded first. A version that is not wanted is unloaded when every wanted one is ready
    or has failed; when all of them failed the old ones stay, so that the model keeps answering.
    """
    wanted = () if snapshot.retired else versions_to_serve(snapshot.available, policy)
    missing = [v for v in wanted if snapshot.state(v) is VersionState.UNAVAILABLE and v not in snapshot.failed]
    if missing:
        return Load(max(missing))
    if any(snapshot.state(version) in (VersionState.LOADING, VersionState.UNLOADING) for version in wanted):
        return None
    if wanted and not any(snapshot.state(version) is VersionState.READY for version in wanted):
        return None
    surplus = [v for v, state in snapshot.states.items() if state is VersionState.READY and v not in wanted]
    return Unload(min(surplus)) if surplus else None
