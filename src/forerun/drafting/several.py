"""Several drafters as one, each row answered by one of them: what a fallback and a switch have in common.

A batch may mix them all, each token with the law it was drawn from. Every part is told what became
of its own proposals, and parts that read hidden states are told what was really kept, whoever
answered.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from forerun.accept.exact import Verdict
from forerun.drafting.drafter import Context, Drafter, Tally
from forerun.model import Scores
from forerun.row import Row
from forerun.tree import TokenTree, Topology

NOBODY = -1
"""The part that answers for a row that no part is asked for."""


class Several(Drafter):
    """Parts, of which every row has one that answers. To be overridden: `propose`, which asks parts
    with `_ask` and says with `_answer` which one it takes for every row."""

    def __init__(self, parts: Sequence[Drafter], name: str):
        self.parts, self.name = list(parts), name
        self.reads = frozenset().union(*(part.reads for part in parts))
        self.models = [model for part in parts for model in part.models]
        self.max_nodes = max(part.max_nodes for part in parts)
        self._chosen: list[int] = []
        self._trees: dict[int, TokenTree] = {}
        self._proposal: TokenTree | None = None
        self._tallies = self._new_tallies()

    def _new_tallies(self) -> list[Tally]:
        return [Tally(f"{self.name}, {part.name}") for part in self.parts]

    def admit(self, row: Row, hidden: Mapping[int, Tensor]) -> None:
        self._begin()  # without what an interrupted step has left
        for part in self.parts:
            part.admit(row, hidden)

    def release(self, slot: int) -> None:
        for part in self.parts:
            part.release(slot)

    def retract(self, lengths: Sequence[int]) -> None:
        for part in self.parts:
            part.retract(lengths)

    # ---- a proposal

    def _begin(self) -> None:
        self._chosen, self._trees, self._proposal = [], {}, None

    def _ask(self, number: int, context: Context, budgets: Sequence[int], depths: Sequence[int]) -> TokenTree:
        """This part's proposal, within these budgets and depths: row by row, 0 where it is not asked. Which part
        is asked is decided here or above: inside, the clock has no say in it."""
        begun, part = time.perf_counter(), self.parts[number]
        within = [min(budget, part.max_nodes) for budget in budgets]
        tree = part.propose(replace(context, depths=depths, budgets=within, costs=None))
        self._trees[number] = tree
        tally = self._tallies[number]
        tally.seconds += time.perf_counter() - begun
        for size, depth in zip(tree.sizes, depths, strict=True):
            tally.asked += depth > 0
            tally.hits += size > 1
            tally.drafted += size - 1
        return tree

    def _answer(self, chosen: Sequence[int], context: Context) -> TokenTree:
        """Row i as the part chosen[i] has proposed it, or without any proposal."""
        self._chosen = list(chosen)
        if len({*chosen}) == 1 and chosen[0] != NOBODY:
            self._proposal = self._trees[chosen[0]]
        elif {*chosen} == {NOBODY}:
            self._proposal = _nothing(context)
        else:
            trees = self._trees | ({NOBODY: _nothing(context)} if NOBODY in chosen else {})
            self._proposal = assembled([trees[number] for number in chosen], context.device)
        return self._proposal

    def origins(self, slot: int, path: Sequence[int]) -> list[str]:
        """As the part says that answered for this row."""
        if self._chosen[slot : slot + 1] in ([], [NOBODY]):
            return []
        return self.parts[self._chosen[slot]].origins(slot, path)

    # ---- what became of it

    def observe(self, context: Context, tree: TokenTree, verdict: Verdict, scores: Scores) -> None:
        """Parts that read hidden states see what was really kept; the others what was kept of their own proposal.

        The tree may be a stranger's: where this is itself a part, another one may have answered
        for some rows or for all.
        """
        if len(self._chosen) != tree.rows:  # it was not asked, or an interrupted step has left something
            self._chosen, self._trees = [NOBODY] * tree.rows, {}
        chosen = [number if self._is_own(tree, row) else NOBODY for row, number in enumerate(self._chosen)]
        for path, number in zip(verdict.kept, chosen, strict=False):
            for depth in range(1, len(path) if number != NOBODY else 1):
                self._tallies[number].keep(depth)
        for number, part in enumerate(self.parts):
            if part.reads:
                part.observe(context, tree, verdict, scores)
            elif number in self._trees:
                kept = [path if n == number else [0] for path, n in zip(verdict.kept, chosen, strict=True)]
                part.observe(context, self._trees[number], replace(verdict, kept=kept), scores)
        self._begin()

    def _is_own(self, tree: TokenTree, row: int) -> bool:
        own = self._proposal
        return tree is own or (
            own is not None
            and tree.tokens[row] == own.tokens[row]
            and tree.topology.parents[row] == own.topology.parents[row]
        )

    def reset(self) -> None:
        for part in self.parts:
            part.reset()
        self._tallies = self._new_tallies()

    def tallies(self) -> list[Tally]:
        return [tally for own, part in zip(self._tallies, self.parts, strict=True) for tally in (own, *part.tallies())]


def _nothing(context: Context) -> TokenTree:
    return TokenTree.root([row.tokens[-1] for row in context.rows], context.device)


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
