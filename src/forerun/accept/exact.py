"""Acceptance: which part of a proposed tree the target would have said itself. Pure functions; luck
comes in as an argument.

Both rules leave the law of the output as it is: `match` by construction (the target's own choice
decides, the tree only saves time), `traversal_verification` by what rejected tokens leave of the
target's law, as in speculative sampling (Leviathan et al. 2023, Chen et al. 2023). The tests
enumerate every outcome. Rules that change the law are in `lossy`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from forerun.chance import Chance, Dice, Purpose, running_sums
from forerun.native import sampling as native
from forerun.tree import Drawn, Ints, TokenTree


@dataclass(frozen=True)
class Verdict:
    """Per row: the nodes kept (node 0 first, root to leaf), the token after them, and whether that token is a *bonus*
    (everything on the path survived) or *recovered* (drawn after a rejection)."""

    kept: list[list[int]]
    next_tokens: list[int]
    bonus: list[bool]

    @property
    def accepted(self) -> list[int]:
        """Surviving draft tokens per row (node 0 was committed before, so it does not count)."""
        return [len(path) - 1 for path in self.kept]


def match(tree: TokenTree, choices_BN: Tensor) -> Verdict:
    """Descend to the child that carries the target's own choice; where none does, that choice is the next token.

    choices_BN: what the target says after each node: its best token (greedy match), or a token
    drawn from its law (sample and match). Exact for every tree whose shape and tokens do not depend
    on the choices.
    """
    kept, following, bonus = [], [], []
    for tokens, parents, choices in zip(tree.tokens, tree.topology.parents, choices_BN.tolist(), strict=True):
        path = _walk(tokens, parents, choices)
        kept.append(path)
        following.append(choices[path[-1]])
        bonus.append(path[-1] not in parents)
    return Verdict(kept, following, bonus)


def _walk(tokens: Sequence[int], parents: Sequence[int], choices: Sequence[int]) -> list[int]:
    """Children come after their parents, so one pass over the nodes follows the path."""
    path = [0]
    for node in range(1, len(parents)):
        if parents[node] == path[-1] and tokens[node] == choices[path[-1]]:
            path.append(node)
    return path


def sample_choices(laws_BNV: Tensor, tree: TokenTree, chance: Chance) -> Tensor:
    """One token per node from the target's law there. Nodes of equal depth share their luck: only
    one of them can be reached."""
    return chance.token(laws_BNV, tree.topology.depths_BN)


def traversal_verification(tree: TokenTree, laws_BNV: Tensor, chance: Chance) -> Verdict:
    """Whatever was drawn: whole paths are weighed, the deepest first, and node 0 is what remains.

    A path has a *budget*, the probability with which it may be kept. A token multiplies it by target(x) / draft(x), and
    it never exceeds 1: likely tokens make up for an unlikely one before them, which a rule that settles one token after
    the other has thrown away by then. On trees this is Traversal Verification (Weng et al. 2025), on chains Block
    Verification (Sun et al. 2025). Rows of which nothing was drawn wait for the target's own choices, as in `match`.

    The coin of every node is thrown, also of those behind the end. So a coin's name is where the step begins, and its
    node: named by its token's position it would fall again, known by then, in the next step.
    """
    if isinstance(chance, Dice) and native.fits(laws_BNV, torch.float64):
        return _verified(tree, laws_BNV, chance)
    return traversal_in_torch(tree, laws_BNV, chance)


def traversal_in_torch(tree: TokenTree, laws_BNV: Tensor, chance: Chance) -> Verdict:
    """The same on any device and with any luck, and what is meant. In fp64, whatever the laws are in."""
    assert tree.laws_BNV is not None
    tree, laws_BNV = replace(tree, laws_BNV=tree.laws_BNV.double()), laws_BNV.double()
    matching = [_was_chosen(tree, row) for row in range(tree.rows)]
    choices = sample_choices(laws_BNV, tree, chance).tolist() if any(matching) else []
    budgets = _Budgets(tree, laws_BNV, [row for row, matches in enumerate(matching) if not matches])
    keep_BN = torch.tensor(budgets.keep, dtype=torch.float64, device=laws_BNV.device)
    coins = chance.coin(keep_BN, *_coins(tree.rows, tree.nodes)).tolist()
    paths = [
        _walk(tree.tokens[row], tree.topology.parents[row], choices[row])
        if matches
        else tree.topology.path(row, next((node for node in tree.topology.upwards[row] if coins[row][node]), 0))
        for row, matches in enumerate(matching)
    ]
    ends = [path[-1] for path in paths]
    law_BV = torch.stack([budgets.law(row, end) for row, end in enumerate(ends)])
    following = chance.token(law_BV[:, None], np.array([[len(path) - 1] for path in paths]))[:, 0].tolist()
    return Verdict(paths, following, [end not in tree.topology.children[row] for row, end in enumerate(ends)])


@lru_cache(maxsize=64)
def _coins(rows: int, nodes: int) -> tuple[Ints, Ints]:
    """The places of the coins of a step, and their numbers."""
    numbers = np.tile(np.arange(nodes), (rows, 1))
    return np.zeros_like(numbers), numbers


def _drafts(tree: TokenTree, dice: Dice, throws_coins: bool) -> native.Drafts:
    coins = dice.uniform(Purpose.ACCEPT, *_coins(tree.rows, tree.nodes)).numpy() if throws_coins else None
    tokens = dice.uniform(Purpose.TOKEN, tree.topology.depths_BN).numpy()
    return native.Drafts(tree.sizes, tree.topology.parents_BN, tree.tokens_BN, tokens, coins)


def _verdict(tree: TokenTree, found: native.Verdicts) -> Verdict:
    kept = found.kept
    bonus = [path[-1] not in parents for path, parents in zip(kept, tree.topology.parents, strict=True)]
    return Verdict(kept, found.next_tokens, bonus)


def _verified(tree: TokenTree, laws_BNV: Tensor, dice: Dice) -> Verdict:
    assert tree.laws_BNV is not None and tree.drawn_BN is not None
    dtype = torch.promote_types(laws_BNV.dtype, tree.laws_BNV.dtype)
    drafts = _drafts(tree, dice, throws_coins=True)
    return _verdict(tree, native.verify(drafts, laws_BNV.to(dtype), tree.laws_BNV.to(dtype), tree.drawn_BN))


def sample_and_match(
    tree: TokenTree, scores_BNV: Tensor, filters: Sequence[native.Filter], dice: Dice, tells_laws: bool
) -> tuple[Verdict, Tensor | None]:
    """`match` of `sample_choices`, natively and from scores: only nodes that are reached get a law. The laws, if they
    are wanted, are zeros at the others."""
    laws_BNV = torch.zeros_like(scores_BNV) if tells_laws else None
    return _verdict(
        tree, native.match(_drafts(tree, dice, throws_coins=False), scores_BNV, filters, laws_BNV)
    ), laws_BNV


def _was_chosen(tree: TokenTree, row: int) -> bool:
    """There are siblings, and none was drawn."""
    parents = list(tree.topology.children[row])
    return bool(parents) and (tree.drawn_BN is None or not tree.drawn_BN[row, parents].any())


@dataclass(frozen=True)
class _Siblings:
    """The children of a node, of which the first `failed` are not kept: what tests the next one."""

    row: int
    node: int
    children: Sequence[int]
    law_V: Tensor
    draft_V: Tensor
    failed: int = 0

    @property
    def candidate(self) -> int:
        return self.children[self.failed]


class _Budgets:
    """What paths are kept with. None of it depends on luck, for a node is asked when all below it has failed.

    keep: per row and node, the probability that the path ends there when it is asked.
    """

    def __init__(self, tree: TokenTree, laws_BNV: Tensor, rows: Sequence[int]):
        self._tree, self._laws = tree, laws_BNV
        self._first_ratios = _first_ratios(tree, laws_BNV).tolist()
        self._left: dict[tuple[int, int], Tensor] = {}
        self.keep = [[0.0] * tree.nodes for _ in range(tree.rows)]
        asked = [siblings for row in rows for siblings in self._reach(row, 0, 1.0)]
        while asked:
            younger = self._fail(asked)
            asked = [*younger, *self._below(younger)]

    def law(self, row: int, node: int) -> Tensor:
        """Of the token behind a path that ends at this node, [V]: what its children leave of the target's. Its sum is
        not 1."""
        return self._left.get((row, node), self._laws[row, node])

    def _reach(self, row: int, node: int, budget: float) -> Iterator[_Siblings]:
        """This node has its budget, and so have its first child, the first child of that, and so on."""
        children = self._tree.topology.children[row]
        self.keep[row][node] = budget
        while node in children and budget > 0:
            draft_V = _proposal(self._tree, row, children[node][:1])
            yield _Siblings(row, node, children[node], self._laws[row, node], draft_V)
            node = children[node][0]
            budget = self.keep[row][node] = min(1.0, budget * self._first_ratios[row][node])

    def _fail(self, asked: Sequence[_Siblings]) -> list[_Siblings]:
        """What the candidates leave of their parents' laws and budgets, and the siblings of which there are more."""
        law_MV, draft_MV = torch.stack([one.law_V for one in asked]), torch.stack([one.draft_V for one in asked])
        budgets = [self.keep[one.row][one.node] for one in asked]
        budget_M1 = torch.tensor(budgets, dtype=law_MV.dtype, device=law_MV.device)[:, None]
        rest_MV, left_M = excess(budget_M1 * law_MV, draft_MV)
        younger = []
        for one, rest_V, budget, left in zip(asked, rest_MV, budgets, left_M.tolist(), strict=True):
            self._left[one.row, one.node] = rest_V
            self.keep[one.row][one.node] = left / (left + 1 - budget) if left + 1 > budget else 1.0
            if one.failed + 1 < len(one.children):
                draft_V = _proposal(self._tree, one.row, one.children[: one.failed + 2])
                law_V = rest_V / left if left > 0 else rest_V
                younger.append(replace(one, law_V=law_V, draft_V=draft_V, failed=one.failed + 1))
        return younger

    def _below(self, younger: Sequence[_Siblings]) -> Iterator[_Siblings]:
        """The candidates get their budgets."""
        if not younger:
            return
        tokens = [[self._tree.tokens[one.row][one.candidate]] for one in younger]
        tokens_M1 = torch.tensor(tokens, device=self._laws.device)
        target_probs = torch.stack([one.law_V for one in younger]).gather(-1, tokens_M1)
        draft_probs = torch.stack([one.draft_V for one in younger]).gather(-1, tokens_M1)
        for one, [ratio] in zip(younger, _ratio(target_probs, draft_probs).tolist(), strict=True):
            yield from self._reach(one.row, one.candidate, min(1.0, self.keep[one.row][one.node] * ratio))


