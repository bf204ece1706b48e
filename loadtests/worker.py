"""A worker: one process that sends its share of the plan on time and writes down what came of it.

One thread, one loop: send what is due, then wait until the next is due or something arrives. Answers that arrive
together do not hold up what becomes due while they are taken in. Nothing is allocated or decided in the loop that could
be beforehand, the collector is off, and times are plain integers: at 5,000 requests a second there are 200 us for each.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import heapq
import os
import signal
import time
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from typing import Any

import numpy as np

from loadtests.connection import Connection, Throttle, Tls, wait
from loadtests.errors import LoadTestError
from loadtests.http2 import Ended, Event, Message, encode_headers
from loadtests.outcome import (
    CANCELLED_BY_PLAN,
    CLIENT_DEADLINE,
    CONNECTION_LOST,
    NOT_SENT,
    OK,
    RECORD,
    RESOURCE_EXHAUSTED,
    UNAVAILABLE,
    UNFINISHED,
    Records,
)
from loadtests.payload import Template
from loadtests.plan import Plan
from service.pb import grpc_service_pb2 as pb

NS = 1_000_000_000
# Requests sent before answers are looked at again: a burst must not make answers look late.
SEND_BATCH = 8
# The loop looks at timers at least this often.
MAX_WAIT_S = 0.05
# How often opening a broken connection again is tried, seconds.
RECONNECT_S = 0.2
# Counters shared with the parent, by position.
SENT, ANSWERED, IN_SLO, LATE, REFUSED, OTHER, LAG_NS = range(7)
COUNTERS = 7
# Words of the server for an error that are kept for the report, per status.
MAX_MESSAGES = 3

# Linux's <sys/prctl.h>. Running before others needs a privilege; without it the worker takes its turn.
PR_SET_PDEATHSIG = 1
PR_SET_TIMERSLACK = 29
NICE = -10

INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"


@dataclass(frozen=True, slots=True)
class EntryJob:
    """What a worker needs to know of one entry of the load."""

    templates: tuple[Template, ...]
    slo_ns: int
    deadline_ns: int
    stream: bool
    throttle: Throttle | None
    connections: int  # of its own; 0 = shared


@dataclass(frozen=True, slots=True)
class Job:
    """A worker's share of a run."""

    worker: int
    workers: int
    address: str
    tls: Tls | None
    metadata: tuple[tuple[str, str], ...]
    connections: int
    drain_ns: int
    entries: tuple[EntryJob, ...]
    plan: Plan


@dataclass(slots=True)
class Result:
    """What a worker hands back. `messages` are a server's words by status; `error` why it could not run."""

    records: Records | None = None
    messages: dict[int, list[str]] = field(default_factory=dict)
    cpu_s: float = 0.0
    wall_s: float = 0.0
    error: str = ""


def main(job: Job, pipe: Pipe, counters: Any) -> None:
    """Entry point of the process: connect, say "ready", wait for the start time, run, hand back a `Result`."""
    try:
        _end_with_parent()
        _be_punctual()
        worker = _Worker(job, counters)
        worker.connect()
        pipe.send("ready")
        start_ns = pipe.recv()
        if start_ns is None:  # the run is off
            return
        pipe.send(worker.run(start_ns))
    except (LoadTestError, OSError) as error:
        pipe.send(Result(error=str(error)))
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        return


def _end_with_parent() -> None:
    """Send no more when whoever started this is gone, however it went (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _be_punctual() -> None:
    """Wake up when asked, as far as the system lets us: no timer slack (50 us by default on Linux), and before
    others."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except (OSError, AttributeError):
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, NICE)


