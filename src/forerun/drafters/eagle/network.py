"""The network of EAGLE: the target's states, each with the token behind it, through a layer, to the
next state.

    pair t    (f_t, x_{t+1}): a state of the target and the token behind it; its position is t, the state's
    EAGLE-1   u = W [E(x); f] + b, through a decoder layer without an input norm, is f'_{t+1}: a guess at
              the target's state behind its last norm, which the target's own projection reads as it is
    EAGLE-3   g = W [l; m; h], of three states of the target; attention reads [norm(E(x)); norm(g)], the
              residual is g; the output o_{t+1} is read through a norm and a projection, mostly its own
    further   the next pair is (f' or o, the token that was drafted): nothing is fused again

After a specification that was made from the papers' code (SafeAILab/EAGLE); the norms that a config
may ask for beside EAGLE-3's own are those of speculators' `eagle3`. Departures: the fusion begins by
passing the newest state and EAGLE-3's projection as the target's, not at random; rotary frequencies
are the target's (EAGLE-3's training code has the base 10000 whatever the target has).

In training a place t is unrolled: step s reads what step s - 1 said there and the true token
x_{t+1+s}, at position t + s; it sees the pairs of the text up to t and its own earlier steps. That
is what drafting does with the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from forerun.drafters.eagle import LAST, EagleConfig
from forerun.drafting.heads import HeadsModule, Places, grow, layer_like, quieten
from forerun.nn import ops
from forerun.nn.cache import Cache
from forerun.nn.feed import Feed, Read
from forerun.nn.network import Network
from forerun.nn.transformer import Layer, Transformer

NOISE, NOISE_LENGTH = 0.1, 512
"""The most that is added to a state in training, and the length of a text at which the code's noise is that."""

