"""One drafter in front of another: a row takes its proposal from the first source that has one.

A store of tokens costs microseconds and is right for long stretches where text repeats; a model or
heads cost far more and always have something to say. In front of them a store saves their cost
wherever it hits. Sources behind the one that answered are not asked, rows choose separately, and a
batch may mix all of them, each token with the law it was drawn from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from forerun.drafting.drafter import Context, Drafter
from forerun.drafting.method import Method
from forerun.drafting.settings import setting
from forerun.drafting.several import Several
from forerun.drafting.workshop import Workshop
from forerun.errors import DrafterError
from forerun.tree import TokenTree


class Fallback(Several):
    """Sources in the order in which they are asked. enough: a source without luck in it that has
    fewer nodes is passed over, unless nobody behind it has more. A proposal that was drawn is
    always an answer: to prefer it for its length, which may depend on the tokens drawn, would
    change their law.
    """

    name = "fallback"

    def __init__(self, sources: Sequence[Drafter], enough: int = 1):
        super().__init__(sources, self.name)
        self.enough = enough

    def propose(self, context: Context) -> TokenTree:
        self._begin()
        depths = list(context.depths)
        for number in range(len(self.parts)):
            inner = replace(context, path=(*context.path, number))  # luck of its own
            tree = self._ask(number, inner, context.budgets, depths)
            depths = [0 if self._answers(tree, row) else depth for row, depth in enumerate(depths)]
            if not any(depths):
                break
        return self._answer([self._choice(row) for row in range(len(context.rows))], context)

    def _answers(self, tree: TokenTree, row: int) -> bool:
        is_drawn = tree.drawn_BN is not None and bool(tree.drawn_BN[row].any())
        return tree.sizes[row] > (1 if is_drawn else self.enough)

    def _choice(self, row: int) -> int:
        """The first source that answers, or else the largest tree, the earlier of equals."""
        answering = (number for number, tree in self._trees.items() if self._answers(tree, row))
        return next(answering, max(self._trees, key=lambda number: (self._trees[number].sizes[row], -number)))


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
