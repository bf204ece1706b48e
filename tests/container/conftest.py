"""The image, built once for all tests of a run."""

from __future__ import annotations

import pytest

from tests.container.bases import build_base, run_base
from tests.container.podman import build, needs_containers

BASES = {"BUILD_BASE": "localhost/onclock-build-base", "RUN_BASE": "localhost/onclock-run-base"}
IMAGE = "localhost/onclock:cpu"


@pytest.fixture(scope="session")
def image() -> str:
    """The name of the image for CPUs. Building it takes minutes; the tests that use it are `timed`."""
    needs_containers()
    build_base(BASES["BUILD_BASE"])
    run_base(BASES["RUN_BASE"])
    build("cpu", IMAGE, BASES)
    return IMAGE
