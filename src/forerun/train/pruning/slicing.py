"""Which parts of a model stay, and the model of these parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from forerun.errors import TrainingError
from forerun.nn.transformer import Layer, Transformer, TransformerConfig
from forerun.train.pruning.masks import Masks

PICKS = ("influence", "even")
"""How layers are picked: by what they change, or evenly spaced."""


@dataclass(frozen=True)
class Kept:
    """Indices that stay, ascending: layers, dimensions, and of every layer its heads, key heads and units."""

    layers: tuple[int, ...]
    hidden: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    kv_heads: tuple[tuple[int, ...], ...]
    units: tuple[tuple[int, ...], ...]

    @staticmethod
    def all_of(config: TransformerConfig) -> Kept:
        def each(count: int) -> tuple[tuple[int, ...], ...]:
            return (tuple(range(count)),) * config.layers

        layers, hidden = tuple(range(config.layers)), tuple(range(config.width))
        return Kept(layers, hidden, each(config.heads), each(config.kv_heads), each(config.mlp_width))

    @staticmethod
    def of(fields: Mapping[str, Any]) -> Kept:
        """As JSON has it."""
        by_layer = (tuple(map(tuple, fields[name])) for name in ("heads", "kv_heads", "units"))
        return Kept(tuple(fields["layers"]), tuple(fields["hidden"]), *by_layer)


def kept(scores: Masks, target: TransformerConfig, shape: TransformerConfig, pick: str | None = "influence") -> Kept:
    """The parts with the highest scores. Of layers always the first and the last, unless `pick` is None; of heads as
    many in every group of those that share a key head, and of the groups those with the highest sums."""
    layers = _layers(scores.layers_L, shape.layers, pick) if pick else best(scores.layers_L, shape.layers)
    group = target.heads // target.kv_heads
    kv_heads, heads = [], []
    for layer in layers:
        by_group = scores.heads_LH[layer].view(target.kv_heads, group)
        groups = best(by_group.sum(1), shape.kv_heads)
        kv_heads.append(groups)
        each = shape.heads // shape.kv_heads
        heads.append(tuple(one * group + place for one in groups for place in best(by_group[one], each)))
    units = tuple(best(scores.units_LF[layer], shape.mlp_width) for layer in layers)
    return Kept(layers, best(scores.hidden_D, shape.width), tuple(heads), tuple(kv_heads), units)


def best(scores: Tensor, count: int) -> tuple[int, ...]:
    """The places of the highest scores, ascending; of equal ones the first."""
    order = torch.sort(scores, descending=True, stable=True).indices[:count]
    return tuple(sorted(order.tolist()))


def _layers(scores_L: Tensor, count: int, pick: str) -> tuple[int, ...]:
    """Ascending. One layer alone is the first."""
    total = len(scores_L)
    if pick not in PICKS:
        raise TrainingError(f"layers cannot be picked by {pick!r}: choose one of {', '.join(PICKS)}")
    if count == 1:
        return (0,)
    if pick == "even":
        return tuple(round(place * (total - 1) / (count - 1)) for place in range(count))
    inner = best(scores_L[1:-1], count - 2)
    return (0, *(1 + layer for layer in inner), total - 1)


@torch.no_grad()
def sliced(module: Transformer, parts: Kept) -> Transformer:
    """The model of these parts, with weights of its own."""
    source = module.config
    windows = tuple(source.windows[layer] for layer in parts.layers) if source.windows else ()
    config = replace(
        source,
        layers=len(parts.layers),
        width=len(parts.hidden),
        heads=len(parts.heads[0]),
        kv_heads=len(parts.kv_heads[0]),
        mlp_width=len(parts.units[0]),
        windows=windows,
    )
    made, hidden = Transformer(config), torch.tensor(parts.hidden)
    made.embedding.weight.copy_(module.embedding.weight[:, hidden])
    if not config.tied:
        made.head.weight.copy_(module.head.weight[:, hidden])
    made.final_norm.copy_(module.final_norm[hidden])
    for place, layer in enumerate(parts.layers):
        ours, theirs = made.blocks[place], module.blocks[layer]
        assert isinstance(ours, Layer) and isinstance(theirs, Layer)
        rows = _Rows.of(source, parts, place)
        for name, value in theirs.named_parameters():
            ours.get_parameter(name).copy_(rows.cut(name, value, hidden))
    return made


@dataclass(frozen=True)
class _Rows:
    """Which rows of a layer's matrices stay: of queries, keys and values; of what heads give; of gate and up; of what
    stands between."""

    qkv: Tensor
    mixed: Tensor
    gate_up: Tensor
    inner: Tensor

    @staticmethod
    def of(source: TransformerConfig, parts: Kept, place: int) -> _Rows:
        def wide(heads: Sequence[int], first: int = 0) -> list[int]:
            return [(first + head) * source.head_dim + at for head in heads for at in range(source.head_dim)]

        heads, keys, units = parts.heads[place], parts.kv_heads[place], parts.units[place]
        qkv = [*wide(heads), *wide(keys, source.heads), *wide(keys, source.heads + source.kv_heads)]
        gate_up = [*units, *(source.mlp_width + unit for unit in units)]
        return _Rows(*map(torch.tensor, (qkv, wide(heads), gate_up, units)))

    def cut(self, name: str, value: Tensor, hidden: Tensor) -> Tensor:
        """A parameter of the layer, by its name there."""
        outputs = {"qkv": self.qkv, "gate_up": self.gate_up, "out": hidden, "down": hidden}
        inputs = {"qkv": hidden, "gate_up": hidden, "out": self.mixed, "down": self.inner}
        part = name.partition(".")[0]
        if part in outputs:
            cut = value[outputs[part]]
            return cut[:, inputs[part]] if value.dim() == 2 else cut
        return value[hidden] if part in ("attention_norm", "mlp_norm") else value


@torch.no_grad()
def compacted(module: Transformer) -> Transformer:
    """The same model without the dimensions that nothing ever writes to, as published drafts have them that were pruned
    and stored at their source's width. A norm no longer counts them in its mean, so its weights grow by as much as that
    mean does, and its epsilon, too. TrainingError if there are none."""
    written = module.embedding.weight.abs().sum(0)
    for block in module.blocks:
        assert isinstance(block, Layer)
        for part in (block.out, block.down):
            written = written + part.weight.abs().sum(1) + (0 if part.bias is None else part.bias.abs())
    whole = Kept.all_of(module.config)
    hidden = tuple(torch.nonzero(written)[:, 0].tolist())
    if len(hidden) == module.config.width:
        raise TrainingError("every dimension of this model is written to: it is as compact as it can be")
    made, wider = sliced(module, replace(whole, hidden=hidden)), module.config.width / len(hidden)
    made.config = replace(made.config, norm_eps=made.config.norm_eps * wider)
    for name, parameter in made.named_parameters():
        if name.rpartition(".")[2] in ("attention_norm", "mlp_norm", "final_norm"):
            parameter.mul_(wider**0.5)
    return made
