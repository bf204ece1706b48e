"""When a batch closes, and what is in it: docs/batching.md, sentence by sentence."""

from __future__ import annotations

import pytest

from service.clock import NEVER_NS
from service.scheduler import CloseReason, Idle, LatencyModel, QueuePolicy, RefusalReason, RequestState, WaitUntil
from tests.unit.scheduler.support import World, ms, reasons, taken


def test_an_empty_scheduler_is_idle() -> None:
    """With nothing queued there is nothing to do until something arrives."""
    assert World().scheduler.next_step(World().slot, 0) == Idle([])


def test_everything_queued_is_one_batch() -> None:
    """A free slot takes everything that is queued, oldest first."""
    world = World()
    queue = world.model()
    requests = world.fill(queue, [0, 1, 2])

    batch = world.run(3)

    assert taken(batch) == requests
    assert (batch.rows, batch.bucket, batch.reason) == (3, 3, CloseReason.DRAINED)
    assert batch.expected_ns == pytest.approx(ms(7), abs=2)
    assert batch.slack_ns == pytest.approx(ms(20 - 3 - 7), abs=2)
    assert queue.pending_requests == queue.pending_rows == 0


def test_the_deadline_closes_a_batch() -> None:
    """The batch grows only as long as its oldest request makes its deadline; the rest is served next."""
    world = World()
    queue = world.model(max_concurrent=1)
    world.fill(queue, [0])
    first = world.run(0)
    kept = world.fill(queue, [float(at) for at in range(1, 5)])
    world.done(first, 5)

    # At 14 the oldest (deadline 21) has 7 ms: three rows. The others have until 22, 23, 24.
    batch = world.run(14)

    assert taken(batch) == kept[:3]
    assert batch.reason is CloseReason.DEADLINE


def test_older_requests_are_refused_for_a_larger_window() -> None:
    """The largest run of rows wins; requests older than it are refused the moment that is decided."""
    world = World()
    queue = world.model()
    world.fill(queue, [0])
    late = world.fill(queue, [10.0 + at / 10 for at in range(8)])

    batch = world.run(13)  # deadline 20 leaves 7 ms (3 rows), deadline 30 leaves 17 ms (13 rows)

    assert taken(batch) == late
    assert reasons(list(batch.refused)) == [RefusalReason.OVERLOADED]
    assert queue.refused[RefusalReason.OVERLOADED] == 1


def test_an_expired_request_is_not_run() -> None:
    """A request whose deadline has passed is handed back as expired with the next step."""
    world = World()
    queue = world.model()
    (old,) = world.fill(queue, [0])

    step = world.scheduler.next_step(world.slot, ms(25))

    assert isinstance(step, Idle)
    assert [(r.request, r.reason, r.retry_after_ns) for r in step.refused] == [(old, RefusalReason.EXPIRED, 0)]
    assert old.state is RequestState.GONE


def test_the_largest_batch_closes_a_batch() -> None:
    """A batch is never larger than the model's largest."""
    world = World()
    queue = world.model(rows=4, slo=100.0)
    world.fill(queue, [0] * 6)

    batch = world.run(0)

    assert (batch.rows, batch.reason) == (4, CloseReason.FULL)
    assert queue.pending_rows == 2


def test_other_shapes_wait() -> None:
    """Requests share a batch only when their shapes are equal."""
    world = World()
    queue = world.model(shapes=((3,), (4,)))
    world.fill(queue, [0, 0], shape=(3,))
    world.fill(queue, [0, 0], shape=(4,))

    batch = world.run(0)

    assert {request.shape for request in taken(batch)} == {(3,)}
    assert batch.reason is CloseReason.SHAPE


def test_an_unbatched_model_runs_one_at_a_time() -> None:
    """A model whose largest batch is one row is run request by request."""
    world = World()
    queue = world.model(rows=1)
    requests = world.fill(queue, [0, 0])

    batch = world.run(0)

    assert taken(batch) == requests[:1]
    assert batch.reason is CloseReason.UNBATCHED


