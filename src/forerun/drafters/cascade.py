"""Cascade Speculative Drafting (Chen et al. 2024, arXiv 2312.11462): no drafter but the last ever writes word by word.

*Vertical*: a drafter only reviews what the next smaller one drafts, down to Max-Gram, which copies
and costs nothing; that is `Verified` around `Verified` ... around `MaxGram`. *Horizontal*: the
first tokens of a draft come from a larger drafter and the later ones, which are less likely to
survive, from smaller ones; that is `Cascade`. Both together are the paper's triangular matrix K:
row i says how many tokens each part adds to the draft that reviewer i is given (increments, as in
the published code).

A part that is asked says at least one token, and what it says beyond its share is kept ("at
least"). Every token keeps the law it was drawn from, so that the review above is exact; leniency
makes intermediate reviews lossy, never the target's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from forerun.accept.exact import Verdict
from forerun.accept.lossy import Lenient
from forerun.drafters.verified import Verified, lenient_of, tentatively
from forerun.drafting.drafter import Context, Drafter, Tally
from forerun.drafting.method import Method
from forerun.drafting.settings import setting
from forerun.drafting.workshop import Workshop
from forerun.errors import DrafterError
from forerun.model import Model, Scores
from forerun.row import Row
from forerun.tree import Drawn, TokenTree, Topology


@dataclass(frozen=True)
class Part:
    """A drafter and how long the whole draft must be, in tokens, before the next part's turn."""

    drafter: Drafter
    until: int


@dataclass
class _Said:
    """What one row's parts have said so far: tokens, the law of each (None: no chance was
    involved), which part it was, and who thought of it there."""

    tokens: list[int]
    laws: list[Tensor | None]
    parts: list[int]
    origins: list[str]


class Cascade(Drafter):
    """A chain whose segments come from different drafters, the strongest first.

    Of a tree that a part proposes, the path of first children is taken: of siblings drawn one after
    the other the first is a draw from the group's law.
    """

    name = "cascade"

    def __init__(self, parts: Sequence[Part]):
        wrong = next((part.drafter.name for part in parts if part.drafter.reads), None)
        if wrong:
            raise DrafterError(
                f"the drafter {wrong} reads hidden states of verified tokens, and the parts of a cascade stand behind"
                " tokens that are not verified: put it alone, or behind a fallback"
            )
        self.parts = list(parts)
        self.models = [model for part in parts for model in part.drafter.models]
        before = [0, *(part.until for part in parts)]
        self.max_nodes = max(
            max(part.until, start) - 1 + part.drafter.max_nodes for start, part in zip(before, parts, strict=False)
        )
        self._tallies = self._new_tallies()
        self._said: list[_Said] = []

    def _new_tallies(self) -> list[Tally]:
        return [Tally(f"cascade, part {number}") for number in range(1, len(self.parts) + 1)]

    def admit(self, row: Row, hidden: Mapping[int, Tensor]) -> None:
        for part in self.parts:
            part.drafter.admit(row, {})

    def release(self, slot: int) -> None:
        for part in self.parts:
            part.drafter.release(slot)

    def retract(self, lengths: Sequence[int]) -> None:
        for part in self.parts:
            part.drafter.retract(lengths)

    def propose(self, context: Context) -> TokenTree:
        rows = context.rows
        most = [min(limits) for limits in zip(context.budgets, context.depths, strict=True)]
        said = [_Said([row.tokens[-1]], [], [], []) for row in rows]
        with tentatively(rows):
            for number, part in enumerate(self.parts):
                begun = time.perf_counter()
                self._segment(replace(context, path=(*context.path, number)), number, part, most, said)
                self._tallies[number].seconds += time.perf_counter() - begun
        self._said = said
        return _chain(said, context.device)

    def _segment(self, context: Context, number: int, part: Part, most: Sequence[int], said: Sequence[_Said]) -> None:
        """Ask one part again and again, until every row's draft is long enough, or it has nothing more to say."""
        wanting, call = [True] * len(said), 0
        while any(
            room := [
                self._room(row, so_far, part.until, left) if wants else 0
                for row, so_far, left, wants in zip(context.rows, said, most, wanting, strict=True)
            ]
        ):
            budgets = [part.drafter.max_nodes] * len(room)
            tree = part.drafter.propose(
                replace(context, budgets=budgets, depths=room, path=(*context.path, call), costs=None)
            )
            for index, row in enumerate(context.rows):
                if room[index]:
                    wanting[index] = self._append(number, row, said[index], tree, index, room[index])
            call += 1

    @staticmethod
    def _room(row: Row, said: _Said, until: int, most: int) -> int:
        """How many tokens may follow; 0 where the draft is long enough or the text has ended."""
        count = len(said.tokens) - 1
        return most - count if count < min(until, most) and not (count and said.tokens[-1] in row.ends) else 0

    def _append(self, number: int, row: Row, said: _Said, tree: TokenTree, index: int, room: int) -> bool:
        """Add the path of first children; False if there is none."""
        nodes, laws = _first_path(tree, index)
        nodes, laws = nodes[:room], laws[:room]
        path = [tree.tokens[index][node] for node in nodes]
        said.tokens += path
        said.laws += laws
        said.origins += self.parts[number].drafter.origins(index, [0, *nodes])
        said.parts += [number] * len(path)
        row.tokens += path
        row.tentative += len(path)
        tally = self._tallies[number]
        tally.asked += 1
        tally.hits += bool(path)
        tally.drafted += len(path)
        return bool(path)

    def origins(self, slot: int, path: Sequence[int]) -> list[str]:
        """As the parts say."""
        return [self._said[slot].origins[node - 1] for node in path[1:]]

    def observe(self, context: Context, tree: TokenTree, verdict: Verdict, scores: Scores) -> None:
        for path, said in zip(verdict.kept, self._said, strict=True):
            for node in path[1:]:
                self._tallies[said.parts[node - 1]].keep(node)
        self.retract([len(row.tokens) + len(path) - 1 for row, path in zip(context.rows, verdict.kept, strict=True)])

    def reset(self) -> None:
        for part in self.parts:
            part.drafter.reset()
        self._tallies = self._new_tallies()

    def tallies(self) -> list[Tally]:
        """A part answers many times before the target does, and is not told which of its answers
        were kept; its own row says."""
        return [
            tally
            for own, part in zip(self._tallies, self.parts, strict=True)
            for tally in (own, *(replace(below, accepted=None) for below in part.drafter.tallies()))
        ]


