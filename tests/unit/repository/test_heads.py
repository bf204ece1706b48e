"""Heads as they are loaded: on what serves, for as long as they need it, and only on the file they were made for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from service.cli.check import examine
from service.config.heads import file_digest
from service.errors import ModelLoadError
from service.repository import loader as loading
from service.repository.layout import scan
from service.repository.repository import ModelRepository
from tests.support.onnx_models import backbone, head, write_model
from tests.unit.repository.loading import load_all, loader_of, repository_of

ON_BACKBONE = 'parameters { key: "backbone" value { string_value: "backbone" } }\n'


def made_for(digest: str) -> str:
    return ON_BACKBONE + f'parameters {{ key: "backbone_sha256" value {{ string_value: "{digest}" }} }}\n'


@pytest.fixture
def repository(tmp_path: Path) -> ModelRepository:
    write_model(tmp_path, "backbone", backbone(8, 8, 1), config="max_batch_size: 8\ndynamic_batching { }\n")
    made = repository_of(tmp_path, loader=loader_of(budget_ns=0))
    load_all(made)
    return made


def bring(repository: ModelRepository, directory: Path, name: str) -> None:
    found = scan([directory]).model(name)
    assert found is not None
    repository.bring(found, "")


def test_a_backbone_stays_while_a_head_is_being_loaded(
    repository: ModelRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it could go between being found and being built on."""
    write_model(tmp_path, "head", head(8, 4, 1), config=ON_BACKBONE)
    below = repository.lookup("backbone", "")
    real, sealed = loading.Head, []

    def make(*given: Any) -> Any:
        sealed.append(below.seal())
        return real(*given)

    monkeypatch.setattr(loading, "Head", make)
    bring(repository, tmp_path, "head")
    assert sealed == [False]
    assert repository.is_ready("head", "")


def test_a_head_that_fails_to_load_lets_its_backbone_go(repository: ModelRepository, tmp_path: Path) -> None:
    write_model(tmp_path, "head", head(3, 4, 1), config=ON_BACKBONE)
    with pytest.raises(ModelLoadError):
        bring(repository, tmp_path, "head")
    assert repository.lookup("backbone", "").seal()


def test_a_head_is_not_loaded_on_a_backbone_that_goes(repository: ModelRepository, tmp_path: Path) -> None:
    write_model(tmp_path, "head", head(8, 4, 1), config=ON_BACKBONE)
    assert repository.lookup("backbone", "").seal()
    with pytest.raises(ModelLoadError, match="'backbone' is being unloaded"):
        bring(repository, tmp_path, "head")


def test_what_a_head_was_made_for_is_what_was_loaded(repository: ModelRepository, tmp_path: Path) -> None:
    """A file that was written since is not what serves, whether it is the right one or not."""
    path = tmp_path / "backbone" / "1" / "model.onnx"
    first = file_digest(path)
    write_model(tmp_path, "head", head(8, 4, 1), config=made_for(first))
    bring(repository, tmp_path, "head")
    onnx.save_model(backbone(8, 8, 1, seed=5), str(path))
    assert file_digest(path) != first
    for digest in (first, file_digest(path)):
        write_model(tmp_path, "other", head(8, 4, 2), config=made_for(digest))
        with pytest.raises(ModelLoadError, match="has changed since 'backbone' was loaded"):
            bring(repository, tmp_path, "other")
    bring(repository, tmp_path, "backbone")
    bring(repository, tmp_path, "other")


@pytest.mark.parametrize("fits", [True, False])
def test_check_compares_the_file_as_well(tmp_path: Path, fits: bool) -> None:
    """What the server would refuse is said before."""
    write_model(tmp_path, "backbone", backbone(8, 8, 1), config="max_batch_size: 8\ndynamic_batching { }\n")
    digest = file_digest(tmp_path / "backbone" / "1" / "model.onnx") if fits else "0" * 64
    write_model(tmp_path, "head", head(8, 4, 1), config=made_for(digest))
    found = scan([tmp_path])
    below, above = found.model("backbone"), found.model("head")
    assert below is not None
    assert above is not None
    (finding,) = examine(above, others=examine(below))
    assert (finding.error is None) is fits
    assert fits or "not the one this head was made for" in str(finding.error)
