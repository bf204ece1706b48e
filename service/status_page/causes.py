"""Why promises were broken in the last minute: what most of the broken ones have in common, and what goes with it.

    device_failed                                  device lost
    execution, out_of_memory, internal             the model fails
    unreachable                                    objective too short
    overloaded, queue_full, expired, refused       overload where the device is full; else queueing
    late                                           queueing where requests waited longer than they ran; else execution
                                                   slower than predicted
    draining                                       stopping

Whatever could not be done in its time has another cause where the device is not what it was at load: "execution slower
than profiled" is the latency model's `scale`, the present speed, and "execution unsteady" its `quantile`, the part of
the capacity that is given up because batches of one size take now longer, now shorter.
"""

from __future__ import annotations

from service.metrics.shard import CLIENT_FAULTS
from service.status_page.facts import Facts
from service.status_page.history import Window, mean_ms
from service.status_page.words import duration, many

# Execution this many times as slow as it was measured at load is named as a cause: less is how machines vary.
SLOW = 1.25
# The safety factor from which on the spread is named; docs/metrics.md says the same of `onclock_latency_quantile`.
UNSTEADY = 1.3
# Saturation from which on a device is full: the load's own spread takes the rest.
FULL = 0.9

_OVERLOAD = frozenset({"overloaded", "queue_full", "expired", "refused"})
_FAILING = frozenset({"execution", "out_of_memory", "internal", "sequence_aborted"})


def broken(window: Window) -> dict[str, int]:
    """The requests of a window whose promise was broken, by what became of them; the most frequent first.

    The keys are `late` and the reasons of refusals and failures. Faults of the clients are left out, and so are
    requests that a client cancelled: not all of those were late.
    """
    counts = window.counts
    found = {"late": counts.late, **counts.refusals}
    for reason, count in counts.failures.items():
        if reason not in CLIENT_FAULTS and reason != "cancelled":
            found[reason] = found.get(reason, 0) + count
    return dict(sorted(((k, n) for k, n in found.items() if n), key=lambda item: (-item[1], item[0])))


def likely_cause(facts: Facts) -> tuple[str, str]:
    """The likely cause in a few words and in a sentence; empty when nothing was broken."""
    lost = broken(facts.minute)
    kinds: dict[str, int] = {}
    for reason, count in lost.items():
        kind = "overload" if reason in _OVERLOAD else "failing" if reason in _FAILING else reason
        kinds[kind] = kinds.get(kind, 0) + count
    if not kinds:
        if facts.minute.in_time < facts.minute.offered:
            return "given up by clients", "Clients gave up after their deadline had passed."
        return "", ""
    kind = max(kinds, key=lambda k: (kinds[k], k))
    requests = many(kinds[kind], "request")
    match kind:
        case "device_failed":
            return "device lost", "The device failed."
        case "failing":
            most = next(reason for reason in lost if reason in _FAILING)
            return "the model fails", f"{requests} failed in the model, most of them: {most.replace('_', ' ')}."
        case "draining":
            return "stopping", f"{requests} refused: the version is being taken out of service."
        case "unreachable" | "overload" | "late":
            return _too_slow(facts, kind, requests)
    return kind.replace("_", " "), f"{requests} failed: {kind.replace('_', ' ')}."


def _too_slow(facts: Facts, kind: str, requests: str) -> tuple[str, str]:
    """Of what could not be done in its time."""
    lost = f"{requests} answered late" if kind == "late" else f"{requests} refused"
    scale = facts.scale or 1.0
    full = kind == "overload" and facts.saturation >= FULL
    # At the speed that was measured at load the device would be full all the same.
    anyway = full and facts.saturation / scale >= FULL
    if scale >= SLOW and not anyway:
        text = f"{lost}: batches take {scale:.1f} times as long as when the model was loaded."
        return "execution slower than profiled", text
    if facts.quantile is not None and facts.quantile >= UNSTEADY and not full:
        text = f"{lost}: batches take now longer, now shorter, so {facts.quantile:.1f} times the usual is allowed for."
        return "execution unsteady", text
    if kind == "unreachable":
        return "objective too short", f"{lost}: their deadlines are shorter than the model takes, even without a queue."
    if kind == "late":
        return _late(facts, lost)
    if full:
        text = f"{lost}: more load than can be answered in time (saturation {facts.saturation:.2f})."
        return "overload", text
    text = (
        f"{lost}: they come in bursts and queue up, though the device is not full (saturation {facts.saturation:.2f})."
    )
    return "queueing", text


def _late(facts: Facts, lost: str) -> tuple[str, str]:
    counts = facts.minute.counts
    waited, ran = mean_ms(counts.queue_ns, counts.requests), mean_ms(counts.compute_ns, counts.requests)
    if waited is None or ran is None:
        return "late answers", f"{lost}."
    text = f"{lost}: on average a request waited {duration(waited)} and ran {duration(ran)}."
    return ("queueing" if waited > ran else "execution slower than predicted"), text
