"""Several drafters of which every row, at every step, is served by the one that pays, or by none.

`drafting/pace.py` decides, from what steps cost and what proposals have brought; here is what its
choices mean. They depend on the past alone, so no law changes.

A row that samples and names its seed says the same again whatever the clock said. So it is served
by drafters without luck in them only: with those a seed's text is that of plain decoding, whoever
is asked for how much. Where no clock may have a say (a lossy rule, where proposals show in the
text; inside another drafter), the first drafter answers always, and in full.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from forerun.accept.exact import Verdict
from forerun.drafting.drafter import Context, Drafter
from forerun.drafting.method import Method
from forerun.drafting.pace import Choice, Expected, Outcome, Pace, Wish
from forerun.drafting.registry import method
from forerun.drafting.settings import setting
from forerun.drafting.several import NOBODY, Several
from forerun.drafting.spec import describe
from forerun.drafting.workshop import Workshop
from forerun.errors import DrafterError
from forerun.model import Scores
from forerun.row import Row
from forerun.tree import TokenTree


class Switch(Several):
    """certain: for every part, whether no luck is involved in what it proposes. expected: what is known of some."""

    def __init__(
        self,
        parts: Sequence[Drafter],
        certain: Sequence[bool],
        name: str = "switch",
        expected: Mapping[int, Expected] | None = None,
    ):
        super().__init__(parts, name)
        self.pace = Pace([part.max_nodes for part in parts], expected)
        self._all = frozenset(range(len(self.parts)))
        self._certain = frozenset(number for number, one in enumerate(certain) if one)
        self._seconds: dict[int, float] = {}

    def admit(self, row: Row, hidden: Mapping[int, Tensor]) -> None:
        super().admit(row, hidden)
        self.pace.admit()

    def release(self, slot: int) -> None:
        super().release(slot)
        self.pace.release(slot)

    def propose(self, context: Context) -> TokenTree:
        self._begin()
        self._seconds = {}
        choices = self._choices(context)
        wanted = [number for number, _ in choices]
        for number in sorted({*wanted} - {NOBODY}):
            begun = time.perf_counter()
            budgets = [choice.budget if choice.part == number else 0 for choice in choices]
            depths = [depth if one == number else 0 for one, depth in zip(wanted, context.depths, strict=True)]
            self._ask(number, context, budgets, depths)
            self._seconds[number] = time.perf_counter() - begun
        return self._answer(wanted, context)

    def _choices(self, context: Context) -> list[Choice]:
        room = [budget if depth > 0 else 0 for budget, depth in zip(context.budgets, context.depths, strict=True)]
        if context.costs is None:
            return [Choice(0, budget) if budget else Choice() for budget in room]
        wishes = [Wish(budget, self._allowed(row)) for row, budget in zip(context.rows, room, strict=True)]
        return self.pace.choose(context.costs, wishes)

    def _allowed(self, row: Row) -> frozenset[int]:
        names_its_luck = row.params.seed is not None and not row.params.is_greedy
        return self._certain if names_its_luck else self._all

    def observe(self, context: Context, tree: TokenTree, verdict: Verdict, scores: Scores) -> None:
        chosen = [number if self._is_own(tree, row) else NOBODY for row, number in enumerate(self._chosen)]
        begun = time.perf_counter()
        super().observe(context, tree, verdict, scores)
        if context.costs is None or len(chosen) != tree.rows:
            return
        learning = (time.perf_counter() - begun) / max(1, len(self._seconds))
        for number, seconds in self._seconds.items():
            self.pace.drafted(number, chosen.count(number), seconds + learning)
        self.pace.learn([Outcome(size - 1, path) for size, path in zip(tree.sizes, verdict.kept, strict=True)])

    def reset(self) -> None:
        super().reset()
        self.pace.reset()


@dataclass(frozen=True)
class Settings:
    """{"drafter": "switch", "parts": ["hierarchy", "small:PATH"]}"""

    parts: Sequence[str | Mapping[str, Any]] = setting((), "The drafters to choose from.", "specs")

    def __post_init__(self) -> None:
        if isinstance(self.parts, str) or not isinstance(self.parts, Sequence) or not self.parts:
            raise DrafterError('switch: parts is a list of drafters, such as ["hierarchy", "small:PATH"]')


def build(workshop: Workshop, settings: Settings) -> Drafter:
    parts = [workshop.build(part) for part in settings.parts]
    return Switch(parts, [is_certain(part) for part in settings.parts])


def is_certain(spec: str | Mapping[str, Any]) -> bool:
    """No luck is involved in what is proposed: not in the method, or in none of the drafters that it is made of."""
    description = describe(spec)
    one = method(description["drafter"])
    is_chain = any(kind == "rule" and description.get(name) for name, kind in one.kinds.items())
    if one.grows != "drawn":
        return not is_chain  # which is drawn, whatever the method grows else
    named = {name: kind for name, kind in one.kinds.items() if kind is not None}
    inner = [part for name in named for part in description.get(name, ())]
    return {*named.values()} == {"specs"} and bool(inner) and all(is_certain(part) for part in inner)


METHOD = Method(
    "switch",
    "Whichever of several drafters pays, or none: measured while it runs.",
    Settings,
    build,
    grows="drawn",
    example={"parts": ["lookup", "small:MODEL"]},
)
