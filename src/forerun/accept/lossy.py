"""Rules that change the law of the output, and say so: Medusa's typical acceptance and CS Drafting's lenient review."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from forerun.accept.exact import Verdict, excess
from forerun.chance import Chance
from forerun.errors import ForerunError
from forerun.tree import TokenTree


@dataclass(frozen=True)
class Typical:
    """Medusa's relaxed rule (Cai et al. 2024, section 2.3.1): a token is kept if its probability exceeds
    min(epsilon, delta exp(-H)), H being the entropy (nats) of the law that it is judged by."""

    epsilon: float = 0.09
    delta: float = 0.3

    def threshold(self, laws_BNV: Tensor) -> Tensor:
        """[B, N]. The entropy is exact; the published code adds 1e-5 inside the logarithm."""
        entropy = -torch.special.xlogy(laws_BNV, laws_BNV).sum(-1)
        return (self.delta * torch.exp(-entropy)).clamp(max=self.epsilon)


def typical(tree: TokenTree, laws_BNV: Tensor, rule: Typical) -> Verdict:
    """Lossy: keep the longest path of typical tokens (equal lengths: the most probable), then say
    the most probable token.

    Nothing is drawn: the output is deterministic, and not distributed like the target at any
    temperature but 0, where it is what `match` gives. The most probable token is always typical if
    delta < 1, so at least as much is kept as greedily.
    """
    verdict = Verdict([], [], [])
    thresholds = rule.threshold(laws_BNV).tolist()
    best = laws_BNV.argmax(-1).tolist()
    rows = torch.arange(tree.rows, device=laws_BNV.device)[:, None]
    parents_BN = torch.from_numpy(tree.topology.parents_BN).to(laws_BNV.device)
    probs = laws_BNV[rows, parents_BN, tree.tokens_BN].tolist()
    for row, above in enumerate(tree.topology.parents):
        alive = {0: (0, 0.0)}  # node -> depth, log-probability of its path
        for node in range(1, len(above)):
            parent, prob = above[node], probs[row][node]
            if parent in alive and prob > thresholds[row][parent]:
                alive[node] = (alive[parent][0] + 1, alive[parent][1] + math.log(prob))
        end = max(alive, key=lambda node: (*alive[node], -node))
        verdict.kept.append(tree.topology.path(row, end))
        verdict.next_tokens.append(best[row][end])
        verdict.bonus.append(end not in above)
    return verdict


@dataclass(frozen=True)
class Lenient:
    """CS Drafting's relaxed review (Chen et al. 2024; reconstruction of the sampled half): a drafted token may be up to
    `factor` times less probable than its drafter thought. 1 would be exact, for chains."""

    factor: float = 2.0


def lenient(tree: TokenTree, laws_BNV: Tensor, rule: Lenient, greedy: Sequence[bool], chance: Chance) -> Verdict:
    """Lossy: keep a token x for which factor * target(x) / draft(x) exceeds 1 (greedy rows), or
    else with that probability.

    A greedy row also keeps the target's best token, as the published code does, and ends with it;
    its laws here are those of temperature 1. Sampled rows end with a draw from what the rejected
    siblings left. The code has no rule for sampling.
    """
    rows = torch.arange(tree.rows, device=laws_BNV.device)[:, None]
    parents_BN = torch.from_numpy(tree.topology.parents_BN).to(laws_BNV.device)
    worth_BN = rule.factor * laws_BNV[rows, parents_BN, tree.tokens_BN]
    if tree.laws_BNV is not None:
        drawn = torch.from_numpy(np.asarray(tree.drawn_BN, dtype=np.bool_)).to(worth_BN.device)[rows, parents_BN]
        worth_BN = torch.where(drawn, worth_BN / tree.laws_BNV[rows, parents_BN, tree.tokens_BN], worth_BN)
    places = np.take_along_axis(tree.topology.depths_BN, tree.topology.parents_BN, 1)
    coins_BN = chance.coin(worth_BN.clamp(max=1.0), places, np.arange(tree.nodes)[None].repeat(tree.rows, 0))
    best_BN = laws_BNV.argmax(-1)
    is_best = tree.tokens_BN == best_BN.gather(1, parents_BN)
    chosen = torch.tensor(greedy, device=worth_BN.device)[:, None]
    kept_BN = torch.where(chosen, is_best | (worth_BN > 1), coins_BN).tolist()
    paths = [
        _lenient_path(children, *told)
        for children, *told in zip(tree.topology.children, kept_BN, is_best.tolist(), greedy, strict=True)
    ]
    ends = [path[-1] for path in paths]
    bonus = [end not in children for end, children in zip(ends, tree.topology.children, strict=True)]
    left = torch.stack([_left_over(tree, row, end, laws_BNV[row, end]) for row, end in enumerate(ends)])
    drawn_B = chance.token(left[:, None], np.array([[len(path) - 1] for path in paths]))[:, 0]
    following = torch.where(
        chosen[:, 0], best_BN.gather(1, torch.tensor(ends, device=best_BN.device)[:, None])[:, 0], drawn_B
    )
    return Verdict(paths, following.tolist(), bonus)


def _lenient_path(
    children: dict[int, list[int]], kept: Sequence[bool], is_best: Sequence[bool], greedy: bool
) -> list[int]:
    """Down to the first child that is kept; greedy rows prefer the target's own choice."""
    path = [0]
    while below := [node for node in children.get(path[-1], []) if kept[node]]:
        path.append(next((node for node in below if greedy and is_best[node]), below[0]))
    return path


def _left_over(tree: TokenTree, row: int, end: int, law_V: Tensor) -> Tensor:
    """What the rejected children of a path's end leave of the law there."""
    children = tree.topology.children[row].get(end)
    if children is None:
        return law_V
    if tree.drawn_BN is not None and tree.drawn_BN[row, end]:
        assert tree.laws_BNV is not None
        return excess(law_V, tree.laws_BNV[row, end])[0]
    rest = law_V.clone()
    rest[[tree.tokens[row][node] for node in children]] = 0
    return rest if float(rest.sum()) > 0 else law_V


Lossy = Typical | Lenient


def lossy_of(acceptance: str) -> Lossy | None:
    """None for exact, else the relaxed rule that the word asks for."""
    name, _, numbers = acceptance.partition(":")
    try:
        values = [float(number) for number in numbers.split(",")] if numbers else []
        if acceptance == "exact":
            return None
        if name == "typical" and len(values) in (0, 2) and all(0 < value < 1 for value in values):
            return Typical(*values)
        if name == "lenient" and len(values) < 2 and all(1 < value < math.inf for value in values):
            return Lenient(*values)
    except ValueError:
        pass
    raise ForerunError(
        f"there is no acceptance {acceptance!r}: use exact, typical, typical:EPSILON,DELTA with numbers between 0 and"
        " 1,"
        " lenient, or lenient:FACTOR with a factor above 1"
    )
