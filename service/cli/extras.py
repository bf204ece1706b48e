"""Commands that are not the server's: they belong to packages of their own, which may not be installed.

Each has a parser and a help of its own and takes all that follows its name.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from service.cli.parsing import Commands, add_command

# Command -> (module with `main(argv)`, what it does, the extra of the package that brings what it needs).
EXTRAS = {
    "transfer": ("models.transfer.command", "make a classifier of one's own on a pretrained network", "models"),
    "models": ("models.zoo.command", "list, fetch, check and describe pretrained models", "models"),
}
EXIT_MISSING = 1


def add_extras(commands: Commands) -> None:
    """List the commands in the help of `onclock`."""
    for name, (_, text, _) in EXTRAS.items():
        add_command(commands, name, text, f"See onclock {name} --help.")


def run_extra(argv: Sequence[str]) -> int:
    """Run the command that `argv` begins with; its exit code."""
    module, _, extra = EXTRAS[argv[0]]
    try:
        run = importlib.import_module(module).main
    except ImportError as error:
        print(f"onclock: error: {argv[0]} needs more: pip install 'onclock[{extra}]' ({error})", file=sys.stderr)
        return EXIT_MISSING
    code: int = run(list(argv[1:]))
    return code