def test_padding_goes_up_to_the_next_bucket() -> None:
    """Rows between two buckets are padded up when trimming would not be cheaper."""
    world = World()
    queue = world.model(rows=8, buckets=(1, 4, 8), setup=10.0, per_row=0.1, slo=100.0)
    world.fill(queue, [0] * 3)

    batch = world.run(0)

    assert (batch.rows, batch.bucket) == (3, 4)
    assert queue.padded_rows == 1


def test_trim_when_a_smaller_bucket_is_cheaper() -> None:
    """Between two buckets the lower one runs when it costs less per row and the rest can be served next."""
    world = World()
    queue = world.model(rows=16, buckets=(1, 4, 16), setup=1.0, per_row=1.0, slo=100.0)
    requests = world.fill(queue, [0] * 5)

    batch = world.run(0)

    assert (batch.rows, batch.bucket, batch.reason) == (4, 4, CloseReason.TRIMMED)
    assert taken(batch) == requests[:4]


def test_no_trim_when_the_rest_would_be_late() -> None:
    """The rest must still make its deadline behind the smaller batch, or everything is padded up."""
    world = World()
    queue = world.model(rows=16, buckets=(1, 4, 16), table={1: 10, 4: 11, 16: 16}, slo=20.0)
    world.fill(queue, [0, 2], rows=2)
    world.fill(queue, [4])

    batch = world.run(4)  # 4 rows cost less per row, but the fifth would end at 25, later than its 24

    assert (batch.rows, batch.bucket, batch.reason) == (5, 16, CloseReason.DRAINED)


def test_rows_of_a_request_stay_together() -> None:
    """A request of several rows is in a batch whole, or not at all."""
    world = World()
    queue = world.model(rows=8, slo=100.0)
    first, second = world.fill(queue, [0, 0], rows=5)

    batch = world.run(0)

    assert taken(batch) == [first]
    assert (batch.rows, batch.reason) == (5, CloseReason.FULL)
    assert second.state is RequestState.QUEUED


def test_one_unservable_request_does_not_spoil_the_run() -> None:
    """A request too large for its own deadline is refused alone; smaller ones around it are served."""
    world = World()
    queue = world.model(rows=16)
    (small,) = world.fill(queue, [0])
    (large,) = world.fill(queue, [0], rows=16)
    (other,) = world.fill(queue, [0])

    batch = world.run(5)  # 15 ms left: 11 rows

    assert taken(batch) == [small, other]
    assert [refusal.request for refusal in batch.refused] == [large]


def test_an_older_start_may_pack_more_rows() -> None:
    """With rows of several sizes an older start can fill a larger batch than the bisection finds."""
    world = World()
    queue = world.model(rows=16, slo=20.0)
    world.fill(queue, [0], rows=8)
    world.fill(queue, [3], rows=5)

    batch = world.run(4)  # 16 ms left for the first: 12 rows, of 13; 19 ms for the second: 15 rows, of 5

    assert batch.rows == 8
    assert not batch.refused


def test_no_objective_takes_the_efficient_batch() -> None:
    """Without deadlines everything is taken, up to the smallest batch that reaches 95 % of the peak throughput."""
    world = World()
    queue = world.model(slo=None, rows=16, setup=0.1, per_row=1.0)
    world.fill(queue, [0] * 10)

    batch = world.run(0)

    assert (batch.rows, batch.reason, batch.slack_ns) == (2, CloseReason.FULL, NEVER_NS)


def test_a_large_request_without_deadline_is_not_divided() -> None:
    """A request of more rows than are efficient runs whole all the same."""
    world = World()
    queue = world.model(slo=None, rows=16, setup=0.1, per_row=1.0)
    world.fill(queue, [0], rows=9)

    assert world.run(0).rows == 9


def test_deadline_classes_fill_up_the_batch() -> None:
    """The class that must start soonest leads, and others ride along while every deadline in the batch is met."""
    world = World()
    queue = world.model()
    (loose,) = world.fill(queue, [0], budget=60)
    (tight,) = world.fill(queue, [0])

    batch = world.run(0)

    assert taken(batch) == [tight, loose]
    assert batch.reason is CloseReason.DRAINED


