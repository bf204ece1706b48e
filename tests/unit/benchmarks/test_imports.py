"""Every benchmark can at least be started: nothing else in the tests runs most of them."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import benchmarks

NAMES = sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__) if not module.name.startswith("_"))


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_can_be_imported(name: str) -> None:
    """What it takes from the rest of the project is still there."""
    assert importlib.import_module(f"benchmarks.{name}").__doc__
