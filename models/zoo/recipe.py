"""What a recipe is: packages, what they are for and under which licences, and how they become repository entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.zoo.fetch import Package
from models.zoo.publish import Entry


class RecipeError(Exception):
    """The converted model does not answer as it should; it is not published."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to make one entry, or several that work together. `make` fetches, converts and checks; it raises what
    `models.zoo.fetch` and the converter raise, `RecipeError`, and `ImportError` where a library to prepare inputs or to
    train with is missing.

    `packages` begins with the one that the model comes from. `noncommercial`: a licence forbids commercial use.
    """

    name: str
    task: str
    summary: str
    packages: tuple[Package, ...]
    make: Callable[[], tuple[Entry, ...]]
    noncommercial: bool = False

    @property
    def licences(self) -> tuple[str, ...]:
        """The licences of the packages, each once."""
        return tuple(dict.fromkeys(package.licence for package in self.packages))


def require_close(name: str, what: str, actual: npt.ArrayLike, recorded: npt.ArrayLike, tolerance: float) -> None:
    """Raises `RecipeError` if what a model answers is further from what was recorded than rounding explains."""
    found, expected = np.asarray(actual, np.float64), np.asarray(recorded, np.float64)
    if found.shape != expected.shape:
        raise RecipeError(f"{name}: {what} have shape {found.shape}, the recorded ones {expected.shape}")
    difference = float(np.abs(found - expected).max())
    if not difference <= tolerance:
        raise RecipeError(
            f"{name}: {what} differ from the recorded ones by {difference:.2g}, at most {tolerance} expected; the "
            "conversion or the installed ONNX Runtime is at fault"
        )
