"""Plain torch: the readable backend, and the one for CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from forerun.nn.backends.heads import DraftHeads, Drafting
from forerun.nn.formats import Formats
from forerun.nn.network import Footprint, Network
from forerun.ranktree import RankTree


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

    def heads(self, module: DraftHeads, network: Network, weights: torch.dtype) -> Drafting:
        return TorchHeads(module, network.input_embedding, network.head_matrix())

    def top_log_probs(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        best = logits.float().log_softmax(-1).topk(k, -1)
        return best.values, best.indices


TORCH = TorchBackend()


def footprint_of(module: nn.Module, runs_on: str) -> Footprint:
    """Of a module's parameters, shared ones once."""
    values = list(module.parameters())
    return Footprint(runs_on, sum(value.numel() for value in values), sum(value.nbytes for value in values))


class TorchHeads:
    """Drafting in plain torch: the readable version, and the one for CUDA."""

    def __init__(self, module: DraftHeads, embedding_VD: Tensor, head_VD: Tensor):
        self.module, self.embedding, self.head = module, embedding_VD, head_VD

    @torch.inference_mode()
    def draft(self, context_BD: Tensor, roots: Sequence[int], tree: RankTree) -> list[list[int]]:
        root_B1 = torch.tensor(roots, device=context_BD.device)[:, None]
        grow = self._level_by_level if self.module.sees_tokens else self._all_at_once
        return torch.cat((root_B1, *grow(context_BD, root_B1, tree)), 1).tolist()

    def _all_at_once(self, context_BD: Tensor, root_B1: Tensor, tree: RankTree) -> list[Tensor]:
        best = _best(self.module.logits(context_BD, context_BD[:, None], self.head), tree.widest)
        return [best[index][:, level.ranks] for index, level in enumerate(tree.levels)]

    def _level_by_level(self, context_BD: Tensor, root_B1: Tensor, tree: RankTree) -> list[Tensor]:
        z_BPM = torch.cat((context_BD[:, None], self.embedding[root_B1]), -1)
        grown = []
        for index, level in enumerate(tree.levels):
            best = _best(self.module.head_logits(index, z_BPM, self.head), level.widest)
            grown.append(best[:, level.parents, level.ranks])
            rows = level.parents[level.grows]
            z_BPM = torch.cat((z_BPM[:, rows], self.embedding[grown[-1][:, level.grows]]), -1)
        return grown


def _best(logits: Tensor, count: int) -> Tensor:
    """The most probable tokens, equal ones by id, as the kernels and the ranks of training have it. topk promises no order
    among equals, so it is given integers of which no two are: the bits of the number, ordered, and behind them the id."""
    bits = (logits.float() + 0.0).view(torch.int32).long()
    ordered = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return ((ordered << 32) | (0xFFFFFFFF - ids)).topk(count, -1).indices