def _first_path(tree: TokenTree, row: int) -> tuple[list[int], list[Tensor | None]]:
    """The nodes below node 0 along first children, and the law that each was drawn from."""
    nodes: list[int] = []
    laws: list[Tensor | None] = []
    children, node = tree.topology.children[row], 0
    while node in children:
        is_drawn = tree.drawn_BN is not None and tree.drawn_BN[row, node] != Drawn.DETERMINISTIC
        laws.append(tree.laws_BNV[row, node] if is_drawn and tree.laws_BNV is not None else None)
        node = children[node][0]
        nodes.append(node)
    return nodes, laws


def _chain(said: Sequence[_Said], device: torch.device) -> TokenTree:
    topology = Topology.chains([len(row.tokens) for row in said])
    laws = [{node: law for node, law in enumerate(row.laws) if law is not None} for row in said]
    return TokenTree.drawn([row.tokens for row in said], topology, laws, device)


@dataclass(frozen=True)
class Settings:
    """The paper's cascade, or any drafters one behind the other:

    {"drafter": "cascade", "models": [LARGE, SMALL], "k": [[5, 14, 10], [0, 1, 10], [0, 0, 10]], "leniency": 1}
    {"drafter": "cascade", "parts": [{"drafter": "small:SMALL", "until": 3}, {"drafter": "lookup", "until": 10}]}
    """

    models: Sequence[str] | None = setting(
        None, "Checkpoints from large to small; the last drafter is `last`.", "models"
    )
    k: Sequence[Sequence[int]] | None = setting(
        None,
        "One row and column per drafter, upper triangular; without it every model reviews once, and the last drafter"
        " adds ten"
        " tokens.",
    )
    leniency: float = setting(1, "Of the models' reviews (1 is exact).")
    last: str | Mapping[str, Any] = setting("maxgram", "The drafter below all models.", "spec")
    parts: Sequence[Mapping[str, Any]] | None = setting(
        None, 'Drafters with "until": how long the whole draft must be before the next one\'s turn.', "parts"
    )

    def __post_init__(self) -> None:
        models, parts = self.models, self.parts
        if (models is None) == (parts is None):
            raise DrafterError('cascade: give either "models" (with "k") or "parts"')
        if parts is not None:
            if self.k is not None or self.leniency != 1 or self.last != "maxgram":
                raise DrafterError('cascade: "parts" says it all; "k", "leniency" and "last" belong to "models"')
            if isinstance(parts, str | Mapping) or not isinstance(parts, Sequence) or not parts:
                raise DrafterError(f'cascade: parts is a list of drafters with "until", at least one, not {parts!r}')
        elif isinstance(models, str) or not isinstance(models, Sequence) or not all(isinstance(m, str) for m in models):
            raise DrafterError(f'cascade: models is a list of checkpoints such as ["LARGE", "SMALL"], not {models!r}')
        else:
            lenient_of("cascade", self.leniency)
            _ = self.matrix

    @property
    def matrix(self) -> list[list[int]]:
        """k, as the models need it."""
        size = len(self.models or ()) + 1
        return _matrix(self.k, size) if self.k is not None else _default(size)


