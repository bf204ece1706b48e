"""From a directory on disk to a model that can answer: read, complete, create sessions, warm up, measure.

Everything that can be wrong with a model is found here, before it serves, and ends in `ModelLoadError` with the reason.
What was decided without being asked (a batch size, batching switched off) is in the notes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from service.clock import now_ns
from service.config.complete import Completed, complete
from service.config.graph import model_file, read_graph
from service.config.heads import backbone_of, complete_head, file_digest
from service.config.model import BackboneReference, ModelConfig
from service.config.signature import Graph
from service.engine.batchable import check_batching
from service.engine.devices import Device, Devices
from service.engine.head import Head
from service.engine.instances import captured_sizes, finish_graphs, make_instances
from service.engine.options import plan_session
from service.engine.pool import Instance, SessionPool
from service.engine.profile import model_digest, profile, profile_key
from service.engine.runtime import Runtime
from service.engine.states import StepTensors
from service.engine.warmup import (
    LatencySample,
    Measured,
    Sample,
    coarse,
    cost_of_change,
    first_run,
    largest_run,
    run_configured,
    samples,
    warm,
)
from service.errors import DeviceFailed, ModelLoadError, OutOfMemory, ServiceError
from service.head_model import HeadModel
from service.metrics import ModelMetrics
from service.model import Model
from service.pb import model_config_pb2 as pb
from service.repository import placement
from service.repository.layout import ModelFiles, VersionFiles
from service.repository.neighbours import Neighbour
from service.repository.placement import Need, Placed
from service.repository.policy import delivery_ns, latency_model, one_size, queue_policy
from service.request import ShapeClass
from service.scheduler import QueuePolicy
from service.sequence_model import SequenceModel
from service.telemetry import SpanTracer
from service.tracing import Tracer


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """The server's settings and knowledge that concern loading."""

    default_max_batch_size: int
    profile_budget_ns: int
    profile_cache: Path | None
    # Free memory of the GPU with a UUID, bytes; None where it is not known.
    free_bytes: Callable[[str], int | None] = lambda _uuid: None


@dataclass(slots=True)
class Loaded:
    """A loaded version: the model, its configuration, what was decided for it and what it took; what it is to its
    neighbours, if its latency was measured."""

    model: Model
    completed: Completed
    notes: list[str]
    load_ns: int
    profiled_from_cache: bool
    memory_bytes: int
    neighbour: Neighbour | None = None
    # What a head needs to know of its backbone: the tensors at its ends, and its file.
    graph: Graph | None = None
    path: Path | None = None
    file_facts: tuple[int, int, int] = (0, 0, 0)


