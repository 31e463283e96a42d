"""Low-rank adapters on our transformer (LoRA, Hu et al. 2021, arXiv 2106.09685): W' = W + alpha / rank * up @ down.

They sit on every linear matrix of the blocks and on the output projection, one for each matrix as
it is published: the three parts of a fused query-key-value projection have adapters of their own.
`up` starts at zero, so the adapted model starts as the original. An adapter is a parametrization of
the weight, so the transformer's forward stays as it is, and the sum is rounded to the weight's
number format as it is when it is merged: what is trained is what will be written. Switched off, it
hands out the original weight itself, which makes the original model available without a second one
in memory.

The published recipes also drop 5 % of an adapter's inputs at random. No parametrization of a weight
can express that (the mask differs from token to token), and we leave it out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from forerun.nn.transformer import Transformer, TransformerConfig
from forerun.nn.translate import places

ADAPTED = ("_proj.weight", "lm_head.weight")
"""How the published names of adapted matrices end."""


class LowRank(nn.Module):
    """The adapters of one parameter, whose `rows` belong to matrices stacked on one another.

    down [parts, rank, in] and up [out, rank] are fp32, whatever the weight is.
    """

    def __init__(self, rows: tuple[int, ...], width: int, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        bound = 1 / math.sqrt(width)
        self.rows, self.scale, self.is_on = rows, alpha / rank, True
        self.down = nn.Parameter((2 * torch.rand(len(rows), rank, width, generator=generator) - 1) * bound)
        self.up = nn.Parameter(torch.zeros(sum(rows), rank))

    def forward(self, weight: Tensor) -> Tensor:
        if not self.is_on:
            return weight
        with torch.autocast(weight.device.type, enabled=False):
            parts = zip(torch.split(self.up, list(self.rows)), self.down, strict=True)
            change = torch.cat([up @ down for up, down in parts])
            return (weight + self.scale * change).to(weight.dtype)


class Adapters(nn.Module):
    """Puts adapters on a transformer and freezes everything else of it. A tied output projection
    becomes one of its own first.

    The parameters of this module are those of the adapters alone, numbered as the matrices are.
    """

    def __init__(self, network: Transformer, rank: int = 32, alpha: float = 16.0, seed: int = 0):
        super().__init__()
        network.requires_grad_(False)
        _untie(network)
        generator = torch.Generator().manual_seed(seed)
        found = _adapted(network.config)
        self.parts = nn.ModuleList()
        self._linears = tuple(
            network.get_submodule(name.rpartition(".")[0]) for name in found
        )  # a tuple does not own them
        for linear, rows in zip(self._linears, found.values(), strict=True):
            assert isinstance(linear, nn.Linear)
            part = LowRank(rows, linear.in_features, rank, alpha, generator).to(linear.weight.device)
            parametrize.register_parametrization(linear, "weight", part)
            self.parts.append(part)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within it the network is the original."""
        try:
            self._switch(False)
            yield
        finally:
            self._switch(True)

    def _switch(self, on: bool) -> None:
        for part in self.parts:
            assert isinstance(part, LowRank)
            part.is_on = on

    def merge(self) -> None:
        """Make the adapted weights the network's own. The adapters are gone from it then."""
        for linear in self._linears:
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)


def _untie(network: Transformer) -> None:
    if network.config.tied:
        network.head.weight = nn.Parameter(network.embedding.weight.detach().clone(), requires_grad=False)
        network.config = replace(network.config, tied=False)


def _adapted(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """The parameters that get adapters, and the rows of the published matrices in each."""
    found: dict[str, tuple[int, ...]] = {}
    for name, place in places(config).items():
        if name.endswith(ADAPTED):
            found[place.parameter] = (*found.get(place.parameter, ()), place.shape[0])
    return found
