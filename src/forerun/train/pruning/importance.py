"""How much the parts of a model do, on text: the scores by which they stay or go (Minitron's, arXiv 2407.14679, in the
main).

    layers       1 - cos(what enters, what leaves), the mean over tokens ("block influence", ShortGPT)
    dimensions   the mean size of what every norm gives, summed over norms
    heads        the mean norm of what a head gives
    units        the mean size of what stands between the halves of a perceptron
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from forerun.nn.transformer import Transformer
from forerun.train.pruning.masks import Masked, Masks, named


class Importance(Masked):
    """A model that adds up what its parts do. valid_BN: which tokens of the batch it reads now count."""

    def __init__(self, module: Transformer):
        super().__init__(module, Masks.ones(module.config, module.device))
        zeros = [torch.zeros_like(mask, dtype=torch.float64) for mask in named(self.masks).values()]
        self.sums, self.tokens = Masks(*zeros), 0
        self._entering: Tensor | None = None
        self._valid_BN = torch.ones(0, dtype=torch.bool)

    @torch.no_grad()
    def read(self, tokens_BN: Tensor, valid_BN: Tensor) -> None:
        """Count a batch in. valid_BN: which of its tokens are not padding."""
        self._valid_BN = valid_BN
        self.encode(self.embedding(tokens_BN))
        self.tokens += int(valid_BN.sum())

    def tell_layer(self, index: int, x_BND: Tensor) -> None:
        now = x_BND[self._valid_BN].float()
        if index:
            assert self._entering is not None
            self.sums.layers_L[index - 1] += (1 - F.cosine_similarity(self._entering, now, -1)).sum().double()
        self._entering = now

    def tell_normed(self, index: int, x_BND: Tensor) -> None:
        self.sums.hidden_D.add_(x_BND[self._valid_BN].float().abs().sum(0).double())

    def tell_heads(self, index: int, mixed_BNHE: Tensor) -> None:
        self.sums.heads_LH[index] += mixed_BNHE[self._valid_BN].float().norm(dim=-1).sum(0).double()

    def tell_units(self, index: int, inner_BNF: Tensor) -> None:
        self.sums.units_LF[index] += inner_BNF[self._valid_BN].float().abs().sum(0).double()

    def state(self) -> dict[str, Tensor]:
        return {**named(self.sums), "tokens": torch.tensor(self.tokens)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """ValueError for the state of a model of another shape."""
        for name, sums in named(self.sums).items():
            if name not in state or state[name].shape != sums.shape:
                raise ValueError(f"the state does not fit {name}")
            sums.copy_(state[name])
        self.tokens = int(state["tokens"])
