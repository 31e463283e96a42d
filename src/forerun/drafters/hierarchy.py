"""Hierarchy Drafting (Cho et al. 2025, arXiv 2502.05609): several stores of tokens, asked in order
of temporal locality.

The request's own text first, then what the model said before, then a corpus: the more local a
store, the smaller it is and the likelier what it knows. Each store fills what the ones before it
have left of the budget, and a store is not even asked once the budget is full. Proposals are merged
into one tree, so that what several stores agree on is verified once.

Departures from the paper, whose published code hands over at most seven rows of four tokens, the
oldest first, and pads them with random tokens (`grams` is its table): stores rank their
continuations by the probability that they survive and propose nothing below `cost`; the budget
counts nodes; the lookahead branch is left out, because its 28 extra tokens per forward cost more
than a plain step on a CPU. Its order of stores, its stop rule and its exactness are the paper's.

A store behind the first that has had nothing to say for a while is asked less and less often
(`Patience`), so that the looking costs next to nothing on text that it does not know. All of it is
a function of the past alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from forerun.accept.exact import Verdict
from forerun.drafters.lookup import demand_limits, limits_of, limits_within
from forerun.drafting.drafter import Context, Drafter, Tally
from forerun.drafting.method import Method
from forerun.drafting.settings import setting
from forerun.drafting.workshop import Workshop
from forerun.errors import DrafterError
from forerun.model import Scores
from forerun.row import Row
from forerun.slots import Slots
from forerun.stores.context import ContextStore
from forerun.stores.corpus import Corpus, CorpusStore
from forerun.stores.grams import GramShape, GramStore, table_of
from forerun.stores.model import ModelStore
from forerun.stores.store import Bounds, Draft, Limits, Store, View
from forerun.stores.texts import find
from forerun.tree import TokenTree

LONGEST_PAUSE = 16
"""Steps between two questions to a store that never has an answer."""
GRACE = 8
"""Empty answers in a row before the pauses begin. What was proposed and rejected is no reason to
pause: the estimate of survival sees to that (`benchmarks/stores.py`; pauses after rejected drafts
cost 11 to 21 % of the speed)."""


WORTH = 0.25
"""Tokens that an answer must promise; where a store knows nothing it still has guesses that are barely worth a node."""


@dataclass
class Patience:
    """When to ask a store again: after some empty answers in a row the pause doubles with each; the
    first answer ends it."""

    empty: int = 0
    pause: int = 0
    left: int = 0

    def asks(self) -> bool:
        self.left -= 1
        return self.left < 0

    def learn(self, answered: bool) -> None:
        self.empty = 0 if answered else self.empty + 1
        self.pause = min(LONGEST_PAUSE, max(1, 2 * self.pause)) if self.empty > GRACE else 0
        self.left = self.pause


@dataclass
class _Seat:
    """One row: the row itself, a view and a patience per store, and where the nodes of its last tree came from."""

    row: Row
    views: list[View]
    patience: list[Patience]
    origins: list[int] = field(default_factory=lambda: [-1])


class Hierarchy(Drafter):
    """Stores in the order in which they are asked."""

    name = "hierarchy"

    def __init__(self, stores: Sequence[Store], limits: Limits):
        self.stores, self.limits = list(stores), limits
        self.max_nodes = limits.nodes
        self._bounds = Bounds(limits)
        self._seats: Slots[_Seat] = Slots()
        self._tallies = [Tally(store.name) for store in stores]

    def admit(self, row: Row, hidden: Mapping[int, Tensor]) -> None:
        views = [store.open(row) for store in self.stores]
        self._seats.admit(_Seat(row, views, [Patience() for _ in views]))

    def release(self, slot: int) -> None:
        seat = self._seats.release(slot)
        if seat is None:
            return
        for store, view in zip(self.stores, seat.views, strict=True):
            store.close(seat.row, view)

    def retract(self, lengths: Sequence[int]) -> None:
        for seat, length in zip(self._seats, lengths, strict=True):
            for view in seat.views:
                view.forget(length)

    def propose(self, context: Context) -> TokenTree:
        grown = [
            self._draft(seat, row, limits, context.is_repeatable(row))
            for seat, row, limits in zip(self._seats, context.rows, limits_within(self._bounds, context), strict=True)
        ]
        if all(len(draft.tokens) == 1 for draft in grown):
            return TokenTree.root([row.tokens[-1] for row in context.rows], context.device)
        return TokenTree.of([draft.tokens for draft in grown], [draft.parents for draft in grown], context.device)

    def _draft(self, seat: _Seat, row: Row, limits: Limits, is_repeatable: bool) -> Draft:
        """Store by store, until the budget is full.

        A store that remembers would know what the dice of a repeatable request brought the last
        time, and choose with knowledge of them; so it is not asked there.
        """
        merged, seat.origins = Draft([row.tokens[-1]], [-1], [1.0]), [-1]
        if limits.depth < 1 or limits.nodes < 1:
            return merged
        firm = len(row.tokens) - row.tentative
        for number, (view, patience, tally) in enumerate(zip(seat.views, seat.patience, self._tallies, strict=True)):
            if (number and not patience.asks()) or (is_repeatable and self.stores[number].remembers):
                continue
            begun = time.perf_counter()
            found = view.draft(row.tokens, firm, limits)
            added = merge(merged, found, limits) if len(found.tokens) > 1 else 0
            seat.origins += [number] * added
            tally.asked += 1
            tally.hits += added > 0
            tally.drafted += added
            tally.seconds += time.perf_counter() - begun
            patience.learn(answered=sum(found.survival) - 1 >= WORTH)
            if len(merged.tokens) > limits.nodes:
                break
        return merged

    def origins(self, slot: int, path: Sequence[int]) -> list[str]:
        """The stores."""
        return [self.stores[self._seats[slot].origins[node]].name for node in path[1:]]

    def observe(self, context: Context, tree: TokenTree, verdict: Verdict, scores: Scores) -> None:
        for seat, path in zip(self._seats, verdict.kept, strict=True):
            if len(seat.origins) == 1:
                continue
            kept = [0] * len(self.stores)
            for depth, node in enumerate(path[1:], 1):
                kept[seat.origins[node]] += 1
                self._tallies[seat.origins[node]].keep(depth)
            for view, count in zip(seat.views, kept, strict=True):
                if count:
                    view.accepted(count)

    def reset(self) -> None:
        for store in self.stores:
            store.rewind()
        self._tallies = [Tally(store.name) for store in self.stores]

    def tallies(self) -> list[Tally]:
        return self._tallies


def merge(merged: Draft, found: Draft, limits: Limits) -> int:
    """Add what is new of one tree to another with the same node 0, as long as there is room;
    returns how many nodes were.

    The children of a node share its probability, so a newcomer has at most what the ones before it
    have left; nodes that are then not worth their cost stay out, and what is below them too.
    """
    children = {
        (parent, token): node for node, (token, parent) in enumerate(zip(merged.tokens, merged.parents, strict=True))
    }
    rest = list(merged.survival)
    for parent, survival in zip(merged.parents[1:], merged.survival[1:], strict=True):
        rest[parent] -= survival
    places, before = {0: 0}, len(merged.tokens)
    for node in range(1, len(found.tokens)):
        parent, token = places.get(found.parents[node], -1), found.tokens[node]
        if parent < 0:
            continue
        place = children.get((parent, token))
        if place is None:
            survival = min(found.survival[node], rest[parent])
            if survival <= limits.cost or len(merged.tokens) > limits.nodes:
                continue
            place = children[parent, token] = len(merged.tokens)
            merged.tokens.append(token)
            merged.parents.append(parent)
            merged.survival.append(survival)
            rest[parent] -= survival
            rest.append(survival)
        places[node] = place
    return len(merged.tokens) - before


@dataclass(frozen=True)
class Settings:
    """{"drafter": "hierarchy", "stores": ["context", "model", "corpus:STORE"], "nodes": 16, "depth": 16}

    stores, in the order in which they are asked: `context`, the request's own text; `model`, what
    the model said before, or `model:FILE` to remember it across runs; `corpus:STORE`, made by
    `forerun index`. Without them: context and model, and `hierarchy:STORE` adds a corpus. The
    paper's own tables of five-grams are stores too: `grams` of the request's text, `grams:ANSWERS`
    of what the model said (from `forerun distill`).
    """

    checkpoint: str | None = setting(None, "A corpus, behind the stores that are always there.", "store")
    stores: Sequence[str] | None = setting(None, "Stores in the order in which they are asked.", "stores")
    nodes: int = setting(16, "As for lookup.")
    depth: int = setting(16, "As for lookup.")
    min_match: int = setting(1, "As for lookup.")
    cost: float | None = setting(None, "As for lookup.")
    capacity: int = setting(262_144, "Tokens that the model store holds.")
    compat: bool = setting(False, "Grams in the published code's order, the oldest first.")

    def __post_init__(self) -> None:
        stores, capacity, compat = self.stores, self.capacity, self.compat
        if stores is not None and self.checkpoint is not None:
            raise DrafterError("hierarchy: give the corpus as a checkpoint or among the stores, not both")
        if stores is not None and (
            isinstance(stores, str) or not stores or not all(isinstance(store, str) for store in stores)
        ):
            raise DrafterError(
                f'hierarchy: stores is a list such as ["context", "model", "corpus:STORE"], not {stores!r}'
            )
        demand_limits("hierarchy", self)
        if not isinstance(capacity, int) or isinstance(capacity, bool) or capacity < 2:
            raise DrafterError(f"hierarchy: capacity is a number of tokens, at least 2, not {capacity!r}")
        if not isinstance(compat, bool):
            raise DrafterError(f"hierarchy: compat is true or false, not {compat!r}")


def build(workshop: Workshop, settings: Settings) -> Drafter:
    corpus = [f"corpus:{settings.checkpoint}"] if settings.checkpoint else []
    stores = ["context", "model", *corpus] if settings.stores is None else settings.stores
    return Hierarchy([_store(spec, settings, workshop) for spec in stores], limits_of(settings))


def _store(spec: str, settings: Settings, workshop: Workshop) -> Store:
    name, _, place = spec.partition(":")
    if name == "grams":
        shape = GramShape(compat=settings.compat)
        return GramStore(shape, table_of(_answers(place, workshop.target.vocab_size), shape) if place else None)
    if name == "context" and not place:
        return ContextStore()
    if name == "model":
        file = Path(place) if place else None
        return ModelStore(
            settings.capacity, file, vocabulary=workshop.target.vocab_size, tokenizer=workshop.tokenizer() or None
        )
    if name == "corpus" and place:
        corpus = Corpus.open(place)
        corpus.demand_fit(workshop.target.vocab_size, workshop.tokenizer())
        return CorpusStore(corpus)
    raise DrafterError(
        f"hierarchy: there is no store {spec!r}: use context, model, model:FILE, corpus:STORE, grams or grams:ANSWERS"
    )


def _answers(path: str, vocabulary: int) -> Iterator[Sequence[int]]:
    """The answers of a file of `forerun distill`."""
    for answer in find([Path(path)]).documents(_no_text):
        if any(not 0 <= token < vocabulary for token in answer):
            raise DrafterError(f"{path} holds tokens that the target does not have: distill the target's own answers")
        yield answer


def _no_text(text: str) -> Sequence[int]:
    raise DrafterError("a table of grams is made of token ids: give a file of forerun distill")


METHOD = Method(
    "hierarchy",
    "Stores of tokens, the most local first.",
    Settings,
    build,
    grows="certain",
    variations=({"nodes": 16}, {"nodes": 8}, {"nodes": 4}),
)
