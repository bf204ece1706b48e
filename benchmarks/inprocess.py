"""The server's scheduler, workers and session pool without its front end, fed from memory at recorded times.

One machine's cores cannot send what a GPU can answer, so past a few thousand requests a second the load has to come
from within. `InProcess` is a child process with the model loaded as the server loads it; it replays arrivals handed to
it and hands back one record per request, in the layout of the load generator's. The thread that feeds has a core of its
own, the workers have the server's; they share the interpreter's lock, as the server's ingress does with its workers.

    python -m benchmarks.inprocess REPOSITORY MODEL DEVICE SERVER_CORE CLIENT_CORE     (the child)

A record's lag is how late the request was handed over; latency counts from when it was due, like its deadline.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import ROOT, BenchmarkError, Settings
from benchmarks.load import RECORD, Records
from benchmarks.models import MODELS
from benchmarks.yardsticks import Seconds

# Time for the last answers after the last arrival, seconds: as the load generator waits.
DRAIN_S = 3.0
UNFINISHED = -1
_PR_SET_TIMERSLACK = 29
# How long the feeding thread waits for a worker to leave the interpreter, seconds. The default is 5 ms.
SWITCH_S = 0.0002
# Time from the command to the first arrival.
LEAD_NS = 50_000_000


@dataclass(frozen=True, slots=True)
class Replay:
    """What came of a replay, and the CPU time it took: cores of everything but the feeding thread."""

    records: Records
    cores: float


class InProcess:
    """A loaded model in a child process. A context manager."""

    def __init__(self, settings: Settings, repository: Path, name: str) -> None:
        self._folder = settings.out
        command = [sys.executable, "-m", "benchmarks.inprocess", str(repository), name, settings.device]
        command += [str(settings.server_core), str(settings.client_core)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )

    def __enter__(self) -> InProcess:
        self._ask("")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def replay(self, arrivals_s: Seconds) -> Replay:
        """Offer a row at each of these times. Raises `BenchmarkError` when the child has ended."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "arrivals.npy"
        np.save(path, arrivals_s)
        answer = self._ask(str(path))
        return Replay(np.fromfile(answer["records"], dtype=RECORD), answer["cores"])

    def _ask(self, line: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            said = self._process.communicate()[1][-1500:]
            raise BenchmarkError(f"the model in a process of its own has ended: {said}")
        return json.loads(answer)


class Answers:
    """The responder of replayed requests: notes when each was answered, and how. `context` is the request's number."""

    def __init__(self, count: int) -> None:
        self.done_ns = [0] * count
        self.status = [UNFINISHED] * count
        self.left = count

    def answer(self, request: Any, outputs: Sequence[Any], first_row: int) -> None:
        # What the encoder takes of it: views of the rows' bytes.
        for output in outputs:
            _ = output.view[first_row * output.row_bytes : (first_row + request.rows) * output.row_bytes]
        self._note(request.context, 0)

    def fail(self, request: Any, error: Any) -> None:
        from service.frontend.status import STATUS

        self._note(request.context, STATUS[type(error)].value[0])

    def hold(self) -> None: ...

    def flush(self) -> None: ...

    def _note(self, number: int, status: int) -> None:
        self.done_ns[number] = time.monotonic_ns()
        self.status[number] = status
        self.left -= 1


def records_of(due_ns: Sequence[int], sent_ns: Sequence[int], answers: Answers, start_ns: int, end_ns: int) -> Records:
    """One record per request. What has no answer by `end_ns` is unfinished, and as late as that."""
    records = np.zeros(len(due_ns), RECORD)
    due, sent, done = (np.array(times, np.int64) for times in (due_ns, sent_ns, answers.done_ns))
    records["index"] = np.arange(len(due))
    records["status"] = answers.status
    records["rows"] = 1
    records["intended_ns"] = due - start_ns
    records["lag_ns"] = sent - due
    records["latency_ns"] = np.where(done > 0, done, end_ns) - due
    return records


def feed(model: Any, arrivals_s: Seconds, row: bytes, shape: Any) -> tuple[Records, int]:
    """Submit a row at each of these times, on this thread; the records, and the thread's own CPU time in ns."""
    from service.clock import NEVER_NS
    from service.request import InferenceRequest

    answers = Answers(len(arrivals_s))
    start_ns = time.monotonic_ns() + LEAD_NS
    due_ns = (start_ns + (arrivals_s * 1e9).astype(np.int64)).tolist()
    sent_ns = [0] * len(due_ns)
    before_ns = time.thread_time_ns()
    policy, priority, inputs = model.policy, model.default_priority, [row]
    for number, due in enumerate(due_ns):
        now = time.monotonic_ns()
        while now < due:
            time.sleep((due - now) / 1e9)
            now = time.monotonic_ns()
        sent_ns[number] = now
        deadline_ns = policy.deadline_ns(due, priority, 0, NEVER_NS)
        model.submit(InferenceRequest(1, due, deadline_ns, priority, shape, inputs, answers, number, b""))
    used_ns = time.thread_time_ns() - before_ns
    end_ns = time.monotonic_ns() + int(DRAIN_S * 1e9)
    while answers.left and time.monotonic_ns() < end_ns:
        time.sleep(0.005)
    return records_of(due_ns, sent_ns, answers, start_ns, time.monotonic_ns()), used_ns


def _child(repository: Path, name: str, device: Any, server_core: int, client_core: int) -> None:
    from service.clock import NS_PER_MS
    from service.engine.devices import find_devices
    from service.engine.options import share_threads
    from service.engine.runtime import Runtime
    from service.metrics import MetricsRegistry
    from service.repository.layout import scan
    from service.repository.loader import Loader, LoadOptions
    from service.repository.repository import ModelRepository

    # Threads inherit where they may run: the workers are started before this thread moves.
    os.sched_setaffinity(0, {server_core})
    devices = find_devices(device, cpu_slots=1, gpu_slots=2, cpu_threads=1)
    share_threads(1)
    runtime = Runtime(devices.all)
    runtime.start()
    assert scan([repository]).model(name) is not None
    loaded = ModelRepository(
        [repository], Loader(runtime, devices, LoadOptions(64, 2000 * NS_PER_MS, None)), MetricsRegistry()
    )
    loaded.load_all(_Silent(), 1, stopping=lambda: False)
    model: Any = loaded.lookup(name, "")
    os.sched_setaffinity(0, {client_core})
    # Sleep to the microsecond, and get the interpreter's lock back soon.
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0)
    sys.setswitchinterval(SWITCH_S)
    row_shape = MODELS[name].row
    shape = model.shape_class((row_shape,), ())
    row = np.random.default_rng(0).random(row_shape, dtype=np.float32).tobytes()
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        answer: dict[str, Any] = {}
        if path := line.strip():
            arrivals = np.load(path)
            cpu, wall = time.process_time(), time.monotonic()
            records, fed_ns = feed(model, arrivals, row, shape)
            answer["cores"] = (time.process_time() - cpu - fed_ns / 1e9) / (time.monotonic() - wall)
            answer["records"] = str(Path(path).with_suffix(".records"))
            records.tofile(answer["records"])
        print(json.dumps(answer), flush=True)


class _Silent:
    """Progress nobody looks at; a model that fails ends the child."""

    def started(self, total: int) -> None: ...

    def loaded(self, name: str, version: str, seconds: float) -> None: ...

    def failed(self, name: str, version: str, reason: str) -> None:
        raise SystemExit(f"model {name} version {version} does not load: {reason}")

    def finished(self) -> None: ...


if __name__ == "__main__":
    where, which, kind, server, client = sys.argv[1:]
    _child(Path(where), which, kind, int(server), int(client))
