"""The repository: what is loaded, what is looked up, and the words of a refusal."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from service.errors import DeviceFailed, InvalidRequest, ModelLoadError, ModelNotReady, UnknownModel, UnknownVersion
from service.repository.layout import scan
from service.repository.repository import ModelRepository, parse_version
from service.repository.version_policy import VersionState
from tests.support import onnx_models
from tests.support.onnx_models import PROBE_CONFIG, write_model
from tests.unit.repository.loading import Progress, load_all, loader_of, repository_of

ALL = "version_policy { all {} }"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`good` of versions 1 to 3 with the newest served, `both` of 1 and 2, `broken`, `empty`, `missing` with a version
    that is not there, `misconfigured`."""
    directory: Path = tmp_path_factory.mktemp("models")
    for version in (1, 2, 3):
        write_model(directory, "good", onnx_models.mlp(), version)
    for version in (1, 2):
        write_model(directory, "both", onnx_models.mlp(), version, ALL)
    write_model(directory, "broken", onnx_models.mlp())
    (directory / "broken" / "1" / "model.onnx").write_bytes(b"no model")
    (directory / "empty").mkdir()
    write_model(directory, "missing", onnx_models.mlp(), 1, "version_policy { specific { versions: [1, 5] } }")
    write_model(directory, "misconfigured", onnx_models.mlp(), 1, "max_batch_sise: 3")
    return directory


@pytest.fixture(scope="module")
def loaded(directory: Path) -> tuple[ModelRepository, Progress]:
    repository = repository_of(directory)
    return repository, load_all(repository, 2)


def test_what_can_be_loaded_is_and_the_rest_is_told(loaded: tuple[ModelRepository, Progress]) -> None:
    """Four ready, four failed, each with its reason; the numbers of the progress add up."""
    repository, progress = loaded
    assert sorted(progress.loads) == [("both", "1"), ("both", "2"), ("good", "3"), ("missing", "1")]
    assert sorted(progress.failures) == [
        ("broken", "1"),
        ("empty", ""),
        ("misconfigured", ""),
        ("missing", "5"),
    ]
    assert progress.total == len(progress.loads) + len(progress.failures)
    assert progress.over
    assert "model.onnx" in progress.failures["broken", "1"]
    assert "max_batch_sise" in progress.failures["misconfigured", ""]
    assert "there is no such version" in progress.failures["missing", "5"]
    assert [(m.name, m.version) for m in repository.ready_models()] == [
        ("both", 1),
        ("both", 2),
        ("good", 3),
        ("missing", 1),
    ]
    assert {entry.name for entry in repository.failed()} == {"broken", "empty", "misconfigured", "missing"}


def test_the_newest_ready_version_answers_when_none_is_named(loaded: tuple[ModelRepository, Progress]) -> None:
    """And the named one when it is."""
    repository, _ = loaded
    assert repository.lookup("good", "").version == 3
    assert repository.lookup("both", "").version == 2
    assert repository.lookup("both", "1").version == 1
    assert repository.lookup("both", "01").version == 1
    assert repository.ready_versions("both") == [1, 2]
    assert repository.ready_versions("nothing") == []


def test_versions_come_back_as_numbers(tmp_path: Path) -> None:
    """10 is newer than 9."""
    for version in (9, 10):
        write_model(tmp_path, "m", onnx_models.mlp(), version, ALL)
    repository = repository_of(tmp_path)
    load_all(repository)
    assert repository.lookup("m", "").version == 10