class Loader:
    """Loads model versions onto the devices of one runtime. Safe to use from several threads."""

    def __init__(
        self,
        runtime: Runtime,
        devices: Devices,
        options: LoadOptions,
        tracer: Tracer | None = None,
        spans: SpanTracer | None = None,
    ) -> None:
        """`tracer` and `spans` are told of what the models have answered."""
        self._runtime = runtime
        self._tracer = tracer
        self._spans = spans
        self._devices = devices
        self._options = options
        # Finds the backbone of a head among what serves; raises `ModelLoadError`. Set by who has the models.
        self.find_backbone: Callable[[BackboneReference], Loaded] = _no_backbone

    def load(self, model: ModelFiles, version: VersionFiles, beside: Model | None = None) -> Loaded:
        """Load one version. Raises `ModelLoadError` (or its `ConfigError`).

        `beside` serves the same model meanwhile: if the new one takes and gives the same tensors it begins with the
        latencies of that one instead of measuring beside it, which would slow both and measure too much.
        """
        start_ns = now_ns()
        memory_before = resident_bytes()
        name, directory, config_file = model.name, model.directory, model.config
        path = model_file(version.model_path)
        # Before it is read: a change from here on is seen.
        facts = file_facts(path)
        graph = read_graph(path)
        reference = backbone_of(config_file)
        if reference is not None and config_file is not None:
            loaded = self._load_head(model, version.version, config_file, reference, graph, path)
            loaded.model.load_ns = loaded.load_ns = now_ns() - start_ns
            loaded.memory_bytes = max(0, resident_bytes() - memory_before)
            return loaded
        completed = complete(
            config_file,
            name,
            graph.inputs,
            graph.outputs,
            graph.dynamic_quantisation,
            self._options.default_max_batch_size,
            [gpu.index for gpu in self._devices.gpus],
            graph.convolutions,
        )
        config = completed.config
        notes = list(completed.notes)
        labels = {output: _read_labels(directory / file, output) for output, file in config.labels.items()}
        explicit = config_file is not None and config_file.max_batch_size > 1
        bytes_each = [file.stat().st_size for file in (path, *(path.parent / f for f in graph.external_files))]
        limit = config.optimization.cuda_options.get("gpu_mem_limit", "")
        need = Need(sum(bytes_each), int(limit) if limit.isdigit() else None)
        # Completing lists every GPU in groups that name none; here it matters who named them.
        stated = [] if config_file is None else config_file.instance_group
        named = [bool(group.gpus) for group in stated] or [False] * len(config.instance_groups)
        groups = [
            g if by_name else replace(g, gpus=()) for g, by_name in zip(config.instance_groups, named, strict=True)
        ]
        placed, not_placed = placement.place(groups, self._devices, need, self._free_bytes)
        notes += not_placed
        pools: dict[str, SessionPool] = {}
        measured: Measured | None = None
        # The only batch sizes that run without a delay; empty where all do.
        sizes: tuple[int, ...] = ()
        from_cache = False
        digest = ""
        # One list for all devices: equal shapes are then one shape class, with the buffers of every instance.
        candidates = samples(config, directory)
        for place in placed:
            instances = make_instances(path, config, place.device, place.count)
            pools[place.device.name] = SessionPool(instances)
            try:
                config, sample, found_out = _warm_up(instances, config, candidates, explicit)
                # Before anything is timed: what is timed then are replays.
                found_out += finish_graphs(instances, config, sample)
            except DeviceFailed as error:
                raise self._broken(name, place, error) from error
            notes += [note for note in found_out if note not in notes]
            captured = captured_sizes(instances, sample) if sample is not None and config.convolutions else ()
            sizes = captured if captured and (not sizes or len(captured) < len(sizes)) else sizes
            if sample is None or self._budget_ns(config) == 0:
                continue
            known = _latencies_of(beside, config, sample)
            if known is not None:
                _warm_again(instances, config, sample, known)
            else:
                digest = digest or model_digest([path, *(path.parent / f for f in graph.external_files)])
                known, from_cache = self._measure(instances[0], config, place, digest, sample)
            # The slower device is the safe assumption for a queue that both serve.
            measured = known if measured is None or _slower(known, measured) else measured
            if place.device.kind == "gpu" and config.convolutions and not captured:
                sizes = self._one_size(instances[0], config, place, sample, known) or sizes
        policy, limit_note = queue_policy(config, [p.device for p in placed], _count(placed), measured, sizes)
        notes += limit_note
        built = self._build(config, version.version, policy, measured, pools, directory)
        for candidate in candidates:
            built.adopt(candidate.shape)
        built.labels = labels
        if config.dynamic_batching is None:
            # Running the model showed it: what clients are told is what is done.
            completed.proto.ClearField("dynamic_batching")
        completed = replace(completed, config=config)
        load_ns = now_ns() - start_ns
        built.load_ns = load_ns
        neighbour = None
        if measured is not None:
            slots = {p.device.name: (min(p.count, p.device.slots), p.device.slots) for p in placed}
            shortest_ns = measured.table[min(measured.table)].p50_ns
            neighbour = Neighbour(config.name, slots, config.objective.slo_ns, shortest_ns)
        grown = max(0, resident_bytes() - memory_before)
        return Loaded(built, completed, notes, load_ns, from_cache, grown, neighbour, graph, path, facts)

    def _load_head(
        self,
        model: ModelFiles,
        version: int,
        config_file: pb.ModelConfig,
        reference: BackboneReference,
        graph: Graph,
        path: Path,
    ) -> Loaded:
        """A model that is only a head: its session, on the queue of what serves already."""
        backbone = self.find_backbone(reference)
        with _kept(backbone.model):
            assert backbone.graph is not None
            if reference.sha256:
                _check_digest(backbone, reference)
            completed, inputs = complete_head(config_file, model.name, graph, backbone.completed, backbone.graph)
            config = completed.config
            head = Head(path, config, inputs, self._devices.cpu)
            labels = {output: _read_labels(model.directory / file, output) for output, file in config.labels.items()}
            policy = replace(
                backbone.model.policy,
                name=config.name,
                slo_ns=config.objective.slo_ns,
                delivery_ns=delivery_ns(config.objective.slo_ns),
            )
            metrics = ModelMetrics(config.name, str(version))
            built = HeadModel(config, version, policy, backbone.model, head, self._runtime, metrics)
            metrics.state = built.state
            built.labels = labels
            built.tracer, built.spans = self._tracer, self._spans
            note = f"a head on '{backbone.model.name}' version {backbone.model.version}"
            return Loaded(built, completed, [note], 0, False, 0, None, graph, path)

    def _build(
        self,
        config: ModelConfig,
        version: int,
        policy: QueuePolicy,
        measured: Measured | None,
        pools: dict[str, SessionPool],
        directory: Path,
    ) -> Model:
        latency = latency_model(policy, measured)
        metrics = ModelMetrics(config.name, str(version))
        if config.sequences is None:
            model = Model(config, version, policy, latency, pools, self._runtime, metrics)
        else:
            tensors = StepTensors(config, directory)
            model = SequenceModel(config, version, policy, latency, pools, self._runtime, metrics, tensors)
        metrics.state = model.state
        model.tracer, model.spans = self._tracer, self._spans
        return model

    def _free_bytes(self, device: Device) -> int | None:
        return self._options.free_bytes(device.uuid) if device.uuid else None

    def _budget_ns(self, config: ModelConfig) -> int:
        """What may be spent on measuring a model; 0 = it is not measured, requests teach."""
        stated_ns = config.objective.profile_budget_ns
        return self._options.profile_budget_ns if stated_ns is None else stated_ns

    def _measure(
        self, instance: Instance, config: ModelConfig, place: Placed, digest: str, sample: Sample
    ) -> tuple[Measured, bool]:
        max_rows = largest_run(config)
        objective = config.objective
        plan = plan_session(config, place.device)
        try:
            return profile(
                instance,
                config,
                sample,
                max_rows,
                objective.slo_ns,
                self._budget_ns(config),
                self._options.profile_cache,
                profile_key(digest, plan, sample, max_rows, objective.slo_ns),
            )
        except DeviceFailed as error:
            raise self._broken(config.name, place, error) from error
        except ServiceError as error:
            raise ModelLoadError(f"model '{config.name}' fails on a batch of its own warm-up input: {error}") from error

    def _one_size(
        self, instance: Instance, config: ModelConfig, place: Placed, sample: Sample, measured: Measured
    ) -> tuple[int, ...]:
        """The size that every batch is padded to, where changing the size costs more than that; empty elsewhere."""
        table = measured.table
        if len(table) == 1 or not config.joins_requests:
            return ()
        try:
            cost_ns = cost_of_change(instance, config, sample, min(table), max(table))
        except OutOfMemory:
            # What fitted a moment ago does not now: no reason not to serve.
            return ()
        except DeviceFailed as error:
            raise self._broken(config.name, place, error) from error
        except ServiceError as error:
            raise ModelLoadError(f"model '{config.name}' fails on a batch of its own warm-up input: {error}") from error
        return one_size({rows: s.p50_ns for rows, s in table.items()}, cost_ns, config.objective.slo_ns)

    def _broken(self, name: str, place: Placed, error: DeviceFailed) -> ModelLoadError:
        """The device broke while the model was warmed up: nobody can use it any more."""
        self._runtime.device_failed(place.device.name, f"while model '{name}' was loading: {error}")
        return ModelLoadError(f"device {place.device.name} has failed: {error}")