def build(workshop: Workshop, settings: Settings) -> Drafter:
    if settings.parts is not None:
        return Cascade([_part(workshop, part) for part in settings.parts])
    rule = lenient_of("cascade", settings.leniency)
    return _cascade(workshop, list(settings.models or ()), settings.matrix, rule, settings.last)


def _part(workshop: Workshop, part: Mapping[str, Any]) -> Part:
    settings = dict(part) if isinstance(part, Mapping) else {}
    until = settings.pop("until", None)
    if not isinstance(until, int) or isinstance(until, bool) or until < 1:
        raise DrafterError(f'cascade: a part is a drafter with "until": so many tokens, at least 1; not {part!r}')
    inner = settings.get("drafter")
    return Part(workshop.build(inner if set(settings) == {"drafter"} and inner is not None else settings), until)


def _cascade(
    workshop: Workshop, models: list[str], k: list[list[int]], rule: Lenient | None, last: str | Mapping[str, Any]
) -> Cascade:
    """Step of the published code as a drafter: part i is reviewed by model i, over the cascade of the smaller ones."""
    parts = []
    for place, until in enumerate(accumulate(k[0])):
        if place == len(models):
            parts.append(Part(workshop.build(last), until))
            continue
        network = workshop.network(models[place], "cascade")
        below = [row[place + 1 :] for row in k[place + 1 :]]
        within = replace(workshop, target=Model(network, 0))
        inner = _cascade(within, models[place + 1 :], below, rule, last)
        parts.append(Part(Verified(Model(network, inner.max_nodes + 1), inner, 1, rule), until))
    return Cascade(parts)


def _matrix(k: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    given = k if isinstance(k, Sequence) else []
    rows = [list(row) if isinstance(row, Sequence) and not isinstance(row, str) else [] for row in given]
    fits = len(rows) == size and all(len(row) == size for row in rows)
    numbers = [value for row in rows for value in row]
    if not fits or not all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in numbers):
        raise DrafterError(
            f"cascade: k has {size} rows of {size} whole numbers, one for each model and one for the last drafter"
        )
    if any(rows[i][j] for i in range(size) for j in range(i)):
        raise DrafterError("cascade: k is upper triangular: a drafter is only ever followed by smaller ones")
    if any(rows[i][i] < 1 for i in range(1, size)) or not any(rows[0]):
        raise DrafterError("cascade: k must have at least 1 on its diagonal: each drafter reviews something")
    return rows


def _default(size: int) -> list[list[int]]:
    """Each model reviews once, Max-Gram's ten tokens below it and behind it."""
    return [[10 if column == size - 1 else int(row <= column) for column in range(size)] for row in range(size)]


METHOD = Method(
    "cascade",
    "Drafters one behind the other, each reviewing what the next smaller one drafts.",
    Settings,
    build,
    grows="drawn",
    example={"models": ["MODEL"], "k": [[2, 3], [0, 4]], "last": "lookup"},
)
