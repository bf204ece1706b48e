"""The largest feasible window against its definition, and the lane's bookkeeping against a plain list."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.scheduler import LatencyModel, ModelQueue, QueuedRequest, QueuePolicy, Scheduler, Slot
from service.scheduler.lane import Lane

Budgets = list[tuple[int, int]]

requests = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 4)), min_size=1, max_size=14)


def lane_of(entries: Budgets, largest: int, setup: int) -> tuple[Lane, list[QueuedRequest]]:
    """A lane with requests of (deadline, rows), for a model with l(b) = setup + 2 b and no margin."""
    policy = QueuePolicy("m", ("d",), largest, slo_ns=100)
    latency = LatencyModel({(): {rows: setup + 2 * rows for rows in policy.buckets}}, policy.buckets)
    latency.quantile = latency.factor = 1.0
    queue: ModelQueue = Scheduler([Slot("d", 0)]).add_queue(policy, latency)
    lane = queue.lane_for(QueuedRequest(1, 0, 100))
    queued = [QueuedRequest(rows, 0, deadline) for deadline, rows in entries]
    for request in queued:
        lane.push(request)
    return lane, queued


def packed(rows: list[int], most: int) -> int:
    """Rows of the longest prefix that fits whole into `most`."""
    total = 0
    for count in rows:
        if total + count > most:
            break
        total += count
    return total


@given(requests, st.integers(1, 20), st.integers(0, 8), st.integers(0, 40))
def test_single_row_window_is_the_largest(entries: Budgets, largest: int, setup: int, start: int) -> None:
    """With one row per request the window is the largest contiguous run that ends within its oldest deadline, and of
    those the one that refuses fewest."""
    lane, queued = lane_of([(deadline, 1) for deadline, _ in entries], largest, setup)
    queued.sort(key=lambda request: request.deadline_ns)
    best_rows, best_start = 0, len(queued)
    for first, request in enumerate(queued):
        fits = max((b for b in range(1, largest + 1) if start + setup + 2 * b <= request.deadline_ns), default=0)
        rows = min(fits, len(queued) - first)
        if rows > best_rows:
            best_rows, best_start = rows, first

    left = lane.settle(start) + lane.commit()

    assert [request.deadline_ns for request in left] == [request.deadline_ns for request in queued[:best_start]]
    assert (lane.window_rows if lane.count else 0) == best_rows


@given(requests, st.integers(4, 20), st.integers(0, 8), st.integers(0, 40))
def test_a_window_is_feasible_and_contiguous(entries: Budgets, largest: int, setup: int, start: int) -> None:
    """With any rows, what a settled lane would run makes its oldest deadline, whole requests only; nothing servable
    alone is left over when nothing is run."""
    lane, queued = lane_of(entries, largest, setup)

    left = lane.settle(start) + lane.commit()

    assert len(left) + lane.count == len(queued)
    if not lane.count:
        assert all(start + setup + 2 * request.rows > request.deadline_ns for request in queued)
        return
    rows = [request.rows for request in lane.items()]
    assert 0 < lane.window_rows == packed(rows, lane.window_rows) <= largest
    assert start + setup + 2 * lane.window_rows <= lane.head.deadline_ns
    assert lane.latest_ns >= start


@given(requests, st.integers(4, 20), st.integers(0, 8), st.integers(0, 40))
def test_what_is_doomed_is_not_in_the_window(entries: Budgets, largest: int, setup: int, start: int) -> None:
    """Looking which requests are doomed and settling agree when rows are equal."""
    lane, queued = lane_of([(deadline, 1) for deadline, _ in entries], largest, setup)
    count = lane.doomed(start)

    assert len(lane.settle(start) + lane.commit()) == count
    assert lane.doomed(start) == 0 if lane.count else count == len(queued)


@given(st.lists(st.tuples(st.sampled_from("pcpk"), st.integers(0, 50), st.integers(1, 4)), max_size=60))
def test_a_lane_is_a_sorted_list(steps: list[tuple[str, int, int]]) -> None:
    """Pushing, cancelling and popping in any order leave the requests sorted by deadline, with their rows right."""
    lane, _ = lane_of([(0, 1)], 64, 0)
    plain = lane.items()
    for what, number, rows in steps:
        if what == "p":
            request = QueuedRequest(rows, 0, number)
            lane.push(request)
            plain.append(request)
            plain.sort(key=lambda entry: entry.deadline_ns)
        elif plain and what == "c":
            victim = plain.pop(number % len(plain))
            lane.cancel(victim)
        elif plain:
            count = number % len(plain) + 1
            assert lane.pop(count) == plain[:count]
            del plain[:count]
        assert lane.count == len(plain)
        assert lane.rows == sum(request.rows for request in plain)
        assert lane.items() == plain
        if plain:
            whole = packed([request.rows for request in plain], number)
            assert lane.prefix(number)[1] == whole
