"""The seam between stores of tokens and the drafters that ask them.

A *store* holds text of some kind: a request's own, what the model said before, a corpus. A *view*
is one row's place in a store: it follows the row's text, learns how well the store foretells it,
and drafts a tree of what came next at similar places, its nodes ranked by the probability that they
survive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from forerun.row import Row


@dataclass(frozen=True)
class Limits:
    """nodes: most nodes of a tree, node 0 not counted. depth: longest path. min_match: shortest
    match to follow. cost: the least probability of survival that is worth a node. ends: tokens that
    end the text, so that nothing follows them. follows_price: the cost holds only where the engine
    knows no better."""

    nodes: int
    depth: int
    min_match: int
    cost: float
    ends: frozenset[int] = frozenset()
    follows_price: bool = False


class Bounds:
    """A drafter's limits, cut to what a row has room for: the same object from step to step as long
    as they are the same, which saves the making of it."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self._made: dict[tuple[int, int, float, frozenset[int]], Limits] = {}

    def within(self, nodes: int, depth: int, ends: frozenset[int], price: float | None = None) -> Limits:
        """price: what a node must promise as the engine knows it, for limits that follow it."""
        limits = self.limits
        cost = limits.cost if price is None or not limits.follows_price else price
        key = min(limits.nodes, nodes), min(limits.depth, depth), cost, ends
        found = self._made.get(key)
        if found is None:
            if len(self._made) >= _BOUNDS:
                self._made.clear()
            found = self._made[key] = replace(limits, nodes=key[0], depth=key[1], cost=cost, ends=ends)
        return found


_BOUNDS = 256


class Draft(NamedTuple):
    """A tree for one row: tokens, parents (-1 for node 0), and the estimated probability that each node survives.

    Siblings are different tokens; a node's survival is never above its parent's, nor the sum of siblings'.
    """

    tokens: list[int]
    parents: list[int]
    survival: list[float]


class View(Protocol):
    """One row's place in a store. What it drafts is a function of the past alone: the row's text,
    and what the store held."""

    def draft(self, tokens: Sequence[int], firm: int, limits: Limits) -> Draft:
        """Catch up with the first `firm` tokens of the row, learn from them, look through the
        tentative rest, and grow."""

    def forget(self, length: int) -> None:
        """The row's text ends at `length` or before it."""

    def accepted(self, count: int) -> None:
        """So many tokens of the last draft were right (0 is not told)."""


class Store:
    """Where texts are looked up. To inherit from it is to leave nothing behind when a row ends."""

    name: str
    remembers = False
    """What it holds depends on what earlier requests drew."""

    def open(self, row: Row) -> View:
        """A view for a new row."""
        raise NotImplementedError

    def close(self, row: Row, view: View) -> None:
        """The row has ended."""

    def rewind(self) -> None:
        """Forget what rows have left here since the store was opened."""
