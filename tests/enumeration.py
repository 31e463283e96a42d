"""Luck in every possible way: what a program that throws dice can do, and how probable each of its results is.

Every uniform number of a run has a name and is known only as an interval: the run takes place in a
box, a part of the cube of all numbers. A question (does the number fall below this probability?
which token does it pick?) cuts the box; where several pieces are left the run goes on in the first,
and other runs later in the others. Asking twice under one name is asking about the same number, as
it is with real dice: a stream that is shared by mistake gives a wrong law here too, and so does a
number that was seen before. What a run asks without need cuts its box without need, and no more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TypeVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from forerun.accept import exact
from forerun.accept.exact import Verdict
from forerun.chance import Chance, Dice, Ints, Purpose, draft_dice, final_dice
from forerun.native import sampling as native
from forerun.sampling import SamplingParams, laws
from forerun.tree import TokenTree

Item = TypeVar("Item")
Result = TypeVar("Result", bound=Hashable)
Law = dict[Hashable, float]
Floats = NDArray[np.float64]

NOTHING = 1e-14
"""Pieces of an interval that are smaller are rounding errors."""


Box = dict[Hashable, tuple[float, float]]


class Luck:
    """One box, and its probability. `others`: the boxes that were cut off it."""

    def __init__(self, box: Box | None = None, probability: float = 1.0):
        self.box, self.probability = dict(box or {}), probability
        self.others: list[tuple[Box, float]] = []

    def place(self, name: Hashable, marks: Sequence[float]) -> float:
        """A number inside the piece (between two ascending marks) where this name's uniform number lies."""
        low, high = self.box.get(name, (0.0, 1.0))
        ends = [low, *(mark for mark in marks if low < mark < high), high]
        first, *others = [(a, b) for a, b in pairwise(ends) if b - a > NOTHING] or [(low, high)]
        per_length = self.probability / (high - low)
        self.others += [({**self.box, name: (a, b)}, (b - a) * per_length) for a, b in others]
        self.box[name], self.probability = first, (first[1] - first[0]) * per_length
        return sum(first) / 2

    def coin(self, name: Hashable, probability: float) -> bool:
        return self.place(name, [probability]) < probability

    def token(self, name: Hashable, law: Tensor) -> int:
        return self.tokens(name, shares_of(law[None]))[0]

    def tokens(self, name: Hashable, shares_XV: Floats) -> list[int]:
        """One token for each law, given as running sums, all with the same number."""
        number = self.place(name, sorted(set(shares_XV.ravel().tolist())))
        last = shares_XV.shape[-1] - 1  # a law of nothing names some token too, as `chance.pick` does
        return [min(int(np.searchsorted(shares, number, side="right")), last) for shares in shares_XV]


def shares_of(laws: Tensor) -> Floats:
    """Running sums of (unnormalised) laws, ending at 1. Padding may have no law at all (NaN)."""
    sums = laws.double().numpy().cumsum(-1)
    total = sums[..., -1:]
    shares: Floats = np.where(total > 0, sums, 0) / np.where(total > 0, total, 1)
    return shares


class Ways:
    """A `Chance` over one luck per row of a batch. stream: part of every number's name."""

    def __init__(self, lucks: Sequence[Luck], stream: Hashable = ""):
        self.lucks, self.stream = lucks, stream

    def row(self, index: int) -> Ways:
        return Ways([self.lucks[index]], self.stream)

    def coin(self, prob_BX: Tensor, place_BX: Ints, attempt_BX: Ints | None = None) -> Tensor:
        answers = torch.zeros(prob_BX.shape, dtype=torch.bool)
        names = self._names("coin", place_BX, attempt_BX)
        for (row, column), prob in np.ndenumerate(prob_BX.double().numpy()):
            answers[row, column] = self.lucks[row].coin(names[row][column], float(prob))
        return answers

    def token(self, law_BXV: Tensor, place_BX: Ints) -> Tensor:
        answers, shares_BXV = torch.zeros(law_BXV.shape[:2], dtype=torch.int64), shares_of(law_BXV)
        names = self._names("token", place_BX)
        for row, luck in enumerate(self.lucks):
            columns: dict[int, list[int]] = defaultdict(list)
            for column, place in enumerate(place_BX[row].tolist()):
                columns[place].append(column)
            for group in columns.values():
                tokens = luck.tokens(names[row][group[0]], shares_BXV[row, group])
                answers[row, group] = torch.tensor(tokens)
        return answers

    def _names(self, kind: str, place_BX: Ints, attempt_BX: Ints | None = None) -> Sequence[Sequence[Hashable]]:
        attempts = np.full_like(place_BX, -1) if attempt_BX is None else attempt_BX
        return [
            [(self.stream, kind, place, attempt) for place, attempt in zip(*row, strict=True)]
            for row in zip(place_BX.tolist(), attempts.tolist(), strict=True)
        ]

    def uniform(self, purpose: Purpose, place_BX: Ints, attempt_BX: Ints | None = None) -> Tensor:
        """From the middle of what is still possible."""
        numbers, kind = torch.empty(place_BX.shape, dtype=torch.float64), purpose.name.lower().replace("accept", "coin")
        for row, names in enumerate(self._names(kind, place_BX, attempt_BX)):
            for column, name in enumerate(names):
                numbers[row, column] = sum(self.lucks[row].box.get(name, (0.0, 1.0))) / 2
        return numbers


