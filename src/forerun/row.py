"""A row: one running request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from forerun.chance import Dice, draft_dice, final_dice
from forerun.constraint import Matcher
from forerun.sampling import Prefix, SamplingParams
from forerun.tree import TokenTree


@dataclass
class Row:
    """The committed tokens of a request, and what is needed to go on.

    tokens: prompt and output. The last `tentative` of them stand for a verified drafter's own
    progress and may be taken back; outside such a drafter there are none. limit: the total length
    at which the row must end. key: where its random streams start (`chance.key_of`). step: how many
    steps it has made. ends: tokens that end the text: nothing need be drafted behind them.
    matcher: what its constraint says, if it has one.
    """

    tokens: list[int]
    prompt_length: int
    params: SamplingParams
    key: int
    limit: int
    step: int = 0
    tentative: int = 0
    ends: frozenset[int] = frozenset()
    matcher: Matcher | None = None

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated."""
        return self.limit - len(self.tokens)

    def prefixes(self, tree: TokenTree, index: int) -> list[Prefix]:
        """The prefix of every node of this row's tree, the node included (`index`: the row's place in the batch)."""
        topology, tokens = tree.topology, tree.tokens[index]
        paths = [topology.path(index, node)[1:] for node in range(topology.sizes[index])]
        return [Prefix(self.tokens + [tokens[node] for node in path], self.prompt_length) for path in paths]


def final_chance(rows: Sequence[Row]) -> Dice:
    """The dice that settle the next tokens of these rows."""
    return final_dice([row.key for row in rows], [len(row.tokens) for row in rows])


def draft_chance(rows: Sequence[Row], path: Sequence[int]) -> Dice:
    """Fresh dice for a drafter at this step; `path` tells its levels and rounds apart."""
    return draft_dice([row.key for row in rows], [row.step for row in rows], path)