@pytest.mark.parametrize(
    ("name", "version", "error", "text"),
    [
        ("nobody", "", UnknownModel, "Request for unknown model: 'nobody' is not found"),
        ("nobody", "1", UnknownModel, "Request for unknown model: 'nobody' is not found"),
        ("good", "4", UnknownVersion, "Request for unknown model: 'good' version 4 is not found"),
        ("good", "0", UnknownVersion, "version 0 is not found"),
        ("good", "latest", InvalidRequest, "version 'latest' is not a number"),
        ("good", "-1", InvalidRequest, "is not a number"),
        ("good", "1.0", InvalidRequest, "is not a number"),
        ("good", "٣", InvalidRequest, "is not a number"),
        ("good", "9" * 5000, InvalidRequest, "is not a number"),
        ("good", "1", ModelNotReady, "version 1 is not at ready state: version_policy does not serve it"),
        ("broken", "", ModelNotReady, "model 'broken' is not at ready state: "),
        ("broken", "1", ModelNotReady, "model.onnx"),
        ("empty", "", ModelNotReady, "'empty' is not at ready state: "),
        ("missing", "5", ModelNotReady, "there is no such version"),
        ("misconfigured", "", ModelNotReady, "max_batch_sise"),
    ],
)
def test_refusals_name_the_model_and_the_reason(
    loaded: tuple[ModelRepository, Progress], name: str, version: str, error: type[Exception], text: str
) -> None:
    """In the words that clients of the protocol match on."""
    repository, _ = loaded
    with pytest.raises(error) as caught:
        repository.lookup(name, version)
    assert type(caught.value) is error
    assert text in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_readiness_tells_the_unknown_from_the_not_ready(loaded: tuple[ModelRepository, Progress]) -> None:
    """False only for what is known."""
    repository, _ = loaded
    assert repository.is_ready("good", "")
    assert not repository.is_ready("good", "1")
    assert not repository.is_ready("broken", "")
    with pytest.raises(UnknownModel):
        repository.is_ready("nobody", "")
    with pytest.raises(UnknownVersion):
        repository.is_ready("good", "77")


def test_the_index_has_every_version_found(loaded: tuple[ModelRepository, Progress]) -> None:
    """By name and number, with states and reasons."""
    repository, _ = loaded
    rows = [(entry.name, entry.version, entry.state) for entry in repository.index()]
    assert rows == [
        ("both", 1, VersionState.READY),
        ("both", 2, VersionState.READY),
        ("broken", 1, VersionState.UNAVAILABLE),
        ("empty", None, VersionState.UNAVAILABLE),
        ("good", 1, VersionState.UNAVAILABLE),
        ("good", 2, VersionState.UNAVAILABLE),
        ("good", 3, VersionState.READY),
        ("misconfigured", None, VersionState.UNAVAILABLE),
        ("missing", 1, VersionState.READY),
        ("missing", 5, VersionState.UNAVAILABLE),
    ]
    assert repository.names() == [
        ("both", True),
        ("broken", False),
        ("empty", False),
        ("good", True),
        ("misconfigured", False),
        ("missing", True),
    ]


def test_the_configuration_of_a_ready_version_is_complete(loaded: tuple[ModelRepository, Progress]) -> None:
    """As the ModelConfig call answers it."""
    repository, _ = loaded
    message = repository.config_message(repository.lookup("good", ""))
    assert (message.name, message.max_batch_size, message.input[0].name) == ("good", 8, "x")


def test_every_publication_changes_the_generation(directory: Path) -> None:
    """What was derived from a lookup before is derived again; a failed load changes nothing that a lookup answers."""
    repository = repository_of(directory)
    before = repository.generation
    load_all(repository)
    assert repository.generation == before + 4


def test_a_model_is_looked_up_while_another_loads(directory: Path) -> None:
    """A lookup takes no lock, and a loading model says that it is loading."""
    seen: dict[str, Any] = {}

    class Watching(Progress):
        def loaded(self, name: str, version: str, seconds: float) -> None:
            super().loaded(name, version, seconds)
            seen[name] = repository.lookup(name, version).version

    repository = repository_of(directory)
    real = repository._loader.load

    def load(model: Any, version: Any) -> Any:
        with pytest.raises(ModelNotReady, match="it is loading"):
            repository.lookup(model.name, str(version.version))
        if not seen:
            with pytest.raises(ModelNotReady, match="it waits to be loaded"):
                repository.lookup("missing", "1")
        return real(model, version)

    repository._loader.load = load  # type: ignore[method-assign]
    repository.load_all(Watching(), 1, stopping=lambda: False)
    assert seen == {"both": 2, "good": 3, "missing": 1}


def test_models_load_side_by_side(tmp_path: Path) -> None:
    """As many at a time as asked for, no more."""
    for name in "abcd":
        write_model(tmp_path, name, onnx_models.mlp())
    repository = repository_of(tmp_path)
    real = repository._loader.load
    together = threading.Barrier(2, timeout=20)
    lock = threading.Lock()
    running: list[int] = [0, 0]

    def load(model: Any, version: Any) -> Any:
        with lock:
            running[0] += 1
            running[1] = max(running)
        together.wait()
        try:
            return real(model, version)
        finally:
            with lock:
                running[0] -= 1

    repository._loader.load = load  # type: ignore[method-assign]
    progress = load_all(repository, 2)
    assert len(progress.loads) == 4
    assert running[1] == 2


