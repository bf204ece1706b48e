"""`onclock transfer`: a classifier of one's own on a pretrained network, from examples to a served version.

Exit status 0: published; 1: it failed, with the reason on standard error; 2: wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from models.transfer.backbones import BACKBONES
from models.transfer.data import DataError
from models.transfer.examples import EXAMPLES, prepare
from models.transfer.heads import KINDS, HeadError
from models.transfer.options import OptionError, Options, check_options
from models.transfer.pipeline import Result, transfer
from models.zoo.errors import ConversionError
from models.zoo.fetch import FetchError
from models.zoo.publish import PublishError
from models.zoo.recipe import RecipeError

FAILURES = (DataError, HeadError, ConversionError, FetchError, RecipeError, PublishError, ImportError, OSError)

# Where examples are written.
EXAMPLE_DIRECTORY = Path("build/examples")

_TEXT = """\
Learn to tell classes apart from a few hundred examples: a pretrained network is cut before its own classifier, a small
head is fitted to its features, compared with what there would have been anyway, and published as the next version of a
model. No training framework, no GPU.

Data is a directory with one folder per class (pictures, or .txt files), optionally in train/ and test/; or a CSV or
Parquet file with a column of labels, and one of texts, one of pictures, or columns of numbers and categories.
"""
_EPILOG = """\
examples:
  onclock transfer --example mails
  onclock transfer --backbone efficientnet-lite0 --data photos --name groceries
  onclock transfer --backbone minilm --data mails.csv --label kind --text body --name mails
  onclock transfer --data payments.parquet --label fraud --name fraud
  onclock transfer --backbone efficientnet-lite0 --data photos --name groceries --shared
"""


def main(argv: Sequence[str] | None = None, prog: str = "onclock transfer") -> int:
    """Run the command; its exit status."""
    parser = _parser(prog)
    given = parser.parse_args(argv)
    example = EXAMPLES.get(given.example)
    if (example is None) == (given.data is None):
        parser.error("say what to learn from: --data PATH, or --example NAME for data to try it on")
    if not given.name and example is None:
        parser.error("the following arguments are required: --name")
    if example is not None:
        given.label = given.label or example.columns["label"]
        given.text = given.text or example.columns.get("text", "")
        given.image = given.image or example.columns.get("image", "")
        given.split_column = given.split_column or example.columns.get("split_column", "")
        given.leave_out = [*given.leave_out, *example.leave_out]
        given.backbone = given.backbone or example.backbone
        given.name = given.name or given.example
    if given.shared and not given.backbone:
        parser.error("--shared needs --backbone: a head shares the network it is on")
    try:
        check_options(given.name, given.slo_ms)
    except OptionError as error:
        parser.error(str(error))
    try:
        data = given.data if example is None else prepare(given.example, EXAMPLE_DIRECTORY)
    except FAILURES as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 1
    options = Options(
        data=data,
        name=given.name,
        repository=given.repository,
        backbone=given.backbone or "",
        cut=given.cut,
        test=given.test,
        label=given.label,
        text=given.text,
        image=given.image,
        split_column=given.split_column,
        leave_out=tuple(given.leave_out),
        head=given.head,
        weighted=given.weighted,
        seed=given.seed,
        slo_ms=given.slo_ms,
        shared=given.shared,
        report=given.report,
    )
    console = Console()
    try:
        result = transfer(options, lambda step: console.print(f"[dim]{step}[/dim]"))
    except FAILURES as error:
        hint = "; install the extra: pip install 'onclock[models]'" if isinstance(error, ImportError) else ""
        print(f"{prog}: error: {error}{hint}", file=sys.stderr)
        return 1
    _show(console, result, options)
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=_TEXT, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, metavar="PATH", help="the examples: a directory, a .csv or a .parquet file")
    known = "; ".join(f"{name}: {example.what}" for name, example in EXAMPLES.items())
    add("--example", choices=sorted(EXAMPLES), help=f"instead of --data, data to try it on ({known})")
    add("--name", help="the model's name in the repository [the example's]")
    add("--backbone", choices=sorted(BACKBONES), help="the network to build on; leave it out for a table")
    add("--test", type=Path, metavar="PATH", help="test examples, if not a part of the data [a quarter is held out]")
    add("--label", default="", metavar="COLUMN", help="the column of labels")
    add("--text", default="", metavar="COLUMN", help="the column of texts")
    add("--image", default="", metavar="COLUMN", help="the column of pictures (encoded, or paths beside the file)")
    add("--split-column", default="", metavar="COLUMN", help="a column that says train, val or test")
    add("--leave-out", action="append", default=[], metavar="COLUMN", help="a column not to learn from (repeatable)")
    add("--head", default="auto", choices=("auto", *KINDS), help="the head [auto: chosen by cross-validation]")
    add(
        "--weighted",
        action="store_true",
        help="rare classes count as much as frequent ones, so they are said more often",
    )
    add("--cut", default="", metavar="TENSOR", help="where to cut the network [before its last classifier]")
    add("--seed", type=int, default=0, help="of splits and heads [0]")
    add("--slo-ms", type=float, default=200.0, help="the objective of the served model, milliseconds [200]")
    add("--shared", action="store_true", help="publish the head alone, served on the shared network (kilobytes)")
    add("--repository", type=Path, default=Path("build/zoo"), help="model repository [build/zoo]")
    add("--report", type=Path, metavar="DIR", help="where the report goes [build/transfer/NAME]")
    return parser


def _show(console: Console, result: Result, options: Options) -> None:
    table = Table("", "accuracy", "macro F1", "log loss")
    for one in result.scores:
        loss = "" if one.log_loss is None else f"{one.log_loss:.3f}"
        table.add_row(one.name, f"{one.accuracy:.1%} ± {one.interval:.1%}", f"{one.macro_f1:.3f}", loss)
    console.print(table)
    for note in result.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    took = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.seconds.items())
    console.print(f"{sum(result.seconds.values()):.1f} s ({took})", markup=False, soft_wrap=True)
    console.print(f"report: {result.page}", soft_wrap=True)
    console.print(
        f"published {result.version}; serve with: onclock serve --model-repository {options.repository}", soft_wrap=True
    )
