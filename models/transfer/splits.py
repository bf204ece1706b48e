"""Training and test examples that have nothing in common: duplicates found, reported, and kept apart.

A test on what was learned by heart measures nothing. Examples with one digest (the same pixels, the same words, the
same values) count as one. Pictures that nearly look the same (a difference hash of 256 bits, a few bits apart) are
reported: that is a heuristic, so they stay.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
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


def separate(
    train: Dataset, test: Dataset | None, seed: int, share: float = TEST_SHARE
) -> tuple[Dataset, Dataset, Leakage]:
    """Training data, test data and what leaked. Without test data, `share` of each class becomes it.

    Raises `DataError` when a class is left without examples.
    """
    found = Leakage()
    learned, found.within_train, contradicting = _once(train.examples)
    found.contradicting = contradicting
    if test is None:
        kept, held_out = _stratified(learned, len(train.classes), seed, share)
    else:
        held_out, found.within_test, more = _once(test.examples)
        found.contradicting += more
        tested = {example.digest for example in held_out}
        kept = [example for example in learned if example.digest not in tested]
        found.between = len(learned) - len(kept)
    absent = set(range(len(train.classes))) - {example.label for example in kept}
    if absent:
        names = ", ".join(f"'{train.classes[label]}'" for label in sorted(absent)[:5])
        raise DataError(f"no training example of {names} is left without those that are in both parts")
    if train.kind == "images" and len(kept) + len(held_out) <= MOST_COMPARED:
        found.near = _near(kept, held_out)
    return train.part(kept), train.part(held_out), found


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
    rng = np.random.default_rng(seed)
    by_label: dict[int, list[Example]] = defaultdict(list)
    for example in examples:
        by_label[example.label].append(example)
    train: list[Example] = []
    test: list[Example] = []
    for label in range(classes):
        mine = by_label[label]
        order = rng.permutation(len(mine))
        count = min(len(mine) - 1, max(1, round(share * len(mine))))
        test += [mine[at] for at in order[:count]]
        train += [mine[at] for at in order[count:]]
    return train, test


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
