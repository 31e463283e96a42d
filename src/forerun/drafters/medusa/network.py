"""Medusa: independent heads on the target's last hidden state (Cai et al. 2024, arXiv 2401.10774, section 2.1.1).

HeadParts i is L residual blocks, u = h + silu(W h + b), and a projection to the vocabulary. The
paper has no b, its code has; we start it at zero, so that untrained heads are the target's own
output projection. Blocks of a head with L > 1 share their weights in the published code
("tied_layers"); ours are independent unless asked. `vocabulary: shared` is the code's version 2:
the target's own frozen projection instead of one per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forerun.drafters.medusa import MedusaConfig
from forerun.drafting.checkpoint import demand_fit, load, tree_for
from forerun.drafting.drafter import Drafter
from forerun.drafting.heads import HeadDrafter, HeadParts, HeadsModule, LastState, drafting, grow
from forerun.drafting.markov import MarkovTerm
from forerun.drafting.trained import HeadSettings
from forerun.drafting.workshop import Workshop
from forerun.nn.backends.heads import HeadWeights


class MedusaHeads(HeadsModule):
    """The parameters of all heads side by side: blocks [L, K, D, D], biases [L, K, D], vocabulary [K, V, D]."""

    tables = ("markov.",)

    def __init__(self, config: MedusaConfig):
        super().__init__(config)
        self.config, self.count, self.sees_tokens = config, config.heads, bool(config.rank)
        self.solvable = config.vocabulary == "own"  # a linear start goes into projections of their own
        self.markov = MarkovTerm(config.vocab_size, config.candidates, config.rank) if config.rank else None
        stored = 1 if config.tied_layers else config.layers
        self.blocks = nn.Parameter(torch.zeros(stored, config.heads, config.width, config.width))
        self.biases = nn.Parameter(torch.zeros(stored, config.heads, config.width))
        self.vocabulary = (
            nn.Parameter(torch.zeros(config.heads, config.candidates, config.width))
            if config.vocabulary == "own"
            else None
        )

    def initialise(self, head_VD: Tensor, seed: int = 0) -> MedusaHeads:
        """Before training every head says what the target says: zero blocks, and copies of its output projection."""
        with torch.no_grad():
            if self.vocabulary is not None:
                self.vocabulary.copy_(self.of_known(head_VD).expand_as(self.vocabulary))
        if self.markov is not None:
            self.markov.initialise(seed)
        return self

    def table(self, embedding_VD: Tensor) -> Tensor:
        return embedding_VD if self.markov is None else self.markov.before

    def start_from(self, maps: Sequence[Tensor], head_VD: Tensor) -> None:
        """Into the projections of its own, behind blocks that do nothing yet; shared ones leave no place for it."""
        with torch.no_grad():
            for head, guess in enumerate(maps if self.vocabulary is not None else ()):
                self.vocabulary[head].copy_(self.of_known(head_VD) @ guess)  # type: ignore[index]

    def grow_from(self, smaller: MedusaHeads) -> None:
        grow(self, smaller, ("blocks", "biases"), smaller.config.layers)

    def logits(self, context_PD: Tensor, embedded_PKD: Tensor, head_VD: Tensor) -> Tensor:
        if self.markov is None:
            return self.unconditional(context_PD, head_VD)
        return self.markov.logits(self._states(context_PD), embedded_PKD.transpose(0, 1), head_VD)

    def unconditional(self, context_PD: Tensor, head_VD: Tensor) -> Tensor:
        y_KPD = self._states(context_PD)
        if self.vocabulary is None:
            return F.linear(y_KPD, head_VD)
        return torch.bmm(y_KPD, self.vocabulary.transpose(1, 2))

    def _states(self, context_PD: Tensor) -> Tensor:
        """What the heads' projections see, [K, P, D]."""
        y_KPD = context_PD.expand(self.count, -1, -1)
        for layer in range(self.config.layers):
            stored = layer % len(self.blocks)
            step = torch.baddbmm(self.biases[stored][:, None], y_KPD, self.blocks[stored].transpose(1, 2))
            y_KPD = y_KPD + F.silu(step)
        return y_KPD

    def head_logits(self, index: int, z: Tensor, head_VD: Tensor) -> Tensor:
        flat = z.reshape(-1, z.shape[-1])
        return self.unconditional(flat, head_VD)[index].view(*z.shape[:-1], -1)

    def weights(self, head_VD: Any) -> list[HeadWeights]:
        return [self._weights(head, head_VD) for head in range(self.count)]

    def _weights(self, head: int, head_VD: Any) -> HeadWeights:
        stored = [(self.blocks[layer, head], self.biases[layer, head]) for layer in range(len(self.blocks))]
        (first, bias), *blocks = [stored[layer % len(stored)] for layer in range(self.config.layers)]
        return HeadWeights(
            first=first,
            first_bias=bias,
            through=None,
            through_bias=None,
            blocks=tuple(blocks),
            vocabulary=head_VD if self.vocabulary is None else self.vocabulary[head],
            vocabulary_bias=None,
        )


def build(workshop: Workshop, settings: HeadSettings) -> Drafter:
    """{"drafter": "medusa", "checkpoint": PATH, "tree": TREE, "weights": "auto" | "int8" | "target"}"""
    stored = load(settings.checkpoint, "medusa")
    module = stored.module(MedusaHeads, MedusaConfig)
    network = workshop.target.network
    demand_fit(stored, module.config.width, module.config.vocab_size, network)
    grows = tree_for(stored, settings.tree, module.count, module.config.candidates)
    parts = HeadParts(drafting(module, network, settings.weights), LastState(), grows, network.cache_shape.layers)
    return HeadDrafter("medusa", parts)
