"""Hydra and Hydra++: heads that see the tokens drafted before theirs (Ankner et al. 2024, arXiv 2402.05109).

HeadParts i sees z = [c_t, E(x_{t+1}), ..., E(x_{t+i+1})], so a tree is grown level by level, every
node from its own branch:

    y = R z + r + silu(W z + b)         the first block; R is learnt, because the width changes
    y = y + silu(W' y + b')             further blocks; the published code repeats one block ("tied_layers")
    logits = V y + v                    a projection per head, or the target's own frozen one (`vocabulary: shared`,
                                        ours)

Hydra has one block and reads the target's state. Hydra++ has four, and its context is what one causal layer of its
own makes of the target's states of all verified tokens ("prefix"). The body of the paper was not available to us:
this follows the released code (a reconstruction where that is silent). Departure: R starts as [I 0 ... 0] and all
biases at zero, not at random, so that untrained heads are the target's own output projection, as Medusa's are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forerun.drafters.hydra import HydraConfig, HydraSettings
from forerun.drafting.checkpoint import demand_fit, load, tree_for
from forerun.drafting.drafter import Drafter
from forerun.drafting.growth import Chain
from forerun.drafting.heads import (
    ContextMaker,
    HeadChain,
    HeadDrafter,
    HeadParts,
    HeadsModule,
    LastState,
    PrefixState,
    TorchHeads,
    drafting,
    format_of,
    grow,
    layer_like,
)
from forerun.drafting.stopping import prepared, rule_of
from forerun.drafting.workshop import Workshop
from forerun.nn.backends.heads import HeadWeights
from forerun.nn.network import Network
from forerun.nn.transformer import Transformer


class HydraHeads(HeadsModule):
    """first[i], through[i]: [D, (i + 2) D], the columns of the context first, then the embeddings from the oldest to
    the newest; their biases [K, D]; blocks [L - 1 or 1, K, D, D]; vocabulary [K, V, D] with biases [K, V]; prefix: a
    one-layer transformer."""

    sees_tokens = True

    def __init__(self, config: HydraConfig):
        super().__init__(config)
        self.config, self.count = config, config.heads
        width, heads = config.width, config.heads
        later = config.layers - 1
        stored = min(1, later) if config.tied_layers else later
        self.first = nn.ParameterList(torch.zeros(width, (i + 2) * width) for i in range(heads))
        self.first_biases = nn.Parameter(torch.zeros(heads, width))
        self.through = nn.ParameterList(torch.zeros(width, (i + 2) * width) for i in range(heads))
        self.through_biases = nn.Parameter(torch.zeros(heads, width))
        self.blocks = nn.Parameter(torch.zeros(stored, heads, width, width)) if stored else None
        self.biases = nn.Parameter(torch.zeros(stored, heads, width)) if stored else None
        own = config.vocabulary == "own"
        self.vocabulary = nn.Parameter(torch.zeros(heads, config.candidates, width)) if own else None
        self.vocabulary_biases = nn.Parameter(torch.zeros(heads, config.candidates)) if own else None
        self.prefix = Transformer(config.prefix.transformer(width)) if config.prefix else None

    def initialise(self, head_VD: Tensor, seed: int = 0) -> HydraHeads:
        """Before training every head says what the target says of its context; the prefix layer starts at random."""
        with torch.no_grad():
            for through in self.through:
                through[:, : self.config.width] = torch.eye(self.config.width)
            if self.vocabulary is not None:
                self.vocabulary.copy_(self.of_known(head_VD).expand_as(self.vocabulary))
        if self.prefix is not None:
            self.prefix.initialise(seed)
        return self

    def start_from(self, maps: Sequence[Tensor], head_VD: Tensor) -> None:
        with torch.no_grad():
            for through, guess in zip(self.through, maps, strict=True):
                through.copy_(guess)

    def grow_from(self, smaller: HydraHeads) -> None:
        grow(self, smaller, ("blocks", "biases"), smaller.config.layers - 1)

    def contexts(self, states_BND: Tensor) -> Tensor:
        return states_BND if self.prefix is None else self.prefix.encode(states_BND)

    def logits(self, context_PD: Tensor, embedded_PKD: Tensor, head_VD: Tensor) -> Tensor:
        inputs = torch.cat((context_PD[:, None], embedded_PKD), 1).flatten(1)
        width = self.config.width
        parts = [self.head_logits(i, inputs[:, : (i + 2) * width], head_VD) for i in range(self.count)]
        return torch.stack(parts)

    def head_state(self, index: int, z: Tensor) -> Tensor:
        z = self._drop(z)
        y = F.linear(z, self.through[index], self.through_biases[index])
        y = y + F.silu(F.linear(z, self.first[index], self.first_biases[index]))
        for weight, bias in self._later(index):
            y = self._drop(y)
            y = y + F.silu(F.linear(y, weight, bias))
        return self._drop(y)

    def projected(self, index: int, state: Tensor, head_VD: Tensor) -> Tensor:
        if self.vocabulary is None or self.vocabulary_biases is None:
            return F.linear(state, head_VD)
        return F.linear(state, self.vocabulary[index], self.vocabulary_biases[index])

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training) if self.config.dropout else x

    def _later(self, index: int) -> list[tuple[Tensor, Tensor]]:
        """The blocks after the first of one head; tied ones are one and the same."""
        if self.blocks is None or self.biases is None:
            return []
        stored = [(self.blocks[layer, index], self.biases[layer, index]) for layer in range(len(self.blocks))]
        return [stored[layer % len(stored)] for layer in range(self.config.layers - 1)]

    def weights(self, head_VD: Any) -> list[HeadWeights]:
        return [
            HeadWeights(
                first=self.first[head],
                first_bias=self.first_biases[head],
                through=self.through[head],
                through_bias=self.through_biases[head],
                blocks=tuple(self._later(head)),
                vocabulary=head_VD if self.vocabulary is None else self.vocabulary[head],
                vocabulary_bias=None if self.vocabulary_biases is None else self.vocabulary_biases[head],
            )
            for head in range(self.count)
        ]


def reader(module: HydraHeads, network: Network, weights: str = "auto") -> ContextMaker:
    """Where the heads' contexts come from, on the target's backend and in the number format of `format_of`."""
    if module.prefix is None:
        return LastState()
    prefix = module.prefix.to(device=network.device, dtype=network.dtype).requires_grad_(False)
    return PrefixState(network.backend.pack(prefix, format_of(network, weights)), module.count + 1)


def fitted(fields: dict[str, Any], network: Network) -> dict[str, Any]:
    """The fields of a config, its prefix layer shaped like the target's own if it is only wished for."""
    if fields.get("prefix") is True:  # heads to go on from bring the shape of their own
        return fields | {"prefix": layer_like(network)}
    return fields


def build(workshop: Workshop, settings: HydraSettings) -> Drafter:
    """See `HydraSettings`; Hydra++ is a checkpoint with a prefix layer."""
    stored = load(settings.checkpoint, "hydra")
    module = stored.module(HydraHeads, HydraConfig)
    network, weights = workshop.target.network, settings.weights
    demand_fit(stored, module.config.width, module.config.vocab_size, network)
    name, top = "hydra" if module.prefix is None else "hydra++", network.cache_shape.layers
    if settings.stopping is not None:
        form = Chain(prepared(rule_of(settings.stopping), module.config.width, network.device))
        context = reader(module, network, weights)
        module = module.to(device=network.device, dtype=network.dtype).eval().requires_grad_(False)
        heads = TorchHeads(module, network.input_embedding, network.head_matrix())
        return HeadChain(name, heads, context, form, top)
    grows = tree_for(stored, settings.tree, module.count, module.config.candidates)
    parts = HeadParts(drafting(module, network, weights), reader(module, network, weights), grows, top)
    return HeadDrafter(name, parts)