def _no_backbone(reference: BackboneReference) -> Loaded:
    raise ModelLoadError(f"parameters[backbone]: there is no model '{reference.name}' here")


@contextlib.contextmanager
def _kept(backbone: Model) -> Iterator[None]:
    """Keep a backbone, which may be unloaded at any time, until a head is on it or has failed. Raises `ModelLoadError`
    when it is too late."""
    loading = object()
    if not backbone.build_on(loading):
        raise ModelLoadError(f"parameters[backbone]: '{backbone.name}' is being unloaded; load it first")
    try:
        yield
    finally:
        backbone.build_on_no_more(loading)


def _check_digest(backbone: Loaded, reference: BackboneReference) -> None:
    """Raises `ModelLoadError` unless what serves was loaded from the file that a head was made for."""
    assert backbone.path is not None
    # Its file is read only now, when somebody asks; what was loaded is in it if nobody has touched it since.
    try:
        digest = file_digest(backbone.path)
        same = file_facts(backbone.path) == backbone.file_facts
    except OSError as error:
        raise ModelLoadError(f"parameters[backbone_sha256]: {backbone.path} cannot be read: {error}") from error
    if not same:
        raise ModelLoadError(
            f"parameters[backbone_sha256]: {backbone.path} has changed since '{reference.name}' was loaded, so it "
            "cannot be told whether this head fits; load that model again first"
        )
    if reference.sha256 != digest:
        raise ModelLoadError(
            f"parameters[backbone_sha256]: the model file of '{reference.name}' that serves is another one than "
            "this head was made for"
        )