class IdealDice(Ways):
    """The library's own dice, perfect: a number's name is the number that they would have thrown."""

    def __init__(self, dice: Dice, lucks: Sequence[Luck]):
        super().__init__(lucks)
        self.dice = dice

    def row(self, index: int) -> IdealDice:
        return IdealDice(self.dice.row(index), [self.lucks[index]])

    def _names(self, kind: str, place_BX: Ints, attempt_BX: Ints | None = None) -> Sequence[Sequence[Hashable]]:
        purpose = Purpose.ACCEPT if kind == "coin" else Purpose.TOKEN
        names: list[list[float]] = self.dice.uniform(purpose, place_BX, attempt_BX).tolist()
        return names


def verification(tree: TokenTree, laws_BNV: Tensor, chance: Chance) -> Verdict:
    """Traversal verification, and the kernels must find the same: so whatever enumerates the one enumerates both."""
    verdict = exact.traversal_in_torch(tree, laws_BNV, chance)
    if native.fits(laws_BNV, torch.float64):
        assert exact._verified(tree, laws_BNV, chance) == verdict  # type: ignore[arg-type]
    return verdict


@contextmanager
def ideal_dice(lucks: Mapping[int, Luck]) -> Iterator[None]:
    """While this holds, rows with these keys throw ideal dice (and all of them as if they had one and the same key)."""

    def final(keys: Sequence[int], positions: Sequence[int]) -> IdealDice:
        return IdealDice(final_dice([7] * len(keys), positions), [lucks[key] for key in keys])

    def draft(keys: Sequence[int], steps: Sequence[int], path: Sequence[int]) -> IdealDice:
        return IdealDice(draft_dice([7] * len(keys), steps, path), [lucks[key] for key in keys])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("forerun.row.final_dice", final)
        patch.setattr("forerun.row.draft_dice", draft)
        patch.setattr("forerun.accept.judge.traversal_verification", verification)
        yield


def ways(
    program: Callable[[list[Item], list[Luck]], Sequence[Result]], items: Sequence[Item], at_once: int = 256
) -> Iterator[tuple[Item, Result, float]]:
    """Everything that the program can do to each item: (item, result, probability). It is run on batches of items."""
    waiting: list[tuple[Item, Box, float]] = [(item, {}, 1.0) for item in items]
    while waiting:
        batch, waiting = waiting[-at_once:], waiting[:-at_once]
        lucks = [Luck(box, probability) for _, box, probability in batch]
        results = program([item for item, *_ in batch], lucks)
        for (item, *_), luck, result in zip(batch, lucks, results, strict=True):
            waiting += [(item, *other) for other in luck.others]
            yield item, result, luck.probability


def law_of(program: Callable[[list[None], list[Luck]], Sequence[Result]], at_once: int = 256) -> Law:
    """The law of a program's result."""
    law: Law = defaultdict(float)
    for _, result, probability in ways(program, [None], at_once):
        law[result] += probability
    return dict(law)


def distance(one: Mapping[Hashable, float], other: Mapping[Hashable, float]) -> float:
    """Total variation."""
    return sum(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in {*one, *other}) / 2


Target = Callable[[tuple[int, ...]], Tensor]
"""The law of the next token [V] after a prefix."""


def continued(law: Mapping[tuple[int, ...], float], target: Target, count: int) -> Law:
    """The law of the first `count` tokens when texts that are shorter go on with plain sampling."""
    full: Law = defaultdict(float)
    texts = dict(law)
    while texts:
        longer: dict[tuple[int, ...], float] = defaultdict(float)
        for text, probability in texts.items():
            if len(text) >= count:
                full[text[:count]] += probability
            else:
                for token, share in enumerate(target(text).tolist()):
                    if share > 0:
                        longer[(*text, token)] += probability * share
        texts = longer
    return dict(full)


def plain_law(target: Target, count: int) -> Law:
    """The law of `count` tokens of plain sampling."""
    return continued({(): 1.0}, target, count)


def one_law(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """The law of one node, [V]."""
    return laws(logits_V[None, None], [params])[0, 0]
