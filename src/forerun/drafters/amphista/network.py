"""The network of Amphista-style heads (arXiv 2406.13170). What there is follows the paper's abstract and reviews of it;
how it is made is a reconstruction.

    s1_t  = SA_1(F_1 [e(x_{t+1}); h_t])      h_t: the target's state; x_{t+1}: the token behind it, the root of a draft
    s2_t  = SA_2(F_2 [e(x_{t+1}); s1_t])     SA: causal layers like the target's, over all verified tokens
    y_k   = z + silu(W_k z + b_k)            z: s1_t for the first half of the heads, s2_t for the others
    y     = AE(y_1 + P_1, ..., y_K + P_K)    attention of the heads to one another, in both directions; layers as SA's,
                                             with learned positions P instead of rotations
    head k says V_k y_k about x_{t+1+k}

Heads are told apart by what they propose: head k, from 1, proposes a node of depth k. No head proposes x_{t+1}. All
layers are pre-norm and have no last norm; the state is the one that the target's projection sees.

At the start F passes the state on, and what layers and blocks add is zero, so every head says what the target said of
x_{t+1}, and the first steps are those of Medusa's heads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forerun.drafters.amphista import NONE, ONE_WAY, AmphistaConfig
from forerun.drafting.heads import HeadsModule, Places, layer_like
from forerun.nn import ops
from forerun.nn.cache import Cache
from forerun.nn.feed import Feed, Read
from forerun.nn.network import Network
from forerun.nn.transformer import Layer, Transformer

Through = Callable[[int, Layer, Tensor], Tensor]
"""A layer by its number and parameters, and what goes into it: what comes out."""


class Adaptation(Transformer):
    """The stages, as a network that reads states beside the embeddings of the tokens that came next, [.., 2 D], and
    says what the stages make of them, side by side, [.., stages D].

    fuse: [D, 2 D] of every stage that is given the token, the columns of the embedding first.
    """

    def __init__(self, config: AmphistaConfig):
        assert config.layer is not None
        super().__init__(config.layer.transformer(config.width, config.stages * config.layers))
        del self.final_norm
        self.shape, width = config, config.width
        given = [stage for stage in range(config.stages) if config.is_given(stage)]
        self.fuse = nn.ParameterList(torch.zeros(width, 2 * width) for _ in given)

    @property
    def dtype(self) -> torch.dtype:
        return self._some.dtype

    @property
    def device(self) -> torch.device:
        return self._some.device

    @property
    def _some(self) -> Tensor:
        return next(self.parameters())

    def initialise(self, seed: int = 0) -> Adaptation:
        """Every stage passes the state on."""
        _begin(self.blocks, seed)
        with torch.no_grad():
            for fuse in self.fuse:
                fuse[:, self.shape.width :] = torch.eye(self.shape.width)
        return self

    @torch.inference_mode()
    def forward(self, feed: Feed, cache: Cache, hidden_layers: Collection[int] = ()) -> Read:
        """Of whatever layer is asked for, the stages' outputs."""
        assert feed.states_BND is not None
        tables = self._rope_tables()
        cos, sin = tables[0][feed.positions_BN, None], tables[1][feed.positions_BN, None]
        said = self._said(feed.states_BND, lambda index, block, x: self._block(index, block, x, cos, sin, feed, cache))
        return Read(feed.wanted(said)[..., :0], dict.fromkeys(hidden_layers, said))

    def encode(self, x_BND: Tensor) -> Tensor:
        """Of whole texts, in training."""
        tables = self._rope_tables()
        cos, sin = tables[0][: x_BND.shape[1], None], tables[1][: x_BND.shape[1], None]

        def whole(index: int, block: Layer, x: Tensor) -> Tensor:
            q, k, v = self._project(block, ops.rms_norm(x, block.attention_norm, self.config.norm_eps), cos, sin)
            mixed = self._mix_whole(index, q.to(v.dtype), k.to(v.dtype), v)
            return self._mlp(block, x + ops.linear(mixed, block.out.weight))

        return self._said(x_BND, whole)

    def _said(self, both_BNM: Tensor, through: Through) -> Tensor:
        x, embedded = both_BNM.to(self.dtype).chunk(2, -1)
        said = []
        for stage in range(self.shape.stages):
            if self.shape.is_given(stage):
                x = ops.linear(torch.cat((embedded, x), -1), self.fuse[stage]).to(x.dtype)
            for index in range(stage * self.shape.layers, (stage + 1) * self.shape.layers):
                block = self.blocks[index]
                assert isinstance(block, Layer)
                x = through(index, block, x)
            said.append(x)
        return torch.cat(said, -1)