def _first_ratios(tree: TokenTree, laws_BNV: Tensor) -> Tensor:
    """What every node multiplies the budget by if it is the first of its siblings, [B, N]."""
    assert tree.laws_BNV is not None and tree.drawn_BN is not None
    rows = torch.arange(tree.rows, device=laws_BNV.device)[:, None]
    parents_BN = torch.from_numpy(tree.topology.parents_BN).to(laws_BNV.device)
    was_drawn = torch.from_numpy(tree.drawn_BN.astype(np.bool_)).to(laws_BNV.device)[rows, parents_BN]
    draft_probs = torch.where(was_drawn, tree.laws_BNV[rows, parents_BN, tree.tokens_BN], 1.0)
    return _ratio(laws_BNV[rows, parents_BN, tree.tokens_BN], draft_probs)


def _proposal(tree: TokenTree, row: int, siblings: Sequence[int]) -> Tensor:
    """The law that the last of these siblings was really drawn from, [V]."""
    assert tree.laws_BNV is not None and tree.drawn_BN is not None
    *earlier, last = siblings
    parent = tree.topology.parents[row][last]
    law_V, drawn = tree.laws_BNV[row, parent], tree.drawn_BN[row, parent]
    if drawn == Drawn.DETERMINISTIC:
        return torch.zeros_like(law_V).index_fill_(0, tree.tokens_BN[row, last], 1.0)
    if drawn == Drawn.WITHOUT_REPLACEMENT and earlier:
        law_V = law_V.index_fill(0, tree.tokens_BN[row, earlier], 0.0)
        law_V = law_V / running_sums(law_V)[-1]
    return law_V


def _ratio(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """target / draft; a token of draft probability zero cannot have been drawn and is not kept."""
    return torch.where(draft_probs > 0, target_probs / draft_probs, 0.0)


def excess(target: Tensor, draft: Tensor) -> tuple[Tensor, Tensor]:
    """max(0, target - draft), what a rejection leaves of the target's law, and its sum over the last dimension.

    Where nothing is left the two laws are equal up to rounding, a rejection has probability zero up
    to rounding, and the target's law stands in.
    """
    rest = (target - draft).clamp(min=0)
    total = running_sums(rest)[..., -1:].to(rest.dtype)
    return torch.where(total > 0, rest, target), total.squeeze(-1)
