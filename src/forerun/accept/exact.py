"""Acceptance: which part of a proposed tree the target would have said itself. Pure functions; luck
comes in as an argument.

Every rule here leaves the law of the output as it is: by construction for `match` (the target's own
choice decides, the tree only saves time), and by the residual laws of speculative sampling for the
others (Leviathan et al. 2023, Chen et al. 2023; siblings as in SpecInfer, Miao et al. 2024). The
tests enumerate every outcome. Rules that change the law are in `lossy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from forerun.chance import Chance
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


def speculative_sampling(tree: TokenTree, laws_BNV: Tensor, chance: Chance) -> Verdict:
    """Sampled chains (Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2).

    Token x is kept with probability min(1, target(x) / draft(x)); after the first rejection the next token comes from
    the normalised max(0, target - draft), after none from the target.
    """
    assert tree.laws_BNV is not None
    drafted = tree.tokens_BN[:, 1:, None]
    target_probs = laws_BNV[:, :-1].gather(-1, drafted).squeeze(-1)
    draft_probs = tree.laws_BNV[:, :-1].gather(-1, drafted).squeeze(-1)
    places = tree.topology.depths_BN[:, :-1]
    coins = chance.coin(_ratio(target_probs, draft_probs), places, np.zeros_like(places)).tolist()
    ends = [[*row[: size - 1], False].index(False) for row, size in zip(coins, tree.sizes, strict=True)]
    bonus = [end == size - 1 for end, size in zip(ends, tree.sizes, strict=True)]
    law = _nodes(laws_BNV, ends)
    if not all(bonus):
        survived = torch.tensor(bonus, device=law.device)[:, None]
        law = torch.where(survived, law, residual(law, _nodes(tree.laws_BNV, ends)))
    tokens = chance.token(law[:, None], np.array(ends)[:, None])
    return Verdict([list(range(end + 1)) for end in ends], tokens[:, 0].tolist(), bonus)


def _nodes(laws_BNV: Tensor, nodes: Sequence[int]) -> Tensor:
    """The law of one node per row, [B, V]."""
    return torch.stack([laws[node] for laws, node in zip(laws_BNV, nodes, strict=True)])


def recursive_rejection(tree: TokenTree, laws_BNV: Tensor, chance: Chance) -> Verdict:
    """Any tree: siblings are tried in drawing order, each against what its predecessors left of the target's law.

    SpecInfer's multi-step speculative sampling (Miao et al. 2024, algorithm 2), with the proposal
    law of each sibling as it really was: the group's law (with replacement), or the same without
    the earlier siblings, renormalised (without replacement). Deterministic siblings wait for the
    target's own choice, as in `match`: equally probable to survive, and the luck of a row is the
    same whichever rule its batch needs. Rows advance side by side.
    """
    walks = [_Walk(tree, row) for row in range(tree.rows)]
    every = torch.arange(tree.rows, device=laws_BNV.device)
    choices_BN = sample_choices(laws_BNV, tree, chance) if any(walk.may_match for walk in walks) else tree.tokens_BN
    law = laws_BNV[:, 0]
    while any(walk.trying for walk in walks):
        nodes = torch.tensor([walk.candidate for walk in walks], device=law.device)
        parents = torch.tensor([walk.path[-1] for walk in walks], device=law.device)
        matching = torch.tensor([[walk.matching] for walk in walks], device=law.device)
        trying = torch.tensor([[walk.trying] for walk in walks], device=law.device)
        proposal = torch.stack([_proposal(tree, row, walk, law[row]) for row, walk in enumerate(walks)])
        tokens = tree.tokens_BN[every, nodes, None]
        matched = tokens == choices_BN[every, parents, None]
        prob = torch.where(matching, matched, _ratio(law.gather(-1, tokens), proposal.gather(-1, tokens)))
        coins = chance.coin(prob * trying, _depths(walks), np.asarray([[walk.tried] for walk in walks]))
        rejected = torch.where(trying & ~matching, residual(law, proposal), law)
        law = torch.where(coins, laws_BNV[every, nodes], rejected)
        for walk, survived in zip(walks, coins[:, 0].tolist(), strict=True):
            walk.settle(survived)
    following = chance.token(law[:, None], _depths(walks))[:, 0].tolist()
    return Verdict([walk.path for walk in walks], following, [not walk.tried for walk in walks])


class _Walk:
    """Where one row stands: the path kept so far and how many of the siblings below it were tried and rejected."""

    def __init__(self, tree: TokenTree, row: int):
        self._children = tree.topology.children[row]
        self._drawn = None if tree.drawn_BN is None else tree.drawn_BN[row]
        self.path = [0]
        self.tried = 0

    @property
    def siblings(self) -> list[int]:
        return self._children.get(self.path[-1], [])

    @property
    def drawn(self) -> Drawn:
        """How the siblings came about."""
        return Drawn.DETERMINISTIC if self._drawn is None else Drawn(int(self._drawn[self.path[-1]]))

    @property
    def matching(self) -> bool:
        return self.drawn is Drawn.DETERMINISTIC

    @property
    def may_match(self) -> bool:
        """Some group of siblings is deterministic."""
        return any(self._drawn is None or self._drawn[parent] == Drawn.DETERMINISTIC for parent in self._children)

    @property
    def trying(self) -> bool:
        return self.tried < len(self.siblings)

    @property
    def candidate(self) -> int:
        """The sibling to try next; node 0, which nobody tests, when there is none."""
        return self.siblings[self.tried] if self.trying else 0

    def settle(self, survived: bool) -> None:
        if not self.trying:
            return
        if survived:
            self.path.append(self.candidate)
            self.tried = 0
        else:
            self.tried += 1


def _depths(walks: Sequence[_Walk]) -> Ints:
    return np.asarray([[len(walk.path) - 1] for walk in walks])


def _proposal(tree: TokenTree, row: int, walk: _Walk, like_V: Tensor) -> Tensor:
    """The law that a row's candidate was really drawn from, [V] (nothing where none was)."""
    if walk.matching or not walk.trying:
        return torch.zeros_like(like_V)
    assert tree.laws_BNV is not None
    law = tree.laws_BNV[row, walk.path[-1]]
    if walk.drawn is Drawn.WITHOUT_REPLACEMENT and walk.tried:
        law = law.clone()
        law[[tree.tokens[row][node] for node in walk.siblings[: walk.tried]]] = 0
        law = law / law.sum()
    return law


def _ratio(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """min(1, target / draft); a token of draft probability zero cannot have been drawn and is not kept."""
    return torch.where(draft_probs > 0, (target_probs / draft_probs).clamp(max=1.0), 0.0)


def residual(target: Tensor, draft: Tensor) -> Tensor:
    """The normalised max(0, target - draft) over the last dimension: what a rejection leaves of the target's law.

    Where nothing is left the two laws are equal up to rounding, a rejection has probability zero up
    to rounding, and the target's law stands in.
    """
    rest = (target - draft).clamp(min=0)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total.clamp(min=torch.finfo(rest.dtype).tiny), target)
