"""What came next in a corpus at the places most like a row's end, grown into a tree best first.

The places that end in the longest match come first; while they are few, places of shorter matches
join them, with less weight. A node of the tree stands for the places that agree so far. The
probability that a child survives is a logistic function of how much of its parent's weight it has
and of how long the match is, corrected by what this row's text has shown so far (`Trust`).

This is the readable form of `kernels/corpus.cc`, which returns the same of every file that is not
damaged (what the two make of a damaged one may differ, and does no harm); it runs where there are
no kernels.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import takewhile
from math import exp, log2
from typing import NamedTuple

from forerun.stores.store import Draft, Limits

PLACES, ENOUGH = 64, 8
"""The most places looked at, and how many of them need no shorter matches beside them."""

RATE, RATE_PER_LENGTH = 0.1, 0.2
"""Steps of the online logistic regression, in log-odds per token: for all matches, and for those of
about equal length."""

LENGTHS = 8  # lengths 1, 2-3, 4-7 ... as `bit_length` counts them

WEIGHTS = (
    # constant, log2(match length), log2(weight), log2(1 + weight of the others)
    (-1.96, 0.09, 0.56, -0.38),  # the heaviest child
    (-1.43, -0.11, 0.75, -0.60),  # the others
)
"""Logistic regression over 5,000 places, half of them in Python files and half in what the
reference target said, with a corpus of 10 M tokens of other Python files; of depths 1 to 12 along
the text that came. `benchmarks/corpus.py --fit` fits to answers."""


class Numbers(NamedTuple):
    """What is asked of a corpus: parts of it, see `index`."""

    tokens: Sequence[int]
    order: Sequence[int]
    starts: Sequence[int]
    vocabulary: int


class Occurrence(NamedTuple):
    """Where a text ends like the row: the position, and how many tokens agree."""

    position: int
    length: int


class Found(NamedTuple):
    """A draft, and what is to be learned from. length: of the longest match, 0 if there was none
    worth following. first: the most probable next token, -1 without any. chance: the probability it
    was given."""

    draft: Draft
    length: int = 0
    first: int = -1
    chance: float = 0.0


class Trust:
    """How far this row's text departs from the prior: log-odds for all lengths (the first number), and for each."""

    def __init__(self) -> None:
        self.odds = array("d", [0.0] * (1 + LENGTHS))

    def learn(self, length: int, chance: float, was_right: bool) -> None:
        """Something that was given this chance came, or did not."""
        surprise = was_right - chance
        self.odds[0] += RATE * surprise
        self.odds[1 + bucket(length)] += RATE_PER_LENGTH * surprise


def bucket(length: int) -> int:
    return min(length.bit_length(), LENGTHS - 1)


def weight(length: int) -> int:
    """Of a place whose match has this length. Of 1, the length and its square the square foretold
    best, as did 8 or 24 places rather than those of the longest match alone."""
    return length * length


def survival(odds: Sequence[float], rank: int, length: int, own: int, others: int) -> float:
    """The probability that a child is right, given that its parent is."""
    constant, by_length, by_own, by_others = WEIGHTS[rank > 0]
    score = constant + by_length * log2(length) + by_own * log2(own) + by_others * log2(1 + others)
    return 1 / (1 + exp(-(score + odds[0] + odds[1 + bucket(length)])))


def position_of(corpus: Numbers, entry: int) -> int:
    """Where an entry's text ends; brought into range, whatever a damaged file says."""
    return min(max(corpus.order[entry], 0), len(corpus.tokens) - 1)


def agreeing(corpus: Numbers, entry: int, end: Sequence[int]) -> int:
    """How many of the tokens `end` (the newest first) this entry's text ends in."""
    position = position_of(corpus, entry)
    most = min(len(end), position + 1)
    return next((back for back in range(most) if corpus.tokens[position - back] != end[back]), most)


def _is_before(corpus: Numbers, entry: int, end: Sequence[int], or_equal: bool) -> bool:
    """Whether an entry is sorted before all (or_equal: before the end of all) that end in these tokens."""
    agree, position = agreeing(corpus, entry, end), position_of(corpus, entry)
    if agree == len(end):
        return or_equal
    if agree > position:
        return True
    token = corpus.tokens[position - agree]
    return token == corpus.vocabulary or token < end[agree]  # a document's start is less than any token


