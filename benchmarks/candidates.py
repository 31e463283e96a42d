"""Stores that `benchmarks/stores.py` can try and that the library does not have, because they did not pay there.

Recycling: Token Recycling (Luo et al. 2024). After every token that the target reads, the tokens
that it thought most probable there replace what was kept for that token; a draft gathers them, best
first.

Counts: SuffixDecoding (Oliaro et al. 2024). Of the matches of every length the one whose tree
promises most: the sum of the empirical probabilities, `count of the child / count of the node`, of
its nodes. Of the request's own text and what was said before the better one is taken. Position
lists stand in for its suffix trees: the same answers, and slower than they would be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from itertools import count
from math import exp, log
from typing import Literal

from forerun.row import Row
from forerun.stores.places import ENOUGH, PLACES, Numbers, Occurrence, Trust, _Growth
from forerun.stores.store import Draft, Limits, Store, View

RANKS = 8
"""Successors kept of every token."""
LONGEST = 24
"""Tokens of a match that are looked at."""
SEPARATOR = -1
"""Between texts; never proposed."""

Law = list[tuple[int, float]]
"""The most probable next tokens, and their probabilities."""
Kind = Literal["rank", "token", "law", "pair"]
"""What tells how probably a successor is right: its rank; its rank and its token's own record; the
probability that the target gave it then; the same, kept for pairs of tokens, and for single ones
where the pair was never seen."""


# ---- recycling


class Recycling(Store):
    """Successors of every token, over all rows, and how often each rank was right. Nothing is
    forgotten between requests."""

    name = "recycling"

    def __init__(self, kind: Kind = "token"):
        self.kind = kind
        self.rewind()

    def rewind(self) -> None:
        self._laws: dict[int | tuple[int, int], Law] = {}
        self._rates = [0.4, 0.1, 0.05, 0.03, 0.02, 0.015, 0.01, 0.01]
        self._records: dict[int, list[float]] = {}
        self._bias = [[-0.5] * RANKS, [-0.5] * RANKS]
        self._slope = [0.7, 0.7]

    def open(self, row: Row) -> RecyclingView:
        return RecyclingView(self)

    def successors(self, before: int, token: int) -> tuple[Law, bool]:
        """And whether they are those of the pair."""
        law = self._laws.get((before, token)) if self.kind == "pair" else None
        return (law, True) if law is not None else (self._laws.get(token, []), False)

    def chance(self, token: int, rank: int, probability: float, is_pair: bool) -> float:
        """That the successor of this rank is right."""
        if self.kind == "rank":
            return self._rates[rank]
        if self.kind == "token":
            record = self._records.get(token)
            return self._rates[rank] if record is None else (record[rank] + 4 * self._rates[rank]) / (record[-1] + 4)
        score = self._bias[is_pair][rank] + self._slope[is_pair] * _log_odds(probability)
        return 1 / (1 + exp(-score))

    def learn(self, before: int, token: int, came: int) -> None:
        """`came` followed `token`."""
        law, is_pair = self.successors(before, token)
        if not law:
            return
        record = self._records.setdefault(token, [0.0] * (RANKS + 1))
        for rank, (guess, probability) in enumerate(law):
            hit = guess == came
            surprise = hit - self.chance(token, rank, probability, is_pair)
            self._bias[is_pair][rank] += 0.02 * surprise
            self._slope[is_pair] += 0.002 * surprise * _log_odds(probability)
            self._rates[rank] += 0.005 * (hit - self._rates[rank])
            record[rank] += hit
        record[-1] += 1

    def keep(self, before: int, token: int, law: Law) -> None:
        """The target's law after `token`."""
        self._laws[token] = law
        if self.kind == "pair":
            self._laws[before, token] = law


class RecyclingView:
    """A row asks and teaches."""

    def __init__(self, store: Recycling):
        self._store = store

    def draft(self, tokens: Sequence[int], firm: int, limits: Limits) -> Draft:
        draft, heap, numbers = Draft([tokens[-1]], [-1], [1.0]), list[tuple[float, int, int, int, int, int]](), count()
        self._consider(heap, numbers, limits, (0, 0, tokens[-2] if len(tokens) > 1 else -1, tokens[-1]), 1.0)
        while heap and len(draft.tokens) <= limits.nodes:
            key, _, parent, depth, before, token = heappop(heap)
            node = len(draft.tokens)
            draft.tokens.append(token)
            draft.parents.append(parent)
            draft.survival.append(-key)
            if depth < limits.depth and token not in limits.ends:
                self._consider(heap, numbers, limits, (node, depth, before, token), -key)
        return draft

    def _consider(
        self,
        heap: list[tuple[float, int, int, int, int, int]],
        numbers: Iterator[int],
        limits: Limits,
        at: tuple[int, int, int, int],
        survival: float,
    ) -> None:
        node, depth, before, token = at
        law, is_pair = self._store.successors(before, token)
        rest = survival
        for rank, (guess, probability) in enumerate(law):
            share = min(rest, survival * self._store.chance(token, rank, probability, is_pair))
            rest -= share
            if share <= limits.cost:
                break
            heappush(heap, (-share, next(numbers), node, depth + 1, token, guess))

    def scored(self, before: int, tree: Draft, laws: Sequence[Law | None], came: Sequence[int | None]) -> None:
        """What the target said after the nodes of the tree (None: it is not known), and what really followed."""
        for node, law in enumerate(laws):
            last = before if node == 0 else tree.tokens[tree.parents[node]]
            follower = came[node]
            if follower is not None:
                self._store.learn(last, tree.tokens[node], follower)
            if law is not None:
                self._store.keep(last, tree.tokens[node], law)

    def forget(self, length: int) -> None:
        pass

    def accepted(self, count: int) -> None:
        pass