def test_a_filler_never_makes_the_batch_late() -> None:
    """Other classes fill only as far as the earliest deadline in the batch allows."""
    world = World()
    queue = world.model()
    world.fill(queue, [0], budget=6.5)
    world.fill(queue, [0] * 5, budget=60)

    batch = world.run(0)  # 6.5 ms: two rows

    assert batch.rows == 2
    assert batch.reason is CloseReason.DEADLINE
    assert batch.slack_ns >= 0


def test_earliest_deadline_first_inside_a_class() -> None:
    """A later arrival with an earlier deadline goes before, within one class."""
    world = World()
    queue = world.model(rows=1)
    (late,) = world.fill(queue, [0], budget=19)
    (early,) = world.fill(queue, [0], budget=18)

    batch = world.run(0)

    assert taken(batch) == [early]
    assert late.state is RequestState.QUEUED


def test_lower_priorities_fill_only_padding() -> None:
    """A lower priority rides in the padding of a bucket, and does not make the batch larger."""
    world = World()
    queue = world.model(rows=8, buckets=(1, 4, 8), slo=100.0, priority_levels=2)
    world.fill(queue, [0] * 3, priority=1)
    world.fill(queue, [0] * 3, priority=2)

    batch = world.run(0)

    assert [request.priority for request in taken(batch)] == [1, 1, 1, 2]
    assert batch.bucket == 4


def test_the_highest_priority_leads() -> None:
    """The batch is chosen from the highest level that has work, even when a lower one waits longer."""
    world = World()
    queue = world.model(rows=4, slo=20.0, priority_levels=2)
    world.fill(queue, [0], priority=2)
    high = world.fill(queue, [10] * 4, priority=1, budget=11)

    assert taken(world.run(10)) == high


def test_a_lower_priority_goes_first_only_into_slack() -> None:
    """A more urgent lower priority goes first when it ends before anybody of a higher level must start."""
    world = World()
    first, second = world.model("a", rows=4, slo=100.0), world.model("b", rows=4, slo=15.0)
    world.fill(first, [0], priority=1)
    world.fill(second, [0], priority=2)

    assert world.run(0).queue is second


def test_oversize_requests_are_cut_into_segments() -> None:
    """A request larger than a batch runs as segments that share its deadline, and ends with the last."""
    world = World()
    queue = world.model(rows=8, slo=100.0)
    (request,) = world.fill(queue, [0], rows=19)

    parts = []
    for at in (0, 20, 40):
        batch = world.run(at)
        (segment,) = batch.segments
        parts.append((segment.first_row, segment.rows, batch.reason))
        world.done(batch, at + 12)

    assert parts == [(0, 8, CloseReason.FULL), (8, 8, CloseReason.FULL), (16, 3, CloseReason.DRAINED)]
    assert request.state is RequestState.RUNNING
    assert queue.pending_rows == queue.pending_requests == 0


def test_oversize_feasibility_counts_all_segments() -> None:
    """An oversize request is refused on arrival when its segments one after another would miss the deadline."""
    world = World()
    queue = world.model(rows=8, slo=30.0)
    world.fill(queue, [0])
    world.done(world.run(0), 1)

    _, refused = world.put(queue, 1, rows=19)  # 12 + 12 + 7 = 31 ms

    assert reasons(refused) == [RefusalReason.UNREACHABLE]


def test_a_doomed_oversize_request_ends_between_segments() -> None:
    """Feasibility is checked again before each segment; the rest of a doomed request is not run."""
    world = World()
    queue = world.model(rows=8, slo=40.0)
    (request,) = world.fill(queue, [0], rows=16)
    world.done(world.run(0), 30)

    step = world.scheduler.next_step(world.slot, ms(30))

    assert isinstance(step, Idle)
    assert [refusal.request for refusal in step.refused] == [request]
    assert queue.pending_rows == 0