def file_facts(path: Path) -> tuple[int, int, int]:
    """What changes when a file is written or replaced: inode, size, time of the last change in ns. Raises `OSError`."""
    facts = path.stat()
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def _warm_up(
    instances: Sequence[Instance], config: ModelConfig, candidates: Sequence[Sample], explicit: bool
) -> tuple[ModelConfig, Sample | None, list[str]]:
    """Run every instance once: (the configuration to serve with, the row the model accepts, notes).

    Raises `ModelLoadError` when the model refuses a warm-up request that the configuration states, or cannot be batched
    as the configuration demands.
    """
    first = instances[0]
    sample, reason = first_run(first, config, candidates)
    if sample is None and config.warmups:
        raise ModelLoadError(f"model_warmup: the model refuses every request of it: {reason}")
    if sample is None:
        return config, None, [f"warm-up failed, so the first requests teach instead (state model_warmup): {reason}"]
    notes: list[str] = []
    if config.joins_requests:
        config, notes = check_batching(first, config, sample, explicit)
    for instance in instances:
        instance.undeclared_shapes |= first.undeclared_shapes
        if instance is not first:
            first_run(instance, config, [sample])
        run_configured(instance, config, candidates)
    return config, sample, notes


def _warm_again(instances: Sequence[Instance], config: ModelConfig, sample: Sample, known: Measured) -> None:
    """Allocations and page faults happen here, not with the first requests: the largest size first, which makes room
    for the others."""
    for rows in reversed(coarse(sorted(known.table))):
        for instance in instances:
            warm(instance, config, sample, rows)


def _read_labels(path: Path, output: str) -> tuple[str, ...]:
    """The names of an output's classes, one a line. Raises `ModelLoadError`."""
    try:
        return tuple(path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ModelLoadError(f"{path}: the labels of output '{output}' cannot be read: {reason}") from error


def _latencies_of(beside: Model | None, config: ModelConfig, sample: Sample) -> Measured | None:
    """What is known of a model that serves, for one of the same tensors."""
    if beside is None or (len(beside.policy.buckets) == 1 and config.max_batch_size > 1):
        # Of a model with one size for all batches the others are not known.
        return None
    old = beside.config
    same = (old.session_inputs, old.session_outputs, old.max_batch_size, old.batched) == (
        config.session_inputs,
        config.session_outputs,
        config.max_batch_size,
        config.batched,
    )
    for shape, latencies in beside.latency.table().items() if same else ():
        if isinstance(shape, ShapeClass) and shape.shapes == sample.shape.shapes and latencies:
            table = {rows: LatencySample(ns, ns, 1) for rows, ns in latencies.items() if ns > 0}
            if table:
                return Measured(sample.shape, table, complete=True)
    return None


def _count(placed: Sequence[Placed]) -> int:
    """Batches of the model at once per device: the least of the devices', since a queue has one number."""
    return min(place.count for place in placed)


def _slower(one: Measured, other: Measured) -> bool:
    return min(one.table.items())[1].p50_ns > min(other.table.items())[1].p50_ns


def resident_bytes() -> int:
    """The process's resident memory, bytes; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except (OSError, ValueError, IndexError):
        return 0
