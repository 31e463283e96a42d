"""Which part of a drafter proposed each token, for one request at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from forerun.accept.exact import Verdict
from forerun.drafting.drafter import Context, Drafter, Tally
from forerun.model import Scores
from forerun.row import Row
from forerun.tree import TokenTree


class Credited(Drafter):
    """A drafter as it is, and a note of who proposed what.

    whose: for the newest request, the name of the part by the place of the token in its output.
    Parts are the drafter's own tallies, of several that claim a token the uppermost; a drafter of
    one part has its own name, and "fallback, lookup" is called lookup.
    """

    def __init__(self, drafter: Drafter):
        self._drafter = drafter
        self.name, self.reads, self.max_nodes = drafter.name, drafter.reads, drafter.max_nodes
        self.whose: dict[int, str] = {}

    def admit(self, row: Row, hidden: Mapping[int, Tensor]) -> None:
        self.whose = {}
        self._drafter.admit(row, hidden)

    def release(self, slot: int) -> None:
        self._drafter.release(slot)

    def propose(self, context: Context) -> TokenTree:
        return self._drafter.propose(context)

    def observe(self, context: Context, tree: TokenTree, verdict: Verdict, scores: Scores) -> None:
        before = [(tally, list(tally.accepted or [])) for tally in self._drafter.tallies()]
        self._drafter.observe(context, tree, verdict, scores)
        row = context.rows[0]
        said = len(row.tokens) - row.prompt_length
        for depth in range(1, len(verdict.kept[0])):
            claims = (
                tally.name for tally, accepted in before if _count(tally.accepted, depth) > _count(accepted, depth)
            )
            self.whose[said + depth - 1] = next(claims, self.name).rpartition(", ")[2]

    def retract(self, lengths: Sequence[int]) -> None:
        self._drafter.retract(lengths)

    def reset(self) -> None:
        self._drafter.reset()

    def tallies(self) -> list[Tally]:
        return self._drafter.tallies()


def _count(accepted: Sequence[int] | None, depth: int) -> int:
    return accepted[depth - 1] if accepted and len(accepted) >= depth else 0
