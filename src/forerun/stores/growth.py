"""How a tree grows out of a suffix automaton: best first, by the probability that a node survives.

The probability is a logistic function of the match (`prior`), corrected by what this row's text has
done so far (`Odds`). This is the readable version and the one that runs without native kernels;
kernels/automaton.cc has the same, bit for bit.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cache
from heapq import heappop, heappush
from itertools import product
from math import exp, log2

from forerun.stores.automaton import SEPARATOR, Cursor, Outlook, SuffixAutomaton
from forerun.stores.store import Draft, Limits

STUDIED = 256
"""Of a long text of its own that is read at once, such as a prompt, only this many tokens at its end teach the odds."""
RATE, RATE_PER_LENGTH = 0.1, 0.2
"""Steps of the online logistic regression, in log-odds per token: for all matches, and for those of
about equal length."""

Weights = tuple[tuple[float, float, float, float], ...]
"""Per rank of a continuation (the newest, the next one, the third): a constant, and what log2(match
length), log2(run) and other branches add to it, in log-odds."""

OWN_TEXT: Weights = ((-0.8, 0.63, 0.95, -1.17), (-2.38, -0.03, -0.35, 0.42), (-3.18, -0.07, -0.41, 0.55))
"""For a text that repeats itself: logistic regression over 200,000 tokens of Python source (the
standard library, the reference family's vocabulary of 4,096); `benchmarks/lookup.py --fit` repeats
it. Most kinds of match are within 0.05 of what was counted."""

RANKS = len(OWN_TEXT)
LONG, OFTEN = 64, 8
"""Longer matches and runs say no more."""


def prior(rank: int, length: int, run: int, branches: bool, weights: Weights = OWN_TEXT) -> float:
    """Log-odds that the rank-th continuation of a match comes next."""
    constant, by_length, by_run, by_branches = weights[rank]
    return constant + by_length * log2(length) + by_run * log2(run) + by_branches * branches


@cache
def priors(weights: Weights) -> array[float]:
    """The prior of everything that can be asked: [ranks][lengths from 1][runs from 1][branches]."""
    kinds = product(range(RANKS), range(1, LONG + 1), range(1, OFTEN + 1), (False, True))
    return array("d", (prior(*kind, weights) for kind in kinds))


class Odds:
    """How far this row's text departs from the prior."""

    def __init__(self, weights: Weights = OWN_TEXT, values: Sequence[float] = (0.0,) * 9) -> None:
        """values: of another row, to start with."""
        self._priors = priors(weights)
        self._all, *self._by_length = values  # lengths 1, 2-3, 4-7 ... 64 and more, as `bit_length` counts them

    @property
    def values(self) -> list[float]:
        return [self._all, *self._by_length]

    def survival(self, length: int, outlook: Outlook, rank: int) -> float:
        """The probability that the rank-th continuation of a match of this length (at least 1) is right."""
        length = length if length < LONG else LONG
        run = outlook.run if outlook.run < OFTEN else OFTEN
        prior = self._priors[((rank * LONG + length - 1) * OFTEN + run - 1) * 2 + outlook.branches]
        return 1 / (1 + exp(-(prior + self._all + self._by_length[length.bit_length()])))

    def learn(self, length: int, outlook: Outlook, token: int) -> None:
        """This token came. Where a text ended, that says nothing about another."""
        if outlook.newest == SEPARATOR:
            return
        surprise = (outlook.newest == token) - self.survival(length, outlook, 0)
        self._all += RATE * surprise
        self._by_length[min(length, LONG).bit_length()] += RATE_PER_LENGTH * surprise


class _Spot:
    """A node whose children are considered: where the automaton stands there, how probably the text gets there, and how
    much of that probability its children have not taken yet."""

    __slots__ = ("cursor", "depth", "node", "outlook", "rest", "survival", "tokens")

    def __init__(self, node: int, depth: int, cursor: Cursor, outlook: Outlook, survival: float):
        self.node, self.depth, self.cursor, self.outlook = node, depth, cursor, outlook
        self.survival = self.rest = survival
        self.tokens: list[int] = []


def grow(automaton: SuffixAutomaton, odds: Odds, root: int, cursor: Cursor, limits: Limits) -> Draft:
    """Best first. A node's next sibling and its first child are considered when it has been taken."""
    return _Growth(automaton, odds, limits).draft(root, cursor)


class _Growth:
    def __init__(self, automaton: SuffixAutomaton, odds: Odds, limits: Limits):
        self._automaton, self._odds, self._limits = automaton, odds, limits
        self._heap: list[tuple[float, int, int, _Spot]] = []

    def draft(self, root: int, cursor: Cursor) -> Draft:
        automaton, limits, heap = self._automaton, self._limits, self._heap
        draft = Draft([root], [-1], [1.0])
        if limits.depth > 0 and root not in limits.ends:
            self._consider(_Spot(0, 0, cursor, automaton.outlook(cursor), 1.0), 0)
        while heap and len(draft.tokens) <= limits.nodes:
            key, _, rank, spot = heappop(heap)
            token = spot.outlook.newest if rank == 0 else self._other(spot, rank)
            if token is None:
                continue
            node = len(draft.tokens)
            if token != SEPARATOR:
                draft.tokens.append(token)
                draft.parents.append(spot.node)
                draft.survival.append(-key)
                spot.rest += key
            if spot.rest > limits.cost:
                self._consider(spot, rank + 1)
            if token != SEPARATOR and spot.depth + 1 < limits.depth and token not in limits.ends:
                cursor = automaton.advance(spot.cursor, token)
                self._consider(_Spot(node, spot.depth + 1, cursor, automaton.outlook(cursor), -key), 0)
        return draft

    def _consider(self, spot: _Spot, rank: int) -> None:
        """Ties go to the older parent, then to the lower rank."""
        length, limits = spot.cursor.length, self._limits
        if rank < RANKS and length >= limits.min_match:
            survival = spot.survival * self._odds.survival(length, spot.outlook, rank)
            if survival > spot.rest:  # what the children of a node share
                survival = spot.rest
            if survival > limits.cost:
                heappush(self._heap, (-survival, spot.node * RANKS + rank, rank, spot))

    def _other(self, spot: _Spot, rank: int) -> int | None:
        if not spot.tokens:
            spot.tokens = self._automaton.continuations(spot.cursor, RANKS, self._limits.min_match)
        return spot.tokens[rank] if rank < len(spot.tokens) else None
