"""Models that share a device and cannot both keep their promises.

A batch cannot be interrupted. A request that comes just after a neighbour's batch began waits for it, and then for its
own: when the neighbour's shortest batch and its own do not fit into its objective together, it is late or refused
whenever that happens, however low the load. No scheduler can help; the operator can.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from service.clock import NS_PER_MS


@dataclass(frozen=True, slots=True)
class Neighbour:
    """What matters of a model to those it shares a device with. `slots` are the run slots of each of its `devices` that
    it may take at once, and how many there are; `shortest_ns` is how long its smallest batch takes."""

    name: str
    slots: dict[str, tuple[int, int]]
    slo_ns: int | None
    shortest_ns: int


def conflicts(newcomer: Neighbour, others: Iterable[Neighbour]) -> list[str]:
    """What to say about the promises that break because `newcomer` joins `others`, both ways."""
    found: list[str] = []
    for other in others:
        if other.name == newcomer.name:
            continue  # another version of it
        found += [*_breaks(newcomer, other), *_breaks(other, newcomer)]
    return found


def _breaks(one: Neighbour, other: Neighbour) -> list[str]:
    """What to say when `one` can keep `other` from its promise."""
    if other.slo_ns is None or other.shortest_ns > other.slo_ns:
        return []  # nothing promised, or nothing that it could keep alone
    if one.shortest_ns + other.shortest_ns <= other.slo_ns:
        return []
    # Where it leaves a slot free, the other need not wait for it.
    shared = [d for d, (taken, slots) in one.slots.items() if d in other.slots and taken >= slots]
    if len(shared) < len(other.slots):
        return []  # there is a device, or a slot, on which they do not meet
    return [
        f"model '{one.name}' takes {one.shortest_ns / NS_PER_MS:.3g} ms for its shortest batch: requests for "
        f"'{other.name}' that come meanwhile cannot keep latency_slo_ms {other.slo_ns / NS_PER_MS:g}; give one of "
        f"them another device, another server or more run slots ({', '.join(shared)})"
    ]
