"""The one transformer: Llama, Mistral, Qwen2, Qwen3 and their relatives, as targets, drafts and in training.

The cached forward is one straight line over `nn/ops.py`: explicit positions, preallocated buffers,
no branch that looks at data. Query, key and value share one projection, gate and up another, so a
layer is four matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from forerun.nn import ops
from forerun.nn.backends.torch import TORCH, footprint_of
from forerun.nn.cache import Cache, CacheShape
from forerun.nn.feed import Feed, Read
from forerun.nn.network import Footprint, LayerShape

NO_VOCABULARY = "a transformer without a vocabulary reads states, not tokens: give states_BND"


@dataclass(frozen=True)
class TransformerConfig:
    """Every architectural choice; sizes in elements, `max_length` in tokens.

    With a `vocab_size` of 0 it is a stack of layers that reads states (`Feed.states_BND`) and gives
    states: nothing is embedded, nothing scored. `windows` holds one sliding-window size per layer
    (None: full attention). `inv_freq` are the rotary frequencies after any length scaling,
    `rope_scale` the factor that YaRN-like scalings put on cos and sin.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    max_length: int
    norm_eps: float = 1e-6
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    inv_freq: tuple[float, ...] = ()
    rope_scale: float = 1.0
    rope_theta: float = 10000.0
    source: dict[str, object] = field(default_factory=dict, compare=False)

    def frequencies(self) -> Tensor:
        """Rotary frequencies [head_dim / 2], fp32; those given, or `theta ** (-2i / head_dim)`."""
        if self.inv_freq:
            return torch.tensor(self.inv_freq, dtype=torch.float32)
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.int64).float() / self.head_dim
        return 1.0 / (self.rope_theta**exponents)

    @property
    def parameters(self) -> int:
        """How many numbers such a model has learnt."""
        return self.parameters_outside_vocabulary + self.vocab_size * self.width * (1 if self.tied else 2)

    @property
    def parameters_outside_vocabulary(self) -> int:
        return self.layers * self.layer_parameters + self.width

    @property
    def layer_parameters(self) -> int:
        """Of one layer."""
        width, queries, keys = self.width, self.heads * self.head_dim, self.kv_heads * self.head_dim
        biases = self.qkv_bias * (queries + 2 * keys) + self.out_bias * width
        biases += self.mlp_bias * (2 * self.mlp_width + width)
        norms = 2 * width + 2 * self.qk_norm * self.head_dim
        return 2 * width * (queries + keys) + 3 * width * self.mlp_width + biases + norms

    @property
    def cache_shape(self) -> CacheShape:
        return CacheShape(self.layers, self.kv_heads, self.head_dim)

    @property
    def layer_shape(self) -> LayerShape:
        return LayerShape(self.heads, self.mlp_width, self.norm_eps, self.rope_theta)