def grpc_headers(job: Job, path: str, deadline_ns: int) -> bytes:
    """The header block of a call."""
    headers = [
        (":method", "POST"),
        (":scheme", "https" if job.tls else "http"),
        (":path", path),
        (":authority", job.tls.name if job.tls and job.tls.name else job.address),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("user-agent", "onclock-loadtests"),
    ]
    if deadline_ns:
        # At most eight digits (gRPC over HTTP/2): nanoseconds as far as they go, then microseconds.
        unit = next(u for u in ((1, "n"), (1_000, "u"), (1_000_000, "m"), (NS, "S")) if deadline_ns // u[0] < 10**8)
        headers.append(("grpc-timeout", f"{deadline_ns // unit[0]}{unit[1]}"))
    return encode_headers([*headers, *job.metadata])


class _Lane:
    """The connections an entry's requests travel on, used in turn."""

    def __init__(self, connections: list[Connection]) -> None:
        self.connections = connections
        self.next = 0
        # Requests that no connection may open a stream for now.
        self.waiting: deque[int] = deque()

    def take(self) -> Connection | None:
        """The next connection that may open a stream."""
        for _ in range(len(self.connections)):
            connection = self.connections[self.next]
            self.next = (self.next + 1) % len(self.connections)
            if connection.http2.can_open:
                return connection
        return None


class _Worker:
    def __init__(self, job: Job, counters: Any) -> None:
        self._job = job
        self._counters = counters
        plan = job.plan
        self._closed = plan.concurrency > 0
        self._intended: Sequence[int] = array("q", plan.intended_ns.tobytes())
        self._entry: Sequence[int] = array("H", plan.entry.tobytes())
        self._template: Sequence[int] = array("I", plan.template.tobytes())
        self._deadline: Sequence[int] = array("q", plan.deadline_ns.tobytes())
        self._cancel: Sequence[int] = array("q", plan.cancel_ns.tobytes())
        count = 0 if self._closed else len(plan)
        self._sent = array("q", [-1]) * count
        self._done = array("q", [-1]) * count
        self._status = array("h", [NOT_SENT]) * count
        self._received = array("I", [0]) * count
        # Closed loop: what was sent, as indices into the cycle; intended is when it was sent.
        self._taken = array("I")
        self._lanes: list[_Lane] = []
        self._connections: list[Connection] = []
        # The request on a stream of a connection.
        self._calls: dict[Connection, dict[int, int]] = {}
        self._where: dict[int, tuple[Connection, int]] = {}
        # Long streams: by lane, connection -> (stream id, requests out by their id).
        self._streams: dict[tuple[int, Connection], tuple[int, dict[str, int]]] = {}
        self._timers: list[tuple[int, int, int]] = []  # due, request, status
        self._messages: dict[int, list[str]] = {}
        self._open = 0
        self._reconnect_ns = 0
        # Open loop: the next request to be sent, and how many there are.
        self._position = self._count = 0

    # ---------------------------------------------------------------- set-up

    def connect(self) -> None:
        """Open all connections. Raises `LoadTestError`."""
        job = self._job
        shared: _Lane | None = None
        for entry in job.entries:
            if entry.throttle is not None or entry.connections:
                count = entry.connections or job.connections
                lane = _Lane([self._opened(entry.throttle) for _ in range(count)])
            else:
                if shared is None:
                    shared = _Lane([self._opened(None) for _ in range(job.connections)])
                lane = shared
            self._lanes.append(lane)
        self._headers = [
            grpc_headers(job, STREAM_INFER if e.stream else INFER, 0 if e.stream else e.deadline_ns)
            for e in job.entries
        ]

    def _opened(self, throttle: Throttle | None) -> Connection:
        connection = Connection(self._job.address, self._job.tls, throttle)
        self._connections.append(connection)
        self._calls[connection] = {}
        return connection

    # ---------------------------------------------------------------- the run

    def run(self, start_ns: int) -> Result:
        """Send the plan; times count from `start_ns` on the monotonic clock."""
        gc.collect()
        gc.freeze()
        gc.disable()
        self._start = start_ns
        cpu = time.process_time()
        try:
            if self._closed:
                self._run_closed()
            else:
                self._run_open()
        finally:
            gc.enable()
            for connection in self._connections:
                connection.close()
        wall = time.monotonic_ns() - start_ns
        return Result(self._records(), self._messages, time.process_time() - cpu, wall / NS)

    def _run_open(self) -> None:
        clock, start, intended = time.monotonic_ns, self._start, self._intended
        self._count = count = len(intended)
        end_ns = self._job.plan.end_ns
        while True:
            now = clock() - start
            self._send_due(now)
            if self._timers and self._timers[0][0] <= now:
                self._fire(now)
            position = self._position
            if position >= count and not self._open:
                return
            if now >= end_ns + self._job.drain_ns:
                self._give_up()
                return
            due = intended[position] if position < count else end_ns + self._job.drain_ns
            self._turn(now, due)

    def _send_due(self, now: int) -> None:
        """Send what is due at `now`, at most `SEND_BATCH` requests."""
        first = position = self._position
        last = min(first + SEND_BATCH, self._count)
        while position < last and self._intended[position] <= now:
            self._send(position)
            position += 1
        if position > first:
            self._position = position
            self._flush(time.monotonic_ns() - self._start)
            self._stamp(first, position, time.monotonic_ns() - self._start)

    def _run_closed(self) -> None:
        clock, start = time.monotonic_ns, self._start
        end_ns, concurrency = self._job.plan.end_ns, self._job.plan.concurrency
        cycle = len(self._intended)
        while True:
            now = clock() - start
            first = len(self._sent)
            while now < end_ns and self._open < concurrency and len(self._sent) - first < SEND_BATCH:
                self._taken.append(len(self._sent) % cycle)
                for column, value in (
                    (self._sent, -1),
                    (self._done, -1),
                    (self._status, NOT_SENT),
                    (self._received, 0),
                ):
                    column.append(value)
                self._send(len(self._sent) - 1)
            if len(self._sent) > first:
                self._flush(clock() - start)
                self._stamp(first, len(self._sent), clock() - start)
            if self._timers and self._timers[0][0] <= now:
                self._fire(now)
            if now >= end_ns and not self._open:
                return
            if now >= end_ns + self._job.drain_ns:
                self._give_up()
                return
            self._turn(now, end_ns if now < end_ns else end_ns + self._job.drain_ns)

    def _turn(self, now: int, due: int) -> None:
        """Wait until `due` or until there is something to hear or say; hear it."""
        if self._timers:
            due = min(due, self._timers[0][0])
        for connection in self._connections:
            turn = connection.next_turn_ns()
            if turn > now:
                due = min(due, turn)
        readable = wait(self._connections, now, min(MAX_WAIT_S, (due - now) / NS))
        if readable:
            heard = time.monotonic_ns() - self._start
            for connection in readable:
                for event in connection.read(heard):
                    self._heard(connection, event, heard)
                    if self._position < self._count:
                        self._send_due(time.monotonic_ns() - self._start)
        for connection in self._connections:
            if connection.gone or (connection.http2.closing and not connection.http2.in_flight):
                self._replace(connection, now)
        self._flush(time.monotonic_ns() - self._start)

    # ---------------------------------------------------------------- sending

    def _slot(self, request: int) -> int:
        """The request's position in the plan."""
        return self._taken[request] if self._closed else request

    def _send(self, request: int) -> None:
        slot = self._slot(request)
        entry = self._entry[slot]
        lane = self._lanes[entry]
        self._open += 1
        self._status[request] = UNFINISHED
        if all(connection.gone for connection in lane.connections):
            # As a client that does not wait for a server: it fails at once.
            self._finish(request, time.monotonic_ns() - self._start, CONNECTION_LOST, 0)
        elif lane.waiting or not self._start_call(request, slot, entry, lane):
            lane.waiting.append(request)

    def _start_call(self, request: int, slot: int, entry: int, lane: _Lane) -> bool:
        job = self._job.entries[entry]
        body = job.templates[self._template[slot]].body
        if job.stream:
            return self._stream_call(request, entry, lane, body)
        connection = lane.take()
        if connection is None:
            return False
        stream = connection.http2.open(self._headers[entry], body)
        self._calls[connection][stream] = request
        if self._deadline[slot] or self._cancel[slot]:
            self._where[request] = (connection, stream)
            self._arm(request, slot)
        return True

    def _stream_call(self, request: int, entry: int, lane: _Lane, body: bytes) -> bool:
        """One more message on the lane's stream of the next connection. The request's id tells its answer."""
        connection = lane.connections[lane.next]
        lane.next = (lane.next + 1) % len(lane.connections)
        key = (entry, connection)
        found = self._streams.get(key)
        if found is None:
            if not connection.http2.can_open:
                return False
            stream = connection.http2.open(self._headers[entry], b"", end=False, messages=True)
            found = self._streams[key] = (stream, {})
        name = str(request)
        found[1][name] = request
        # Field 3 (`id`) behind the encoded message: protobuf takes fields in any order.
        message = body[5:] + b"\x1a" + bytes((len(name),)) + name.encode()
        connection.http2.send(found[0], b"\x00" + len(message).to_bytes(4, "big") + message)
        return True

    def _arm(self, request: int, slot: int) -> None:
        now = time.monotonic_ns() - self._start
        if self._deadline[slot]:
            heapq.heappush(self._timers, (now + self._deadline[slot], request, CLIENT_DEADLINE))
        if self._cancel[slot]:
            heapq.heappush(self._timers, (now + self._cancel[slot], request, CANCELLED_BY_PLAN))

    def _fire(self, now: int) -> None:
        """End what has run out of time, as a gRPC client does: reset the stream, answer the caller."""
        while self._timers and self._timers[0][0] <= now:
            _, request, status = heapq.heappop(self._timers)
            where = self._where.pop(request, None)
            if where is None:
                continue
            connection, stream = where
            self._calls[connection].pop(stream, None)
            connection.http2.cancel(stream)
            self._finish(request, now, status, 0)
        self._flush(now)

    def _flush(self, now: int) -> None:
        for connection in self._connections:
            if connection.http2.out and connection.wants_write(now):
                connection.write(now)

    def _stamp(self, first: int, last: int, now: int) -> None:
        """When requests were handed to the kernel. Those that wait for a stream are stamped when they get one."""
        waiting = {request for lane in self._lanes for request in lane.waiting}
        sent = self._sent
        for request in range(first, last):
            if request not in waiting:
                sent[request] = now
        self._counters[SENT] += last - first
        if not self._closed and last:
            self._counters[LAG_NS] = max(self._counters[LAG_NS], now - self._intended[first])

    # ---------------------------------------------------------------- hearing

    def _heard(self, connection: Connection, event: Event, now: int) -> None:
        if isinstance(event, Message):
            self._answered_on_stream(connection, event, now)
            return
        request = self._calls[connection].pop(event.stream, None)
        if request is None:
            self._stream_ended(connection, event, now)
            return
        if self._where:
            self._where.pop(request, None)
        if event.status != OK and event.message:
            kept = self._messages.setdefault(event.status, [])
            if len(kept) < MAX_MESSAGES and event.message not in kept:
                kept.append(event.message)
        self._finish(request, now, event.status, event.received)

    def _answered_on_stream(self, connection: Connection, event: Message, now: int) -> None:
        answer = pb.ModelStreamInferResponse.FromString(event.data)
        for (_, where), (stream, out) in self._streams.items():
            if where is connection and stream == event.stream:
                request = out.pop(answer.infer_response.id, None)
                if request is None and answer.error_message and out:
                    request = out.pop(next(iter(out)))  # without an id: the oldest
                if request is None:
                    return
                if answer.error_message:
                    self._messages.setdefault(2, [answer.error_message])
                self._finish(request, now, 2 if answer.error_message else OK, len(event.data))
                return

    def _stream_ended(self, connection: Connection, event: Ended, now: int) -> None:
        """A long stream is over: what was out on it gets its status."""
        for key, (stream, out) in list(self._streams.items()):
            if key[1] is connection and stream == event.stream:
                del self._streams[key]
                status = event.status if event.status else UNAVAILABLE  # ended in the middle
                if event.message:
                    self._messages.setdefault(status, [event.message])
                for request in out.values():
                    self._finish(request, now, status, 0)

    def _finish(self, request: int, now: int, status: int, received: int) -> None:
        self._done[request] = now
        self._status[request] = status
        self._received[request] = received
        self._open -= 1
        slot = self._slot(request)
        entry = self._entry[slot]
        counters = self._counters
        counters[ANSWERED] += 1
        if status == OK:
            slo = self._job.entries[entry].slo_ns
            since = self._sent[request] if self._closed else self._intended[request]
            counters[LATE if slo and now - since > slo else IN_SLO] += 1
        elif status in (UNAVAILABLE, RESOURCE_EXHAUSTED):
            counters[REFUSED] += 1
        else:
            counters[OTHER] += 1
        lane = self._lanes[entry]
        while lane.waiting:
            waiting = lane.waiting[0]
            waiting_slot = self._slot(waiting)
            if not self._start_call(waiting, waiting_slot, self._entry[waiting_slot], lane):
                break
            lane.waiting.popleft()
            self._sent[waiting] = now

    def _replace(self, connection: Connection, now: int) -> None:
        """Open a connection again that the server has closed; not too often when it does not come back."""
        if now < self._reconnect_ns:
            return
        self._reconnect_ns = now + int(RECONNECT_S * NS)
        try:
            fresh = Connection(self._job.address, self._job.tls, connection.throttle)
        except LoadTestError:
            return
        for lane in {id(lane): lane for lane in self._lanes}.values():
            lane.connections = [fresh if c is connection else c for c in lane.connections]
        self._connections = [fresh if c is connection else c for c in self._connections]
        self._calls[fresh] = {}
        connection.close()

    def _give_up(self) -> None:
        """The drain time is over. What is still out stays UNFINISHED, what waits for a stream was never sent."""
        for lane in self._lanes:
            for request in lane.waiting:
                self._status[request] = NOT_SENT
            lane.waiting.clear()

    # ---------------------------------------------------------------- the result

    def _records(self) -> Records:
        job, plan = self._job, self._job.plan
        count = len(self._sent)
        slots = np.frombuffer(self._taken, np.uint32) if self._closed else np.arange(count)
        records = np.zeros(count, RECORD)
        records["index"] = np.arange(count) * job.workers + job.worker
        records["worker"] = job.worker
        records["entry"] = plan.entry[slots]
        records["sent_ns"] = np.frombuffer(self._sent, np.int64) if count else []
        records["done_ns"] = np.frombuffer(self._done, np.int64) if count else []
        records["status"] = np.frombuffer(self._status, np.int16) if count else []
        records["received_bytes"] = np.frombuffer(self._received, np.uint32) if count else []
        records["intended_ns"] = records["sent_ns"] if self._closed else plan.intended_ns
        records["deadline_ns"] = plan.deadline_ns[slots]
        for index, entry in enumerate(job.entries):
            mine = records["entry"] == index
            chosen = plan.template[slots][mine]
            for column, values in (
                ("rows", [t.rows for t in entry.templates]),
                ("priority", [t.priority for t in entry.templates]),
                ("variant", [t.variant for t in entry.templates]),
                ("sent_bytes", [len(t.body) for t in entry.templates]),
            ):
                records[column][mine] = np.array(values)[chosen]
        return records