def _boundary(corpus: Numbers, end: Sequence[int], or_equal: bool, low: int, high: int) -> int:
    while low < high:
        middle = (low + high) // 2
        if _is_before(corpus, middle, end, or_equal):
            low = middle + 1
        else:
            high = middle
    return low


def _ending_in(corpus: Numbers, token: int) -> tuple[int, int]:
    """The entries whose texts end in a token, from the first one on and before the second; brought into range."""
    entries = len(corpus.order)
    first = min(max(corpus.starts[token], 0), entries)
    return first, min(max(corpus.starts[token + 1], first), entries)


def places(corpus: Numbers, end: Sequence[int], min_match: int) -> list[Occurrence]:
    """Where texts end like these tokens (the newest first), the longest matches first; none below `min_match`."""
    found = list[Occurrence]()
    if not end:
        return found
    first, last = _ending_in(corpus, end[0])
    low = high = _boundary(corpus, end, False, first, last)
    inner = (low, low)
    length = len(end) + 1
    while len(found) < ENOUGH:
        beside = [agreeing(corpus, entry, end) for entry in (low - 1, high) if first <= entry < last]
        length = min(length - 1, max(beside, default=0))
        if length < min_match:
            break
        low = _boundary(corpus, end[:length], False, first, low)
        high = _boundary(corpus, end[:length], True, high, last)
        before, fresh = inner[0] - low, (high - low) - (inner[1] - inner[0])
        taken = min(fresh, PLACES - len(found))
        for number in range(taken):
            entry = low + number * fresh // taken
            entry += 0 if entry - low < before else inner[1] - inner[0]
            found.append(Occurrence(position_of(corpus, entry), length))
        inner = (low, high)
    return found


def grow(corpus: Numbers, context: Sequence[int], trust: Trust, limits: Limits) -> Found:
    """A draft for a row that ends in `context`, the newest token last."""
    known = list(takewhile(lambda token: 0 <= token < corpus.vocabulary, reversed(context)))
    found = places(corpus, known, limits.min_match)
    growth = _Growth(corpus, trust, limits)
    draft = growth.draft(context[-1], found)
    return Found(draft, found[0].length if found else 0, growth.first, growth.chance)


class _Growth:
    """Ties go to what was considered first."""

    def __init__(self, corpus: Numbers, trust: Trust, limits: Limits):
        self._corpus, self._odds, self._limits = corpus, trust.odds, limits
        self._heap: list[tuple[float, int, int, int, int, list[Occurrence]]] = []
        self._considered = 0
        self.first, self.chance = -1, 0.0

    def draft(self, root: int, found: list[Occurrence]) -> Draft:
        limits, heap = self._limits, self._heap
        draft = Draft([root], [-1], [1.0])
        if found and limits.depth > 0 and root not in limits.ends:
            self._expand(0, 0, 1.0, found)
        while heap and len(draft.tokens) <= limits.nodes:
            key, _, parent, depth, token, there = heappop(heap)
            node = len(draft.tokens)
            draft.tokens.append(token)
            draft.parents.append(parent)
            draft.survival.append(-key)
            if depth < limits.depth and token not in limits.ends:
                self._expand(node, depth, -key, there)
        return draft

    def _expand(self, node: int, depth: int, rest: float, there: list[Occurrence]) -> None:
        """Consider the children of a node whose places these are."""
        parent, children = rest, self._children(depth, there)
        total = sum(own for own, _, _ in children.values())
        ranked = sorted(children.items(), key=lambda item: -item[1][0])
        for rank, (token, (own, length, behind)) in enumerate(ranked):
            chance = survival(self._odds, rank, length + depth, own, total - own)
            if node == 0 and rank == 0:
                self.first, self.chance = token, chance
            share = min(parent * chance, rest)  # what the children of a node share
            rest -= share
            if share > self._limits.cost:
                heappush(self._heap, (-share, self._considered, node, depth + 1, token, behind))
                self._considered += 1

    def _children(self, depth: int, there: list[Occurrence]) -> dict[int, tuple[int, int, list[Occurrence]]]:
        """Per next token: its weight, its longest match, its places."""
        corpus, groups = self._corpus, dict[int, list[Occurrence]]()
        for place in there:
            at = place.position + 1 + depth
            token = corpus.tokens[at] if at < len(corpus.tokens) else corpus.vocabulary
            if 0 <= token < corpus.vocabulary:
                groups.setdefault(token, []).append(place)
        return {
            token: (sum(weight(place.length) for place in group), max(place.length for place in group), group)
            for token, group in groups.items()
        }
