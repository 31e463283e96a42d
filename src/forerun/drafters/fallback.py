"""One drafter in front of another: a row takes its proposal from the first source that has one.

A store of tokens costs microseconds and is right for long stretches where text repeats; a model or
heads cost far more and always have something to say. In front of them a store saves their cost
wherever it hits. Sources behind the one that answered are not asked, rows choose separately, and a
batch may mix all of them, each token with the law it was drawn from.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forerun.accept.exact import Verdict
from forerun.drafting.drafter import Context, Drafter, Tally
from forerun.drafting.method import Method
from forerun.drafting.settings import setting
from forerun.drafting.workshop import Workshop
from forerun.errors import DrafterError
from forerun.model import Scores
from forerun.row import Row
from forerun.tree import TokenTree, Topology


class Fallback(Drafter):
    """Sources in the order in which they are asked. enough: a source without luck in it that has
    fewer nodes is passed over, unless nobody behind it has more. A proposal that was drawn is
    always an answer: to prefer it for its length, which may depend on the tokens drawn, would
    change their law.
    """

    name = "fallback"

    def __init__(self, sources: Sequence[Drafter], enough: int = 1):
        self.sources, self.enough = list(sources), enough
        self.reads = frozenset().union(*(source.reads for source in sources))
        self.max_nodes = max(source.max_nodes for source in sources)
        self._chosen: list[int] = []
        self._trees: dict[int, TokenTree] = {}
        self._proposal: TokenTree | None = None
        self._tallies = self._new_tallies()

    def _new_tallies(self) -> list[Tally]:
        return [Tally(f"fallback, {source.name}") for source in self.sources]

    def admit(self, row: Row, hidden: Mapping[int, Tensor]) -> None:
        self._chosen, self._trees, self._proposal = [], {}, None  # what an interrupted step has left
        for source in self.sources:
            source.admit(row, hidden)

    def release(self, slot: int) -> None:
        for source in self.sources:
            source.release(slot)

    def retract(self, lengths: Sequence[int]) -> None:
        for source in self.sources:
            source.retract(lengths)

    def propose(self, context: Context) -> TokenTree:
        self._trees, depths = {}, list(context.depths)
        for number, source in enumerate(self.sources):
            begun = time.perf_counter()
            budgets = [min(budget, source.max_nodes) for budget in context.budgets]
            tree = source.propose(replace(context, depths=depths, budgets=budgets, path=(*context.path, number)))
            self._trees[number] = tree
            self._count(number, tree, depths, time.perf_counter() - begun)
            depths = [0 if self._answers(tree, row) else depth for row, depth in enumerate(depths)]
            if not any(depths):
                break
        self._chosen = [self._choice(row) for row in range(len(context.rows))]
        if len(self._trees) == 1:
            self._proposal = self._trees[0]
        else:
            self._proposal = assembled([self._trees[number] for number in self._chosen], context.device)
        return self._proposal

    def _count(self, number: int, tree: TokenTree, depths: Sequence[int], seconds: float) -> None:
        tally = self._tallies[number]
        tally.seconds += seconds
        for size, depth in zip(tree.sizes, depths, strict=True):
            tally.asked += depth > 0
            tally.hits += size > 1
            tally.drafted += size - 1

    def _answers(self, tree: TokenTree, row: int) -> bool:
        is_drawn = tree.drawn_BN is not None and bool(tree.drawn_BN[row].any())
        return tree.sizes[row] > (1 if is_drawn else self.enough)

    def _choice(self, row: int) -> int:
        """The first source that answers, or else the largest tree, the earlier of equals."""
        answering = (number for number, tree in self._trees.items() if self._answers(tree, row))
        return next(answering, max(self._trees, key=lambda number: (self._trees[number].sizes[row], -number)))

    def origins(self, slot: int, path: Sequence[int]) -> list[str]:
        """As the source says that answered for this row."""
        return self.sources[self._chosen[slot]].origins(slot, path)

    def observe(self, context: Context, tree: TokenTree, verdict: Verdict, scores: Scores) -> None:
        """Sources that read hidden states see what was really kept; the others what was kept of their own proposal.

        The tree may be a stranger's: where this is itself a source, another one may have answered
        for some rows or for all.
        """
        if len(self._chosen) != tree.rows:  # it was not asked, or an interrupted step has left something
            self._chosen, self._trees = [-1] * tree.rows, {}
        chosen = [number if number >= 0 and self._is_own(tree, row) else -1 for row, number in enumerate(self._chosen)]
        for path, number in zip(verdict.kept, chosen, strict=False):
            for depth in range(1, len(path) if number >= 0 else 1):
                self._tallies[number].keep(depth)
        for number, source in enumerate(self.sources):
            if source.reads:
                source.observe(context, tree, verdict, scores)
            elif number in self._trees:
                kept = [path if n == number else [0] for path, n in zip(verdict.kept, chosen, strict=True)]
                source.observe(context, self._trees[number], replace(verdict, kept=kept), scores)
        self._chosen, self._trees, self._proposal = [], {}, None

    def _is_own(self, tree: TokenTree, row: int) -> bool:
        own = self._proposal
        return tree is own or (
            own is not None
            and tree.tokens[row] == own.tokens[row]
            and tree.topology.parents[row] == own.topology.parents[row]
        )

    def reset(self) -> None:
        for source in self.sources:
            source.reset()
        self._tallies = self._new_tallies()

    def tallies(self) -> list[Tally]:
        return [
            tally for own, source in zip(self._tallies, self.sources, strict=True) for tally in (own, *source.tallies())
        ]


def assembled(trees: Sequence[TokenTree], device: torch.device) -> TokenTree:
    """Row i of tree i, as one batch."""
    tokens = [tree.tokens[row] for row, tree in enumerate(trees)]
    topology = Topology.of([tree.topology.parents[row] for row, tree in enumerate(trees)])
    some = next((tree.laws_BNV for tree in trees if tree.laws_BNV is not None), None)
    if some is None:
        return TokenTree(tokens, topology, device)
    laws = some.new_zeros(len(trees), topology.nodes, some.shape[2])
    drawn = np.zeros((len(trees), topology.nodes), dtype=np.uint8)
    for row, tree in enumerate(trees):
        if tree.laws_BNV is not None and tree.drawn_BN is not None:
            size = tree.sizes[row]
            laws[row, :size], drawn[row, :size] = tree.laws_BNV[row, :size], tree.drawn_BN[row, :size]
    return TokenTree(tokens, topology, device, drawn, laws)


@dataclass(frozen=True)
class Settings:
    """{"drafter": "fallback", "sources": ["lookup", "hydra:HEADS"], "enough": 1}, on the command
    line `lookup | hydra:HEADS`."""

    sources: Sequence[str | Mapping[str, Any]] = setting((), "At least two drafters, in the order of asking.", "specs")
    enough: int = setting(1, "A source without luck in it that has fewer nodes is passed over.")

    def __post_init__(self) -> None:
        sources, enough = self.sources, self.enough
        if isinstance(sources, str) or not isinstance(sources, Sequence) or len(sources) < 2:
            raise DrafterError('fallback: sources is a list of at least two drafters, such as ["lookup", "small:PATH"]')
        if not isinstance(enough, int) or isinstance(enough, bool) or enough < 1:
            raise DrafterError(f"fallback: enough is a number of tokens, at least 1, not {enough!r}")


def build(workshop: Workshop, settings: Settings) -> Drafter:
    return Fallback([workshop.build(source) for source in settings.sources], settings.enough)


METHOD = Method(
    "fallback",
    "One drafter in front of another.",
    Settings,
    build,
    grows="drawn",
    example={"sources": ["lookup", "small:MODEL"]},
)
