"""A run from start to end: ask the server for its models, draw the plan, start the workers, watch them, collect.

Workers are processes that do nothing but send and listen. They say when they are connected, are told one moment to
start at, and hand back what happened. Nothing of the parent is in their way meanwhile: it reads counters that they
share, and scrapes the server.
"""

from __future__ import annotations

import datetime as dt
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np

from loadtests.connection import Throttle, Tls
from loadtests.errors import LoadTestError
from loadtests.model_info import ModelInfo, asked
from loadtests.outcome import OK
from loadtests.payload import Template, templates
from loadtests.plan import Plan, build_plan, capacity_of, pacer_of
from loadtests.records import EntryInfo, Run, RunInfo
from loadtests.scenario import Closed, Criteria, Entry, Scenario
from loadtests.scrape import Scraper
from loadtests.worker import COUNTERS, EntryJob, Job, Result, main

NS = 1_000_000_000
# Starting Python and connecting, and how far ahead the common start is: all workers must have heard of it.
READY_S = 60.0
AHEAD_NS = 200_000_000
# Beyond its plan and drain a worker needs this long at most to hand back its records.
HAND_BACK_S = 60.0
PROGRESS_S = 0.2
# Measuring the capacity: a closed loop this wide for this long, after a warm-up.
CAPACITY_CONCURRENCY = 64
CAPACITY_S = 4.0
CAPACITY_WARM_UP_S = 1.0
# Points of the curve of intended rates.
RATE_POINTS = 240


@dataclass(frozen=True, slots=True)
class Progress:
    """What is known while a run goes on: seconds since its start, and counts of all workers."""

    at_s: float
    counters: Sequence[int]


Watch = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A scenario whose server has been asked: what each entry sends."""

    scenario: Scenario
    server_name: str
    models: tuple[ModelInfo, ...]
    templates: tuple[tuple[Template, ...], ...]
    factor: float = 1.0  # all rates are this many times the scenario's

    @property
    def counts(self) -> list[int]:
        return [len(made) for made in self.templates]


def tls_of(scenario: Scenario) -> Tls | None:
    """The scenario's TLS settings as plain values."""
    given = scenario.tls
    if given is None:
        return None

    def text(path: object) -> str | None:
        return None if path is None else str(path)

    return Tls(text(given.ca), text(given.certificate), text(given.key), given.name)


def prepare(scenario: Scenario) -> Prepared:
    """Ask the server for the models and make all messages. Raises `LoadTestError`."""
    with asked(scenario.server, tls_of(scenario), scenario.metadata) as server:
        name = server.name_and_version()
        models = tuple(server.model(entry.model, entry.version) for entry in scenario.load)
    made = tuple(
        tuple(templates(entry, model, [scenario.seed, 100, index]))
        for index, (entry, model) in enumerate(zip(scenario.load, models, strict=True))
    )
    return Prepared(scenario, name, models, made)


def measure_capacity(prepared: Prepared, watch: Watch | None = None) -> float:
    """Answers per second of a closed loop on the scenario's own mix: the unit of rates such as 0.8x.

    Raises `LoadTestError` when nothing is answered.
    """
    plain = [entry.model_copy(update={"arrivals": None, "cancel": None, "slow": None, "criteria": None, "rpc": "unary"})
             for entry in prepared.scenario.load]  # fmt: skip
    scenario = prepared.scenario.model_copy(
        update={
            "name": "capacity",
            "arrivals": Closed(kind="closed", concurrency=CAPACITY_CONCURRENCY),
            "duration": CAPACITY_S,
            "warm_up": CAPACITY_WARM_UP_S,
            "capacity": None,
            "load": tuple(plain),
            "criteria": Criteria(),
        }
    )
    run = execute(Prepared(scenario, prepared.server_name, prepared.models, prepared.templates), None, watch)
    records = run.counted
    answered = records[(records["status"] == OK) & (records["done_ns"] <= round(scenario.total_s * NS))]
    if not len(answered):
        raise LoadTestError(
            f"the capacity of {scenario.server} cannot be measured: none of {len(records)} requests was answered; "
            f"{'; '.join(word for words in run.info.messages.values() for word in words) or 'no message'}"
        )
    return len(answered) / CAPACITY_S


