"""What TLS and API keys cost: server CPU for each request, over that of the same server without them.

One server for each way, all at once, on one core; a client on the other keeps requests in flight on four connections,
with one of them after the other. `tiny` is 16 bytes each way (what a call costs), `image` 588 KiB in and as much out
(what the bytes cost). The client is gRPC for Python: slower than the load generator, but it speaks TLS.
`connection` is a connection that is made and closed, one after the other: with TLS, a whole handshake (ECDSA P-256, no
session resumed).

    python -m benchmarks.security [--quick] [--repeats N]
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import numpy as np
import onnx
import trustme

from benchmarks.harness import ROOT, BenchmarkError, Settings, parse_settings, say
from benchmarks.report import Figure, Report, Sense, Table, publish
from benchmarks.servers import SERVICE, Server, onclock_server, pinned
from service.config.keys import Group, entry_text, new_key
from service.pb import grpc_service_pb2 as pb
from tests.support.onnx_models import identity

SHAPES = {"tiny": (1, 4), "image": (1, 3, 224, 224)}
IN_FLIGHT = {"tiny": 32, "image": 8}
WAYS = ("plain", "keys", "TLS", "TLS and keys")
CONNECTION = "connection"
MEASURED = {**dict.fromkeys(SHAPES, WAYS), CONNECTION: ("plain", "TLS")}
CHILD = "--child"
# How a client begins: RFC 9113, section 3.4, and settings that set nothing.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"


def run(settings: Settings) -> Report:
    """Measure. Raises `BenchmarkError`."""
    report = Report("security")
    table = Table("What TLS and keys cost", ("what", "way", "of them a second", "server CPU us each"))
    repository = settings.out / "security"
    shutil.rmtree(repository, ignore_errors=True)
    for name, shape in SHAPES.items():
        (repository / "models" / name / "1").mkdir(parents=True)
        model = identity(dims=("N", *shape[1:]))
        onnx.save_model(model, str(repository / "models" / name / "1" / "model.onnx"))
        (repository / "models" / name / "config.pbtxt").write_text("max_batch_size: 8\ndynamic_batching { }\n")
    found: dict[tuple[str, str], list[float]] = {(name, way): [] for name, ways in MEASURED.items() for way in ways}
    with contextlib.ExitStack() as stack:
        servers = {way: stack.enter_context(_serving(settings, repository, way)) for way in WAYS}
        for repeat in range(settings.repeats):
            for name, ways in MEASURED.items():
                for way in ways:
                    say(f"security: {name}, {way}, run {repeat + 1} of {settings.repeats}")
                    rate, cpu = _window(settings, servers[way], name, repository)
                    found[name, way].append(cpu)
                    table.rows.append([name, way, f"{rate:.0f}", f"{cpu:.0f}"])
    for name, ways in MEASURED.items():
        for way in ways[1:]:
            ratios = tuple(a / b for a, b in zip(found[name, way], found[name, "plain"], strict=True))
            report.figures.append(Figure("security", f"{name}: CPU, {way} / plain", ratios, "x", None, Sense.AT_MOST))
    more = tuple(a - b for a, b in zip(found[CONNECTION, "TLS"], found[CONNECTION, "plain"], strict=True))
    report.figures.append(Figure("security", "a handshake: CPU", more, "us", None, Sense.AT_MOST))
    report.tables.append(table)
    return report


def _serving(settings: Settings, repository: Path, way: str):  # type: ignore[no-untyped-def]
    own = repository / way.replace(" ", "-")
    own.mkdir()
    flags: list[str] = []
    credentials, metadata = None, ()
    if "TLS" in way:
        authority = trustme.CA()
        made = authority.issue_cert("127.0.0.1")
        (own / "server.pem").write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        (own / "server.key").write_bytes(made.private_key_pem.bytes())
        (own / "ca.pem").write_bytes(authority.cert_pem.bytes())
        flags += ["--tls-certificate", str(own / "server.pem"), "--tls-key", str(own / "server.key")]
        credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    if "keys" in way:
        key = new_key()
        (own / "keys.toml").write_text(entry_text("client", key, (Group.INFERENCE, Group.METADATA), ("*",)))
        (own / "key").write_text(key)
        flags += ["--api-keys", str(own / "keys.toml")]
        metadata = (("authorization", f"Bearer {key}"),)
    return onclock_server(settings, repository / "models", list(SHAPES), flags, credentials, metadata)


def _window(settings: Settings, server: Server, name: str, repository: Path) -> tuple[float, float]:
    """Requests a second, and the server's CPU time for each in us."""
    way = next(way for way in WAYS if _is(server, way))
    own = repository / way.replace(" ", "-")
    command = [sys.executable, "-m", "benchmarks.security", CHILD, server.url, name, str(settings.window_s), str(own)]
    done = subprocess.run(
        pinned(settings.client_core, [*command, str(server.pid)]), capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode != 0:
        raise BenchmarkError(f"the client failed: {done.stderr[-1000:]}")
    count, cpu_s = done.stdout.split()
    return int(count) / settings.window_s, float(cpu_s) / int(count) * 1e6


def _is(server: Server, way: str) -> bool:
    return ("TLS" in way) == (server.credentials is not None) and ("keys" in way) == bool(server.metadata)


def cpu_s(pid: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Client:
    """So many calls in flight, each followed by the next. `metadata` goes with each."""

    def __init__(self, channels: list[grpc.Channel], name: str, metadata: tuple[tuple[str, str], ...]) -> None:
        shape = SHAPES[name]
        message = pb.ModelInferRequest(model_name=name)
        message.inputs.add(name="x", datatype="FP32", shape=shape)
        message.raw_input_contents.append(np.zeros(shape, np.float32).tobytes())
        self._payload = message.SerializeToString()
        self._metadata = metadata
        self._methods = [channel.unary_unary(SERVICE + "ModelInfer", None, None) for channel in channels]
        self._over = False
        self.count = 0
        self.failed: BaseException | None = None
        self._lock = threading.Lock()
        for number in range(IN_FLIGHT[name]):
            self._send(number)

    def _send(self, number: int) -> None:
        method = self._methods[number % len(self._methods)]
        call = method.future(self._payload, timeout=30, metadata=self.metadata())
        call.add_done_callback(lambda done: self._answered(number, done))

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with the next call."""
        return self._metadata

    def _answered(self, number: int, call: grpc.Future) -> None:
        if call.exception() is not None:
            self.failed = call.exception()
            return
        with self._lock:
            self.count += 1
        if not self._over:
            self._send(number)

    def close(self) -> None:
        """Send no more."""
        self._over = True


def _connect(url: str, seconds: float, own: Path, pid: int) -> int:
    """Connections made and closed, and the CPU time of the server meanwhile."""
    host, _, port = url.rpartition(":")
    context = None
    if (own / "ca.pem").exists():
        context = ssl.create_default_context(cafile=own / "ca.pem")
        context.set_alpn_protocols(["h2"])
    count, before, end = 0, cpu_s(pid), time.monotonic() + seconds
    while time.monotonic() < end:
        with (
            socket.create_connection((host, int(port)), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname=host) if context else contextlib.nullcontext(plain) as wire,
        ):
            wire.sendall(_PREFACE)
            # The server's settings: it has taken the connection as one of HTTP/2.
            if not wire.recv(64):
                print("the server closed the connection", file=sys.stderr)
                return 1
        count += 1
    print(count, cpu_s(pid) - before)
    return 0


def _child(url: str, name: str, seconds: float, own: Path, pid: int) -> int:
    if name == CONNECTION:
        return _connect(url, seconds, own, pid)
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1))
    channels = [
        grpc.secure_channel(url, grpc.ssl_channel_credentials((own / "ca.pem").read_bytes()), options)
        if (own / "ca.pem").exists()
        else grpc.insecure_channel(url, options)
        for _ in range(4)
    ]
    key = own / "key"
    metadata = (("authorization", f"Bearer {key.read_text()}"),) if key.exists() else ()
    client = Client(channels, name, metadata)
    time.sleep(0.5)  # the window opens on a server at work
    before = client.count, cpu_s(pid)
    time.sleep(seconds)
    after = client.count, cpu_s(pid)
    client.close()
    if client.failed is not None or after[0] == before[0]:
        print(client.failed or "nothing was answered", file=sys.stderr)
        return 1
    print(after[0] - before[0], after[1] - before[1])
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        _, _, url_, name_, seconds_, own_, pid_ = sys.argv
        sys.exit(_child(url_, name_, float(seconds_), Path(own_), int(pid_)))
    chosen = parse_settings("What TLS and API keys cost", window_s=4.0)
    publish(chosen, [run(chosen)], "security")
