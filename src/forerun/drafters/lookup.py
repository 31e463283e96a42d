"""Continuations found in the request's own text: training-free, no second model, microseconds per step.

Prompt lookup (Saxena 2023) copies what followed the last few tokens at an earlier place. SAM-Decoding (Hu et al. 2024)
finds the longest such suffix with a suffix automaton. Here the automaton also tells what followed at *other* places, and how
often the same token came in a row, so that a tree can be grown best first, its nodes ranked by the probability that they
survive (SuffixDecoding, Oliaro et al. 2024, ranks by counts; the newest occurrence predicts as well and is cheaper to keep
up to date). A node is proposed if that probability exceeds what the node costs.

The probability is a logistic function of the match (`prior`), corrected by what this row's text has done so far (`Odds`).
Every token that becomes firm teaches, whether it was proposed or not: where nothing hits, nothing is proposed, and nothing
need be proposed to notice that the text begins to repeat itself. Trees are a function of the row's past alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from heapq import heappop, heappush
from itertools import islice
from math import exp, log2

from torch import Tensor

from forerun.automaton import Cursor, Outlook, SuffixAutomaton
from forerun.drafter import Context, Drafter
from forerun.drafters import Workshop
from forerun.errors import DrafterError
from forerun.row import Row
from forerun.tree import TokenTree

STUDIED = 256
"""Of a long text that is read at once, such as a prompt, only this many tokens at its end teach the odds."""
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


@dataclass(frozen=True)
class Limits:
    """nodes: most nodes of a tree, node 0 not counted. depth: longest path. min_match: shortest match to follow. cost: the
    least probability of survival that is worth a node."""

    nodes: int
    depth: int
    min_match: int
    cost: float


class _Spot:
    """A node whose children are considered: where the automaton stands there, how probably the text gets there, and how
    much of that probability its children have not taken yet."""

    __slots__ = ("cursor", "depth", "node", "outlook", "rest", "survival", "tokens")

    def __init__(self, node: int, depth: int, cursor: Cursor, outlook: Outlook, survival: float):
        self.node, self.depth, self.cursor, self.outlook = node, depth, cursor, outlook
        self.survival = self.rest = survival
        self.tokens: list[int] = []


class Memory:
    """What is known of one row: its firm tokens, and how well they could have been foretold."""

    def __init__(self) -> None:
        self.automaton, self.odds = SuffixAutomaton(), Odds()

    def read(self, tokens: Sequence[int], firm: int) -> None:
        """Catch up with the first `firm` tokens of the row."""
        self.forget(firm)
        known, automaton = len(self.automaton), self.automaton
        if firm - known > STUDIED:
            automaton.extend(islice(tokens, known, firm - STUDIED))
            known = firm - STUDIED
        for token in tokens[known:firm]:
            match = automaton.match
            if match.length:
                self.odds.learn(match.length, automaton.outlook(match), token)
            automaton.append(token)

    def forget(self, length: int) -> None:
        """Start again if more than `length` tokens were read: an automaton cannot shrink. Firm tokens do not either."""
        if len(self.automaton) > length:
            self.automaton, self.odds = SuffixAutomaton(), Odds()

    def draft(self, tokens: Sequence[int], firm: int, limits: Limits) -> tuple[list[int], list[int]]:
        """A tree as tokens and parents, node 0 the last token. What follows the firm tokens is read with a cursor only."""
        self.read(tokens, firm)
        cursor = self.automaton.match
        for token in tokens[firm:]:
            cursor = self.automaton.advance(cursor, token)
        return self._grow(tokens[-1], cursor, limits)

    def _grow(self, root: int, cursor: Cursor, limits: Limits) -> tuple[list[int], list[int]]:
        """Best first. A node's next sibling and its first child are considered when it has been taken."""
        automaton, grown, parents = self.automaton, [root], [-1]
        heap: list[tuple[float, int, int, _Spot]] = []
        if limits.depth > 0:
            self._consider(heap, _Spot(0, 0, cursor, automaton.outlook(cursor), 1.0), 0, limits)
        while heap and len(grown) <= limits.nodes:
            key, _, rank, spot = heappop(heap)
            token = spot.outlook.newest if rank == 0 else self._other(spot, rank, limits.min_match)
            if token is None:
                continue
            node = len(grown)
            grown.append(token)
            parents.append(spot.node)
            spot.rest += key
            if spot.rest > limits.cost:
                self._consider(heap, spot, rank + 1, limits)
            if spot.depth + 1 < limits.depth:
                cursor = automaton.advance(spot.cursor, token)
                below = _Spot(node, spot.depth + 1, cursor, automaton.outlook(cursor), -key)
                self._consider(heap, below, 0, limits)
        return grown, parents

    def _consider(self, heap: list[tuple[float, int, int, _Spot]], spot: _Spot, rank: int, limits: Limits) -> None:
        """Ties go to the older parent, then to the lower rank."""
        length = spot.cursor.length
        if rank < RANKS and length >= limits.min_match:
            survival = spot.survival * self.odds.survival(length, spot.outlook, rank)
            if survival > spot.rest:  # what the children of a node share
                survival = spot.rest
            if survival > limits.cost:
                heappush(heap, (-survival, spot.node * RANKS + rank, rank, spot))

    def _other(self, spot: _Spot, rank: int, shortest: int) -> int | None:
        if not spot.tokens:
            spot.tokens = self.automaton.continuations(spot.cursor, RANKS, shortest)
        return spot.tokens[rank] if rank < len(spot.tokens) else None