def test_blackout_waits_for_company() -> None:
    """Where running now dooms the next arrivals, and arrivals come in clumps, a batch waits for a quiet gap or the last
    moment, and says so."""
    world = World()
    queue = world.model(setup=4.0, per_row=0.5, slo=8.0)
    world.fill(queue, [0, 0.1, 0.2])

    step = world.wait(0.2)
    assert step == WaitUntil(ms(0.2 + 0.8), [])

    world.fill(queue, [0.9])
    assert world.wait(0.9).at_ns == ms(1.5)  # at 1.5 a fifth could still join and all end at 8
    batch = world.run(1.5)
    assert (batch.rows, batch.reason) == (4, CloseReason.QUIET)


def test_no_wait_without_clumps() -> None:
    """With arrivals far apart nobody waits, whatever the objective."""
    world = World()
    queue = world.model(setup=4.0, per_row=0.5, slo=8.0)
    for at in range(0, 60, 6):
        world.fill(queue, [float(at)])
        world.done(world.run(at), at + 4.5)


def test_queue_delay_waits_only_without_objective() -> None:
    """`max_queue_delay` holds a batch without objective until the delay is over; with one it is unused."""
    world = World()
    delayed = world.model("delayed", slo=None, max_queue_delay_ns=ms(5))
    world.fill(delayed, [0])
    assert world.wait(1).at_ns == ms(5)
    batch = world.run(5)
    assert (batch.rows, batch.reason) == (1, CloseReason.QUIET)
    world.done(batch, 10)

    prompt = world.model("prompt", max_queue_delay_ns=ms(5))
    world.fill(prompt, [10])
    assert world.run(10).rows == 1


def test_preferred_sizes_close_a_batch() -> None:
    """A preferred size is run as soon as it is there; less than the smallest waits for the delay."""
    world = World()
    queue = world.model(slo=None, max_queue_delay_ns=ms(5), preferred_rows=(4, 8))
    world.fill(queue, [0] * 3)
    assert world.wait(0).at_ns == ms(5)
    world.fill(queue, [1] * 2)

    batch = world.run(1)

    assert batch.rows == 4
    assert queue.pending_rows == 1


def test_a_request_larger_than_a_preferred_size_runs_whole() -> None:
    """A preferred size that the oldest request does not fit into is passed over, and never makes an empty batch."""
    world = World()
    queue = world.model(slo=None, preferred_rows=(2, 4))
    world.fill(queue, [0], rows=3)

    assert world.run(0).rows == 3


def test_a_full_batch_does_not_wait() -> None:
    """A queue delay ends when the batch is full."""
    world = World()
    queue = world.model(slo=None, rows=4, max_queue_delay_ns=ms(5))
    world.fill(queue, [0] * 4)

    assert world.run(0).rows == 4


def test_staging_behind_a_running_batch() -> None:
    """A slot may be given one more batch while it runs; that one starts at the predicted end."""
    world = World(lead=1.0)
    queue = world.model(max_concurrent=2)
    world.fill(queue, [0])
    first = world.run(0)
    world.fill(queue, [2])
    second = world.run(5)

    assert first.start_ns == ms(1)
    assert second.start_ns == first.start_ns + first.expected_ns
    with pytest.raises(ValueError, match="2 batches already"):
        world.scheduler.next_step(world.slot, ms(5))
    world.done(first, 6.5)
    assert world.scheduler.free_ns("d", ms(6.5)) == ms(6.5) + second.expected_ns


def test_an_unknown_model_learns_from_its_first_runs() -> None:
    """Without any profile nothing is refused, everything is taken, and the runs are the profile."""
    world = World()
    queue = world.model(known=False)
    world.fill(queue, [0] * 5)
    batch = world.run(0)
    world.scheduler.completed(batch, ms(9), ms(9))

    assert batch.rows == 5
    assert queue.latency.table()[()][5] == ms(9)


def test_latency_model_and_policy_must_agree_on_buckets() -> None:
    """A latency model for other buckets than the policy's is refused when the queue is made."""
    with pytest.raises(ValueError, match="buckets"):
        World().scheduler.add_queue(QueuePolicy("m", ("d",), 8), LatencyModel({}, (1, 2)))