def _log_odds(probability: float) -> float:
    probability = min(max(probability, 0.001), 0.999)
    return log(probability / (1 - probability))


# ---- counts


class Positions:
    """A text, and where each token stands in it."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._where: dict[int, list[int]] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        for at, token in enumerate(tokens, len(self.tokens)):
            self._where.setdefault(token, []).append(at)
        self.tokens += tokens

    def matches(self, context: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Lengths of ends of `context`, ascending, and where they end in the text with something
        behind them. Only the longest length of those that end at the same places."""
        tokens, here = self.tokens, [at for at in self._where.get(context[-1], ()) if at + 1 < len(self.tokens)]
        length = 1
        while here:
            longer: list[int] = []
            if length < min(LONGEST, len(context)):
                back = context[-1 - length]
                longer = [at for at in here if at >= length and tokens[at - length] == back]
            if len(longer) < len(here):
                yield length, here
            here, length = longer, length + 1

    def promising(self, context: Sequence[int], limits: Limits, least: float = 0.1) -> Draft:
        """The tree with the largest sum of empirical probabilities; of equals that of the longest match."""
        best, most = Draft([context[-1]], [-1], [1.0]), 0.0
        for length, here in self.matches(context):
            draft = self._tree(context[-1], here, min(limits.nodes, length), max(least, limits.cost), limits)
            if (score := sum(draft.survival[1:])) >= most:
                best, most = draft, score
        return best

    def _tree(self, root: int, here: list[int], nodes: int, least: float, limits: Limits) -> Draft:
        draft, heap, numbers = Draft([root], [-1], [1.0]), list[tuple[float, int, int, int, int, list[int]]](), count()
        self._consider(heap, numbers, 0, 0, 1.0, here)
        while heap and len(draft.tokens) <= nodes and -heap[0][0] >= least:
            key, _, parent, depth, token, there = heappop(heap)
            draft.tokens.append(token)
            draft.parents.append(parent)
            draft.survival.append(-key)
            if depth < limits.depth and token not in limits.ends:
                self._consider(heap, numbers, len(draft.tokens) - 1, depth, -key, there)
        return draft

    def _consider(
        self,
        heap: list[tuple[float, int, int, int, int, list[int]]],
        numbers: Iterator[int],
        node: int,
        depth: int,
        survival: float,
        here: list[int],
    ) -> None:
        tokens, groups = self.tokens, dict[int, list[int]]()
        for at in here:
            if at + 1 < len(tokens):
                groups.setdefault(tokens[at + 1], []).append(at + 1)
        for token, there in groups.items():
            if token != SEPARATOR:
                share = survival * len(there) / len(here)
                heappush(heap, (-share, next(numbers), node, depth + 1, token, there))


class Counts(Store):
    """SuffixDecoding. said: also what was said in rows that ended."""

    name = "counts"

    def __init__(self, said: bool = False):
        self.said = said
        self.rewind()

    def rewind(self) -> None:
        self.texts = Positions()

    def open(self, row: Row) -> View:
        return CountsView(self)

    def close(self, row: Row, view: View) -> None:
        if self.said:
            self.texts.extend([*row.tokens[row.prompt_length :], SEPARATOR])


class CountsView:
    """The better of two trees; of equals that of the row's own text."""

    def __init__(self, store: Counts):
        self._store, self.own = store, Positions()

    def draft(self, tokens: Sequence[int], firm: int, limits: Limits) -> Draft:
        self.own.extend(tokens[len(self.own.tokens) : firm])
        own = self.own.promising(tokens[-LONGEST:], limits)
        if not self._store.said:
            return own
        said = self._store.texts.promising(tokens[-LONGEST:], limits)
        return own if sum(own.survival) >= sum(said.survival) else said

    def forget(self, length: int) -> None:
        pass

    def accepted(self, count: int) -> None:
        pass


class Weighed(Store):
    """The request's own text, read as the library reads a corpus: counts weighted by match length,
    through a logistic function that learns."""

    name = "weighed"

    def open(self, row: Row) -> View:
        return WeighedView()


class WeighedView:
    def __init__(self) -> None:
        self._own, self._trust = Positions(), Trust()

    def draft(self, tokens: Sequence[int], firm: int, limits: Limits) -> Draft:
        self._learn(tokens, firm)
        return self._grown(tokens, limits)[0]

    def _learn(self, tokens: Sequence[int], firm: int) -> None:
        """Of a prompt only its end teaches."""
        known = max(len(self._own.tokens), min(firm, len(tokens)) - 256)
        self._own.extend(tokens[len(self._own.tokens) : known])
        glance = Limits(nodes=1, depth=1, min_match=1, cost=0.0)
        for at in range(known, firm):
            if at > 0:
                _, length, first, chance = self._grown(tokens[max(0, at - LONGEST) : at], glance)
                if first >= 0:
                    self._trust.learn(length, chance, first == tokens[at])
            self._own.extend([tokens[at]])

    def _grown(self, tokens: Sequence[int], limits: Limits) -> tuple[Draft, int, int, float]:
        found = self._places(tokens[-LONGEST:])
        growth = _Growth(Numbers(self._own.tokens, (), (), 2**31), self._trust, limits)
        draft = growth.draft(tokens[-1], found)
        return draft, found[0].length if found else 0, growth.first, growth.chance

    def _places(self, context: Sequence[int]) -> list[Occurrence]:
        found: list[Occurrence] = []
        known = set[int]()
        for length, here in reversed(list(self._own.matches(context))):
            found += [Occurrence(at, length) for at in reversed(here) if at not in known]
            known.update(here)
            if len(found) >= ENOUGH:
                break
        return found[:PLACES]

    def forget(self, length: int) -> None:
        pass

    def accepted(self, count: int) -> None:
        pass
