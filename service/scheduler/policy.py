"""What a model's queue promises and allows: the values that steer the scheduler, set once when a model is loaded.

With an objective (`slo_ns`) there is nothing else to choose. The knobs of Triton's `dynamic_batching` are for models
without one, and for its priority levels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from service.clock import NEVER_NS, NS_PER_S

# Rows kept at least, whatever the batch size: a burst of small requests must not meet the absolute bound before the
# bound by predicted wait. 64 full batches are far more than any deadline leaves time for.
MIN_QUEUE_ROWS = 4096
QUEUE_BATCHES = 64


@dataclass(frozen=True, slots=True)
class PriorityPolicy:
    """Triton's ModelQueuePolicy, for one priority level.

    `max_queue_size`: requests of this level that may wait (0 = only the derived bounds). `default_timeout_ns`: how
    long one may take when the client states nothing (0 = no limit); a client may shorten it when
    `allow_timeout_override`. `timeout_action`: REJECT refuses a request that cannot make it, DELAY keeps it as best
    effort.
    """

    max_queue_size: int = 0
    default_timeout_ns: int = 0
    allow_timeout_override: bool = True
    timeout_action: Literal["REJECT", "DELAY"] = "REJECT"


_DEFAULT_LEVEL = PriorityPolicy()


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """How one model is queued and batched.

    `devices` it is loaded on; `max_batch_rows` (1 = unbatched); `joins` False: requests may have several rows, but each
    is a batch by itself; `slo_ns` its objective or None; `buckets`: ascending
    batch sizes the engine runs, the last equal to `max_batch_rows` (empty = every size); `max_concurrent` batches of
    it at a time per device. `shed_eagerness` 0..1: how much of the forecast arrivals is held against the oldest
    requests (0 = most goodput, 0.8 = most refusals happen on arrival). `late_policy`: "best_effort" keeps doomed
    requests to fill padding and idle devices. `max_queue_delay_ns` and `preferred_rows` wait for company, only
    without an SLO. `max_queue_ns` bounds the predicted wait of requests without a deadline; `max_queue_rows` bounds
    the queue absolutely (0 = 64 batches, at least 4096). `delivery_ns` of the objective are left for the way between
    client and server. Raises `ValueError` when the values contradict each other.
    """

    name: str
    devices: tuple[str, ...]
    max_batch_rows: int
    slo_ns: int | None = None
    buckets: tuple[int, ...] = ()
    max_concurrent: int = 1
    shed_eagerness: float = 0.0
    late_policy: Literal["shed", "best_effort"] = "shed"
    max_queue_delay_ns: int = 0
    preferred_rows: tuple[int, ...] = ()
    max_queue_ns: int = NS_PER_S
    max_queue_rows: int = 0
    priority_levels: int = 1
    default_priority: int = 1
    priorities: Mapping[int, PriorityPolicy] = field(default_factory=dict)
    joins: bool = True
    delivery_ns: int = 0

    def __post_init__(self) -> None:
        if not self.devices:
            raise ValueError(f"model '{self.name}': a queue needs at least one device")
        if self.max_batch_rows < 1:
            raise ValueError(f"model '{self.name}': max_batch_rows is {self.max_batch_rows}, expected >= 1")
        if not self.buckets:
            object.__setattr__(self, "buckets", tuple(range(1, self.max_batch_rows + 1)))
        if list(self.buckets) != sorted(set(self.buckets)) or self.buckets[0] < 1:
            raise ValueError(f"model '{self.name}': buckets {self.buckets} must ascend from at least 1")
        if self.buckets[-1] != self.max_batch_rows:
            raise ValueError(
                f"model '{self.name}': the last bucket is {self.buckets[-1]}, expected max_batch_rows "
                f"{self.max_batch_rows}"
            )
        if self.slo_ns is not None and self.slo_ns <= 0:
            raise ValueError(f"model '{self.name}': slo_ns is {self.slo_ns}, expected > 0 or None")
        if self.max_concurrent < 1:
            raise ValueError(f"model '{self.name}': max_concurrent is {self.max_concurrent}, expected >= 1")
        if self.delivery_ns and not 0 < self.delivery_ns < (self.slo_ns or 0):
            raise ValueError(f"model '{self.name}': delivery_ns is {self.delivery_ns}, expected less than slo_ns")
        if not 0.0 <= self.shed_eagerness <= 1.0:
            raise ValueError(f"model '{self.name}': shed_eagerness is {self.shed_eagerness}, expected 0..1")
        if self.max_queue_rows <= 0:
            object.__setattr__(self, "max_queue_rows", max(MIN_QUEUE_ROWS, QUEUE_BATCHES * self.max_batch_rows))

    def level(self, priority: int) -> PriorityPolicy:
        """The queue policy of a priority level (the defaults when none is stated)."""
        return self.priorities.get(priority, _DEFAULT_LEVEL)

    def deadline_ns(
        self,
        arrival_ns: int,
        priority: int | None = None,
        timeout_ns: int = 0,
        client_deadline_ns: int = NEVER_NS,
    ) -> int:
        """The one absolute deadline of a request: the sooner of the objective, the level's timeout and what the
        client states (`timeout_ns` its request parameter, 0 = none; `client_deadline_ns` its gRPC deadline).

        As in Triton a request's timeout counts only where the level allows it to override, and only to shorten. The
        objective is to hold where the client measures, so `delivery_ns` of it are left for the way.
        """
        level = self.level(self.default_priority if priority is None else priority)
        limit_ns = level.default_timeout_ns
        if timeout_ns > 0 and level.allow_timeout_override and (limit_ns == 0 or timeout_ns < limit_ns):
            limit_ns = timeout_ns
        deadline_ns = client_deadline_ns
        if limit_ns:
            deadline_ns = min(deadline_ns, arrival_ns + limit_ns)
        if self.slo_ns is not None:
            deadline_ns = min(deadline_ns, arrival_ns + self.slo_ns - self.delivery_ns)
        return deadline_ns


def bucket_ladder(max_rows: int, factor: float = 1.25) -> tuple[int, ...]:
    """Batch sizes 1 .. `max_rows`, each about `factor` times the one before, the last exactly `max_rows`.

    A x1.25 ladder needs 16 sizes up to 64. Powers of two cost 9 to 13 points of attainment under load for their
    padding, this ladder with the trim rule 1.0 to 1.6 (measured in simulation, docs/batching.md).
    """
    if max_rows < 1:
        raise ValueError(f"a ladder up to {max_rows} rows has no rungs; expected max_rows >= 1")
    if factor <= 1.0:
        raise ValueError(f"a ladder with factor {factor} never ends; expected a factor > 1")
    rungs: list[int] = []
    size = 1.0
    while round(size) < max_rows:
        if not rungs or round(size) > rungs[-1]:
            rungs.append(round(size))
        size *= factor
    return (*rungs, max_rows)
