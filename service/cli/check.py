"""`onclock check DIR`: what a server would load from a repository, and why it would not load the rest.

Promise: nothing is run and no weights are read, so it is safe and quick on any machine, in a pull request too. With a
`probe` (the engine's, given by the command line) each version is loaded as well. Exit code 0 when every model would be
served, else 1.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from service.clock import NS_PER_MS
from service.config.complete import DEFAULT_MAX_BATCH_SIZE, Completed, complete
from service.config.graph import model_file, read_graph
from service.config.heads import backbone_of, complete_head, file_digest
from service.config.model import InstanceGroup, ModelConfig
from service.config.pbtxt import CONFIG_FILENAME, to_text
from service.config.sequences import INITIAL_DIRECTORY
from service.config.signature import Graph
from service.errors import ConfigError, ModelLoadError
from service.repository.layout import ModelFiles, Scan, VersionFiles, scan, scan_model
from service.repository.version_policy import missing_versions, versions_to_serve
from service.tensor import TensorSpec

# Loads a version for real: returns what else there is to say, or raises ModelLoadError.
Probe = Callable[[VersionFiles, Completed], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Finding:
    """What would become of one version (0: of the model as a whole). Either `completed` or `error` is set."""

    model: str
    version: int
    completed: Completed | None
    error: ModelLoadError | None
    notes: tuple[str, ...] = ()
    graph: Graph | None = None
    path: Path | None = None


def check(
    repositories: Path | Sequence[Path],
    default_max_batch_size: int = DEFAULT_MAX_BATCH_SIZE,
    gpus: Collection[int] | None = None,
    verbose: bool = False,
    probe: Probe | None = None,
    console: Console | None = None,
) -> int:
    """Print what would be served from `repositories` (or from one model's directory); returns the exit code.

    `gpus` are the CUDA devices to check instance groups against, None to leave them unchecked. `verbose` prints each
    completed configuration. Raises `ModelLoadError` when a repository is no readable directory.
    """
    console = console or Console()
    found = _scan([repositories] if isinstance(repositories, Path) else repositories)
    findings: list[Finding] = []
    # Heads after all others, since they are completed from what they build on.
    for model in sorted(found.models, key=lambda model: (model.backbone is not None, model.name)):
        findings += examine(model, default_max_batch_size, gpus, probe, findings)
    findings.sort(key=lambda finding: finding.model)
    console.print(_table(findings))
    for finding in findings:
        name = f"{finding.model}/{finding.version}" if finding.version else finding.model
        if finding.error is not None:
            console.print(f"[red]fails[/red] {escape(name)}: {escape(_reason(finding.error))}", soft_wrap=True)
        for note in finding.notes:
            console.print(f"[yellow]note[/yellow]  {escape(name)}: {escape(note)}", soft_wrap=True)
    for warning in found.warnings:
        console.print(f"[yellow]left out[/yellow] {escape(str(warning))}", soft_wrap=True)
    if verbose:
        for finding in findings:
            if finding.completed is not None:
                console.print(f"\n# {finding.model}/{finding.version}/{CONFIG_FILENAME}, as completed", markup=False)
                console.print(to_text(finding.completed.proto), markup=False, highlight=False, soft_wrap=True, end="")
    if not findings:
        console.print("no model found; expected DIR/<model>/<version>/model.onnx")
    return 1 if not findings or any(finding.error is not None for finding in findings) else 0


def examine(
    model: ModelFiles,
    default_max_batch_size: int = DEFAULT_MAX_BATCH_SIZE,
    gpus: Collection[int] | None = None,
    probe: Probe | None = None,
    others: Sequence[Finding] = (),
) -> list[Finding]:
    """What would become of the versions of `model` that its policy wants, newest last. `others` are what it may build
    on."""
    if model.error is not None:
        return [Finding(model.name, 0, None, model.error)]
    findings = []
    numbers = [files.version for files in model.versions]
    absent = missing_versions(numbers, model.version_policy)
    if absent:
        listed = ", ".join(str(version) for version in absent)
        error = ConfigError("version_policy.specific.versions", f"{listed} not found in {model.directory}")
        findings.append(Finding(model.name, 0, None, error))
    wanted = versions_to_serve(numbers, model.version_policy)
    for files in model.versions:
        if files.version not in wanted:
            continue
        try:
            graph = read_graph(files.model_path)
            completed = _completed(model, graph, default_max_batch_size, gpus, others)
            _check_files(model, completed.config)
            more = () if probe is None or model.backbone is not None else tuple(probe(files, completed))
        except ModelLoadError as error:
            findings.append(Finding(model.name, files.version, None, error))
        else:
            findings.append(
                Finding(model.name, files.version, completed, None, (*completed.notes, *more), graph, files.model_path)
            )
    return findings


def _completed(
    model: ModelFiles,
    graph: Graph,
    default_max_batch_size: int,
    gpus: Collection[int] | None,
    others: Sequence[Finding],
) -> Completed:
    reference = backbone_of(model.config)
    if reference is None or model.config is None:
        tensors = (graph.inputs, graph.outputs, graph.dynamic_quantisation)
        return complete(model.config, model.name, *tensors, default_max_batch_size, gpus, graph.convolutions)
    served = [finding for finding in others if finding.model == reference.name and finding.completed is not None]
    wanted = [finding for finding in served if reference.version in (None, finding.version)]
    if not wanted:
        raise ConfigError("parameters[backbone]", f"no model '{reference.name}' would serve")
    below = max(wanted, key=lambda finding: finding.version)
    assert below.completed is not None
    assert below.graph is not None
    assert below.path is not None
    if reference.sha256 and reference.sha256 != file_digest(model_file(below.path)):
        raise ConfigError(
            "parameters[backbone_sha256]", f"the model file of '{reference.name}' is not the one this head was made for"
        )
    completed, _ = complete_head(model.config, model.name, graph, below.completed, below.graph)
    return completed


def _check_files(model: ModelFiles, config: ModelConfig) -> None:
    """Raises `ConfigError` for a file that the configuration names and that is not there."""
    for name in config.labels.values():
        if not (model.directory / name).is_file():
            raise ConfigError("output.label_filename", f"{model.directory / name} does not exist")
    for state in config.sequences.states if config.sequences is not None else ():
        path = model.directory / INITIAL_DIRECTORY / state.initial_file
        if state.initial_file and not path.is_file():
            raise ConfigError("sequence_batching.state.initial_state.data_file", f"{path} does not exist")


def _scan(repositories: Sequence[Path]) -> Scan:
    """As `scan`; a directory that is a model itself stands for a repository of one."""
    if len(repositories) == 1:
        (directory,) = repositories
        alone, warnings = scan_model(directory.resolve())
        if alone.versions or (directory / CONFIG_FILENAME).is_file():
            return Scan((alone,), warnings)
    return scan(repositories)


def _reason(error: ModelLoadError) -> str:
    return f"{CONFIG_FILENAME}: {error}" if isinstance(error, ConfigError) and "/" not in error.path else str(error)


def _table(findings: Sequence[Finding]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("model", "version", "state", "batching", "inputs", "outputs", "objective", "runs on"):
        table.add_column(column, overflow="fold", no_wrap=column not in ("inputs", "outputs"))
    for finding in findings:
        version = str(finding.version) if finding.version else ""
        if finding.completed is None:
            table.add_row(escape(finding.model), version, "[red]fails[/red]")
            continue
        config = finding.completed.config
        table.add_row(
            escape(finding.model),
            version,
            "[green]loads[/green]",
            _batching(config),
            escape("\n".join(_tensor(spec) for spec in config.inputs)),
            escape("\n".join(_tensor(spec) for spec in config.outputs)),
            f"{config.objective.slo_ns / NS_PER_MS:g} ms" if config.objective.slo_ns is not None else "none",
            ", ".join(_group(group) for group in config.instance_groups),
        )
    return table


def _batching(config: ModelConfig) -> str:
    if not config.batched:
        text = "no batch"
    else:
        text = f"{config.max_batch_size} rows" if config.joins_requests else f"{config.max_batch_size} rows, not joined"
    if config.backbone is not None:
        return f"{text}; a head on {config.backbone.name}"
    if config.sequences is None:
        return text
    states = ", ".join(state.input.name for state in config.sequences.states)
    return f"{text}; sequences" + (f" with {states}" if states else "")


def _tensor(spec: TensorSpec) -> str:
    sizes = ",".join("?" if size < 0 else str(size) for size in spec.full_shape)
    return f"{spec.name} {spec.datatype.wire_name}[{sizes}]"


def _group(group: InstanceGroup) -> str:
    where = group.kind.value.removeprefix("KIND_").lower()
    numbers = f" {','.join(str(gpu) for gpu in group.gpus)}" if group.gpus else ""
    return f"{group.count}x {where}{numbers}" if group.count > 1 else f"{where}{numbers}"
