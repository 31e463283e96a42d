"""Plain torch: the readable backend, and the one for CUDA."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from forerun.nn.backends.blocks import BlockNetwork, BlockWeights
from forerun.nn.backends.heads import DraftHeads, Drafting
from forerun.nn.formats import Formats
from forerun.nn.network import Footprint, Network


class TorchBackend:
    """Networks in plain torch (see `Backend`): a module is a network already."""

    name = "torch"
    keeps_bits = False
    formats = frozenset({torch.bfloat16, torch.float16, torch.float32})

    def pack(self, module: nn.Module, weights: torch.dtype | Formats) -> Network:
        formats = Formats.of(weights)
        if formats.default not in self.formats or formats.exceptions:
            raise ValueError(f"torch has one float for all weights, not {formats}")
        packed: Network = module.to(formats.default)  # type: ignore[assignment]
        return packed

    def heads(self, module: DraftHeads, network: Network, weights: torch.dtype) -> Drafting | None:
        return None

    def blocks(self, block: BlockWeights, network: Network, weights: torch.dtype) -> BlockNetwork | None:
        return None

    def top_log_probs(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        best = logits.float().log_softmax(-1).topk(k, -1)
        return best.values, best.indices


TORCH = TorchBackend()


def footprint_of(module: nn.Module, runs_on: str) -> Footprint:
    """Of a module's parameters, shared ones once."""
    values = list(module.parameters())
    return Footprint(runs_on, sum(value.numel() for value in values), sum(value.nbytes for value in values))
