"""Pieces that every sub-command's parser is made of: help that keeps its lines, flags they share, and number types."""

from __future__ import annotations

import argparse
import math
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class ManualFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of help texts, and wraps each of their lines."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return [line for part in text.splitlines() for line in super(ManualFormatter, self)._split_lines(part, width)]


def add_command(commands: Commands, name: str, summary: str, text: str, epilog: str = "") -> argparse.ArgumentParser:
    """A sub-command: `summary` is its line in the list of commands, `text` and `epilog` frame its own help page."""
    return commands.add_parser(
        name,
        help=summary,
        description=text,
        epilog=epilog,
        formatter_class=ManualFormatter,
        allow_abbrev=False,
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """`--device`, for commands that run models."""
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run [default auto: a GPU if any]"
    )


def add_max_batch_size(parser: argparse.ArgumentParser) -> None:
    """`--default-max-batch-size`, as `onclock serve` has it."""
    parser.add_argument(
        "--default-max-batch-size",
        type=positive,
        default=64,
        metavar="N",
        help="largest batch, rows, where the model's configuration does not say [default 64]",
    )


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; expected a whole number from 1")
    return int(text)


def number(text: str) -> float:
    """A finite number from 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; expected a number from 0")
    return value


def positive_number(text: str) -> float:
    """A finite number above 0."""
    value = number(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; expected a number above 0")
    return value