def execute(prepared: Prepared, capacity: float | None, watch: Watch | None = None) -> Run:
    """Run a prepared scenario. `capacity` is what was measured, if the scenario asks for it.

    Raises `LoadTestError` when a worker cannot connect or dies; requests that fail are results.
    """
    scenario = prepared.scenario
    capacity = capacity_of(scenario, capacity)
    plan = build_plan(scenario, prepared.counts, capacity, prepared.factor)
    jobs = [_job(prepared, plan, worker) for worker in range(scenario.workers)]
    context = multiprocessing.get_context("spawn")
    counters = [context.RawArray("q", COUNTERS) for _ in jobs]
    workers: list[tuple[BaseProcess, Any]] = []
    scraper = Scraper(scenario.metrics)
    try:
        for job, shared in zip(jobs, counters, strict=True):
            ours, theirs = context.Pipe()
            process = context.Process(target=main, args=(job, theirs, shared), name=f"worker-{job.worker}")
            process.start()
            theirs.close()
            workers.append((process, ours))
        for started, pipe in workers:
            _expect_ready(started, pipe)
        started_at = dt.datetime.now(dt.UTC)
        start_ns = time.monotonic_ns() + AHEAD_NS
        for _, pipe in workers:
            pipe.send(start_ns)
        scraper.start(start_ns)
        results = _collect(scenario, workers, start_ns, counters, watch)
        scraper.stop()
    finally:
        for started, _ in workers:
            if started.is_alive():
                started.terminate()
            started.join(5)
    records = np.concatenate([result.records for result in results if result.records is not None])
    records = records[np.lexsort((records["index"], records["intended_ns"]))]
    messages: dict[str, list[str]] = {}
    for result in results:
        for status, words in result.messages.items():
            known = messages.setdefault(str(status), [])
            known += [word for word in words if word not in known]
    info = RunInfo(
        name=scenario.name,
        description=scenario.description,
        server=scenario.server,
        server_name=prepared.server_name,
        started_at=started_at.isoformat(timespec="seconds"),
        start_ns=start_ns,
        seed=scenario.seed,
        plan=plan.digest(),
        warm_up_s=scenario.warm_up,
        duration_s=scenario.duration,
        workers=scenario.workers,
        closed=scenario.closed,
        capacity=capacity,
        entries=[EntryInfo(e.title, e.model, scenario.slo_of(e), _arrivals_text(scenario, e)) for e in scenario.load],
        scenario=scenario.model_dump(mode="json", by_alias=True, exclude_defaults=True),
        worker_cpu=[round(result.cpu_s / max(result.wall_s, 1e-9), 3) for result in results],
        messages=messages,
        rates=_rates(scenario, capacity, prepared.factor),
        client={
            "python": platform.python_version(),
            "machine": platform.machine(),
            "system": f"{platform.system()} {platform.release()}",
            "cores": str(os.cpu_count()),
        },
        scrapes=list(scraper.scrapes),
        scrape_failures=scraper.failures,
    )
    return Run(info, records)


def _job(prepared: Prepared, plan: Plan, worker: int) -> Job:
    scenario = prepared.scenario
    entries = tuple(
        EntryJob(
            templates=made,
            slo_ns=round((scenario.slo_of(entry) or 0) * NS),
            deadline_ns=round((entry.deadline or 0) * NS),
            stream=entry.rpc == "stream",
            throttle=Throttle(entry.slow.bytes, round(entry.slow.every * NS)) if entry.slow else None,
            connections=entry.connections,
        )
        for entry, made in zip(scenario.load, prepared.templates, strict=True)
    )
    return Job(
        worker=worker,
        workers=scenario.workers,
        address=scenario.server,
        tls=tls_of(scenario),
        metadata=tuple(scenario.metadata.items()),
        connections=scenario.connections,
        drain_ns=round(scenario.drain * NS),
        entries=entries,
        plan=plan.share(worker, scenario.workers),
    )


def _expect_ready(process: BaseProcess, pipe: Any) -> None:
    try:
        said = pipe.recv() if pipe.poll(READY_S) else None
    except EOFError:
        said = None
    if isinstance(said, Result):
        raise LoadTestError(said.error)
    if said != "ready":
        raise LoadTestError(f"{process.name} did not start within {READY_S:.0f} s (exit code {process.exitcode})")


def _collect(
    scenario: Scenario,
    workers: Sequence[tuple[BaseProcess, Any]],
    start_ns: int,
    counters: Sequence[Any],
    watch: Watch | None,
) -> list[Result]:
    """Wait for all workers, showing how they are doing."""
    limit_s = scenario.total_s + scenario.drain + HAND_BACK_S
    results: dict[int, Result] = {}
    while len(results) < len(workers):
        now_s = (time.monotonic_ns() - start_ns) / NS
        for index, (process, pipe) in enumerate(workers):
            if index in results or not pipe.poll(PROGRESS_S if watch else 1.0):
                continue
            try:
                result: Result = pipe.recv()
            except EOFError:
                result = Result(error=f"it ended with exit code {process.exitcode}")
            if result.error:
                raise LoadTestError(f"{process.name}: {result.error}")
            results[index] = result
        if watch is not None:
            watch(Progress(max(0.0, now_s), [sum(column) for column in zip(*counters, strict=True)]))
        if now_s > limit_s:
            raise LoadTestError(f"a worker has not ended {HAND_BACK_S:.0f} s after the run")
    return [results[index] for index in range(len(workers))]


def _rates(scenario: Scenario, capacity: float | None, factor: float) -> dict[str, list[float]]:
    """The intended rate over the measured part, summed over all pacers."""
    if scenario.closed:
        return {}
    at = np.linspace(0.0, scenario.duration, RATE_POINTS, endpoint=False)
    total = np.zeros(RATE_POINTS)
    everyone = [scenario.arrivals, *(entry.arrivals for entry in scenario.load)]
    for arrivals in everyone:
        if arrivals is not None and not isinstance(arrivals, Closed):
            pacer = pacer_of(arrivals, capacity, [scenario.seed, 0])
            total += np.array([pacer.rate(float(second), scenario.duration) for second in at]) * factor
    return {"at_s": [round(float(s), 4) for s in at], "per_second": [round(float(r), 3) for r in total]}


def _arrivals_text(scenario: Scenario, entry: Entry) -> str:
    arrivals = entry.arrivals or scenario.arrivals
    assert arrivals is not None
    if isinstance(arrivals, Closed):
        return f"closed loop, {arrivals.concurrency} in flight"
    return arrivals.kind
