"""Parts of a model: which stay, and that the model of them says what the whole one says with the others masked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from forerun.errors import TrainingError
from forerun.nn.transformer import Layer, Transformer, TransformerConfig
from forerun.train.pruning.importance import Importance
from forerun.train.pruning.masks import Masked, Masks, folded
from forerun.train.pruning.shape import Shape
from forerun.train.pruning.slicing import Kept, compacted, kept, sliced

CONFIG = TransformerConfig(
    vocab_size=40, width=24, layers=4, heads=4, kv_heads=2, head_dim=6, mlp_width=20, max_length=32
)
FAMILIES = {
    "llama": CONFIG,
    "tied": replace(CONFIG, tied=True),
    "one key head per head": replace(CONFIG, kv_heads=4),
    "biases": replace(CONFIG, qkv_bias=True, out_bias=True, mlp_bias=True),
    "normed queries": replace(CONFIG, qk_norm=True),
    "a large epsilon": replace(CONFIG, norm_eps=0.1),
}
TOKENS = torch.arange(20).view(2, 10) * 7 % 40


def model(config: TransformerConfig, seed: int = 0) -> Transformer:
    """Every parameter is random, norms and biases too."""
    torch.manual_seed(seed)
    made = Transformer(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.4 + (1 if parameter.dim() == 1 else 0))
    return made


def logits(module: Transformer) -> Tensor:
    with torch.no_grad():
        return F.linear(module.features(TOKENS), module.head.weight)


def random_masks(config: TransformerConfig, zeros: bool) -> Masks:
    """Values in (0, 1); with zeros a layer is gone, one has lost its attention, and parts of everything are missing."""
    torch.manual_seed(1)
    layers, hidden = torch.rand(config.layers), torch.rand(config.width)
    heads, units = torch.rand(config.layers, config.heads), torch.rand(config.layers, config.mlp_width)
    if zeros:
        layers[1], hidden[3:9], heads[2], units[:, ::3] = 0, 0, 0, 0
        heads[:, 1] = 0
    return Masks(layers, hidden, heads, units)


def left(config: TransformerConfig, masks: Masks) -> Kept:
    """Everything but the layers and dimensions that are masked out, and the units that are in every layer."""
    layers = tuple(torch.nonzero(masks.layers_L)[:, 0].tolist())
    hidden = tuple(torch.nonzero(masks.hidden_D)[:, 0].tolist())
    units = tuple(torch.nonzero(masks.units_LF.sum(0))[:, 0].tolist())
    whole = Kept.all_of(config)
    few = len(layers)
    return Kept(layers, hidden, whole.heads[:few], whole.kv_heads[:few], (units,) * few)


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("zeros", [False, True], ids=["values", "zeros"])
def test_folded_masks_say_what_masks_say(config: TransformerConfig, zeros: bool) -> None:
    module, masks = model(config), random_masks(config, zeros)
    masked = logits(Masked(module, masks))
    pruned = sliced(folded(module, masks), left(config, masks))
    assert pruned.config.layers == (3 if zeros else 4) and pruned.config.width == (18 if zeros else 24)
    torch.testing.assert_close(logits(pruned), masked, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(module), masked, atol=0.1), "the masks do something"


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_all_ones_and_all_parts_change_no_bit(config: TransformerConfig) -> None:
    module = model(config)
    ones = Masks.ones(config)
    assert torch.equal(logits(Masked(module, ones)), logits(module))
    assert torch.equal(logits(sliced(folded(module, ones), Kept.all_of(config))), logits(module))


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_a_part_is_the_whole_with_the_rest_masked(config: TransformerConfig) -> None:
    """Whole groups of heads go, and heads within groups."""
    module, scores = model(config), random_masks(config, zeros=False)
    small = Shape(2, 16, 12, 2, 2 if config.kv_heads == 2 else None)
    parts = kept(scores, config, small.within(config))
    masks = Masks(*(torch.zeros_like(mask) for mask in vars(Masks.ones(config)).values()))
    for place, layer in enumerate(parts.layers):
        masks.layers_L[layer] = 1
        masks.heads_LH[layer, list(parts.heads[place])] = 1
        masks.units_LF[layer, list(parts.units[place])] = 1
    masks.hidden_D[list(parts.hidden)] = 1
    pruned = sliced(module, parts)
    assert (pruned.config.heads, pruned.config.kv_heads) == (2, 2)
    torch.testing.assert_close(logits(pruned), logits(Masked(module, masks)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_columns_that_are_zero_everywhere_are_dropped(config: TransformerConfig) -> None:
    """What reads them may be anything."""
    module, unused = model(config), [2, 3, 11, 23]
    with torch.no_grad():
        module.embedding.weight[:, unused] = 0
        for block in module.blocks:
            assert isinstance(block, Layer)
            for part in (block.out, block.down):
                part.weight[unused] = 0
                if part.bias is not None:
                    part.bias[unused] = 0
    compact = compacted(module)
    assert compact.config.width == 20 and compact.config.head_dim == 6
    torch.testing.assert_close(logits(compact), logits(module), atol=1e-4, rtol=1e-4)
    with pytest.raises(TrainingError, match="as compact as it can be"):
        compacted(compact)


def test_the_parts_that_do_nothing_go() -> None:
    """A dimension that nothing writes, a layer, a head and units whose work is zero."""
    module = model(CONFIG)
    with torch.no_grad():
        for block in module.blocks:
            assert isinstance(block, Layer)
            block.attention_norm[5] = block.mlp_norm[5] = 0
            block.qkv.weight[-6:] = 0  # the values of the second group
            block.gate_up.weight[[3, 11]] = 0
        module.final_norm[5] = 0
        idle = module.blocks[2]
        assert isinstance(idle, Layer)
        idle.out.weight.zero_()
        idle.down.weight.zero_()
    reading = Importance(module)
    reading.read(TOKENS, torch.ones_like(TOKENS, dtype=torch.bool))
    shape = replace(CONFIG, layers=3, width=23, mlp_width=18, heads=2, kv_heads=1)
    parts = kept(reading.sums, CONFIG, shape)
    assert parts.layers == (0, 1, 3)
    assert 5 not in parts.hidden and len(parts.hidden) == 23
    assert set(parts.heads) == {(0, 1)} and set(parts.kv_heads) == {(0,)}
    assert all({3, 11}.isdisjoint(units) for units in parts.units)


def test_padding_does_not_count() -> None:
    module, valid = model(CONFIG), torch.ones_like(TOKENS, dtype=torch.bool)
    valid[1, 4:] = False
    other = TOKENS.clone()
    other[1, 4:] = 0
    one, two = Importance(module), Importance(module)
    for reading, tokens in ((one, TOKENS), (two, other)):
        reading.read(tokens, valid)
    assert one.tokens == 14
    for ours, theirs in zip(one.state().values(), two.state().values(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_first_and_the_last_layer_stay_whatever_they_do() -> None:
    scores = replace(random_masks(CONFIG, zeros=False), layers_L=torch.tensor([0.1, 0.5, 0.9, 0.2]))
    target = replace(CONFIG, layers=4)
    assert kept(scores, target, Shape(3).within(target)).layers == (0, 2, 3)
    assert kept(scores, target, Shape(2).within(target)).layers == (0, 3)
    assert kept(scores, target, Shape(3).within(target), "even").layers == (0, 2, 3)
    with pytest.raises(TrainingError, match="picked by 'luck'"):
        kept(scores, target, Shape(3).within(target), "luck")


@pytest.mark.parametrize(
    ("written", "sizes"),
    [
        ("2x12", (2, 12, 20, 4, 2)),
        ("4", (4, 24, 20, 4, 2)),
        ("1x8x10", (1, 8, 10, 4, 2)),
        ("1x8x10x2", (1, 8, 10, 2, 2)),
        ("1X8x10x1", (1, 8, 10, 1, 1)),
        ("1x8x10x2/1", (1, 8, 10, 2, 1)),
    ],
)
def test_a_shape_is_written_as_people_do(written: str, sizes: tuple[int, ...]) -> None:
    config = Shape.read(written).within(CONFIG)
    assert (config.layers, config.width, config.mlp_width, config.heads, config.kv_heads) == sizes
    assert Shape.read(str(Shape.of(config))) == Shape.of(config)


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("wide", "no shape"),
        ("5x12", "layers 5"),
        ("2x99", "width 99"),
        ("2x12x10x4/1", "share one"),
        ("0x8", "layers"),
        ("2x15", "its heads divide"),
    ],
)
def test_a_shape_that_the_target_does_not_have_is_refused(written: str, reason: str) -> None:
    with pytest.raises(TrainingError, match=reason):
        Shape.read(written).within(CONFIG)
