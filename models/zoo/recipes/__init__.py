"""The recipes of the zoo, a module for each family: which packages, and how they become repository entries.

A recipe checks its own result: a model that does not give the recorded answers is not published.
"""

from __future__ import annotations

from collections.abc import Mapping

from models.zoo.recipe import Recipe, RecipeError
from models.zoo.recipes import (
    bergamot,
    efficientnet_lite,
    fraud,
    minilm,
    mnist,
    mobilenet_v2,
    moonshine,
    ppocr,
    silero_vad,
    u2netp,
    yolov4_tiny,
)
from models.zoo.recipes.bergamot import RECORDED_TRANSLATIONS, Translation
from models.zoo.recipes.efficientnet_lite import efficientnet_lite0, imagenet_labels
from models.zoo.recipes.minilm import MINILM
from models.zoo.recipes.mnist import MNIST
from models.zoo.recipes.silero_vad import SILERO_VAD

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        efficientnet_lite.RECIPE,
        mobilenet_v2.RECIPE,
        yolov4_tiny.RECIPE,
        *ppocr.RECIPES,
        u2netp.RECIPE,
        mnist.RECIPE,
        minilm.RECIPE,
        *fraud.RECIPES,
        silero_vad.RECIPE,
        moonshine.RECIPE,
        bergamot.RECIPE,
    )
}

__all__ = [
    "MINILM",
    "MNIST",
    "RECIPES",
    "RECORDED_TRANSLATIONS",
    "SILERO_VAD",
    "Recipe",
    "RecipeError",
    "Translation",
    "efficientnet_lite0",
    "imagenet_labels",
]
