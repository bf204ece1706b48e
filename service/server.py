"""The composition root: builds the parts, and takes the server through its life.

start: the ports open, not ready    load: models are loaded and warmed up    ready
SIGTERM or SIGINT -> drain: not ready, a moment later new requests refused, accepted ones answered -> stop
a device fails    -> the same, at once, and the exit code says so: only a new process can use the device again
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import grpc

from service.clock import NS_PER_MS, NS_PER_S, now_ns
from service.config.otlp import TelemetryError
from service.config.settings import Settings
from service.engine.devices import Devices, find_devices, names
from service.engine.nvml import GpuMeter
from service.engine.options import share_threads
from service.engine.runtime import Runtime
from service.errors import DeviceFailed, ModelLoadError, ServiceError
from service.frontend.access import AccessInterceptor
from service.frontend.admin import Admin
from service.frontend.choice import IngressError, core_serves, make_ingress
from service.frontend.control import Control
from service.frontend.health import Health
from service.frontend.inference import InferenceHandler
from service.frontend.ingress import age_options, idle_options
from service.frontend.model_control import ModelControlRpcs
from service.frontend.security import Security, SecurityError
from service.frontend.services import register
from service.frontend.shared_memory import Regions
from service.frontend.stream import StreamService
from service.logs import LogControl
from service.metrics import MetricsPortError, MetricsRegistry, MetricsServer
from service.metrics.pages import no_pages
from service.repository.changing import ModelControl
from service.repository.loader import Loader, LoadOptions
from service.repository.reaper import Reaper
from service.repository.repository import LoadProgress, ModelRepository
from service.state import Phase, ServerState
from service.status_page import Observer, ObserverThread, status_pages
from service.telemetry import chosen_spans
from service.tracing import Tracer, TraceSettings

log = logging.getLogger(__name__)

# How long a server that is about to drain serves on after it has said that it is not ready: clients that watch health
# leave meanwhile. Otherwise those that send all the while would be refused, or meet the closing port.
_NOTICE_S = 0.2
# How often a draining server looks whether its last request has been answered.
_DRAIN_POLL_S = 0.005
# What is left to do after the last answer: sending it, closing connections and threads.
_FLUSH_S = 0.5
_STOP_S = 5.0
# How long a batch that is running when everybody else is gone may take to end.
_LAST_BATCH_S = 1.0
# And how long a collector may take for the last spans.
_SPANS_S = 2.0

# sysexits.h's EX_TEMPFAIL: nothing is wrong with how the server was started; start it again, perhaps elsewhere.
EXIT_DEVICE_FAILED = 75


class PortError(Exception):
    """A port cannot be listened on."""


class Server:
    """One serving process. `start`, `load`, `wait`, `drain` and `stop` are called in this order by one thread.

    `on_failure` is called, on some other thread, when a device is broken for good: it is time to drain.
    """

    def __init__(self, settings: Settings, on_failure: Callable[[], None] = lambda: None) -> None:
        self._settings = settings
        self._on_failure = on_failure
        self.state = ServerState()
        self.registry = MetricsRegistry()
        self._security = Security(
            settings.tls_files,
            settings.api_keys,
            settings.security_poll_secs,
            self.registry.security_reloaded,
            self.registry.unrouted,
        )
        access = self._security.access
        self.devices: Devices = find_devices(
            settings.device, settings.cpu_run_slots, settings.gpu_run_slots, settings.cpu_threads_per_slot
        )
        share_threads(settings.cpu_threads_per_slot)
        self._runtime = Runtime(self.devices.all, self._device_failed, int(settings.hung_run_timeout_s * NS_PER_S))
        self._tracer = Tracer(
            settings.trace_file,
            TraceSettings(
                settings.trace_level == "TIMESTAMPS",
                settings.trace_rate,
                settings.trace_count,
                settings.trace_log_frequency,
            ),
        )
        self._spans = chosen_spans(settings, os.environ)
        spans = self._spans
        self.registry.spans = lambda: None if spans is None else asdict(spans.counts)
        self._gpus = GpuMeter([gpu.uuid for gpu in self.devices.gpus if gpu.uuid])
        loader = Loader(
            self._runtime,
            self.devices,
            LoadOptions(
                settings.default_max_batch_size,
                settings.profile_budget_ms * NS_PER_MS,
                settings.profile_cache,
                self._gpus.free_bytes,
            ),
            self._tracer,
            spans,
        )
        self.repository = ModelRepository(settings.model_repository, loader, self.registry)
        self._reaper = Reaper(self.repository.stateful_models)
        self._changes = ModelControl(self.repository, settings.model_repository)
        self._control_pool = ThreadPoolExecutor(settings.control_threads, thread_name_prefix="control")
        self._stream_pool = ThreadPoolExecutor(settings.max_streams, thread_name_prefix="stream")
        # Behind the native ingress there are no clients' connections, whose ages would matter.
        aged = core_serves(settings)
        self._grpc = grpc.server(
            self._control_pool,
            interceptors=() if access is None else (AccessInterceptor(access, self.registry.record_unrouted),),
            options=(
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.max_send_message_length", settings.max_message_bytes),
                # Two servers on one port would share its connections at random; the second one must fail instead.
                ("grpc.so_reuseport", 0),
                *idle_options(settings.idle_timeout_s),
                *age_options(settings.max_connection_age_s if aged else 0, settings.grace_period_s),
            ),
            # Control calls that may wait for a thread, and open streams. ModelInfer has its own bound.
            maximum_concurrent_rpcs=2 * settings.max_streams + 16 * settings.control_threads,
        )
        regions = Regions(settings.allow_client_shm, settings.max_in_flight_bytes)
        find = regions.find if settings.allow_client_shm else None
        self._handler = InferenceHandler(self.repository, self.registry, find_region=find, access=access, spans=spans)
        self._stream_handler = InferenceHandler(
            self.repository,
            self.registry,
            gated=False,
            find_region=find,
            access=access,
            spans=spans,
            method="ModelStreamInfer",
        )
        self._streams = StreamService(
            self._stream_handler,
            settings.max_streams,
            max(settings.max_in_flight_bytes, settings.max_streams),
            settings.max_streams + 16 * settings.control_threads,
            access,
            spans is not None,
        )
        self._ingress = make_ingress(settings, self._grpc, self._handler, access, spans is not None)
        self._handler.outbox = self._ingress
        self._health = Health(self._stream_pool)
        self._health.register(self._grpc)
        admin = Admin(self.repository, self._tracer, LogControl(settings.log_level, settings.log_format))
        more = [] if settings.trace_file is None else ["trace"]
        if settings.allow_client_shm:
            more.append("system_shared_memory")
        if settings.model_control_mode == "explicit":
            more += ["model_repository", "model_repository(unload_dependents)"]
        control = Control(self.repository, self.state, more)
        explicit = settings.model_control_mode == "explicit"
        changes = ModelControlRpcs(self._changes, explicit)
        # Loads take long and must not keep metadata waiting; more of them than this wait for each other.
        self._change_pool = ThreadPoolExecutor(settings.control_threads, thread_name_prefix="change")
        register(self._grpc, control, admin, regions, changes, self._change_pool, self._streams, self._stream_pool)
        self.registry.streams = lambda: self._streams.streams
        self.registry.connections = self._ingress.count_connections
        self.registry.refused = self._ingress.count_refused
        self.registry.load_failures = self.repository.load_failures
        for what in self._security.watched():
            self.registry.security_watched(what)
        certificates = self._security.certificates
        self.registry.certificate_end_s = lambda: None if certificates is None else certificates.end_s
        observer = Observer(self.registry, self.repository, self.state, settings.status_attainment)
        self._observer = ObserverThread(observer) if settings.metrics_enabled and settings.status_page else None
        self._metrics = (
            MetricsServer(
                settings.metrics_host or settings.host,
                settings.metrics_port,
                self.registry,
                (lambda: certificates.context) if certificates is not None and settings.metrics_tls else None,
                None if access is None else self._may_scrape,
                lambda: self.state.ready,
                status_pages(observer.document) if settings.status_page else no_pages,
            )
            if settings.metrics_enabled
            else None
        )
        self.grpc_port = 0
        self.metrics_port = 0

    def start(self) -> None:
        """Open the ports: alive, not ready. Raises `PortError`."""
        settings = self._settings
        for device in self.devices.taken:
            self.registry.add_device(device.name, device.provider, device.slots)
        log.info("devices", extra={"taken": names(self.devices.taken), "reason": self.devices.why})
        if self.devices.gpus:
            self.registry.gpus = self._gpus.read
            if self._gpus.why_not:
                log.warning("no metrics of the GPUs", extra={"reason": self._gpus.why_not})
        try:
            self.grpc_port = self._ingress.open(settings.host, settings.grpc_port, self._security.certificates)
        except ValueError as error:
            raise SecurityError(f"{settings.tls_certificate}, {settings.tls_key}: {error}") from error
        except OSError as error:
            raise PortError(
                f"cannot listen on {settings.host}:{settings.grpc_port}: is another server running? "
                "Choose another --grpc-port, or 0 for any free one"
            ) from error
        if self._metrics is not None:
            try:
                self._metrics.start()
            except MetricsPortError as error:
                raise PortError(str(error)) from error
            self.metrics_port = self._metrics.port
        if self._observer is not None:
            self._observer.start()
        self._runtime.start()
        self._reaper.start()
        self._security.start()
        if self._spans is not None:
            self._spans.start()
        self._grpc.start()
        self._ingress.start()
        log.info(
            "listening",
            extra={
                "host": settings.host,
                "grpc_port": self.grpc_port,
                "metrics_port": self.metrics_port or "off",
                "ingress": self._ingress.kind,
                "tls": "off" if settings.tls_files is None else "mutual" if settings.tls_client_ca else "on",
                "api_keys": "off" if settings.api_keys is None else str(settings.api_keys),
            },
        )

    def _device_failed(self, device: str, reason: str) -> None:
        """Say so everywhere, and answer what can no longer be run. Called on the thread that found out."""
        log.error("a device has failed: the server drains and ends", extra={"device": device, "reason": reason})
        self.state.failure = f"device {device} has failed: {reason}"
        self.registry.device_failed(device)
        self._health.drain()
        self._refuse(self.state.failure)
        self.repository.fail_device(device, DeviceFailed(self.state.failure))
        self._on_failure()

    def _may_scrape(self, credentials: str | None) -> bool:
        assert self._security.access is not None
        try:
            self._security.access.check_scrape(credentials)
        except ServiceError as error:
            self.registry.record_unrouted(error.reason)
            return False
        return True

    def load(self, progress: LoadProgress, stopping: Callable[[], bool] = lambda: False) -> bool:
        """Load the models and become ready; False when the settings forbid to serve what is there.

        When `stopping` comes true, loading ends after the present model, and the server does not become ready.
        """
        start_ns = now_ns()
        settings = self._settings
        polled = settings.model_control_mode == "poll"
        # Before they are loaded: what changes meanwhile is then seen.
        files = self._changes.facts() if polled else {}
        self.repository.load_all(progress, settings.load_parallelism, stopping, self._chosen)
        if stopping():
            return True
        self._health.models(self.repository.names())
        self.repository.on_change = lambda name, ready: self._health.models([(name, ready)])
        failed = self.repository.failed()
        if failed and self._settings.exit_on_error:
            return False
        # What is there now stays: keep the garbage collector from walking it again and again.
        gc.collect()
        gc.freeze()
        if self.state.failure:
            return True
        if polled:
            self._changes.watch(settings.repository_poll_secs, files)
        if not failed or not self._settings.strict_readiness:
            self.state.enter(Phase.READY)
            self._health.server(ready=True)
        log.info(
            "ready" if self.state.ready else "not ready: strict_readiness, and models failed to load",
            extra={
                "models": len(self.repository.ready_models()),
                "failed": len(failed),
                "seconds": round((now_ns() - start_ns) / NS_PER_S, 3),
            },
        )
        return True

    def _chosen(self, name: str) -> bool:
        """Whether a model is loaded at the start."""
        if self._settings.model_control_mode != "explicit":
            return True
        return "*" in self._settings.load_model or name in self._settings.load_model

    def drain(self) -> None:
        """Say so, and a moment later refuse what is new; answer what was accepted, within the grace period."""
        self.state.enter(Phase.DRAINING)
        self._changes.close()
        self._health.drain()
        pause = threading.Event()
        # Where a device has failed everything is refused already.
        if not self.state.failure:
            pause.wait(_NOTICE_S)
        self._refuse(self._handler.stopping or "no new requests are accepted")
        in_flight = self._in_flight
        log.info("draining", extra={"in_flight": in_flight, "grace_period_s": self._settings.grace_period_s})
        end_ns = now_ns() + int(self._settings.grace_period_s * NS_PER_S)
        # Calls alone do not tell: those of clients that go on sending come and go. Idle must be seen twice, for a
        # request may be on its way from the handler into the queue.
        idle = False
        while self._in_flight > 0 and now_ns() < end_ns:
            before, idle = idle, self.repository.idle()
            if before and idle:
                return
            pause.wait(_DRAIN_POLL_S)
        if self._in_flight > 0:
            log.warning("grace period over", extra={"in_flight": self._in_flight})

    @property
    def _in_flight(self) -> int:
        return self._ingress.calls + self._streams.calls

    def _refuse(self, reason: str) -> None:
        """New requests are told `reason`."""
        self._handler.stopping = reason
        self._stream_handler.stopping = reason

    def stop(self) -> bool:
        """Close everything; calls that are still open are cancelled. False when a batch is running that does not
        end."""
        self._reaper.stop()
        self._security.stop()
        self.repository.close()
        self._streams.close()
        self._grpc.stop(grace=_FLUSH_S).wait(_FLUSH_S + _STOP_S)
        self._ingress.stop(_FLUSH_S, _STOP_S)
        ended = self._runtime.stop(_LAST_BATCH_S)
        self._tracer.close(_FLUSH_S)
        if self._spans is not None:
            self._spans.close(_SPANS_S)
        if self._metrics is not None:
            self._metrics.stop()
        if self._observer is not None:
            self._observer.stop()
        self._change_pool.shutdown(wait=False, cancel_futures=True)
        self._control_pool.shutdown(wait=False, cancel_futures=True)
        self._stream_pool.shutdown(wait=False, cancel_futures=True)
        self._streams.shut_down()
        self.state.enter(Phase.STOPPED)
        log.info("stopped")
        return ended


class StopSignal:
    """SIGTERM and SIGINT as something to wait for.

    A handler runs between two instructions of the main thread, perhaps while that thread holds the lock of whatever it
    waits on: setting a `threading.Event` there can deadlock. A flag needs no lock. Nor may the handler be what ends the
    wait: a signal that comes between the last instruction and the system call that waits has no handler run for it
    until that call returns. So the interpreter itself writes a byte into a pipe, at the moment the signal comes.
    """

    def __init__(self) -> None:
        self.requested = False
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def request(self) -> None:
        """As if a signal had come. From any thread."""
        self.requested = True
        os.write(self._write, b"\0")

    def _handle(self, _number: int, _frame: object) -> None:
        self.requested = True

    def is_set(self) -> bool:
        """Whether a signal has come."""
        return self.requested

    def wait(self) -> None:
        """Return when a signal has come, or at once when one has."""
        while not self.requested:
            os.read(self._read, 1)


def run(settings: Settings, progress: LoadProgress) -> int:
    """Serve until SIGTERM or SIGINT, or until a device fails; the exit code. Called by the main thread."""
    stop = StopSignal()
    try:
        server = Server(settings, stop.request)
        server.start()
    except (IngressError, ModelLoadError, PortError, SecurityError, TelemetryError) as error:
        log.error("cannot start", extra={"reason": str(error)})
        return 1
    code = 0
    try:
        if not server.load(progress, stop.is_set):
            log.error("stopping: a model failed to load and exit_on_error is set")
            code = 1
        else:
            stop.wait()
    except ModelLoadError as error:
        log.error("cannot read the model repository", extra={"reason": str(error)})
        code = 1
    server.drain()
    ended = server.stop()
    if server.state.failure:
        log.error("ending, to be replaced", extra={"reason": server.state.failure, "exit_code": EXIT_DEVICE_FAILED})
        code = EXIT_DEVICE_FAILED
    if not ended:
        log.warning("a batch is still running; the process ends without waiting for it")
    if not ended or server.state.failure:
        # A normal exit would take the runtime apart under the thread that is running it.
        logging.shutdown()
        os._exit(code)
    return code