def test_a_defect_in_one_load_does_not_end_the_others(tmp_path: Path) -> None:
    """Whatever a loader raises is that model's failure."""
    for name in "abc":
        write_model(tmp_path, name, onnx_models.mlp())
    repository = repository_of(tmp_path)
    real = repository._loader.load

    def load(model: Any, version: Any) -> Any:
        if model.name == "b":
            raise ZeroDivisionError("a defect")
        return real(model, version)

    repository._loader.load = load  # type: ignore[method-assign]
    progress = load_all(repository)
    assert sorted(progress.loads) == [("a", "1"), ("c", "1")]
    assert progress.failures == {("b", "1"): "a defect"}


def test_loading_ends_when_the_server_stops(tmp_path: Path) -> None:
    """The model that is being loaded is finished, no further one is begun."""
    for name in "abc":
        write_model(tmp_path, name, onnx_models.mlp())
    repository = repository_of(tmp_path)
    progress = Progress()
    repository.load_all(progress, 1, stopping=lambda: bool(progress.loads))
    assert progress.loads == [("a", "1")]
    assert not repository.is_ready("b", "")


def test_a_directory_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    """Not an empty repository."""
    with pytest.raises(ModelLoadError, match="nowhere"):
        load_all(repository_of(tmp_path / "nowhere"))


def test_an_empty_directory_is_an_empty_repository(tmp_path: Path) -> None:
    """Nothing to load is no failure."""
    repository = repository_of(tmp_path)
    progress = load_all(repository)
    assert (progress.total, progress.over, repository.index()) == (0, True, [])


def test_a_name_in_two_directories_is_served_from_neither(tmp_path: Path) -> None:
    """Which one was meant is not for the server to guess."""
    for part in ("one", "other"):
        write_model(tmp_path / part, "m", onnx_models.mlp())
    repository = repository_of(tmp_path / "one", tmp_path / "other")
    progress = load_all(repository)
    assert progress.loads == []
    with pytest.raises(ModelNotReady):
        repository.lookup("m", "")


def test_closing_stops_every_model(directory: Path) -> None:
    """Nothing is accepted any more; what is looked up says so by itself."""
    repository = repository_of(directory, loader=loader_of(budget_ns=0))
    load_all(repository)
    assert repository.idle()
    repository.close()
    assert not any(model.state().ready for model in repository.ready_models())


@pytest.mark.parametrize("end", ["close", "fail_device"])
def test_what_has_been_replaced_is_stopped_with_the_others(tmp_path: Path, end: str) -> None:
    """It may still have requests and sequences, whose steps the new one passes on to it."""
    write_model(tmp_path, "probe", onnx_models.sequence_probe(1), config=PROBE_CONFIG)
    repository = repository_of(tmp_path, loader=loader_of(budget_ns=0))
    load_all(repository)
    old = repository.lookup("probe", "")
    write_model(tmp_path, "probe", onnx_models.sequence_probe(2), config=PROBE_CONFIG)
    found = scan([tmp_path]).model("probe")
    assert found is not None
    repository.bring(found, "")
    new = repository.lookup("probe", "")
    assert new is not old
    assert repository.stateful_models() == (new,)
    assert old.state().ready
    if end == "close":
        repository.close()
    else:
        repository.fail_device("cpu", DeviceFailed("broken"))
    assert not old.state().ready
    assert not new.state().ready


@pytest.mark.parametrize("unloads", [False, True])
def test_a_model_is_seen_at_the_moment_it_stops_serving(tmp_path: Path, unloads: bool) -> None:
    """Who stops everything right after the swap stops what was swapped out, too."""
    write_model(tmp_path, "m", onnx_models.mlp())
    repository = repository_of(tmp_path, loader=loader_of(budget_ns=0))
    load_all(repository)
    old = repository.lookup("m", "")
    ready: list[bool] = []

    def stop(_name: str, _ready: bool) -> None:
        repository.close()
        ready.append(old.state().ready)

    repository.on_change = stop
    if unloads:
        repository.unload("m")
    else:
        write_model(tmp_path, "m", onnx_models.mlp(seed=1))
        found = scan([tmp_path]).model("m")
        assert found is not None
        repository.bring(found, "")
    assert ready == [False]


@pytest.mark.parametrize("text", ["1", "007", "999999999999999999"])
def test_numbers(text: str) -> None:
    """Up to 18 digits, which fit the protocol's numbers."""
    assert parse_version(text, "m") == int(text)
