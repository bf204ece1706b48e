"""What each step of a request costs, in microseconds, without gRPC.

Every step is the server's own code on a real request: `tiny` (16 floats) and `identity` (1x3x224x224, 588 KiB). One
process pinned to the server's core; each step is repeated in chunks of a few milliseconds, the steps taking turns, and
the median of the chunks counts. Microseconds compare between steps; between machines only their proportions do.

    decode          bytes to a checked request with views of its tensors
    enqueue, next step, completed    the scheduler alone, per call, by batch size
    run             merge + session + split of one batch, beside a bare `session.run` of an array that is already there
    encode          a row of a batch to the answer's bytes
    record          the metrics of one batch
    to and fro      decode to answer through the queue and the worker thread, one request at a time: everything but gRPC
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.harness import ROOT, BenchmarkError, Settings, parse_settings, say
from benchmarks.models import MODELS, make_repository, model_file
from benchmarks.report import Figure, Report, Table, publish
from benchmarks.servers import pinned
from service.batch import BatchRecord, CloseReason
from service.clock import NEVER_NS, NS_PER_MS, NS_PER_S, now_ns
from service.engine.devices import Device, Devices
from service.engine.options import plan_session, share_threads
from service.engine.pool import Instance
from service.engine.runtime import Runtime
from service.engine.session import OnnxSession
from service.errors import ServiceError
from service.frontend.codec.decode import Decoder
from service.frontend.codec.encode import encode
from service.frontend.inference import InferenceHandler
from service.metrics import MetricsRegistry, ModelMetrics
from service.model import Model
from service.pb import grpc_service_pb2 as pb
from service.repository.layout import scan_model
from service.repository.loader import Loader, LoadOptions
from service.request import BatchOutput, InferenceRequest
from service.scheduler import (
    Dispatch,
    LatencyModel,
    QueuedRequest,
    QueuePolicy,
    Scheduler,
    Segment,
    Slot,
    bucket_ladder,
)

CHUNK_S = 0.005
# A stuck worker would hang the benchmark; no step here takes more than milliseconds.
ANSWER_TIMEOUT_S = 10.0
# A rung of the bucket ladder, so that a batch of it is neither padded nor trimmed.
BATCH = 15


@dataclass(slots=True)
class Step:
    """A step: `call` does it `per_call` times."""

    name: str
    call: Callable[[], object]
    per_call: int = 1


class _OneModel:
    """A repository of one model, as the codec and the handler see it."""

    generation = 1

    def __init__(self, model: Model) -> None:
        self._model = model

    def lookup(self, name: str, version: str) -> Model:  # noqa: ARG002
        return self._model


class _Call:
    """A call that keeps its answer and lets whoever waits for it go on."""

    deadline_ns = NEVER_NS
    on_cancel: Callable[[], object] | None = None

    def __init__(self) -> None:
        self.answer: bytes | ServiceError | None = None
        self._done = threading.Lock()
        self._done.acquire()

    def reply(self, parts: Sequence[bytes | memoryview], /) -> None:
        self.answer = b"".join(parts)
        self._done.release()

    def fail(self, error: ServiceError) -> None:
        self.answer = error
        self._done.release()

    def wait(self) -> None:
        """Until the answer is there. Raises `BenchmarkError` if it is an error or does not come."""
        if not self._done.acquire(timeout=ANSWER_TIMEOUT_S):
            raise BenchmarkError(f"no answer within {ANSWER_TIMEOUT_S:.0f} s")
        if not isinstance(self.answer, bytes):
            raise BenchmarkError(f"the request failed: {self.answer}")


def message_for(name: str) -> bytes:
    """A serialized request of one row."""
    row = MODELS[name].row
    request = pb.ModelInferRequest(model_name=name)
    request.inputs.add(name="x", datatype="FP32", shape=(1, *row))
    request.raw_input_contents.append(np.random.default_rng(0).random(row, dtype=np.float32).tobytes())
    return bytes(request.SerializeToString())


def scheduler_steps(rows: int) -> list[Step]:
    """The scheduler on `rows` one-row requests with an objective: enqueue them all, dispatch them as one batch."""
    buckets = bucket_ladder(64)
    table = {size: (5 + size // 2) * NS_PER_MS for size in buckets}
    latency = LatencyModel({(): table}, buckets)
    slot = Slot("cpu", 0)
    scheduler = Scheduler([slot])
    queue = scheduler.add_queue(QueuePolicy("m", ("cpu",), 64, slo_ns=200 * NS_PER_MS, buckets=buckets), latency)
    clock = [NS_PER_S]
    spent = {"enqueue": 0, "next_step": 0, "completed": 0}

    def cycle() -> None:
        now = clock[0]
        requests = [QueuedRequest(1, now, now + 200 * NS_PER_MS) for _ in range(rows)]
        lap = time.perf_counter_ns()
        for request in requests:
            scheduler.enqueue(queue, request, now)
        enqueued = time.perf_counter_ns()
        step = scheduler.next_step(slot, now)
        stepped = time.perf_counter_ns()
        if not isinstance(step, Dispatch) or step.rows != rows:
            raise BenchmarkError(f"expected a batch of {rows} rows, got {step}")
        actual_ns = table[step.bucket]  # as long as profiled, so that the estimate stays where it is
        clock[0] = now + actual_ns
        completing = time.perf_counter_ns()
        scheduler.completed(step, clock[0], actual_ns, 0)
        done = time.perf_counter_ns()
        spent["enqueue"] += enqueued - lap
        spent["next_step"] += stepped - enqueued
        spent["completed"] += done - completing

    def share(key: str) -> Callable[[], object]:
        def run() -> int:
            cycle()
            taken, spent[key] = spent[key], 0
            return taken

        return run

    return [
        Step(f"enqueue, 1 of {rows}", share("enqueue"), rows),
        Step(f"next step, {rows} queued", share("next_step")),
        Step(f"completed, batch of {rows}", share("completed")),
    ]


def model_steps(name: str, batches: Sequence[int], settings_models: Path, repository: Path) -> list[Step]:
    """Codec, session and metrics of one model, and the whole way through a running worker."""
    cpu = Device("cpu", "cpu", 0, 1, 1)
    runtime = Runtime([cpu])
    loader = Loader(runtime, Devices(cpu, (), (cpu,), "benchmark"), LoadOptions(64, 2 * NS_PER_S, None))
    files, _ = scan_model(repository / name)
    model = loader.load(files, files.versions[0]).model
    one = _OneModel(model)
    decoder, message = Decoder(one), message_for(name)
    handler = InferenceHandler(one, MetricsRegistry())  # type: ignore[arg-type]  # looks models up, nothing else
    decoded = decoder.decode(message)

    def request() -> InferenceRequest:
        now = now_ns()
        return InferenceRequest(1, now, NEVER_NS, 1, decoded.shape, decoded.inputs, handler, None, b"")

    session = OnnxSession(model_file(name, settings_models), plan_session(model.config, cpu))
    instance = Instance(session, model.inputs, model.outputs, model.max_batch_size)
    steps = [Step(f"decode, {name}", lambda: decoder.decode(message))]
    outputs: list[BatchOutput] = []
    for rows in batches:
        segments = [Segment(request(), 0, 1) for _ in range(rows)]
        array = np.random.default_rng(0).random((rows, *MODELS[name].row), dtype=np.float32)
        feeds = {"x": (model.inputs[0], array)}
        outputs = instance.run(segments, rows, rows).outputs
        steps += [
            Step(f"run, {name}, batch of {rows}", lambda s=segments, r=rows: instance.run(s, r, r)),  # type: ignore[misc]
            Step(f"bare session, {name}, batch of {rows}", lambda f=feeds: session.run(f, model.outputs)),  # type: ignore[misc]
        ]
    steps.append(Step(f"encode, {name}", lambda: encode(decoded.plan, b"", outputs, 0, 1)))

    def to_and_fro() -> None:
        call = _Call()
        handler(message, call)
        call.wait()

    runtime.start()
    steps.append(Step(f"to and fro, {name}", to_and_fro))
    return steps


def metric_steps() -> list[Step]:
    """Recording batches of 1 and of `BATCH` requests."""
    shard = ModelMetrics("m", "1").shard()
    steps = []
    for rows in (1, BATCH):
        now = NS_PER_S
        record = BatchRecord(
            "cpu", rows, rows, rows, CloseReason.DRAINED, now, now + 10, now + 5000, now + 6000, 5500, 10**6
        )
        requests = [QueuedRequest(1, now - 1000 * i, now + NS_PER_MS) for i in range(rows)]
        steps.append(Step(f"record, batch of {rows}", lambda b=record, r=requests: shard.record_batch(b, r)))  # type: ignore[misc]
    return steps


def time_steps(steps: Sequence[Step], rounds: int) -> dict[str, float]:
    """Median microseconds per step over `rounds` chunks; a call that returns an int says itself how many ns it took."""
    chunks: dict[str, list[float]] = {step.name: [] for step in steps}
    for lap in range(rounds + 1):
        for step in steps:
            calls, reported, start = 0, 0, time.perf_counter_ns()
            while time.perf_counter_ns() - start < CHUNK_S * 1e9:
                result = step.call()
                reported += result if isinstance(result, int) else 0
                calls += 1
            took = reported or time.perf_counter_ns() - start
            if lap:  # the first round warms up
                chunks[step.name].append(took / calls / step.per_call / 1e3)
    return {name: statistics.median(values) for name, values in chunks.items()}


def run(settings: Settings) -> Report:
    """Time every step in a process pinned to the server's core; raises `BenchmarkError` if a step does not work."""
    say("microbench: every step of a request")
    repository = make_repository(settings.out / "microbench", settings.models, {"tiny": None, "identity": None})
    command = [sys.executable, "-m", "benchmarks.microbench", "--worker", str(repository), str(settings.models)]
    rounds = max(3, round(settings.window_s / CHUNK_S / 4))
    done = subprocess.run(
        pinned(settings.server_core, [*command, str(rounds)]), capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode != 0:
        raise BenchmarkError(f"microbench failed:\n{done.stderr[-2000:]}")
    times: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    report = Report("microbench", details=dict(times))
    report.tables.append(
        Table("Cost of each step", ("step", "us"), [[name, f"{us:.2f}"] for name, us in times.items()])
    )
    for name in ("decode, tiny", f"enqueue, 1 of {BATCH}", "encode, tiny", "to and fro, tiny"):
        report.figures.append(Figure("microbench", name, (times[name],), "us"))
    return report


def work(repository: Path, models: Path, rounds: int) -> None:
    """The pinned process: print the times as JSON."""
    share_threads(1)  # as the server does at start
    steps = [step for rows in (1, BATCH) for step in scheduler_steps(rows)]
    steps += metric_steps()
    steps += model_steps("tiny", (1, BATCH), models, repository)
    steps += model_steps("identity", (1, 7), models, repository)
    print(json.dumps(time_steps(steps, rounds)))


def main() -> None:
    """`--worker REPOSITORY MODELS ROUNDS` is what `run` starts; anything else is the benchmark."""
    if sys.argv[1:2] == ["--worker"]:
        parser = argparse.ArgumentParser()
        parser.add_argument("--worker", nargs=3)
        repository, models, rounds = parser.parse_args().worker
        work(Path(repository), Path(models), int(rounds))
        return
    settings = parse_settings("Cost of each step of a request", window_s=1.0, quick_window_s=0.2)
    publish(settings, [run(settings)], "microbench")


if __name__ == "__main__":
    main()
