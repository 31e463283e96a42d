"""A transformer whose parts count as much as masks say, and the same model with the masks folded into its weights.

Masks are of layers, of the dimensions of the residual stream (one for the whole model), of heads and of the units of
the multilayer perceptrons; 0: not there, 1: as it was (Sheared LLaMA, arXiv 2310.06694, section 2). A norm takes its
mean square over the dimensions that are there. We fold in two other ways than the authors' code. A head's mask goes
into the columns of the output projection and not into the rows of the values, which several heads may share. And the
mask of the dimensions meets the logits once: through the final norm, or through the embedding where that is the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from forerun.nn import ops
from forerun.nn.transformer import Layer, Transformer, TransformerConfig


@dataclass(frozen=True)
class Masks:
    """How much counts: layers [L], dimensions [D], heads [L, H], units [L, F]."""

    layers_L: Tensor
    hidden_D: Tensor
    heads_LH: Tensor
    units_LF: Tensor

    @staticmethod
    def ones(config: TransformerConfig, device: torch.device | None = None) -> Masks:
        shapes = (config.layers,), (config.width,), (config.layers, config.heads), (config.layers, config.mlp_width)
        return Masks(*(torch.ones(shape, device=device) for shape in shapes))


class Masked(Transformer):
    """A model with masks, on the very parameters of another one. Of the training forward (`encode`) alone."""

    def __init__(self, module: Transformer, masks: Masks):
        nn.Module.__init__(self)
        self.config, self.masks, self._rope = module.config, masks, None
        self.embedding, self.blocks, self.head = module.embedding, module.blocks, module.head
        self.final_norm = module.final_norm

    def encode(self, x_BND: Tensor) -> Tensor:
        masks, tables = self.masks, self._rope_tables()
        cos, sin = tables[0][: x_BND.shape[1], None], tables[1][: x_BND.shape[1], None]
        x = x_BND.to(self.dtype) * masks.hidden_D
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Layer)
            self.tell_layer(index, x)
            counts_D = masks.layers_L[index] * masks.hidden_D
            q, k, v = self._project(block, self._norm(index, x, block.attention_norm), cos, sin)
            mixed = self._mix_whole(index, q.to(v.dtype), k.to(v.dtype), v)
            mixed = mixed.view(*mixed.shape[:2], self.config.heads, -1)
            self.tell_heads(index, mixed)
            mixed = (mixed * masks.heads_LH[index, :, None]).flatten(-2)
            x = x + counts_D * ops.linear(mixed, block.out.weight, block.out.bias)
            h = self._norm(index, x, block.mlp_norm)
            h = ops.silu_gate(ops.linear(h, block.gate_up.weight, block.gate_up.bias))
            self.tell_units(index, h)
            x = x + counts_D * ops.linear(h * masks.units_LF[index], block.down.weight, block.down.bias)
        self.tell_layer(len(self.blocks), x)
        return self._norm(len(self.blocks), x, self.final_norm)

    def _norm(self, index: int, x: Tensor, weight: Tensor) -> Tensor:
        hidden_D = self.masks.hidden_D
        kept = int((hidden_D > 0).sum())
        if kept == len(hidden_D):
            normed = ops.rms_norm(x, weight, self.config.norm_eps)
        else:
            square = x.float().square().sum(-1, keepdim=True) / max(1, kept)
            normed = (x * torch.rsqrt(square + self.config.norm_eps)).to(x.dtype) * weight
        normed = normed * hidden_D
        self.tell_normed(index, normed)
        return normed

    def tell_layer(self, index: int, x_BND: Tensor) -> None:
        """The residual stream entering a layer, or leaving the last."""

    def tell_normed(self, index: int, x_BND: Tensor) -> None:
        """What a norm gives, in a layer or behind the last."""

    def tell_heads(self, index: int, mixed_BNHE: Tensor) -> None:
        """What a layer's heads give."""

    def tell_units(self, index: int, inner_BNF: Tensor) -> None:
        """What stands between the two halves of a layer's perceptron."""


@torch.no_grad()
def folded(module: Transformer, masks: Masks) -> Transformer:
    """A model without masks, of the same shape, that says the same as long as nothing is masked out of the stream;
    where dimensions are, it does so once they are left out (`slicing.sliced`)."""
    config = module.config
    made = Transformer(config)
    made.load_state_dict({name: value.detach().clone() for name, value in module.state_dict().items()})
    made.embedding.weight.mul_(masks.hidden_D)
    if config.tied:
        made.head.weight = made.embedding.weight
    else:
        made.final_norm.mul_(masks.hidden_D)
    for index, block in enumerate(made.blocks):
        assert isinstance(block, Layer)
        counts_D = masks.layers_L[index] * masks.hidden_D
        block.attention_norm.mul_(masks.hidden_D)
        block.mlp_norm.mul_(masks.hidden_D)
        by_head = masks.heads_LH[index].repeat_interleave(config.head_dim)
        block.out.weight.mul_(by_head).mul_(counts_D[:, None])
        block.down.weight.mul_(masks.units_LF[index]).mul_(counts_D[:, None])
        for bias in (block.out.bias, block.down.bias):
            if bias is not None:
                bias.mul_(counts_D)
    return made


def named(masks: Masks) -> Mapping[str, Tensor]:
    """For a checkpoint."""
    return {"layers": masks.layers_L, "hidden": masks.hidden_D, "heads": masks.heads_LH, "units": masks.units_LF}
