"""The Markov term: what a head says depends on the token before the one that it proposes, at the cost of a few numbers.

    logits of depth d behind token x = logits_d + B A[x]            A, B: [V, R] (DSpark, deepseek-ai/DeepSpec)

Everything else about a depth is known before the tree grows, so siblings get children of their own for the price of one
small product each.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forerun.drafting.growth import Expander, Frontier, Known
from forerun.model import Scores

SPREAD = 0.01
"""Of the tables' first values: larger or smaller ones do not learn (speculators#1066, second-hand)."""


class MarkovTerm(nn.Module):
    """before [V, R], of the token before; behind, of those that can be proposed, [V or fewer, R]."""

    def __init__(self, vocab_size: int, candidates: int, rank: int):
        super().__init__()
        self.before = nn.Parameter(torch.zeros(vocab_size, rank))
        self.behind = nn.Parameter(torch.zeros(candidates, rank))

    def initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for table in (self.before, self.behind):
                table.copy_(torch.randn(table.shape, generator=generator) * SPREAD)

    def logits(self, states: Tensor, before: Tensor, head_VD: Tensor) -> Tensor:
        """Of states [..., D] behind tokens whose rows of `before` are given, [..., R]: one product for both terms,
        whose sum is as large as the vocabulary."""
        joined = torch.cat((head_VD, self.behind.to(head_VD.dtype)), 1)
        return F.linear(torch.cat((states, before.to(states.dtype)), -1), joined)


class MarkovExpander(Expander):
    """Of logits [B, K, V] of all depths that are known but for the term (None: altogether)."""

    def __init__(self, logits_BKV: Tensor, root_B: Tensor, term: MarkovTerm | None, known: Known | None = None):
        self._logits, self._root, self._term, self.known = logits_BKV, root_B, term, known

    def begin(self) -> Scores:
        return self._after(self._root[:, None], 0)

    def expand(self, frontier: Frontier) -> Scores:
        return self._after(frontier.tokens_BW, frontier.depth)

    @torch.inference_mode()
    def _after(self, tokens_BN: Tensor, depth: int) -> Scores:
        logits = self._logits[:, depth : depth + 1]
        return Scores(logits if self._term is None else logits + self._term.before[tokens_BN] @ self._term.behind.T)
