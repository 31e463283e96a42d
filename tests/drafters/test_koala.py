"""Drafters of K layers (KOALA, arXiv 2408.08146, of which we know the abstract): their sizes, how they begin, and how
trained ones are grown. That what they draft changes nothing is shown beside those of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from drafters import heading
from drafters.heading import WIDTH, filled, lively, noise
from drafters.test_block import CONFIGS as BLOCKS
from drafters.test_eagle import CONFIGS as EAGLES
from drafters.test_eagle import ONE, TEXT, THREE, Heard, eagle, joined, row_of
from forerun.drafters.eagle import EagleConfig
from forerun.drafters.eagle.drafter import Pairs
from forerun.drafters.eagle.network import EagleModule
from forerun.drafters.hydra import HydraConfig
from forerun.drafters.medusa import MedusaConfig
from forerun.drafting import registry
from forerun.drafting.drafter import Context
from forerun.drafting.growth import StaticTree
from forerun.drafting.heads import HeadsModule
from forerun.drafting.trained import HeadsConfig, LayerConfig
from forerun.errors import DrafterError
from forerun.ranktree import RankTree

MEDUSA, HYDRA = heading.CONFIGS["medusa"], heading.CONFIGS["hydra"]
LAYERED: dict[str, HeadsConfig] = {
    "medusa": MEDUSA,
    "medusa, fused": heading.CONFIGS["medusa, fused"],
    "hydra": HYDRA,
    "hydra, deep": heading.CONFIGS["hydra, deep"],
    "hydra++": replace(heading.CONFIGS["hydra++"], layers=1),
    "eagle": ONE,
    "eagle, two layers and biases": EAGLES["eagle, two layers and biases"],
    "eagle3": THREE,
    "eagle3, part of the vocabulary": EAGLES["eagle3, part of the vocabulary"],
    "block": BLOCKS["one layer"],
}


def of(config: HeadsConfig) -> Any:
    return registry.trained_of(config)[1].network(config)


# ---- sizes


D = {"7B": 4096, "13B": 5120, "33B": 6656, "70B": 8192}
SIZES = {
    "7B": ((11008, 32), (0.236, 0.438, 0.641), (0.739, 0.823, 0.907)),
    "13B": ((13824, 40), (0.370, 0.687, 1.004), (0.950, 1.081, 1.212)),
    "33B": ((17920, 13), (0.557, 1.026, 1.494), (1.287, 1.508, 1.730)),
    "70B": ((28672, 8), (0.990, 1.846, 2.701), (1.646, 1.982, 2.317)),
}
"""Of a target's layers: the width of the perceptron, and how many key heads; then billions of parameters that K = 1, 2
and 3 layers have, of an EAGLE and of five Medusa heads."""
TOKENS = 32_000


def size_of(config: HeadsConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in of(config).parameters())


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_there_are_as_many_parameters_as_arithmetic_says(name: str, layers: int) -> None:
    (inner, keys), eagles, medusas = SIZES[name]
    d = D[name]
    medusa = size_of(MedusaConfig(d, TOKENS, 5, layers))
    assert medusa == 5 * (TOKENS * d + layers * (d * d + d)) and round(medusa / 1e9, 3) == medusas[layers - 1]
    layer = LayerConfig(d // 128, keys, 128, inner, 2048)
    one = size_of(EagleConfig(d, TOKENS, layers=layers, layer=layer))
    own = 2 * d * d + 2 * d * keys * 128 + 3 * d * inner
    norms = 2 * layers - 1  # the first layer has none before its attention, and there is no last one
    assert one == 2 * d * d + layers * own + norms * d and round(one / 1e9, 3) == eagles[layers - 1]


# ---- how they begin


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("config", [MEDUSA, HYDRA], ids=["medusa", "hydra"])
def test_untrained_heads_of_any_depth_say_what_the_target_says(config: MedusaConfig | HydraConfig, layers: int) -> None:
    head, states = lively().head.weight, noise(7, WIDTH)
    module = of(replace(config, layers=layers, tied_layers=False)).initialise(head)
    seen = noise(7, module.count, WIDTH, seed=1)
    logits = module.logits(states, seen, head)
    torch.testing.assert_close(logits, (states @ head.T).expand_as(logits), rtol=1e-5, atol=1e-5)
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-2)
    logits.logsumexp(-1).sum().backward()
    optimiser.step()
    after = module.logits(states, seen, head)
    assert all(bool((one - two).abs().max() > 1e-3) for one, two in zip(after, logits, strict=True))
    moved = [p for name, p in module.named_parameters() if name == "blocks"]
    assert all(bool((layer.abs().amax((-1, -2)) > 0).all()) for p in moved for layer in p), "no layer stays behind"


def said(module: HeadsModule, seed: int = 0) -> Tensor:
    """What it makes of a text, [K, P, V], as in training."""
    from drafters.test_eagle import some_places, states_of

    tokens = torch.tensor([TEXT])
    places = some_places(tokens, [(0, place) for place in range(3, 14)])
    states = states_of(tuple(TEXT), lively())
    seen = module.seen({layer: states[layer] for layer in module.reads(2)}, places)
    behind = places.places_P[:, None] + torch.arange(1, module.count + 1)
    embedded = module.table(lively().embedding.weight)[tokens[0, behind.clamp(max=len(TEXT) - 1)]]
    return module.logits(seen, embedded, module.of_known(lively().head.weight))


@pytest.mark.parametrize("more", [1, 2])
@pytest.mark.parametrize("config", LAYERED.values(), ids=LAYERED)
def test_grown_heads_say_what_the_smaller_ones_said_bit_for_bit(config: HeadsConfig, more: int) -> None:
    """And every layer that came learns: none is silent for good."""
    smaller = filled(of(config), 1.0, seed=2).eval()
    grown = of(replace(config, layers=config.layers + more, tied_layers=False))
    grown.initialise(lively().head.weight, 7).grow_from(smaller)
    grown.eval()
    assert torch.equal(said(grown), said(smaller))
    of_smaller = dict(smaller.named_parameters())
    optimiser = torch.optim.AdamW(grown.parameters(), lr=1e-3, weight_decay=0.0)
    before = deepcopy(dict(grown.named_parameters()))
    for _ in range(2):  # what leads into a silent layer learns once the layer is heard
        optimiser.zero_grad()
        said(grown).square().mean().backward()
        optimiser.step()
    for name, parameter in grown.named_parameters():
        new = parameter[config.layers - 1 :] if name in ("blocks", "biases") else parameter
        if name not in of_smaller or name in ("blocks", "biases"):
            assert not torch.equal(new, before[name][len(before[name]) - len(new) :]), name


def test_tied_layers_are_grown_where_nothing_is_repeated_yet() -> None:
    tied = replace(heading.CONFIGS["hydra, deep"], tied_layers=True)
    smaller = filled(of(tied), 1.0)
    apart = of(replace(tied, layers=4, tied_layers=False)).initialise(lively().head.weight)
    apart.grow_from(smaller)
    torch.testing.assert_close(said(apart.eval()), said(smaller.eval()))
    again = of(replace(tied, layers=4)).initialise(lively().head.weight)
    with pytest.raises(DrafterError, match="--own-layers"):
        again.grow_from(smaller)
    first = filled(of(replace(HYDRA, tied_layers=True)), 1.0)
    again.grow_from(first)
    assert torch.equal(said(again.eval()), said(first.eval()))
    with pytest.raises(DrafterError, match="--own-layers"):
        of(replace(MEDUSA, layers=2, tied_layers=True)).grow_from(of(MEDUSA))


def test_heads_that_cannot_be_grown_say_so() -> None:
    from drafters.test_amphista import WHOLE

    with pytest.raises(DrafterError, match="train them with all"):
        of(replace(WHOLE, layers=2)).grow_from(of(WHOLE))


# ---- an EAGLE of two layers


def double(module: EagleModule) -> EagleModule:
    return deepcopy(module).double().requires_grad_(False)


def drafted(config: EagleConfig, text: Sequence[int], tree: RankTree, tokens: Any = None) -> tuple[list[Tensor], Any]:
    """What is said of every node of a tree, level by level, in fp64. tokens: those to draft along a chain."""
    target = deepcopy(lively()).double()
    stack = double(eagle(config)).stack.lend(target.embedding.weight, target.head.weight)
    pairs = Pairs(stack, 64)
    pairs.admit(row_of(text), joined(config, text, lively())[:, : len(text) - 1].double())
    heard = Heard(pairs, [row_of(text)])
    if tokens is not None:
        heard.best = lambda logits, count: torch.full((1, 1, 1), tokens[len(heard.laws) - 1])  # type: ignore[method-assign]
    grown = StaticTree(tree).grow(heard, Context([row_of(text)], [tree.size], [tree.depth], torch.device("cpu")), [9])
    return heard.laws, dict(zip(tree.nodes, grown.tree.tokens[0][1:], strict=True))


@pytest.mark.parametrize("config", [EAGLES["eagle, two layers and biases"], replace(THREE, layers=3)], ids=["1", "3"])
def test_a_tree_of_layers_is_every_path_by_itself(config: EagleConfig) -> None:
    """Each with a memory of its own, to 1e-10; what one branch leaves in any layer, no other sees."""
    text = TEXT[:9]
    tree = RankTree([(0,), (1,), (0, 0), (0, 2), (1, 0), (1, 1), (0, 2, 0), (1, 1, 3), (1, 1, 0)])
    laws, named = drafted(config, text, tree)
    expanded = [[node for node in [(), *tree.nodes] if len(node) == depth] for depth in range(tree.depth)]
    expanded = [[node for node in level if any(n[:-1] == node for n in tree.nodes)] for level in expanded]
    for depth, level in enumerate(expanded):
        for place, node in enumerate(level):
            path = [named[node[: end + 1]] for end in range(depth)]
            alone, _ = drafted(config, text, RankTree.chain(depth + 1), [*path, 0])
            assert (alone[depth][0] - laws[depth][place]).abs().max() < 1e-10
