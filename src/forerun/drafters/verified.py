"""A verified model is again a drafter: it proposes what its model would say, using another drafter to say it faster.

The tokens follow the model's law, whatever drafted them, so that is the law handed up (specs of hierarchical speculative
decoding, section 3: the law of the original drafter would be wrong two levels up). Nesting it gives hierarchies of any
depth. This is the fixed "at least T" buffer of Fast Inference via Hierarchical Speculative Decoding (arXiv 2510.19705, a
reconstruction): a round's surplus over `length` is kept, not cut off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from forerun.accept import Verdict
from forerun.drafter import Context, Drafter
from forerun.drafters import Workshop
from forerun.errors import DrafterError
from forerun.judge import judge
from forerun.model import Model, Scores
from forerun.row import Row, draft_chance
from forerun.tree import TokenTree


class Verified(Drafter):
    """`model`'s own words, at least `length` of them per proposal if there is room, drafted by `inner`."""

    name = "verified"

    def __init__(self, model: Model, inner: Drafter, length: int):
        if inner.reads:
            raise DrafterError(
                f"the drafter {inner.name} reads hidden states, which a verified model does not hand down yet"
            )
        self.model, self.inner, self.length = model, inner, length
        self.max_nodes = length + inner.max_nodes

    def admit(self, row: Row, hidden: Mapping[int, Tensor]) -> None:
        self.model.admit(row.limit)
        self.inner.admit(row, {})

    def release(self, slot: int) -> None:
        self.model.release(slot)
        self.inner.release(slot)

    def retract(self, lengths: Sequence[int]) -> None:
        for slot, length in enumerate(lengths):
            self.model.truncate(slot, length)
        self.inner.retract(lengths)

    def propose(self, context: Context) -> TokenTree:
        rows = context.rows
        starts = [len(row.tokens) for row in rows]
        most = min(context.budget, self.max_nodes)
        depths = [max(0, min(d, most, self.model.max_length - s)) for d, s in zip(context.depths, starts, strict=True)]
        spoken: list[list[Tensor]] = [[] for _ in rows]
        number = 0
        try:
            while any(room := self._room(rows, starts, depths)):
                self._round(replace(context, path=(*context.path, number)), room, spoken)
                number += 1
            tokens = [row.tokens[start - 1 :] for row, start in zip(rows, starts, strict=True)]
        finally:  # an interrupted request must not end with tokens that its target never saw
            for row, start in zip(rows, starts, strict=True):
                row.tentative -= len(row.tokens) - start
                del row.tokens[start:]
        if all(row.params.is_greedy for row in rows):
            return TokenTree.chain(tokens, context.device)
        return _tree(tokens, spoken, context.device)

    def _room(self, rows: Sequence[Row], starts: Sequence[int], depths: Sequence[int]) -> list[int]:
        """How many tokens each row may still say; 0 once it has said enough."""
        said = [len(row.tokens) - start for row, start in zip(rows, starts, strict=True)]
        return [most - n if n < min(self.length, most) else 0 for n, most in zip(said, depths, strict=True)]

    def _round(self, context: Context, room: Sequence[int], spoken: list[list[Tensor]]) -> None:
        """One turn of the loop on the inner pair; what it settles is appended to the rows tentatively.

        A row that has said enough goes through the motions with nothing proposed, and what the model says is ignored.
        """
        rows = context.rows
        within = replace(context, budget=self.inner.max_nodes, depths=[max(0, left - 1) for left in room])
        tree = self.inner.propose(within)
        scores = self.model.score(tree, rows)
        chance = draft_chance(rows, (*context.path, _VERIFY))
        judgement = judge(tree, scores.logits_BNV, rows, chance, scores.best_BN)
        verdict = judgement.verdict
        self.model.keep(verdict.kept)
        self.inner.observe(within, tree, verdict, scores)
        for index, row in enumerate(rows):
            if room[index]:
                said = [*(tree.tokens[index][node] for node in verdict.kept[index][1:]), verdict.next_tokens[index]]
                row.tokens += said
                row.tentative += len(said)
                if judgement.laws_BNV is not None:
                    spoken[index] += judgement.laws_BNV[index, verdict.kept[index]]

    def observe(self, context: Context, tree: TokenTree, verdict: Verdict, scores: Scores) -> None:
        """The level above kept a part: everything behind it never happened."""
        self.retract([len(row.tokens) + len(path) - 1 for row, path in zip(context.rows, verdict.kept, strict=True)])


_VERIFY = 1 << 20
"""Tells the dice of the inner verdict from those of the inner drafter, which has the same path otherwise."""


def _tree(tokens: list[list[int]], spoken: list[list[Tensor]], device: torch.device) -> TokenTree:
    some = next((law for laws in spoken for law in laws), None)
    if some is None:
        return TokenTree.chain(tokens, device)
    table = some.new_zeros(len(tokens), max(map(len, tokens)), some.shape[0])
    for index, laws in enumerate(spoken):
        if laws:
            table[index, : len(laws)] = torch.stack(laws)
    return TokenTree.drawn_chain(tokens, table)


def build(
    workshop: Workshop,
    checkpoint: str | None = None,
    inner: str | Mapping[str, Any] = "lookup",
    length: int = 5,
) -> Drafter:
    """{"drafter": "verified", "checkpoint": PATH, "inner": any drafter, "length": N}"""
    if not isinstance(length, int) or length < 1:
        raise DrafterError(f"verified: a length of {length} proposes nothing; give 1 or more")
    network = workshop.network(checkpoint, "verified")
    drafter = replace(workshop, target=Model(network, 0)).build(inner)
    return Verified(Model(network, drafter.max_nodes + 1), drafter, length)
