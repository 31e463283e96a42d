"""The acceptance head of SpecDec++ (Huang, Guo, Wang, arXiv 2405.19715): from a draft model's state at a token that it
has drafted, the probability that the target accepts this token where it has accepted those before.

    x <- x + silu(W x + b)      `depth` blocks, as wide as the draft model
    logits = V x + v            index 0: rejected, index 1: accepted

The released code repeats one block (`tie_blocks`); the paper speaks of layers of their own, which is the default here.

A rejection counts `weight` times in the loss that it learns, so what it says is too low on purpose: the odds divided by
that. `corrected` undoes it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forerun.drafting import checkpoint as checkpoints
from forerun.drafting.acceptance import KIND, AcceptanceConfig
from forerun.errors import CheckpointError, DrafterError

REJECTED, ACCEPTED = 0, 1


class AcceptanceHead(nn.Module):
    """Begins at random, as torch's linear layers do."""

    def __init__(self, config: AcceptanceConfig):
        super().__init__()
        self.config = config
        stored = min(1, config.depth) if config.tie_blocks else config.depth
        self.blocks = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(stored))
        self.last = nn.Linear(config.width, 2)

    def forward(self, states: Tensor) -> Tensor:
        """Logits [..., 2] at states [..., D]."""
        for layer in range(self.config.depth):
            states = states + F.silu(self.blocks[layer % len(self.blocks)](states))
        logits: Tensor = self.last(states)
        return logits

    def probability(self, states: Tensor) -> Tensor:
        """Of acceptance, as it says it, [...]."""
        logits: Tensor = self(states.float())
        return logits.softmax(-1)[..., ACCEPTED]


def corrected(probability: Tensor, weight: float) -> Tensor:
    """What a head that learnt with this weight of rejections means: the odds times the weight."""
    return weight * probability / (1 - probability + weight * probability)


def opened(folder: str) -> AcceptanceHead:
    """The head in a folder, on the processor, in single precision. CheckpointError for another kind of checkpoint."""
    stored = checkpoints.read(folder)
    if stored.drafter != KIND:
        raise CheckpointError(
            f"{folder} holds a drafter of the kind {stored.drafter}, and no acceptance head: give the folder that"
            " forerun train acceptance wrote"
        )
    return stored.module(AcceptanceHead, AcceptanceConfig).float().eval().requires_grad_(False)


def head_on(folder: str, width: int, device: torch.device) -> AcceptanceHead:
    """The head in a folder, beside a draft model with states of this width. DrafterError unless it fits."""
    head = opened(folder)
    if head.config.width != width:
        raise DrafterError(
            f"{folder} holds an acceptance head for states of width {head.config.width}, and this drafter's have"
            f" {width}: use the head that was trained with it"
        )
    return head.to(device)
