"""Two hundred streams of voice: what a step costs where the server keeps the state, over a client that sends it along.

Silero VAD, one call at a time for each of 200 sequences, from a client on the other core. `kept`: steps of sequences,
whose rows share batches. `sent`: the same model without `sequence_batching`; the state goes by the wire both ways, and
no two requests share a batch, since its batch dimension is not the first. Server CPU per step, windows in turn, beside
what ONNX Runtime alone takes for a row.

    python -m benchmarks.sequences [--quick]
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime as ort

from benchmarks.harness import ROOT, BenchmarkError, Settings, parse_settings, say
from benchmarks.report import Figure, Report, Table, publish
from benchmarks.servers import Server, onclock_server, pinned
from models.zoo.publish import Entry
from models.zoo.publish import publish as publish_entry
from models.zoo.recipes.silero_vad import silero_vad_16khz
from service.pb import grpc_service_pb2 as pb

CLIENTS = 200
WAYS = ("kept", "sent")
CHILD = "--child"
_SERVICE = "/inference.GRPCInferenceService/"
_OBJECTIVE = 'parameters { key: "latency_slo_ms"'


def run(settings: Settings) -> Report:
    """Measure. Raises `BenchmarkError`."""
    report = Report("sequences")
    table = Table(
        f"Silero VAD, {CLIENTS} streams",
        ("state", "steps/s", "rows a batch", "CPU us/step", "ONNX Runtime alone, us/row"),
    )
    repository = settings.out / "sequences"
    entry = silero_vad_16khz()
    assert entry.config is not None
    config = "".join(line for line in entry.config.splitlines(True) if not line.startswith(_OBJECTIVE))
    publish_entry(Entry("kept", config.replace('"silero-vad"', '"kept"'), {}, entry.version_files), repository)
    publish_entry(Entry("sent", None, {}, entry.version_files), repository)
    bare = {rows: _bare_us(repository / "kept" / "1" / "model.onnx", rows) for rows in (1, 8, 64)}
    with onclock_server(settings, repository, WAYS) as server:
        ratios, shares = [], []
        for repeat in range(settings.repeats):
            say(f"sequences: run {repeat + 1} of {settings.repeats}")
            cpu = {}
            for way in WAYS:
                count, batches, cpu[way] = _window(settings, server, way)
                rows = count / batches
                nearest = min(bare, key=lambda size: abs(size - rows))
                table.rows.append(
                    [
                        way,
                        f"{count / settings.window_s:.0f}",
                        f"{rows:.2f}",
                        f"{cpu[way]:.0f}",
                        f"{bare[nearest]:.0f} ({nearest} at once)",
                    ]
                )
                if way == "kept":
                    shares.append(rows)
            ratios.append(cpu["kept"] / cpu["sent"])
        report.figures.append(Figure("sequences", "CPU a step, kept / sent", tuple(ratios), "x", None))
        report.figures.append(Figure("sequences", "rows a batch, kept", tuple(shares), "", None))
    report.tables.append(table)
    return report


def _bare_us(path: Path, rows: int) -> float:
    """CPU time of a row with ONNX Runtime alone, us."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds = {
        "input": rng.standard_normal((rows, 576)).astype(np.float32) * np.float32(0.1),
        "state": np.zeros((2, rows, 128), np.float32),
        "sr": np.array(16000, np.int64),
    }
    for _ in range(20):
        session.run(None, feeds)
    count = 400 // rows + 20
    before_ns = time.thread_time_ns()
    for _ in range(count):
        session.run(None, feeds)
    return (time.thread_time_ns() - before_ns) / 1e3 / count / rows


def _window(settings: Settings, server: Server, way: str) -> tuple[int, int, float]:
    """Steps answered in a window, batches they took, and the server's CPU time for each step in us."""
    command = [sys.executable, "-m", "benchmarks.sequences", CHILD, server.url, way, str(settings.window_s)]
    done = subprocess.run(
        pinned(settings.client_core, [*command, str(server.pid)]), capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode != 0:
        raise BenchmarkError(f"the client failed: {done.stderr[-1000:]}")
    count, batches, cpu_s = done.stdout.split()
    return int(count), int(batches), float(cpu_s) / int(count) * 1e6


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _message(way: str, chunk: Any, identity: int, start: bool) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name=way)
    message.inputs.add(name="input", datatype="FP32", shape=chunk.shape)
    message.raw_input_contents.append(chunk.tobytes())
    if way == "kept":
        message.parameters["sequence_id"].int64_param = identity
        message.parameters["sequence_start"].bool_param = start
    else:
        message.inputs.add(name="state", datatype="FP32", shape=(2, 1, 128))
        message.raw_input_contents.append(bytes(4 * 2 * 128))
    message.inputs.add(name="sr", datatype="INT64", shape=())
    message.raw_input_contents.append(np.array(16000, np.int64).tobytes())
    return message


class _Streams:
    """`CLIENTS` calls in flight, each followed by the next of its sequence. Contents do not matter to the time, so a
    sequence says the same all the while."""

    def __init__(self, channels: list[grpc.Channel], way: str) -> None:
        rng = np.random.default_rng(0)
        self.count = 0
        self.open = threading.Event()
        self.failed: grpc.RpcError | None = None
        self._over = False
        self._methods = [channel.unary_unary(_SERVICE + "ModelInfer", None, None) for channel in channels]
        chunks = [rng.standard_normal((1, 576)).astype(np.float32) * np.float32(0.1) for _ in range(CLIENTS)]
        for number, chunk in enumerate(chunks):
            self._methods[0](_message(way, chunk, number + 1, True).SerializeToString(), timeout=30)
        self._payloads = [_message(way, c, n + 1, False).SerializeToString() for n, c in enumerate(chunks)]
        for number in range(CLIENTS):
            self._send(number)

    def _send(self, number: int) -> None:
        call = self._methods[number % len(self._methods)].future(self._payloads[number], timeout=30)
        call.add_done_callback(lambda done: self._answered(number, done))

    def _answered(self, number: int, call: grpc.Future) -> None:
        if call.exception() is not None:
            self.failed = call.exception()
            return
        self.count += 1
        if not self._over:
            self._send(number)

    def close(self) -> None:
        self._over = True


def _child(url: str, way: str, seconds: float, pid: int) -> int:
    channels = [grpc.insecure_channel(url, options=(("grpc.use_local_subchannel_pool", 1),)) for _ in range(4)]
    statistics = channels[0].unary_unary(
        _SERVICE + "ModelStatistics",
        pb.ModelStatisticsRequest.SerializeToString,
        pb.ModelStatisticsResponse.FromString,
    )

    def now() -> tuple[int, int, float]:
        model = statistics(pb.ModelStatisticsRequest(name=way)).model_stats[0]
        return streams.count, model.execution_count, _cpu_s(pid)

    streams = _Streams(channels, way)
    time.sleep(0.5)  # the window opens on a server at work
    before = now()
    time.sleep(seconds)
    after = now()
    streams.close()
    if streams.failed is not None:
        print(streams.failed, file=sys.stderr)
        return 1
    print(*(a - b for a, b in zip(after, before, strict=True)))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        sys.exit(_child(sys.argv[2], sys.argv[3], float(sys.argv[4]), int(sys.argv[5])))
    else:
        chosen = parse_settings("Sequences", window_s=4.0, quick_window_s=1.0)
        publish(chosen, [run(chosen)], "sequences")
