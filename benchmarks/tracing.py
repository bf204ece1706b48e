"""What tracing costs: server CPU for each request, over that of the same server without it.

One server for each way, all at once, on one core; a client on the other keeps requests in flight on four connections,
with one of the servers after the other. `tiny` is 16 bytes each way (what a call costs), `image` 588 KiB in and as much
out. `off` has no endpoint; nor has `off, sampled`, though clients send a `traceparent`: what the header itself costs.
The others send to a receiver on the client's core that reads and forgets: `ratio N` traces that share of requests whose
client says nothing, `unsampled` and `sampled` follow what each request's `traceparent` says. Spans are made and sent by
the server's process, so the figures have all of it. The table says how many requests were traced for each that was
answered: less than 1 at `ratio 1` or `sampled` means that spans were dropped.

    python -m benchmarks.tracing [--quick] [--repeats N]
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import getrandbits

import grpc
import onnx

from benchmarks.harness import ROOT, BenchmarkError, Settings, parse_settings, say
from benchmarks.report import Figure, Report, Sense, Table, publish
from benchmarks.security import SHAPES, Client, cpu_s
from benchmarks.servers import Server, free_port, onclock_server, pinned
from tests.support.onnx_models import identity

# Way -> the ratio, and the flags of the requests' `traceparent` (None: they have none).
WAYS: dict[str, tuple[str, int | None]] = {
    "off": ("", None),
    "off, sampled": ("", 1),
    "ratio 0": ("0", None),
    "ratio 0.01": ("0.01", None),
    "ratio 1": ("1", None),
    "unsampled": ("0", 0),
    "sampled": ("0", 1),
}
CHILD, SINK = "--child", "--sink"


def run(settings: Settings) -> Report:
    """Measure. Raises `BenchmarkError`."""
    report = Report("tracing")
    table = Table("What tracing costs", ("request", "way", "requests/s", "server CPU us/request", "traced/request"))
    repository = settings.out / "tracing"
    shutil.rmtree(repository, ignore_errors=True)
    for name, shape in SHAPES.items():
        (repository / "models" / name / "1").mkdir(parents=True)
        onnx.save_model(identity(dims=("N", *shape[1:])), str(repository / "models" / name / "1" / "model.onnx"))
        (repository / "models" / name / "config.pbtxt").write_text("max_batch_size: 8\ndynamic_batching { }\n")
    found: dict[tuple[str, str], list[float]] = {(name, way): [] for name in SHAPES for way in WAYS}
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(_sink(settings))
        servers = {way: stack.enter_context(_serving(settings, repository, way, sink)) for way in WAYS}
        for repeat in range(settings.repeats):
            for name in SHAPES:
                for way in WAYS:
                    say(f"tracing: {name}, {way}, run {repeat + 1} of {settings.repeats}")
                    rate, cpu, traced = _window(settings, servers[way], name, way)
                    found[name, way].append(cpu)
                    table.rows.append([name, way, f"{rate:.0f}", f"{cpu:.0f}", f"{traced:.3f}"])
    for name in SHAPES:
        for way in list(WAYS)[1:]:
            ratios = tuple(a / b for a, b in zip(found[name, way], found[name, "off"], strict=True))
            report.figures.append(Figure("tracing", f"{name}: CPU, {way} / off", ratios, "x", None, Sense.AT_MOST))
    report.tables.append(table)
    return report


@contextlib.contextmanager
def _sink(settings: Settings) -> Iterator[int]:
    """A receiver of spans in a process of its own; its port."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.tracing", SINK, str(port)]
    process = subprocess.Popen(pinned(settings.client_core, command), cwd=ROOT)
    try:
        end = time.monotonic() + 30
        while process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if time.monotonic() > end:
                raise BenchmarkError("the receiver of spans does not listen")
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait()


def _serving(settings: Settings, repository: Path, way: str, sink: int):  # type: ignore[no-untyped-def]
    ratio, _ = WAYS[way]
    flags = ["--otlp-endpoint", f"http://127.0.0.1:{sink}", "--trace-sample-ratio", ratio] if ratio else []
    # All that a client wants: what a traced request costs is asked here, not what the limit saves.
    flags += ["--trace-client-limit", "1000000"] if ratio else []
    return onclock_server(settings, repository / "models", list(SHAPES), flags)


def _window(settings: Settings, server: Server, name: str, way: str) -> tuple[float, float, float]:
    """Requests a second, the server's CPU time for each in us, and how many were traced and sent for each."""
    command = [sys.executable, "-m", "benchmarks.tracing", CHILD, server.url, name, str(settings.window_s)]
    before = _exported(server)
    done = subprocess.run(
        pinned(settings.client_core, [*command, str(WAYS[way][1]), str(server.pid)]),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if done.returncode != 0:
        raise BenchmarkError(f"the client failed: {done.stderr[-1000:]}")
    count, cpu, total = done.stdout.split()
    # What waits is sent within the delay of a second, or so much the sooner as there is more.
    time.sleep(1.5)
    exported = _exported(server) - before
    return int(count) / settings.window_s, float(cpu) / int(count) * 1e6, exported / int(total)


def _exported(server: Server) -> int:
    text = urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=10).read().decode()
    lines = (line for line in text.splitlines() if line.startswith('onclock_traced_requests_total{result="exported"}'))
    return sum(int(line.split()[-1]) for line in lines)


class _Calling(Client):
    """A client whose every request is a span of a trace of its own, sampled or not by `flags`; None: of no trace."""

    def __init__(self, channels: list[grpc.Channel], name: str, flags: int | None) -> None:
        self._flags = flags
        super().__init__(channels, name, ())

    def metadata(self) -> tuple[tuple[str, str], ...]:
        if self._flags is None:
            return ()
        return (("traceparent", f"00-{getrandbits(128) | 1:032x}-{getrandbits(64) | 1:016x}-{self._flags:02x}"),)


def _child(url: str, name: str, seconds: float, flags: int | None, pid: int) -> int:
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1))
    client = _Calling([grpc.insecure_channel(url, options) for _ in range(4)], name, flags)
    time.sleep(0.5)  # the window opens on a server at work
    before = client.count, cpu_s(pid)
    time.sleep(seconds)
    after = client.count, cpu_s(pid)
    client.close()
    if client.failed is not None or after[0] == before[0]:
        print(client.failed or "nothing was answered", file=sys.stderr)
        return 1
    time.sleep(0.5)  # those on their way are answered, and then all of them are counted
    print(after[0] - before[0], after[1] - before[1], client.count)
    sys.stdout.flush()
    os._exit(0)


class _Reader(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name http.server calls
        """Nothing is logged."""


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        _, _, url_, name_, seconds_, flags_, pid_ = sys.argv
        sys.exit(_child(url_, name_, float(seconds_), None if flags_ == "None" else int(flags_), int(pid_)))
    if sys.argv[1:2] == [SINK]:
        ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), _Reader).serve_forever()
    chosen = parse_settings("What tracing costs", window_s=4.0)
    publish(chosen, [run(chosen)], "tracing")