class Layer(nn.Module):
    """The parameters of one block; the arithmetic is in `Transformer`, where it can be read in one place."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        heads, kv_heads, dim = config.heads, config.kv_heads, config.head_dim
        self.attention_norm = nn.Parameter(torch.ones(config.width))
        self.qkv = nn.Linear(config.width, (heads + 2 * kv_heads) * dim, bias=config.qkv_bias)
        self.q_norm = nn.Parameter(torch.ones(dim)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(dim)) if config.qk_norm else None
        self.out = nn.Linear(heads * dim, config.width, bias=config.out_bias)
        self.mlp_norm = nn.Parameter(torch.ones(config.width))
        self.gate_up = nn.Linear(config.width, 2 * config.mlp_width, bias=config.mlp_bias)
        self.down = nn.Linear(config.mlp_width, config.width, bias=config.mlp_bias)


class Transformer(nn.Module):
    """A decoder-only transformer with fused projections. Weights come from `nn/load.py` or from training."""

    backend = TORCH
    no_tokens: Tensor | None = None
    home: Path | None = None

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        if config.vocab_size:
            self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.final_norm = nn.Parameter(torch.ones(config.width))
        if config.vocab_size:
            self.head = nn.Linear(config.width, config.vocab_size, bias=False)
            if config.tied:
                self.head.weight = self.embedding.weight
        self._rope: tuple[Tensor, Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.final_norm.dtype

    @property
    def weights(self) -> torch.dtype:
        return self.dtype

    @property
    def device(self) -> torch.device:
        return self.final_norm.device

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def max_length(self) -> int:
        return self.config.max_length

    @property
    def cache_shape(self) -> CacheShape:
        return self.config.cache_shape

    @property
    def windows(self) -> frozenset[int]:
        """The sliding-window sizes for which `forward` needs a mask of its own."""
        return frozenset(window for window in self.config.windows if window is not None)

    @property
    def input_embedding(self) -> Tensor:
        return self.embedding.weight

    @property
    def output_head(self) -> Tensor:
        return self.head.weight

    def head_matrix(self) -> Tensor:
        return self.head.weight

    @property
    def output_shape(self) -> tuple[int, int]:
        return self.config.vocab_size, self.config.width

    @property
    def layer_shape(self) -> LayerShape:
        return self.config.layer_shape

    @property
    def footprint(self) -> Footprint:
        return footprint_of(self, "forerun's own transformer, torch")

    def initialise(self, seed: int = 0) -> Transformer:
        """Random weights for training: normal with 0.02, residual outputs scaled down by sqrt(2 * layers) (GPT-2)."""
        generator = torch.Generator().manual_seed(seed)
        residual = 0.02 / math.sqrt(2 * self.config.layers)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if weight.dim() == 2:
                    std = residual if name.endswith(("out.weight", "down.weight")) else 0.02
                    weight.copy_(torch.randn(weight.shape, generator=generator) * std)
        return self

    @torch.inference_mode()
    def forward(self, feed: Feed, cache: Cache, hidden_layers: Collection[int] = ()) -> Read:
        """Read `feed` into the cache and score it.

        Args:
            feed: tokens, positions and cache places of B rows with N tokens each.
            cache: written at `feed.at_BN`; entries below `feed.span` are read.
            hidden_layers: which hidden states to return, numbered as transformers does: i is the residual stream
                entering layer i, `layers` is the output of the final norm.
        """
        tables = self._rope_tables()
        cos, sin = tables[0][feed.positions_BN, None], tables[1][feed.positions_BN, None]
        hidden: dict[int, Tensor] = {}
        x = self._inputs(feed)
        for index, block in enumerate(self.blocks):
            if index in hidden_layers:
                hidden[index] = x
            x = self._block(index, block, x, cos, sin, feed, cache)
        x = ops.rms_norm(x, self.final_norm, self.config.norm_eps)
        if self.config.layers in hidden_layers:
            hidden[self.config.layers] = x
        wanted = feed.wanted(x)
        return Read(ops.linear(wanted, self.head.weight) if self.vocab_size else wanted[..., :0], hidden)

    def _inputs(self, feed: Feed) -> Tensor:
        if feed.states_BND is not None:
            return feed.states_BND.to(self.dtype)
        if not self.vocab_size:
            raise ValueError(NO_VOCABULARY)
        return self.embedding.weight[feed.tokens_BN]

    def _block(
        self, index: int, block: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, feed: Feed, cache: Cache
    ) -> Tensor:
        assert isinstance(block, Layer)
        q, k, v = self._project(block, ops.rms_norm(x, block.attention_norm, self.config.norm_eps), cos, sin)
        keys, values = cache.append(index, feed, k, v)
        window = self.config.windows[index] if self.config.windows else None
        mixed = ops.attention(q, keys, values, feed.bias(window), self.config.head_dim**-0.5)
        return self._mlp(block, x + ops.linear(mixed, block.out.weight, block.out.bias))

    def _project(self, block: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        rows, count, _ = x.shape
        fused = ops.linear(x, block.qkv.weight, block.qkv.bias).view(rows, count, -1, config.head_dim)
        if block.q_norm is not None and block.k_norm is not None:
            q, k, v = torch.split(fused, [config.heads, config.kv_heads, config.kv_heads], 2)
            q = ops.rms_norm(q, block.q_norm, config.norm_eps)
            k = ops.rms_norm(k, block.k_norm, config.norm_eps)
            return ops.rotary(q, cos, sin), ops.rotary(k, cos, sin), v
        turned = ops.rotary(fused[:, :, : config.heads + config.kv_heads], cos, sin)
        return turned[:, :, : config.heads], turned[:, :, config.heads :], fused[:, :, -config.kv_heads :]

    def _mlp(self, block: Layer, x: Tensor) -> Tensor:
        h = ops.rms_norm(x, block.mlp_norm, self.config.norm_eps)
        h = ops.silu_gate(ops.linear(h, block.gate_up.weight, block.gate_up.bias))
        return x + ops.linear(h, block.down.weight, block.down.bias)

    def features(self, tokens_BN: Tensor) -> Tensor:
        """Final-norm states [B, N, D] of whole sequences from position 0, without a cache: the training forward."""
        return self.encode(self.embedding(tokens_BN))

    def encode(self, x_BND: Tensor) -> Tensor:
        """The same for whole sequences of states instead of tokens."""
        tables = self._rope_tables()
        cos, sin = tables[0][: x_BND.shape[1], None], tables[1][: x_BND.shape[1], None]
        x = x_BND.to(self.dtype)
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Layer)
            q, k, v = self._project(block, ops.rms_norm(x, block.attention_norm, self.config.norm_eps), cos, sin)
            mixed = self._mix_whole(index, q.to(v.dtype), k.to(v.dtype), v)
            x = self._mlp(block, x + ops.linear(mixed, block.out.weight, block.out.bias))
        return ops.rms_norm(x, self.final_norm, self.config.norm_eps)

    def _mix_whole(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention over whole sequences from position 0, in this layer's window if it has one."""
        window = self.config.windows[index] if self.config.windows else None
        scale = self.config.head_dim**-0.5
        if window is None or window >= q.shape[1]:
            return ops.causal_attention(q, k, v, scale)
        entries = torch.arange(q.shape[1], device=q.device)
        back = entries[:, None] - entries
        bias = torch.zeros((1, *back.shape), dtype=q.dtype, device=q.device)
        return ops.attention(q, k, v, bias.masked_fill((back < 0) | (back >= window), float("-inf")), scale)

    @torch.inference_mode(False)  # made while reading, the tables must still serve training
    def _rope_tables(self) -> tuple[Tensor, Tensor]:
        """cos and signed sin [max_length, head_dim] in the weights' dtype, made once."""
        if self._rope is None or self._rope[0].device != self.device or self._rope[0].dtype != self.dtype:
            cos, sin = rope_tables(self.config, self.max_length)
            self._rope = (
                torch.cat((cos, cos), -1).to(self.device, self.dtype),
                torch.cat((-sin, sin), -1).to(self.device, self.dtype),
            )
        return self._rope


def rope_tables(config: TransformerConfig, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, fp32 [length, head_dim / 2] each."""
    angles = torch.arange(length).float()[:, None] * config.frequencies()
    return angles.cos() * config.rope_scale, angles.sin() * config.rope_scale


def stack(weights: dict[str, Tensor], layers: Sequence[int]) -> dict[str, Tensor]:
    """Weights of a deeper model made by repeating blocks: growth by stacking ("Stacking Your Transformers", G_stack).

    `layers[i]` names the block of the shallow model that becomes block i of the deep one. The residual outputs keep
    their size, as in that paper.
    """
    deep = {name: value for name, value in weights.items() if not name.startswith("blocks.")}
    for new, old in enumerate(layers):
        prefix = f"blocks.{old}."
        deep |= {f"blocks.{new}.{n[len(prefix) :]}": v.clone() for n, v in weights.items() if n.startswith(prefix)}
    return deep
