"""The network of a block drafter (after DSpark, deepseek-ai/DeepSpec; a reconstruction where its code is silent).

    H     = norm(F [h_a; h_b; ...])     the target's states of several layers, fused, at every token it has read
    rows  = [E(anchor), MASK, ..., MASK]    the anchor is the newest token, which the target has not read
    layer : queries from the rows; keys and values from H (not normed again) and from the normed rows; every row sees
            all of H and all rows of its block; row k stands at the anchor's position + k
    logits of row k = head(norm(y_k)) + B A[token before it]        the Markov term

Row k (from 0) proposes the token k + 1 behind the anchor, a node of depth k + 1. In the form of DFlash ("past the
anchor") there is one row more, the anchor's proposes nothing and row k the token k behind it. MASK is a vector that is
learnt, or the embedding of a token. Projection and embedding are the target's own and frozen. The confidence head of
the original is left out: here the tree's own probabilities tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forerun.drafters.block import LAST, BlockConfig
from forerun.drafting.heads import HeadsModule, Places, grow, layer_like, quieten
from forerun.drafting.markov import MarkovTerm
from forerun.nn import ops
from forerun.nn.backends.blocks import BlockWeights
from forerun.nn.network import Network
from forerun.nn.transformer import Layer, Transformer


class BlockModule(HeadsModule):
    """mask [D], None where it is a token's; fuse [D, M D], fuse_norm [D]; the layers and the last norm in `stack`; the
    Markov term."""

    sees_tokens = True
    solvable = False
    tables = ("markov.",)

    def __init__(self, config: BlockConfig):
        super().__init__(config)
        assert config.layer is not None
        self.config, self.count, self.borrows = config, config.heads, config.layers
        width = config.width
        self.mask = nn.Parameter(torch.zeros(width)) if config.mask_token is None else None
        self.fuse = nn.Parameter(torch.zeros(width, len(config.sources) * width))
        self.fuse_norm = nn.Parameter(torch.ones(width))
        longest = config.layer.max_length + config.rows
        self.stack = Transformer(config.layer.transformer(width, config.layers, qk_norm=True, max_length=longest))
        self.markov = MarkovTerm(config.vocab_size, config.candidates, config.rank) if config.rank else None

    def initialise(self, head_VD: Tensor, seed: int = 0) -> BlockModule:
        """The newest source's state passes the fusion; everything else begins at random."""
        generator = torch.Generator().manual_seed(seed)
        width = self.config.width
        self.stack.initialise(seed)
        with torch.no_grad():
            self.fuse[:, -width:] = torch.eye(width)
            if self.mask is not None:
                self.mask.copy_(torch.randn(width, generator=generator) * head_VD.std())
        if self.markov is not None:
            self.markov.initialise(seed)
        return self

    def borrow(self, layers: Sequence[nn.Module]) -> None:
        """Where the shapes are the same."""
        with torch.no_grad():
            for own, other in zip(self.stack.blocks, layers, strict=True):
                theirs = dict(other.named_parameters())
                for name, parameter in own.named_parameters():
                    if name in theirs and theirs[name].shape == parameter.shape:
                        parameter.copy_(theirs[name])

    def stretch(self, length: int) -> None:
        """Know angles for texts of so many tokens: the target's may be longer than the one that it was trained on."""
        stack = self.stack
        longest = max(stack.config.max_length, length + self.config.rows)
        stack.config = replace(stack.config, max_length=longest)

    def grow_from(self, smaller: BlockModule) -> None:
        grow(self, smaller)
        quieten(self.stack.blocks[smaller.config.layers :])

    def reads(self, top: int) -> tuple[int, ...]:
        return tuple(top if source == LAST else source for source in self.config.sources)

    def table(self, embedding_VD: Tensor) -> Tensor:
        return embedding_VD[:, :0] if self.markov is None else self.markov.before

    def parts(self, embedding_VD: Tensor) -> BlockWeights:
        """Everything as plain matrices, for the kernels. embedding: the target's."""
        before, behind = (None, None) if self.markov is None else (self.markov.before, self.markov.behind)
        more = (before, behind, self.known, geometric_mean(self.temperatures or (1.0,)))
        return BlockWeights(self.config.rows, self.stack, self.filler(embedding_VD), self.fuse, self.fuse_norm, *more)

    def filler(self, embedding_VD: Tensor | None) -> Tensor:
        """What stands in the rows behind the anchor, [D]. embedding: the target's."""
        if self.mask is not None:
            return self.mask
        assert embedding_VD is not None and self.config.mask_token is not None
        return embedding_VD[self.config.mask_token]

    # ---- what the rows of blocks say

    def fused(self, states_BNM: Tensor) -> Tensor:
        """H [B, N, D] of the target's states, those of all sources side by side."""
        return self._norm(ops.linear(states_BNM, self.fuse), self.fuse_norm)

    def memory(self, layer: int, fused_BND: Tensor, positions_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, N, H, E] that a layer makes of H, which it does not norm again."""
        block, config = self._layer(layer), self.stack.config
        rows, count, _ = fused_BND.shape
        queries = config.heads * config.head_dim
        both = ops.linear(fused_BND, block.qkv.weight[queries:]).view(rows, count, -1, config.head_dim)
        keys, values = both[:, :, : config.kv_heads], both[:, :, config.kv_heads :]
        assert block.k_norm is not None
        return ops.rotary(self._norm(keys, block.k_norm), *self._angles(positions_BN)), values

    def rows(self, embedded_BD: Tensor, embedding_VD: Tensor | None) -> Tensor:
        """What goes into the first layer, [B, W, D], of anchors' embeddings. embedding: the target's."""
        masks = self.filler(embedding_VD).to(embedded_BD.dtype).expand(len(embedded_BD), self.config.rows - 1, -1)
        return torch.cat((embedded_BD[:, None], masks), 1)

    def proposing(self, x_BWM: Tensor) -> Tensor:
        """Of all rows those that propose a token, [B, K, ...]."""
        return x_BWM[:, self.config.rows - self.count :]

    def project(self, layer: int, x_BWD: Tensor, positions_BW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of rows."""
        block = self._layer(layer)
        normed = self._norm(x_BWD, block.attention_norm)
        q, k, v = self.stack._project(block, normed, *self._angles(positions_BW))
        return q.to(v.dtype), k.to(v.dtype), v

    def go_on(self, layer: int, x_BWD: Tensor, mixed_BWD: Tensor) -> Tensor:
        """A layer's outputs, of what its attention has mixed."""
        block = self._layer(layer)
        return self.stack._mlp(block, x_BWD + ops.linear(mixed_BWD, block.out.weight))

    def last_norm(self, x_BWD: Tensor) -> Tensor:
        return self._norm(x_BWD, self.stack.final_norm)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """In the precision of what is normed, in which it is one operation."""
        return ops.rms_norm(x, weight.to(x.dtype), self.stack.config.norm_eps)

    def _layer(self, number: int) -> Layer:
        block = self.stack.blocks[number]
        assert isinstance(block, Layer)
        return block

    def _angles(self, positions_BN: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.stack._rope_tables()
        return cos[positions_BN, None], sin[positions_BN, None]

    # ---- in training

    def seen(self, states: Mapping[int, Tensor], places: Places) -> Tensor:
        """The last states [P, K, D] of the rows that propose, of a block at every place, all side by side."""
        fused = self.fused(torch.cat(list(states.values()), -1))
        texts = [places.places_P[places.rows_P == row] for row in range(len(fused))]
        positions_BN = torch.arange(fused.shape[1], device=fused.device).expand(len(fused), -1)
        positions_PW = 1 + places.places_P[:, None] + torch.arange(self.config.rows, device=fused.device)
        x = self.rows(places.roots_PD, places.embedding_VD)
        for layer in range(self.config.layers):
            keys, values = self.memory(layer, fused, positions_BN)
            parts = [torch.split(part, list(map(len, texts))) for part in self.project(layer, x, positions_PW)]
            mixed = [
                self._mix(q, (keys[row], k), (values[row], v), text)
                for row, (text, q, k, v) in enumerate(zip(texts, *parts, strict=True))
                if len(text)
            ]
            x = self.go_on(layer, x, torch.cat(mixed))
        return self.last_norm(self.proposing(x))

    def _mix(
        self, q_AWHE: Tensor, keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], places_A: Tensor
    ) -> Tensor:
        """Attention of the blocks of one text, [A, W, H E]: each sees the text up to its place, and itself. Both are
        scored apart, for no block sees another."""
        blocks, width, heads, size = q_AWHE.shape
        (text_k, own_k), (text_v, own_v) = keys, values
        grouped = q_AWHE.view(blocks, width, own_k.shape[2], -1, size).permute(2, 0, 1, 3, 4)
        q = grouped.flatten(2, 3) * size**-0.5  # [G, A, Q, E]: the queries that share a key head, side by side
        of_text = (q.flatten(1, 2) @ text_k.to(q.dtype).permute(1, 2, 0)).view(*q.shape[:3], -1)
        of_own = q @ own_k.permute(2, 0, 3, 1)
        after = torch.arange(len(text_k), device=q.device) > places_A[:, None]
        scores = torch.cat((of_text.masked_fill(after[:, None], float("-inf")), of_own), -1)
        to_text, to_own = torch.split(scores.softmax(-1).to(q.dtype), [len(text_k), width], -1)
        from_text = (to_text.flatten(1, 2) @ text_v.to(q.dtype).transpose(0, 1)).view(q.shape)
        mixed: Tensor = from_text + to_own @ own_v.permute(2, 0, 1, 3)
        return mixed.view(grouped.shape).permute(1, 2, 0, 3, 4).reshape(blocks, width, heads * size)

    def logits(self, context_PD: Tensor, embedded_PKD: Tensor, head_VD: Tensor) -> Tensor:
        if self.markov is None:
            return self.unconditional(context_PD, head_VD)
        return self.markov.logits(context_PD.transpose(0, 1), embedded_PKD.transpose(0, 1), head_VD)

    def unconditional(self, context_PD: Tensor, head_VD: Tensor) -> Tensor:
        return F.linear(context_PD.transpose(0, 1), head_VD)


def fitted(fields: dict[str, Any], network: Network) -> dict[str, Any]:
    """The fields of a config, with layers like the target's, and three of its layers as sources."""
    top = network.cache_shape.layers
    return {"layer": layer_like(network), "sources": sources_of(top)} | fields


def sources_of(top: int) -> tuple[int, ...]:
    """Three of so many layers: of eight, 2, 5 and the last."""
    inner = {max(1, round(top / 4)), max(1, round(5 * top / 8))}
    return (*sorted(inner - {top}), LAST)
