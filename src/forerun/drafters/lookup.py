"""Continuations found in text: training-free, no second model, microseconds per step. This file: in
the request's own text.

Prompt lookup (Saxena 2023) copies what followed the last few tokens at an earlier place.
SAM-Decoding (Hu et al. 2024) finds the longest such suffix with a suffix automaton. Here the
automaton also tells what followed at *other* places, and how often the same token came in a row, so
that a tree can be grown best first, its nodes ranked by the probability that they survive
(SuffixDecoding, Oliaro et al. 2024, ranks by counts; the newest occurrence predicts as well and is
cheaper to keep up to date). A node is proposed if that probability exceeds what the node costs.

Every token that becomes firm teaches, whether it was proposed or not: where nothing hits, nothing
is proposed, and nothing need be proposed to notice that the text begins to repeat itself. Trees are
a function of the row's past alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from forerun.drafting.drafter import Context, Drafter
from forerun.drafting.method import Method
from forerun.drafting.settings import demand_count, setting
from forerun.drafting.workshop import Workshop
from forerun.errors import DrafterError
from forerun.row import Row
from forerun.slots import Slots
from forerun.stores.context import ContextStore
from forerun.stores.follower import Automaton, automaton_of
from forerun.stores.store import Bounds, Limits, View
from forerun.tree import TokenTree


class Lookup(Drafter):
    """Proposes what came before."""

    name = "lookup"

    def __init__(self, limits: Limits, make: Callable[[], Automaton] = automaton_of):
        self.limits = limits
        self.max_nodes = limits.nodes
        self._store = ContextStore(make)
        self._views: Slots[View] = Slots()
        self._bounds = Bounds(limits)

    def admit(self, row: Row, hidden: Mapping[int, Tensor]) -> None:
        self._views.admit(self._store.open(row))

    def release(self, slot: int) -> None:
        self._views.release(slot)

    def retract(self, lengths: Sequence[int]) -> None:
        for view, length in zip(self._views, lengths, strict=True):
            view.forget(length)

    def propose(self, context: Context) -> TokenTree:
        grown = [
            view.draft(row.tokens, len(row.tokens) - row.tentative, limits)
            for view, row, limits in zip(self._views, context.rows, limits_within(self._bounds, context), strict=True)
        ]
        if all(len(draft.tokens) == 1 for draft in grown):
            return TokenTree.root([row.tokens[-1] for row in context.rows], context.device)
        return TokenTree.of([draft.tokens for draft in grown], [draft.parents for draft in grown], context.device)


@dataclass(frozen=True)
class Settings:
    """{"drafter": "lookup", "nodes": 16, "depth": 16, "min_match": 1}"""

    nodes: int = setting(16, "The largest tree.")
    depth: int = setting(16, "Its longest path.")
    min_match: int = setting(1, "The fewest tokens that must match.")
    cost: float | None = setting(
        None,
        "The least probability of survival for which a node is proposed. The best value is what one more node adds"
        " to a step, as"
        " a share of a plain step, times the speed-up (on a 2-core CPU 0.045 times 1.8). Without it, that is what"
        " the engine"
        " measures while it runs; where it has measured nothing yet, or where the clock must have no say, a node"
        " must survive"
        " once in as many proposals as the largest tree has nodes, node 0 included.",
    )

    def __post_init__(self) -> None:
        demand_limits("lookup", self)

    @property
    def limits(self) -> Limits:
        return limits_of(self)


def limits_within(bounds: Bounds, context: Context) -> list[Limits]:
    """Of every row."""
    return [
        bounds.within(budget, depth, row.ends, context.price(slot))
        for slot, (row, budget, depth) in enumerate(zip(context.rows, context.budgets, context.depths, strict=True))
    ]


def limits_of(settings: Any) -> Limits:
    """The limits among these settings. Without a cost they follow the price of nodes."""
    nodes, depth, min_match, cost = settings.nodes, settings.depth, settings.min_match, settings.cost
    if cost is None:
        return Limits(nodes, depth, min_match, 1 / (nodes + 1), follows_price=True)
    return Limits(nodes, depth, min_match, float(cost))


def demand_limits(drafter: str, settings: Any) -> None:
    """DrafterError unless the limits among these settings make sense."""
    for name in ("nodes", "depth", "min_match"):
        demand_count(drafter, name, getattr(settings, name))
    cost = settings.cost
    if cost is None:
        return
    if isinstance(cost, bool) or not isinstance(cost, int | float) or not 0 < cost < 1:
        raise DrafterError(f"{drafter}: cost is a probability between 0 and 1, not {cost!r}")


def build(workshop: Workshop, settings: Settings) -> Drafter:
    return Lookup(settings.limits)


METHOD = Method(
    "lookup",
    "What followed the last tokens earlier in the text.",
    Settings,
    build,
    grows="certain",
    variations=({"nodes": 16}, {"nodes": 8}, {"nodes": 4}),
)