Angles = tuple[Tensor, Tensor]
Mix = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, queries, keys, values) to what attention makes of them."""


class EagleStack(Transformer):
    """The layers, with what leads into them and out: a network that reads tokens and states of width D.

    It gives its output back as its last hidden state, to be read next. Embedding and projection may be the target's
    (`lend`).
    """

    def __init__(self, config: EagleConfig):
        assert config.layer is not None
        width, sources = config.width, len(config.sources)
        super().__init__(
            config.layer.transformer(width, config.layers, qkv_bias=config.qkv_bias, qk_norm=config.qk_norm)
        )
        self.form = config
        first = self.first
        if config.fused:
            first.qkv = nn.Linear(2 * width, first.qkv.out_features, bias=config.qkv_bias)
            self.state_norm = nn.Parameter(torch.ones(width))
            self.fuse = nn.Parameter(torch.zeros(width, sources * width))
        else:
            del first.attention_norm, self.final_norm
            self.fuse = nn.Parameter(torch.zeros(width, 2 * width))
        self.fuse_bias = nn.Parameter(torch.zeros(width)) if config.fuse_bias else None
        normed = (sources, width) if config.sources_normed else (1, sources * width) if config.joined_normed else None
        self.fuse_norm = nn.Parameter(torch.ones(normed)) if normed else None
        own = config.vocabulary == "own"
        self.vocabulary = nn.Parameter(torch.zeros(config.candidates, width)) if own else None
        self._lent: tuple[Tensor, Tensor] | None = None

    @property
    def first(self) -> Layer:
        block = self.blocks[0]
        assert isinstance(block, Layer)
        return block

    @property
    def dtype(self) -> torch.dtype:
        return self.fuse.dtype

    @property
    def device(self) -> torch.device:
        return self.fuse.device

    def lend(self, embedding_VD: Tensor, head_VD: Tensor) -> EagleStack:
        """Read tokens, and score them, with these matrices of the target, as far as it has none of its own. head: the
        rows of tokens that can be proposed."""
        self._lent = embedding_VD, head_VD if self.vocabulary is None else self.vocabulary
        return self

    def fused(self, states_BNM: Tensor) -> Tensor:
        """What a pair reads of the target's states of its sources, side by side: [..., M D] to [..., D]."""
        x = states_BNM.to(self.dtype)
        if not self.form.fused:
            return x
        if self.fuse_norm is not None:  # of every source, or of all of them
            parts = x.view(*x.shape[:-1], -1, self.fuse_norm.shape[-1])
            x = (F.rms_norm(parts, parts.shape[-1:], eps=self.config.norm_eps) * self.fuse_norm).flatten(-2)
        return ops.linear(x, self.fuse).to(self.dtype)

    def run(self, states_BND: Tensor, embedded_BND: Tensor, angles: Angles, mix: Mix) -> tuple[Tensor, Tensor]:
        """The output that the next step reads, and the one that is scored, [B, N, D] each."""
        x, read = self._begin(states_BND, embedded_BND.to(self.dtype))
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Layer)
            if index:
                read = ops.rms_norm(x, block.attention_norm, self.config.norm_eps)
            mixed = mix(index, *self._project(block, read, *angles))
            x = self._mlp(block, x + ops.linear(mixed, block.out.weight))
        if not self.form.fused:
            return x, x
        scored = ops.rms_norm(x, self.final_norm, self.config.norm_eps)
        return (scored if self.form.output_normed else x), scored

    def _begin(self, states: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """The residual, and what the first layer's attention reads."""
        if not self.form.fused:
            x = ops.linear(torch.cat((embedded, states), -1), self.fuse, self.fuse_bias).to(self.dtype)
            return x, x
        eps = self.config.norm_eps
        normed = ops.rms_norm(states, self.state_norm, eps)
        read = torch.cat((ops.rms_norm(embedded, self.first.attention_norm, eps), normed), -1)
        return (normed if self.form.residual_normed else states), read

    def angles(self, positions_BN: Tensor) -> Angles:
        cos, sin = self._rope_tables()
        inside = positions_BN.clamp(max=self.max_length - 1)
        return cos[inside, None], sin[inside, None]

    @torch.inference_mode()
    def forward(self, feed: Feed, cache: Cache, hidden_layers: Collection[int] = ()) -> Read:
        """See `Network`. The states to read are of width D: the target's, fused, or its own."""
        assert self._lent is not None and feed.states_BND is not None
        embedding, head = self._lent

        def mix(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.append(index, feed, k, v)
            return ops.attention(q, keys, values, feed.bias(), self.config.head_dim**-0.5)

        states = feed.states_BND.to(self.dtype)
        said, scored = self.run(states, embedding[feed.tokens_BN], self.angles(feed.positions_BN), mix)
        hidden = {self.config.layers: said} if self.config.layers in hidden_layers else {}
        return Read(ops.linear(feed.wanted(scored), head), hidden)


class EagleModule(HeadsModule):
    """All of it is in `stack`. The steps of a place are its heads: `taught` of them in training, else all that are
    looked at."""

    sees_tokens = True
    solvable = False

    def __init__(self, config: EagleConfig):
        super().__init__(config)
        self.config, self.count, self.foresees = config, config.heads, not config.fused
        self.stack = EagleStack(config)

    @property
    def taught(self) -> int:
        return self.config.taught

    def train(self, mode: bool = True) -> EagleModule:
        self.count = self.config.taught if mode else self.config.heads
        super().train(mode)
        return self

    def initialise(self, head_VD: Tensor, seed: int = 0) -> EagleModule:
        """The newest state passes the fusion; the layers begin at random."""
        width = self.config.width
        self.stack.initialise(seed)
        with torch.no_grad():
            self.stack.fuse.zero_()
            self.stack.fuse[:, -width:] = torch.eye(width)
            if self.stack.fuse_norm is not None:
                self.stack.fuse_norm.fill_(1.0)
            if self.stack.vocabulary is not None:
                self.stack.vocabulary.copy_(self.of_known(head_VD))
        return self

    def grow_from(self, smaller: EagleModule) -> None:
        grow(self, smaller)
        quieten(self.stack.blocks[smaller.config.layers :])

    def reads(self, top: int) -> tuple[int, ...]:
        return tuple(top if source == LAST else source for source in self.config.sources)

    def table(self, embedding_VD: Tensor) -> Tensor:
        return embedding_VD[:, :0]  # `seen` has read the tokens already

    # ---- in training

    def seen(self, states: Mapping[int, Tensor], places: Places) -> Tensor:
        """What every step says at every place, to be scored, [P, K, D]."""
        said = self._noised(torch.cat(list(states.values()), -1).to(self.stack.dtype))
        said, found, memory = self.stack.fused(said), list[Tensor](), _Unrolled(self.stack)
        text = torch.arange(said.shape[1], device=said.device)[None]
        longer = F.pad(places.embedded_BND, (0, 0, 0, self.count))
        for step in range(self.count):
            behind = longer[:, step + 1 : step + 1 + places.embedded_BND.shape[1]]
            said, scored = self.stack.run(said, behind, self.stack.angles(text + step), memory.mix)
            found.append(scored[places.rows_P, places.places_P])
        return torch.stack(found, 1)

    def _noised(self, states: Tensor) -> Tensor:
        """Uniform noise on the target's states. The paper's is "flat", its code's falls with the batch's length."""
        kind = self.config.noise
        if not self.training or kind == "none":
            return states
        most = NOISE if kind == "flat" else NOISE * NOISE_LENGTH / states.shape[1]
        return states + (2 * torch.rand(states.shape, device=states.device) - 1).to(states.dtype) * most

    def foreseen(self, context_PD: Tensor) -> Tensor:
        return context_PD.transpose(0, 1)

    def logits(self, context_PD: Tensor, embedded_PKD: Tensor, head_VD: Tensor) -> Tensor:
        return F.linear(context_PD.transpose(0, 1), head_VD if self.stack.vocabulary is None else self.stack.vocabulary)


class _Unrolled:
    """Attention of steps that are unrolled at every place of whole texts: the first sees the text, each further one the
    text's first step up to its place, and of the others those of its own place alone."""

    def __init__(self, stack: EagleStack):
        self._scale = stack.config.head_dim**-0.5
        self._kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in stack.blocks]

    def mix(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        steps, q, k = self._kept[layer], q.to(v.dtype), k.to(v.dtype)
        steps.append((k, v))
        if len(steps) == 1:
            return ops.causal_attention(q, k, v, self._scale)
        keys, values = ([step[kind] for step in steps] for kind in (0, 1))
        found: Tensor = checkpoint(_mixed, q * self._scale, keys, values, use_reentrant=False)
        return found


def _mixed(q_BNHE: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """[B, N, H E]. keys, values: [B, N, G, E] of every step, the text's first."""
    (text_k, *own_k), (text_v, *own_v) = keys, values
    q = q_BNHE.view(*q_BNHE.shape[:2], text_k.shape[2], -1, q_BNHE.shape[3])
    of_text = torch.einsum("bngre,bmge->bgrnm", q, text_k)
    own = torch.einsum("bngre,bnsge->bgrns", q, torch.stack(own_k, 2))
    entries = torch.arange(q.shape[1], device=q.device)
    of_text = of_text.masked_fill(entries > entries[:, None], float("-inf"))
    law = torch.cat((of_text, own), -1).softmax(-1, torch.float32).to(q.dtype)
    to_text, to_own = torch.split(law, [q.shape[1], len(own_k)], -1)
    mixed = torch.einsum("bgrnm,bmge->bngre", to_text, text_v)
    mixed = mixed + torch.einsum("bgrns,bnsge->bngre", to_own, torch.stack(own_v, 2))
    return mixed.flatten(2)


def fitted(fields: dict[str, Any], network: Network) -> dict[str, Any]:
    """The fields of a config, with layers like the target's; EAGLE-3's with its sources."""
    sources = {"sources": sources_of(network.cache_shape.layers)} if fields.get("fused") else {}
    return {"layer": layer_like(network)} | sources | fields


def sources_of(top: int) -> tuple[int, ...]:
    """EAGLE-3's of so many layers: the streams that enter layers 2, half of them and the third from the end."""
    return tuple(sorted({min(2, top - 1), top // 2, max(0, top - 3)}))
