"""The server as its users run it: a process of its own, on free ports, ready before a test sends anything.

    with running_server(repository) as server:
        channel = server.channel()

Nothing sleeps and hopes: the ports are read from the log line "listening", readiness is asked of `grpc.health.v1`, the
end is SIGTERM and the exit code. Log lines are kept; a server that dies while it is waited for fails the test with its
last lines.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]

# Starting Python and its imports takes a second or two; an idle machine and a small repository need no more than that.
# The rest is for a machine that is busy with other tests.
START_S = 60.0
STOP_S = 40.0
# Lines of the log kept: more than a test looks at, less than a server with `--log-level debug` can fill memory with.
MAX_LINES = 50_000
_POLL_S = 0.02

# As large as the protocol allows: a test that wants a limit sets the server's.
UNLIMITED = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


class ServerDied(AssertionError):
    """The server ended, or did not get as far as a test needs, in time."""


class RunningServer:
    """A started `onclock serve`. Made by `running_server`, which waits for it and ends it."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service", "serve", *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self.grpc_port = 0
        self.metrics_port = 0
        # What its channels are secured with unless they say otherwise; None: they are not.
        self.credentials: grpc.ChannelCredentials | None = None
        self._lines: deque[str] = deque(maxlen=MAX_LINES)
        self._changed = threading.Condition()
        self._ended = False
        self._channels: list[grpc.Channel] = []
        self._reader = threading.Thread(target=self._read, name="server-log", daemon=True)
        self._reader.start()

    @property
    def address(self) -> str:
        """`host:port` of the gRPC port."""
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def metrics_url(self) -> str:
        """The page of metrics; the server was started with a metrics port."""
        return f"http://127.0.0.1:{self.metrics_port}/metrics"

    @property
    def pid(self) -> int:
        return self.process.pid

    # ---------------------------------------------------------------- what it says

    @property
    def stderr(self) -> str:
        """What the server has written to stderr so far."""
        with self._changed:
            return "\n".join(self._lines)

    def log_lines(self, message: str | None = None) -> list[dict[str, Any]]:
        """The JSON lines of the log so far, those with exactly this `message` when one is given."""
        with self._changed:
            lines = list(self._lines)
        parsed = [line for line in map(_as_json, lines) if line is not None]
        return parsed if message is None else [line for line in parsed if line.get("message") == message]

    def wait_for_log(self, message: str, timeout_s: float = START_S) -> dict[str, Any]:
        """The first log line with this `message`; waits for it. Raises `ServerDied` when it does not come."""
        end = time.monotonic() + timeout_s
        seen = 0
        with self._changed:
            while True:
                lines = list(self._lines)
                for line in lines[seen:]:
                    parsed = _as_json(line)
                    if parsed is not None and parsed.get("message") == message:
                        return parsed
                seen = len(lines) if len(lines) < MAX_LINES else 0
                if self._ended or not self._changed.wait(max(0.0, end - time.monotonic())):
                    raise ServerDied(f"the server never said {message!r}{self._last_lines()}")

    # ---------------------------------------------------------------- how it is reached

    def channel(
        self, options: Sequence[tuple[str, Any]] = UNLIMITED, credentials: grpc.ChannelCredentials | None = None
    ) -> grpc.Channel:
        """A channel of its own connection to the server, with TLS if there are credentials; closed with the server."""
        channel = self._connect(options, credentials or self.credentials)
        self._channels.append(channel)
        return channel

    def _connect(self, options: Sequence[tuple[str, Any]], credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
        every = [("grpc.use_local_subchannel_pool", 1), *options]
        if credentials is None:
            return grpc.insecure_channel(self.address, options=every)
        return grpc.secure_channel(self.address, credentials, options=every)

    def wait_ready(self, timeout_s: float = START_S) -> None:
        """Wait until the health service says SERVING for the server as a whole. Raises `ServerDied`."""
        with self._connect((), self.credentials) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            end = time.monotonic() + timeout_s
            answer: object = "nothing"
            while time.monotonic() < end:
                if self.process.poll() is not None:
                    break
                try:
                    answer = check(health_pb2.HealthCheckRequest(), timeout=5).status
                except grpc.RpcError as error:
                    answer = error.code()
                if answer == health_pb2.HealthCheckResponse.SERVING:
                    return
                time.sleep(_POLL_S)
        with self._changed:
            raise ServerDied(f"the server did not become ready (health: {answer}){self._last_lines()}")

    # ---------------------------------------------------------------- how it ends

    def wait_exit(self, timeout_s: float = STOP_S) -> int:
        """Wait for the process to end by itself; its exit code. All of the log is there afterwards."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            with self._changed:
                raise ServerDied(f"the server did not end in {timeout_s} s{self._last_lines()}") from None
        self._reader.join(5)
        return code

    def stop(self, timeout_s: float = STOP_S) -> int:
        """End the server as an orchestrator does, with SIGTERM; its exit code (-9 when it had to be killed)."""
        for channel in self._channels:
            channel.close()
        self._channels.clear()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.wait_exit(timeout_s)
        except ServerDied:
            self.process.kill()
            return self.wait_exit(timeout_s)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self._lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _last_lines(self) -> str:
        """The end of the log, for an error message. The lock is held."""
        code = self.process.poll()
        state = "it still runs" if code is None else f"exit code {code}"
        return f" ({state}); its last lines:\n" + "\n".join(list(self._lines)[-20:])


@contextlib.contextmanager
def running_server(
    repository: Path | Sequence[Path],
    *flags: str,
    ready: bool = True,
    expect_exit: int | None = 0,
    environment: dict[str, str] | None = None,
    credentials: grpc.ChannelCredentials | None = None,
) -> Iterator[RunningServer]:
    """A server on free ports that serves `repository`, ended when the block is left.

    `flags` are added to the command line (`"--max-in-flight", "8"`) and win over what is set here: the CPU (or what
    `ONCLOCK_TEST_DEVICE` names), no metrics port, a short measurement that is not kept. `ready=False` does not wait for
    readiness, only for the ports. `expect_exit` is the exit code that the end must bring (None = any). `environment` is
    added to this process's. `credentials` secure the channels to it.
    """
    directories = [repository] if isinstance(repository, Path) else list(repository)
    arguments = [part for directory in directories for part in ("--model-repository", os.fspath(directory))]
    defaults = {
        "--grpc-port": "0",
        "--metrics-port": "off",
        "--device": os.environ.get("ONCLOCK_TEST_DEVICE", "cpu"),
        "--profile-cache": "none",
        "--profile-budget-ms": "100",
    }
    for flag, value in defaults.items():
        if not any(given == flag or given.startswith(f"{flag}=") for given in flags):
            arguments += [flag, value]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("ONCLOCK_", "OTEL_"))}
    server = RunningServer([*arguments, *flags], {**inherited, **(environment or {})})
    server.credentials = credentials
    try:
        listening = server.wait_for_log("listening")
        server.grpc_port = int(listening["grpc_port"])
        metrics_port = listening["metrics_port"]
        server.metrics_port = 0 if metrics_port == "off" else int(metrics_port)
        if ready:
            server.wait_ready()
        yield server
    except BaseException:
        server.stop()
        raise
    code = server.stop()
    if expect_exit is not None and code != expect_exit:
        raise ServerDied(f"the server ended with exit code {code}, not {expect_exit}:\n{server.stderr[-4000:]}")


StartServer = Callable[..., RunningServer]


@pytest.fixture
def start_server() -> Iterator[StartServer]:
    """`running_server` as a function: servers started with it end with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda repository, *flags, **options: stack.enter_context(running_server(repository, *flags, **options))


def _as_json(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        parsed = json.loads(line)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None