class AutoEmbedding(nn.Module):
    """Heads attend to one another, at one place of one text. positions: [K, D]."""

    def __init__(self, config: AmphistaConfig):
        super().__init__()
        assert config.layer is not None
        self.config, self.one_way = config.layer, config.auto_embedding == ONE_WAY
        shape = config.layer.transformer(config.width)
        self.positions = nn.Parameter(torch.zeros(config.heads, config.width)) if config.ae_positions else None
        self.blocks = nn.ModuleList(Layer(shape) for _ in range(config.ae_layers))
        self.has_mlp = config.ae_mlp
        for block in self.blocks if not config.ae_mlp else ():
            del block.mlp_norm, block.gate_up, block.down

    def initialise(self, seed: int) -> None:
        _begin(self.blocks, seed)

    def forward(self, y_PKD: Tensor) -> Tensor:
        if self.positions is not None:
            y_PKD = y_PKD + self.positions
        for block in self.blocks:
            assert isinstance(block, Layer)
            y_PKD = self._block(block, y_PKD)
        return y_PKD

    def _block(self, block: Layer, x: Tensor) -> Tensor:
        config, (places, count, _) = self.config, x.shape
        normed = ops.rms_norm(x, block.attention_norm, config.norm_eps)
        fused = ops.linear(normed, block.qkv.weight).view(places, count, -1, config.head_dim)
        q, k, v = torch.split(fused, [config.heads, config.kv_heads, config.kv_heads], 2)
        scale = config.head_dim**-0.5
        mixed = ops.causal_attention(q, k, v, scale) if self.one_way else ops.attention(q, k, v, None, scale)
        x = x + ops.linear(mixed, block.out.weight)
        if not self.has_mlp:
            return x
        h = ops.linear(ops.rms_norm(x, block.mlp_norm, config.norm_eps), block.gate_up.weight)
        return x + ops.linear(ops.silu_gate(h), block.down.weight)


def _begin(blocks: nn.ModuleList, seed: int) -> None:
    """Layers that add nothing yet: random but for their outputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in blocks.named_parameters():
            if weight.dim() == 2:
                std = 0.0 if name.endswith(("out.weight", "down.weight")) else 0.02
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)


class AmphistaHeads(HeadsModule):
    """adaptation: the stages, or None; mlps [K, D, D] and mlp_biases [K, D], W and b of the heads; embedding: the block
    between them, or None; vocabulary [K, V, D], or None for the target's own."""

    def __init__(self, config: AmphistaConfig):
        super().__init__(config)
        self.config, self.count = config, config.heads
        self.adaptation = Adaptation(config) if config.stages else None
        self.mlps = nn.Parameter(torch.zeros(config.heads, config.width, config.width))
        self.mlp_biases = nn.Parameter(torch.zeros(config.heads, config.width))
        self.embedding = AutoEmbedding(config) if config.auto_embedding != NONE else None
        own = config.vocabulary == "own"
        self.vocabulary = nn.Parameter(torch.zeros(config.heads, config.candidates, config.width)) if own else None

    def initialise(self, head_VD: Tensor, seed: int = 0) -> AmphistaHeads:
        """Before training every head says what the target says of the token that is known already."""
        if self.adaptation is not None:
            self.adaptation.initialise(seed)
        if self.embedding is not None:
            self.embedding.initialise(seed + 1)
        if self.vocabulary is not None:
            with torch.no_grad():
                self.vocabulary.copy_(self.of_known(head_VD).expand_as(self.vocabulary))
        return self

    def linear_context(self, context_PD: Tensor) -> Tensor:
        """What the first stage passes on, which is the state before training."""
        return context_PD[:, : self.config.width]

    def start_from(self, maps: Sequence[Tensor], head_VD: Tensor) -> None:
        """Into the projections of their own, as Medusa's heads; shared ones leave no place for it."""
        with torch.no_grad():
            for head, guess in enumerate(maps if self.vocabulary is not None else ()):
                self.vocabulary[head].copy_(self.of_known(head_VD) @ guess)  # type: ignore[index]

    def seen(self, states: Mapping[int, Tensor], places: Places) -> Tensor:
        """What the stages say, side by side, [P, stages D]; without any, the target's state."""
        if self.adaptation is None:
            return super().seen(states, places)
        (states_BND,) = states.values()
        both = torch.cat((states_BND[:, :-1], places.embedded_BND[:, 1:].to(states_BND.dtype)), -1)
        return self.adaptation.encode(both)[places.rows_P, places.places_P]

    def logits(self, context_PD: Tensor, embedded_PKD: Tensor, head_VD: Tensor) -> Tensor:
        return self.project(self.embed(self.head_states(context_PD)), head_VD)

    def head_states(self, context_PD: Tensor) -> Tensor:
        """What the heads make of their stages, [K, P, D], before they hear one another."""
        first, last = context_PD[:, : self.config.width], context_PD[:, -self.config.width :]
        split = self.config.split
        z_KPD = torch.cat((first.expand(split, -1, -1), last.expand(self.count - split, -1, -1)))
        return z_KPD + F.silu(torch.baddbmm(self.mlp_biases[:, None], z_KPD, self.mlps.transpose(1, 2)))

    def embed(self, y_KPD: Tensor) -> Tensor:
        """The same once they have."""
        if self.embedding is None:
            return y_KPD
        mixed: Tensor = self.embedding(torch.stack(tuple(y_KPD), 1))  # a view's strides would slow every product
        return mixed.transpose(0, 1)

    def project(self, y_KPD: Tensor, head_VD: Tensor) -> Tensor:
        if self.vocabulary is None:
            rows = y_KPD.flatten(0, 1)  # a plain product: strided batches would have the matrix copied K times
            return F.linear(rows, head_VD).view(*y_KPD.shape[:2], -1)
        return torch.bmm(y_KPD, self.vocabulary.transpose(1, 2))


def fitted(fields: dict[str, Any], network: Network) -> dict[str, Any]:
    """The fields of a config, with layers like the target's."""
    return {"layer": layer_like(network)} | fields
