"""What a large tensor costs the server by system shared memory, over the same tensor by the wire.

Requests of 1x3x224x224 FP32 (588 KiB), one in flight, from a client on the other core: `identity` answers as many
bytes, into shared memory as well, `average` three numbers. Server CPU per request, windows in turn.

    python -m benchmarks.shared_memory [--quick]
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import grpc
import numpy as np

from benchmarks.harness import ROOT, BenchmarkError, Settings, parse_settings, say
from benchmarks.models import make_repository
from benchmarks.report import Figure, Report, Table, publish
from benchmarks.servers import Server, onclock_server, pinned
from service.pb import grpc_service_pb2 as pb

SHAPE = (1, 3, 224, 224)
SIZE = 4 * int(np.prod(SHAPE))
NAMES = ("identity", "average")
CHILD = "--child"
_SERVICE = "/inference.GRPCInferenceService/"


def run(settings: Settings) -> Report:
    """Measure. Raises `BenchmarkError`."""
    report = Report("shared_memory")
    table = Table("A 588 KiB tensor by the wire and by shared memory", ("model", "way", "requests/s", "CPU us/request"))
    repository = make_repository(settings.out / "shared_memory", settings.models, dict.fromkeys(NAMES))
    with onclock_server(settings, repository, NAMES, ("--allow-client-shm", "true")) as server:
        for name in NAMES:
            ratios = []
            for repeat in range(settings.repeats):
                say(f"shared memory: {name}, run {repeat + 1} of {settings.repeats}")
                cpu = {}
                for way in ("wire", "shared"):
                    count, cpu[way] = _window(settings, server, name, way)
                    table.rows.append([name, way, f"{count / settings.window_s:.0f}", f"{cpu[way]:.0f}"])
                ratios.append(cpu["shared"] / cpu["wire"])
            report.figures.append(Figure("shared_memory", f"{name}: CPU, shared / wire", tuple(ratios), "x", None))
    report.tables.append(table)
    return report


def _window(settings: Settings, server: Server, name: str, way: str) -> tuple[int, float]:
    """Requests answered in a window, and the server's CPU time for each in us."""
    command = [sys.executable, "-m", "benchmarks.shared_memory", CHILD, server.url, name, way, str(settings.window_s)]
    before = _cpu_s(server.pid)
    done = subprocess.run(pinned(settings.client_core, command), capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise BenchmarkError(f"the client failed: {done.stderr[-1000:]}")
    count = int(done.stdout)
    return count, (_cpu_s(server.pid) - before) / count * 1e6


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _child(url: str, name: str, way: str, seconds: float) -> int:
    image = np.random.default_rng(0).random(SHAPE, dtype=np.float32)
    message = pb.ModelInferRequest(model_name=name)
    tensor = message.inputs.add(name="x", datatype="FP32", shape=SHAPE)
    options = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
    with grpc.insecure_channel(url, options=options) as channel:
        keys = [f"/onclock_bench_{os.getpid()}_{end}" for end in ("in", "out")]
        if way == "wire":
            message.raw_input_contents.append(image.tobytes())
        else:
            register = channel.unary_unary(
                _SERVICE + "SystemSharedMemoryRegister",
                request_serializer=pb.SystemSharedMemoryRegisterRequest.SerializeToString,
            )
            output = message.outputs.add(name="y")
            for key, end in zip(keys, (tensor, output), strict=True):
                with Path(f"/dev/shm{key}").open("w+b") as file:
                    file.truncate(SIZE)
                    with mmap.mmap(file.fileno(), SIZE) as view:
                        view[:] = image.tobytes()
                register(pb.SystemSharedMemoryRegisterRequest(name=key, key=key, byte_size=SIZE))
                end.parameters["shared_memory_region"].string_param = key
                end.parameters["shared_memory_byte_size"].int64_param = SIZE
        infer = channel.unary_unary(_SERVICE + "ModelInfer", None, None)
        payload = message.SerializeToString()
        count, end_s = 0, time.monotonic() + seconds
        while time.monotonic() < end_s:
            infer(payload)
            count += 1
        if way == "shared":
            for key in keys:
                Path(f"/dev/shm{key}").unlink()
            unregister = channel.unary_unary(
                _SERVICE + "SystemSharedMemoryUnregister",
                request_serializer=pb.SystemSharedMemoryUnregisterRequest.SerializeToString,
            )
            unregister(pb.SystemSharedMemoryUnregisterRequest())
    return count


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        print(_child(sys.argv[2], sys.argv[3], sys.argv[4], float(sys.argv[5])))
    else:
        chosen = parse_settings("Large tensors by shared memory", window_s=4.0, quick_window_s=1.0)
        publish(chosen, [run(chosen)], "shared_memory")
