"""The control plane: what is alive, what is served, how it is configured and how it is doing.

Each method takes a request message and returns a response message or raises a `ServiceError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version as distribution_version
from typing import Any

from service.errors import InvalidRequest
from service.model import Model
from service.pb import grpc_service_pb2 as pb
from service.repository.repository import ModelRepository
from service.repository.version_policy import VersionState
from service.state import ServerState
from service.tensor import TensorSpec

# Exactly what is supported: clients switch features on by what they find here (perf_analyzer: "statistics").
EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "logging",
    "model_configuration",
    "parameters",
    "schedule_policy",
    "sequence",
    "statistics",
)
PLATFORM = "onnxruntime_onnx"


class Control:
    """Answers the RPCs that only tell. `extensions`: what is supported because the server was started so."""

    def __init__(self, repository: ModelRepository, state: ServerState, extensions: Sequence[str] = ()) -> None:
        self._repository = repository
        self._state = state
        self._extensions = sorted((*EXTENSIONS, *extensions))

    def server_live(self, _request: Any) -> Any:
        """True as long as the process can answer, also while it drains."""
        return pb.ServerLiveResponse(live=True)

    def server_ready(self, _request: Any) -> Any:
        """True from the end of loading to the beginning of draining."""
        return pb.ServerReadyResponse(ready=self._state.ready)

    def model_ready(self, request: Any) -> Any:
        """Whether a known model can answer now; an unknown one is an error."""
        ready = self._repository.is_ready(request.name, request.version)
        return pb.ModelReadyResponse(ready=ready and self._state.ready)

    def server_metadata(self, _request: Any) -> Any:
        """Name, version and extensions."""
        return pb.ServerMetadataResponse(
            name="onclock", version=distribution_version("onclock"), extensions=self._extensions
        )

    def model_metadata(self, request: Any) -> Any:
        """Inputs, outputs and ready versions. Shapes begin with -1 for the batch when the model is batched."""
        model = self._repository.lookup(request.name, request.version)
        return pb.ModelMetadataResponse(
            name=model.name,
            versions=[str(v) for v in self._repository.ready_versions(model.name)],
            platform=PLATFORM,
            inputs=[_tensor_metadata(spec) for spec in model.inputs],
            outputs=[_tensor_metadata(spec) for spec in model.outputs],
        )

    def model_config(self, request: Any) -> Any:
        """The configuration in force, completed from the model file."""
        model = self._repository.lookup(request.name, request.version)
        return pb.ModelConfigResponse(config=self._repository.config_message(model))

    def model_statistics(self, request: Any) -> Any:
        """Statistics of one version, of all of a model's, or of every model's when no name is given."""
        if not request.name:
            if request.version:
                raise InvalidRequest(f"a version ('{request.version}') is given without the name of a model")
            models = self._repository.ready_models()
        elif request.version:
            models = [self._repository.lookup(request.name, request.version)]
        else:
            self._repository.lookup(request.name, "")
            models = [m for m in self._repository.ready_models() if m.name == request.name]
        return pb.ModelStatisticsResponse(model_stats=[_statistics(model) for model in models])

    def repository_index(self, request: Any) -> Any:
        """Every model version found, with its state and, when it cannot be served, the reason."""
        entries = self._repository.index()
        if request.ready:
            entries = [entry for entry in entries if entry.state is VersionState.READY]
        if request.repository_name:
            raise InvalidRequest("'repository_name' is not supported: the server has one repository")
        return pb.RepositoryIndexResponse(
            models=[
                pb.RepositoryIndexResponse.ModelIndex(
                    name=entry.name,
                    version="" if entry.version is None else str(entry.version),
                    state=entry.state.name,
                    reason=entry.reason,
                )
                for entry in entries
            ]
        )


def _tensor_metadata(spec: TensorSpec) -> Any:
    return pb.ModelMetadataResponse.TensorMetadata(
        name=spec.name, datatype=spec.datatype.wire_name, shape=spec.full_shape
    )


def _statistics(model: Model) -> Any:
    stats = model.metrics.statistics()
    return pb.ModelStatistics(
        name=stats.name,
        version=stats.version,
        last_inference=stats.last_inference_ms,
        inference_count=stats.inference_count,
        execution_count=stats.execution_count,
        inference_stats=pb.InferStatistics(
            success=_duration(stats.success),
            fail=_duration(stats.fail),
            queue=_duration(stats.queue),
            compute_input=_duration(stats.compute_input),
            compute_infer=_duration(stats.compute_infer),
            compute_output=_duration(stats.compute_output),
            cache_hit=_duration(stats.cache_hit),
            cache_miss=_duration(stats.cache_miss),
        ),
        batch_stats=[
            pb.InferBatchStatistics(
                batch_size=batch.batch_size,
                compute_input=_duration(batch.compute_input),
                compute_infer=_duration(batch.compute_infer),
                compute_output=_duration(batch.compute_output),
            )
            for batch in stats.batch_stats
        ],
    )


def _duration(duration: Any) -> Any:
    return pb.StatisticDuration(count=duration.count, ns=duration.ns)
