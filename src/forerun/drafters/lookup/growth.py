"""How a tree grows out of a suffix automaton: best first, by the probability that a node survives.

The probability is a logistic function of the match (`prior`), corrected by what this row's text has done so far (`Odds`).
"""

from __future__ import annotations

from functools import cache
from heapq import heappop, heappush
from math import exp, log2

from forerun.automaton import Cursor, Outlook, SuffixAutomaton
from forerun.drafters.lookup.store import Draft, Limits

RATE, RATE_PER_LENGTH = 0.1, 0.2
"""Steps of the online logistic regression, in log-odds per token: for all matches, and for those of about equal length."""

_WEIGHTS = (
    # constant, log2(match length), log2(run), branches
    (-0.8, 0.63, 0.95, -1.17),  # the newest continuation
    (-2.38, -0.03, -0.35, 0.42),  # the next one
    (-3.18, -0.07, -0.41, 0.55),  # and the third
)
RANKS = len(_WEIGHTS)
_LONG, _OFTEN = 64, 8  # longer matches and runs say no more


@cache
def prior(rank: int, length: int, run: int, branches: bool) -> float:
    """Log-odds that the rank-th continuation of a match comes next.

    Logistic regression over 200,000 tokens of Python source (the standard library, the reference family's vocabulary of
    4,096); `benchmarks/lookup.py --fit` repeats it. Most kinds of match are within 0.05 of what was counted.
    """
    constant, by_length, by_run, by_branches = _WEIGHTS[rank]
    return constant + by_length * log2(length) + by_run * log2(run) + by_branches * branches


class Odds:
    """How far this row's text departs from the prior."""

    def __init__(self) -> None:
        self._all = 0.0
        self._by_length = [0.0] * 8  # lengths 1, 2-3, 4-7 ... 64 and more, as `bit_length` counts them

    def survival(self, length: int, outlook: Outlook, rank: int) -> float:
        """The probability that the rank-th continuation of a match of this length (at least 1) is right."""
        length = length if length < _LONG else _LONG
        run = outlook.run if outlook.run < _OFTEN else _OFTEN
        score = prior(rank, length, run, outlook.branches) + self._all + self._by_length[length.bit_length()]
        return 1 / (1 + exp(-score))

    def learn(self, length: int, outlook: Outlook, token: int) -> None:
        """This token came."""
        surprise = (outlook.newest == token) - self.survival(length, outlook, 0)
        self._all += RATE * surprise
        self._by_length[min(length, _LONG).bit_length()] += RATE_PER_LENGTH * surprise


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
            draft.tokens.append(token)
            draft.parents.append(spot.node)
            draft.survival.append(-key)
            spot.rest += key
            if spot.rest > limits.cost:
                self._consider(spot, rank + 1)
            if spot.depth + 1 < limits.depth and token not in limits.ends:
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
