"""Training and test examples that have nothing in common: duplicates found, reported, and kept apart.

A test on what was learned by heart measures nothing. Pictures and texts with one digest (the same pixels, the same
words) count as one. Pictures that nearly look the same (a difference hash of 256 bits, a few bits apart) are reported:
that is a heuristic, so they stay.

Rows of a table with the same values are often different cases: all of them count, as often as they are there. Where the
parts are made here, equal rows are in one of them; where they are given, equal rows stay, and are reported.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.transfer.data import DataError, Dataset, Example, decoded

TEST_SHARE = 0.25
# Bits of 256 in which two hashes of one scene differ, at most. Photographs of different things differ in 80 and more.
NEAR_BITS = 8
# Every pair is compared: beyond that many pictures it takes too long, and is left out.
MOST_COMPARED = 20_000


@dataclass(slots=True)
class Leakage:
    """What was found: examples that are there more than once in a part, in both parts, with different labels, and
    pairs of pictures that nearly look the same on either side."""

    within_train: int = 0
    within_test: int = 0
    between: int = 0
    contradicting: int = 0
    near: tuple[tuple[str, str], ...] = ()

    def lines(self) -> list[str]:
        """For people."""
        said = []
        for count, where in ((self.within_train, "training"), (self.within_test, "test")):
            if count:
                said.append(f"{count} {where} examples are there more than once; each counts once")
        if self.between:
            said.append(f"{self.between} training examples are test examples, too: not trained on")
        if self.contradicting:
            said.append(f"{self.contradicting} examples have the same content as another one and a different label")
        if self.near:
            shown = "; ".join(f"{one} and {other}" for one, other in self.near[:3])
            said.append(f"{len(self.near)} pairs of a training and a test picture nearly look the same: {shown}")
        return said or ["no example is in both parts, and none is there twice"]


@dataclass(slots=True)
class EqualRows(Leakage):
    """What was found in a table: rows that equal an earlier one, and test rows that equal a training row."""

    def lines(self) -> list[str]:
        """For people."""
        said = []
        for count, where in ((self.within_train, "training"), (self.within_test, "test")):
            if count:
                said.append(f"{count} {where} rows equal an earlier one; they may be different cases, so all count")
        if self.between:
            said.append(
                f"{self.between} test rows equal a training row: if they are the same cases, the figures are too good, "
                "and the data should be divided otherwise"
            )
        if self.contradicting:
            said.append(f"{self.contradicting} rows equal an earlier one and have a different label")
        return said or ["no row is in both parts, and none is there twice"]


def separate(
    train: Dataset, test: Dataset | None, seed: int, share: float = TEST_SHARE
) -> tuple[Dataset, Dataset, Leakage]:
    """Training data, test data and what leaked. Without test data, `share` of each class becomes it.

    Raises `DataError` when a class is left without examples.
    """
    kept, held_out, found = (_rows if train.kind == "table" else _contents)(train, test, seed, share)
    absent = set(range(len(train.classes))) - {example.label for example in kept}
    if absent:
        names = ", ".join(f"'{train.classes[label]}'" for label in sorted(absent)[:5])
        raise DataError(
            f"no training example of {names} is left when training and test have nothing in common; add some, or leave "
            "the class out"
        )
    if train.kind == "images" and len(kept) + len(held_out) <= MOST_COMPARED:
        found.near = _near(kept, held_out)
    return train.part(kept), (test or train).part(held_out), found


def groups(examples: Sequence[Example]) -> npt.NDArray[np.int64]:
    """A number for each example, the same for those that show the same."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(example.digest, len(numbers)) for example in examples], np.int64)


def _contents(
    train: Dataset, test: Dataset | None, seed: int, share: float
) -> tuple[list[Example], list[Example], Leakage]:
    """Of pictures and texts: each once, in one part."""
    found = Leakage()
    learned, found.within_train, found.contradicting = _once(train.examples)
    if test is None:
        return *_stratified(learned, len(train.classes), seed, share), found
    held_out, found.within_test, more = _once(test.examples)
    found.contradicting += more
    tested = {example.digest for example in held_out}
    kept = [example for example in learned if example.digest not in tested]
    found.between = len(learned) - len(kept)
    return kept, held_out, found


def _rows(
    train: Dataset, test: Dataset | None, seed: int, share: float
) -> tuple[list[Example], list[Example], Leakage]:
    """Of a table: all of them."""
    found = EqualRows()
    learned, found.within_train, found.contradicting = _once(train.examples)
    if test is None:
        return *_stratified(train.examples, len(train.classes), seed, share), found
    _, found.within_test, more = _once(test.examples)
    found.contradicting += more
    trained = {example.digest for example in learned}
    found.between = sum(example.digest in trained for example in test.examples)
    return train.examples, test.examples, found


def _once(examples: Sequence[Example]) -> tuple[list[Example], int, int]:
    """Each content once, how many were left out, and how many of those had another label."""
    seen: dict[str, Example] = {}
    again = contradicting = 0
    for example in examples:
        first = seen.setdefault(example.digest, example)
        if first is not example:
            again += 1
            contradicting += first.label != example.label
    return list(seen.values()), again, contradicting


def _stratified(
    examples: Sequence[Example], classes: int, seed: int, share: float
) -> tuple[list[Example], list[Example]]:
    """Examples to learn from and, of each class, about `share` to test with; those that show the same are in one part,
    and there are some to learn from."""
    rng = np.random.default_rng(seed)
    by_class = _by_class(examples)
    train: list[Example] = []
    test: list[Example] = []
    for label in range(classes):
        mine = by_class[label]
        wanted = max(1, round(share * sum(map(len, mine))))
        taken, left = 0, len(mine)
        for at in rng.permutation(len(mine)):
            nearer = abs(taken + len(mine[at]) - wanted) < abs(taken - wanted)
            if nearer and left > 1:
                test += mine[at]
                taken, left = taken + len(mine[at]), left - 1
            else:
                train += mine[at]
    return train, test


def _by_class(examples: Sequence[Example]) -> Mapping[int, list[list[Example]]]:
    """Examples that show the same, together, by the class that they are dealt out with: the rarest that they are of."""
    counts = Counter(example.label for example in examples)
    alike: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        alike[example.digest].append(example)
    by_class: dict[int, list[list[Example]]] = defaultdict(list)
    for group in alike.values():
        by_class[min((example.label for example in group), key=lambda label: (counts[label], label))].append(group)
    return by_class


def _near(train: Sequence[Example], test: Sequence[Example]) -> tuple[tuple[str, str], ...]:
    if not train or not test:
        return ()
    ours, theirs = (np.stack([_hash(example) for example in part]) for part in (train, test))
    pairs = []
    for row, mine in enumerate(theirs):
        apart = np.unpackbits(ours ^ mine, axis=1).sum(axis=1)
        pairs += [(train[int(at)].source, test[row].source) for at in np.flatnonzero(apart <= NEAR_BITS)]
    return tuple(pairs)


def _hash(example: Example) -> npt.NDArray[np.uint8]:
    """Whether each of 16 x 16 fields is brighter than the one to its left (a difference hash; N. Krawetz, 2013)."""
    assert isinstance(example.content, bytes)
    picture = decoded(example.content)
    assert picture is not None
    grey = np.asarray(picture.convert("L").resize((17, 16)), np.int16)
    return np.packbits((grey[:, 1:] > grey[:, :-1]).ravel())