class Lookup(Drafter):
    """Proposes what came before."""

    name = "lookup"

    def __init__(self, limits: Limits):
        self.limits = limits
        self.max_nodes = limits.nodes
        self._memories: list[Memory] = []

    def admit(self, row: Row, hidden: Mapping[int, Tensor]) -> None:
        memory = Memory()
        memory.read(row.tokens, _firm(row))
        self._memories.append(memory)

    def release(self, slot: int) -> None:
        if slot < len(self._memories):
            self._memories[slot] = self._memories[-1]
            self._memories.pop()

    def retract(self, lengths: Sequence[int]) -> None:
        for memory, length in zip(self._memories, lengths, strict=True):
            memory.forget(length)

    def propose(self, context: Context) -> TokenTree:
        nodes = min(self.limits.nodes, context.budget)
        grown = [
            memory.draft(row.tokens, _firm(row), replace(self.limits, nodes=nodes, depth=min(self.limits.depth, depth)))
            for memory, row, depth in zip(self._memories, context.rows, context.depths, strict=True)
        ]
        if all(len(tokens) == 1 for tokens, _ in grown):
            return TokenTree.root([row.tokens[-1] for row in context.rows], context.device)
        return TokenTree.of([tokens for tokens, _ in grown], [parents for _, parents in grown], context.device)


def _firm(row: Row) -> int:
    """How many of a row's tokens cannot be taken back."""
    return len(row.tokens) - row.tentative


def build(workshop: Workshop, nodes: int = 16, depth: int = 16, min_match: int = 1, cost: float = 0.08) -> Drafter:
    """{"drafter": "lookup", "nodes": 16, "depth": 16, "min_match": 1, "cost": 0.08}

    nodes: the largest tree. depth: its longest path. min_match: the fewest tokens that must match. cost: the least
    probability of survival for which a node is proposed; the best value is what one more node adds to a step, as a share of
    a plain step, times the speed-up (on a 2-core CPU 0.045 times 1.8).
    """
    for setting, value in (("nodes", nodes), ("depth", depth), ("min_match", min_match)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise DrafterError(f"lookup: {setting} is a whole number of at least 1, not {value!r}")
    if isinstance(cost, bool) or not isinstance(cost, int | float) or not 0 < cost < 1:
        raise DrafterError(f"lookup: cost is a probability between 0 and 1, not {cost!r}")
    return Lookup(Limits(nodes, depth, min_match, float(cost)))
