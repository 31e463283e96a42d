"""The seam for everything that proposes: models, heads, stores, and drafters made of drafters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from forerun.accept.exact import Verdict
from forerun.chance import Dice
from forerun.cost import Table
from forerun.model import Model, Scores
from forerun.row import Row, draft_chance
from forerun.tree import TokenTree


@dataclass(frozen=True)
class Context:
    """What a drafter is told at a step.

    rows: the requests, in slot order. budgets: the most nodes it may propose for each, node 0 not
    counted. depths: the longest path per row (a row may have room for fewer tokens; 0: propose
    nothing for it). path: which level and round of a hierarchy asks, so that every level draws its
    own luck. prices: per row, the probability of survival at which a node that the target reads
    neither gains nor loses time (`cost.NodePrice`); None where nothing has been measured, or where
    another model than the target reads what is proposed. costs: what the engine's steps take, the
    last one included; None where the clock must have no say.
    """

    rows: Sequence[Row]
    budgets: Sequence[int]
    depths: Sequence[int]
    device: torch.device
    path: tuple[int, ...] = field(default=(0,))
    prices: Sequence[float] | None = None
    costs: Table | None = None

    @property
    def is_nested(self) -> bool:
        """Another drafter asks, not the engine."""
        return len(self.path) > 1

    def is_repeatable(self, row: Row) -> bool:
        """Something above draws, and the row names its seed: it throws the same dice again when it
        is repeated, so what is proposed for it must not depend on anything but its own past."""
        return self.is_nested and row.params.seed is not None and not row.params.is_greedy

    def price(self, slot: int) -> float | None:
        """What a node of this row must promise; None where the clock knows nothing, or must have no say."""
        return None if self.prices is None or self.is_repeatable(self.rows[slot]) else self.prices[slot]

    def chance(self) -> Dice:
        """Luck that no other step, level or row sees."""
        return draft_chance(self.rows, self.path)


@dataclass
class Tally:
    """What one part of a drafter did so far: a level of a hierarchy, a tier of stores. Sums over rows and steps.

    asked: proposals asked of it, hits: those that held anything. drafted: tokens; accepted[i]:
    those at depth i + 1 that the level above kept, None where it was not told. seconds: of asking
    it, everything below included. passes: forwards of its own model.
    """

    name: str
    asked: int = 0
    hits: int = 0
    drafted: int = 0
    accepted: list[int] | None = field(default_factory=list)
    seconds: float = 0.0
    passes: int = 0

    def keep(self, depth: int) -> None:
        """A token at this depth (from 1) was kept."""
        assert self.accepted is not None
        self.accepted += [0] * (depth - len(self.accepted))
        self.accepted[depth - 1] += 1

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


class Drafter:
    """Proposes trees and learns what became of them. Override what your method needs.

    Slots: rows are admitted at the end and released as `Cache.release` says (the last row moves
    into the hole), so slot i is always `context.rows[i]`.
    """

    name: str = "drafter"
    reads: frozenset[int] = frozenset()
    """Which hidden states of the target it wants, numbered as transformers numbers them."""
    max_nodes: int = 0
    """The most nodes it ever proposes, node 0 not counted: the target's cache keeps room for them."""
    models: Sequence[Model] = ()
    """Those of its models that read the rows' own texts: they may be allowed to remember what they have read."""
    known_costs: Sequence[tuple[int, float, int]] = ()
    """What the target's steps are known to cost here before any was made, as `cost.Table.add` takes it."""

    def admit(self, row: Row, hidden: Mapping[int, Tensor]) -> None:
        """A new row takes the next slot. hidden: the states it `reads`, [1, S - 1, D], for the
        prompt but its last token."""

    def release(self, slot: int) -> None:
        """A row has ended. A slot that was never opened, because admitting its row failed, is
        nothing to complain about."""

    def propose(self, context: Context) -> TokenTree:
        """A tree per row, node 0 being the row's last token."""
        raise NotImplementedError

    def origins(self, slot: int, path: Sequence[int]) -> list[str]:
        """Who thought of each node of a path of the tree just proposed for this row, node 0 not counted.

        The names are those of the innermost parts: a store, a model, heads. A drafter of one part has
        thought of everything itself. To be asked before `observe`.
        """
        return [self.name] * (len(path) - 1)

    def observe(self, context: Context, tree: TokenTree, verdict: Verdict, scores: Scores) -> None:
        """What the model said about the tree just proposed. The rows do not hold the new tokens yet."""

    def retract(self, lengths: Sequence[int]) -> None:
        """The text of slot i now ends at `lengths[i]` or before it: what came later was taken back.

        Only a verified drafter does this, to the tokens it had committed tentatively (`Row.tentative`).
        """

    def reset(self) -> None:
        """Forget what finished requests have left behind, as if just built: measurements begin like
        this. Nothing is running."""

    def tallies(self) -> list[Tally]:
        """What its parts did, those of the uppermost level first. A drafter of one part has nothing
        to add to the engine's own statistics."""
        return []
