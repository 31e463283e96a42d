"""A verified model is again a drafter: it proposes what its model would say, using another drafter to say it faster.

The tokens follow the model's law, whatever drafted them, so that is the law handed up (specs of
hierarchical speculative decoding, section 3: the law of the original drafter would be wrong two
levels up). That holds for joint verification too: given that a round goes on behind some tokens,
the next one follows the model's law. Nesting it gives hierarchies of any depth. This is the "at
least T" buffer of Fast Inference via Hierarchical Speculative Decoding (arXiv 2510.19705, a
reconstruction): a round's surplus over `length` is kept, not cut off; only what would follow the
end of the text is.

Every level has a cache of its own (the model's), luck of its own (`Context.path`) and counts its
own passes. Tokens that a level above has placed are read together with the next draft, so a round
is one pass.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from forerun.accept.exact import Verdict
from forerun.accept.judge import judge
from forerun.accept.lossy import Lenient
from forerun.drafting.drafter import Context, Drafter, Tally
from forerun.drafting.method import Method
from forerun.drafting.settings import demand_count, setting
from forerun.drafting.workshop import Workshop
from forerun.errors import DrafterError
from forerun.model import Model, Scores
from forerun.row import Row, draft_chance
from forerun.tree import TokenTree


class Verified(Drafter):
    """`model`'s own words, at least `length` of them per proposal if there is room, drafted by `inner`.

    lenient: review by this rule instead of an exact one (CS Drafting). The tokens then follow no
    law that anybody knows, so they are handed up as if they involved no chance, which is exact
    whatever they are (specs, section 3, corollaries).
    """

    name = "verified"

    def __init__(self, model: Model, inner: Drafter, length: int, lenient: Lenient | None = None):
        self.model, self.inner, self.length, self.lenient = model, inner, length, lenient
        self.models = (model, *inner.models)
        self.max_nodes = length + inner.max_nodes
        self._tally = self._new_tally()
        self._origins: list[list[str]] = []

    def _new_tally(self) -> Tally:
        return Tally("verified, lenient (lossy)" if self.lenient else "verified")

    def admit(self, row: Row, hidden: Mapping[int, Tensor]) -> None:
        slot = self.model.admit(row.limit)
        try:
            self.inner.admit(row, self._read(row, slot))
        except BaseException:
            self.model.release(slot)
            raise

    def _read(self, row: Row, slot: int) -> dict[int, Tensor]:
        """The prompt at once if the inner drafter wants to know the model's states; else when the
        row is first asked for."""
        return self.model.prefill_all(row, slot, self.inner.reads) if self.inner.reads else {}

    def release(self, slot: int) -> None:
        self.model.release(slot)
        self.inner.release(slot)

    def retract(self, lengths: Sequence[int]) -> None:
        for slot, length in enumerate(lengths):
            self.model.truncate(slot, length)
        self.inner.retract(lengths)

    def propose(self, context: Context) -> TokenTree:
        begun = time.perf_counter()
        rows = context.rows
        starts = [len(row.tokens) for row in rows]
        most = [min(self.max_nodes, *limits) for limits in zip(context.budgets, context.depths, strict=True)]
        depths = [max(0, min(m, self.model.max_length - s)) for m, s in zip(most, starts, strict=True)]
        spoken: list[list[Tensor]] = [[] for _ in rows]
        self._origins = [[] for _ in rows]
        number = 0
        with tentatively(rows):
            while any(room := self._room(rows, starts, depths)):
                self._round(replace(context, path=(*context.path, number)), room, spoken)
                number += 1
            tokens = [row.tokens[start - 1 :] for row, start in zip(rows, starts, strict=True)]
        self._tally.seconds += time.perf_counter() - begun
        if self.lenient or all(row.params.is_greedy for row in rows):
            return TokenTree.chain(tokens, context.device)
        return _tree(tokens, spoken, context.device)

    def _room(self, rows: Sequence[Row], starts: Sequence[int], depths: Sequence[int]) -> list[int]:
        """How many tokens each row may still say; 0 once it has said enough, or its text has ended."""
        said = [row.tokens[start:] for row, start in zip(rows, starts, strict=True)]
        return [
            most - len(some) if len(some) < min(self.length, most) and not (some and some[-1] in row.ends) else 0
            for row, some, most in zip(rows, said, depths, strict=True)
        ]

    def _round(self, context: Context, room: Sequence[int], spoken: list[list[Tensor]]) -> None:
        """One turn of the loop on the inner pair; what it settles is appended to the rows tentatively.

        A row that has said enough goes through the motions with nothing proposed, and what the model says is ignored.
        """
        rows = context.rows
        budgets, depths = [self.inner.max_nodes] * len(rows), [max(0, left - 1) for left in room]
        within = replace(
            context, budgets=budgets, depths=depths, prices=None, costs=None
        )  # they cost the target nothing
        tree = self.inner.propose(within)
        scores = self.model.score(tree, rows, self.inner.reads)
        chance = draft_chance(rows, (*context.path, _VERIFY))
        judgement = judge(tree, scores.logits_BNV, rows, chance, scores.best_BN, self.lenient)
        verdict = judgement.verdict
        self.model.keep(verdict.kept)
        origins = [[*self.inner.origins(slot, path), self.name] for slot, path in enumerate(verdict.kept)]
        self.inner.observe(within, tree, verdict, scores)
        for index, row in enumerate(rows):
            if not room[index]:
                continue
            path = verdict.kept[index]
            said = [*(tree.tokens[index][node] for node in path[1:]), verdict.next_tokens[index]]
            count = next((place for place, token in enumerate(said, 1) if token in row.ends), len(said))
            row.tokens += said[:count]
            row.tentative += count
            self._origins[index] += origins[index][:count]
            if judgement.laws_BNV is not None:
                spoken[index].append(judgement.laws_BNV[index, path[:count]])
            self._tally.asked += 1
            self._tally.drafted += count

    def origins(self, slot: int, path: Sequence[int]) -> list[str]:
        """Whoever thought of a token below, or this level, where the model itself had to."""
        return [self._origins[slot][node - 1] for node in path[1:]]

    def observe(self, context: Context, tree: TokenTree, verdict: Verdict, scores: Scores) -> None:
        """The level above kept a part: everything behind it never happened."""
        for path in verdict.kept:
            for depth in range(1, len(path)):
                self._tally.keep(depth)
        self.retract([len(row.tokens) + len(path) - 1 for row, path in zip(context.rows, verdict.kept, strict=True)])

    def reset(self) -> None:
        self.inner.reset()
        self._tally, self.model.passes = self._new_tally(), 0
        self.model.prefixes.clear()

    def tallies(self) -> list[Tally]:
        """asked: rounds, each of which has an answer. drafted: tokens said."""
        self._tally.passes, self._tally.hits = self.model.passes, self._tally.asked
        return [self._tally, *self.inner.tallies()]


_VERIFY = 1 << 20
"""Tells the dice of the inner verdict from those of the inner drafter, which has the same path otherwise."""


class tentatively:  # noqa: N801 - reads as a word
    """Whatever is appended to the rows inside is taken back: an interrupted request must not end
    with tokens that its target never saw."""

    def __init__(self, rows: Sequence[Row]):
        self._rows, self._lengths = rows, [len(row.tokens) for row in rows]

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        for row, length in zip(self._rows, self._lengths, strict=True):
            row.tentative -= len(row.tokens) - length
            del row.tokens[length:]


def _tree(tokens: list[list[int]], spoken: list[list[Tensor]], device: torch.device) -> TokenTree:
    """spoken: per row, the laws [n, V] of the tokens of each round."""
    some = next((laws for rounds in spoken for laws in rounds), None)
    if some is None:
        return TokenTree.chain(tokens, device)
    if len(tokens) == 1:
        return TokenTree.drawn_chain(tokens, torch.cat(spoken[0])[None])
    table = some.new_zeros(len(tokens), max(map(len, tokens)), some.shape[1])
    for index, rounds in enumerate(spoken):
        if rounds:
            laws = torch.cat(rounds)
            table[index, : len(laws)] = laws
    return TokenTree.drawn_chain(tokens, table)


@dataclass(frozen=True)
class Settings:
    """{"drafter": "verified", "checkpoint": PATH, "inner": any drafter, "length": N, "leniency": 1}"""

    checkpoint: str | None = setting(None, "The model whose words are proposed.", "model")
    inner: str | Mapping[str, Any] = setting("lookup", "Any drafter, for that model.", "spec")
    length: int = setting(5, "Tokens of a proposal, at least.")
    leniency: float = setting(
        1,
        "Above 1, the model keeps tokens that are up to so many times less probable than their drafter thought. What"
        " the"
        " target says stays exact.",
    )

    def __post_init__(self) -> None:
        demand_count("verified", "length", self.length)
        lenient_of("verified", self.leniency)


def build(workshop: Workshop, settings: Settings) -> Drafter:
    network = workshop.network(settings.checkpoint, "verified")
    drafter = replace(workshop, target=Model(network, 0)).build(settings.inner)
    rule = lenient_of("verified", settings.leniency)
    return Verified(Model(network, drafter.max_nodes + 1), drafter, settings.length, rule)


def lenient_of(drafter: str, leniency: object) -> Lenient | None:
    """None for 1, which is exact."""
    if isinstance(leniency, bool) or not isinstance(leniency, int | float) or not 1 <= leniency < math.inf:
        raise DrafterError(f"{drafter}: leniency is a factor of at least 1 (1 is exact), not {leniency!r}")
    return Lenient(float(leniency)) if leniency > 1 else None


METHOD = Method(
    "verified",
    "What a model says, drafted by another drafter.",
    Settings,
    build,
    grows="drawn",
    variations=({"length": 4}, {"length": 2}, {"length": 7}),
)
