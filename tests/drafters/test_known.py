"""Drafters that know a part of the vocabulary: they propose nothing else, in the order that all tokens would have, and
the text is the target's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from drafters.heading import PROMPTS, VOCAB, WIDTH, every_kernel, filled, greedy, lively, needs_kernels, on
from drafters.test_medusa import every_wish
from enumeration import distance, plain_law
from fakes import TableNetwork
from forerun.drafters.block.drafter import BlockDrafter
from forerun.drafters.eagle import EagleConfig
from forerun.drafters.eagle.drafter import EagleDrafter, Pairs
from forerun.drafters.eagle.network import EagleModule
from forerun.drafting import checkpoint as checkpoints
from forerun.drafting import registry
from forerun.drafting.checkpoint import Checkpoint
from forerun.drafting.drafter import Context, Drafter
from forerun.drafting.growth import Chain, Form, SampledTree, TopTree
from forerun.drafting.heads import Places
from forerun.drafting.stopping import Fixed
from forerun.drafting.trained import HeadsConfig, LayerConfig
from forerun.drafting.workshop import Workshop, build
from forerun.engine.engine import Engine
from forerun.errors import DrafterError
from forerun.model import Inputs, Model
from forerun.nn.backends.native.blocks import SPARE
from forerun.nn.transformer import Transformer, TransformerConfig
from forerun.sampling import SamplingParams
from forerun.tree import TokenTree
from test_engine import engine_law, processed

KEPT = (0, 1, 2, 5, 7, 8, 9, 14, 20, 21, 30, 31, 33, 36, 39)
CASES = [(name, preset) for name, one in registry.trained().items() for preset in one.presets]
every_case = pytest.mark.parametrize(("name", "preset"), CASES, ids=[preset for _, preset in CASES])


def config_of(name: str, preset: str, network: Any, kept: Sequence[int], **more: Any) -> HeadsConfig:
    trained = registry.trained()[name]
    vocab_size, width = network.input_embedding.shape
    shape = {**trained.presets[preset].architecture, "width": width, "vocab_size": vocab_size, "kept": kept, **more}
    return trained.config(**trained.fitted(shape, network))


def module_of(config: HeadsConfig, network: Transformer, seed: int = 0) -> Any:
    """Heads that say what the target says, more or less."""
    trained = registry.trained_of(config)[1]
    module = trained.network(config).initialise(network.head.weight)
    with torch.no_grad():
        for weight, knock in zip(
            module.parameters(), filled(trained.network(config), 0.3, seed).parameters(), strict=True
        ):
            weight += knock
    return module


def stored(folder: Path, name: str, config: HeadsConfig, module: Any) -> str:
    checkpoints.write(module, config, Checkpoint(folder, name, {}, "lively", {}), torch.float32)
    return str(folder)


def made(name: str, checkpoint: str, network: Any, **settings: Any) -> Drafter:
    description = {"drafter": name, "checkpoint": checkpoint, **settings}
    return build(description, Workshop(Model(network, 1), {}.__getitem__))


def proposals(drafter: Drafter) -> list[TokenTree]:
    """What it proposes from now on."""
    seen: list[TokenTree] = []
    propose = drafter.propose

    def watched(context: Context) -> TokenTree:
        seen.append(propose(context))
        return seen[-1]

    drafter.propose = watched  # type: ignore[method-assign]
    return seen


def paths_of(tree: TokenTree, row: int) -> list[tuple[int, ...]]:
    """In no order: the tokens from the root to every node."""
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens[row], tree.topology.parents[row], strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return sorted(found)


@every_case
@every_kernel
def test_they_propose_known_tokens_alone(name: str, preset: str, kernels: str, tmp_path: Path) -> None:
    """And the text is that of plain decoding, for rows of several lengths side by side."""
    network = lively()
    config = config_of(name, preset, network, KEPT)
    drafter = made(name, stored(tmp_path / "it", name, config, module_of(config, network)), on(network, kernels))
    seen = proposals(drafter)
    outputs = Engine(on(network, kernels), drafter, max_rows=3).generate(PROMPTS, SamplingParams(max_new_tokens=40))
    assert [o.token_ids for o in outputs] == [greedy(network, prompt, 40) for prompt in PROMPTS]
    proposed = {token for tree in seen for row in tree.tokens for token in row[1:]}
    roots = {row[0] for tree in seen for row in tree.tokens}
    assert proposed and proposed <= set(KEPT) and not roots <= set(KEPT)


@every_case
@needs_kernels
def test_both_backends_propose_the_same(name: str, preset: str, tmp_path: Path) -> None:
    """Roots that are not known included."""
    network = lively()
    config = config_of(name, preset, network, KEPT)
    checkpoint = stored(tmp_path / "it", name, config, module_of(config, network, seed=4))
    trees: list[list[list[list[tuple[int, ...]]]]] = []
    for kernels in ("torch", "native"):
        drafter = made(name, checkpoint, on(network, kernels))
        seen = proposals(drafter)
        Engine(on(network, kernels), drafter, max_rows=5).generate(PROMPTS, SamplingParams(max_new_tokens=25))
        trees.append([[paths_of(tree, row) for row in range(len(tree.tokens))] for tree in seen])
    assert trees[0] == trees[1]


@every_kernel
@pytest.mark.parametrize(("name", "preset"), [("medusa", "medusa"), ("hydra", "hydra"), ("block", "block")])
def test_siblings_are_the_best_of_what_training_computes(name: str, preset: str, kernels: str, tmp_path: Path) -> None:
    network = lively()
    config = config_of(name, preset, network, KEPT, heads=1)
    module = module_of(config, network)
    drafter = made(name, stored(tmp_path / "it", name, config, module), on(network, kernels), tree=[[0], [1], [2]])
    seen = proposals(drafter)
    Engine(on(network, kernels), drafter, max_rows=1).generate(PROMPTS[3:4], SamplingParams(max_new_tokens=12))
    expected = slow_best(name, config, module, [*PROMPTS[3], *greedy(network, PROMPTS[3], 12)])
    drafts = [tuple(tree.tokens[0]) for tree in seen if len(tree.tokens[0]) == 4]
    assert len(drafts) > 3 and set(drafts) <= set(expected)


def slow_best(name: str, config: HeadsConfig, module: Any, text: list[int]) -> list[tuple[int, ...]]:
    """At every place of a text, the root behind it and the three best known tokens of the first head."""
    network, tokens = lively(), torch.tensor([text])
    module = module.eval().requires_grad_(False)
    table = network.embedding.weight
    layers = module.reads(2)
    read = Model(network, 0).read(Inputs.whole(tokens), layers)
    places = torch.arange(len(text) - 1)
    there = Places(torch.zeros_like(places), places, table[tokens], table)
    seen = module.seen({layer: read[layer].clone() for layer in layers}, there)
    logits = module.logits(seen, module.table(table)[tokens[0, 1:]][:, None], network.head.weight[list(KEPT)])[0]
    best = logits.argsort(dim=-1, descending=True, stable=True)[:, :3]
    return [(text[place + 1], *(KEPT[at] for at in row)) for place, row in enumerate(best.tolist())]


@every_kernel
def test_more_unknown_roots_than_a_call_of_the_kernels_has_room_for(kernels: str, tmp_path: Path) -> None:
    network = lively()
    config = config_of("block", "block", network, (3, 5))
    drafter = made("block", stored(tmp_path / "it", "block", config, module_of(config, network)), on(network, kernels))
    prompts = [[row % VOCAB, (7 * row + 1) % VOCAB] for row in range(2 * SPARE + 5)]
    outputs = Engine(on(network, kernels), drafter, max_rows=64).generate(prompts, SamplingParams(max_new_tokens=8))
    assert [o.token_ids for o in outputs] == [greedy(network, prompt, 8) for prompt in prompts]
    assert sum(o.stats.drafted_tokens for o in outputs) > 0


# ---- what is drawn


FORMS: dict[str, Form] = {
    "best": TopTree(2, 3, 6),
    "chain": Chain(Fixed(2)),
    "sampled tree": SampledTree((2, 1)),
}


@every_wish
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_law_of_the_output_is_that_of_plain_sampling(form: Form, wishes: SamplingParams) -> None:
    """Every outcome is enumerated, for a vocabulary of three, of which two are known, drawn proposals included."""
    target = TableNetwork(3, seed=3, order=2, sharpness=1.0)
    more = {"fused": True, "vocabulary": "own", "kept": (0, 2), "sources": (0, 1)}
    config = EagleConfig(3, 3, layer=LayerConfig(1, 1, 2, 4, 64), **more)  # type: ignore[arg-type]
    embedding, head = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def drafter() -> Drafter:
        module = filled(EagleModule(config), 1.5, seed=4).double().eval().requires_grad_(False)
        return EagleDrafter(Pairs(module.stack.lend(embedding, head), form.scratch), form, module.reads(1))

    wishes = replace(wishes, max_new_tokens=3)
    law = engine_law(drafter, {"target": target}, [1, 0, 1], wishes)
    assert distance(law, plain_law(processed(wishes, target, [1, 0, 1]), 3)) < 1e-6


@every_kernel
@pytest.mark.parametrize("form", [FORMS["chain"], FORMS["sampled tree"]], ids=["chain", "sampled tree"])
def test_laws_that_are_drawn_from_have_known_tokens_alone(form: Form, kernels: str, tmp_path: Path) -> None:
    network = lively()
    config = config_of("block", "block", network, KEPT)
    drafter = made("block", stored(tmp_path / "it", "block", config, module_of(config, network)), on(network, kernels))
    assert isinstance(drafter, BlockDrafter)
    drafter.form, drafter.max_nodes = form, form.max_nodes
    seen = proposals(drafter)
    drawn = SamplingParams(temperature=1.0, seed=3, max_new_tokens=30)
    Engine(on(network, kernels), drafter).generate(PROMPTS[:2], drawn)
    proposed = {token for tree in seen for row in tree.tokens for token in row[1:]}
    assert len(proposed) > 2 and proposed <= set(KEPT)


# ---- a large vocabulary


LARGE, MOST = 151_936, 2_000


@cache
def large() -> Transformer:
    """As many tokens as Qwen's, in a network of next to nothing."""
    config = TransformerConfig(LARGE, 8, layers=2, heads=2, kv_heads=1, head_dim=4, mlp_width=8, max_length=64)
    return filled(Transformer(config), 1.8, 3).requires_grad_(False)


@every_kernel
@pytest.mark.parametrize(
    ("name", "preset", "more"),
    [
        ("block", "block", {"rank": 4}),
        ("medusa", "medusa", {"heads": 3}),
        ("medusa", "medusa-fused", {"heads": 3, "rank": 4}),
        ("hydra", "hydra", {"heads": 3}),
        ("hydra", "hydra++", {"heads": 3, "vocabulary": "shared"}),
        ("amphista", "amphista", {"heads": 3}),
        ("eagle", "eagle3", {}),
    ],
)
def test_a_vocabulary_of_151936(name: str, preset: str, more: dict[str, Any], kernels: str, tmp_path: Path) -> None:
    """The projection that is stored and multiplied has as many rows as there are known tokens; text is the target's."""
    network = large()
    prompts = [[11, 150_000], [7, 7, 70_000]]
    expected = [greedy(network, prompt, 6) for prompt in prompts]
    said = {token for text in expected for token in text}
    kept = tuple(sorted({*list(said)[:4], *torch.arange(3, LARGE, LARGE // MOST).tolist()}))
    config = config_of(name, preset, network, kept, **more)
    module = module_of(config, network)
    assert sum(LARGE in p.shape for p in module.parameters()) == (1 if module.markov else 0)
    drafter = made(name, stored(tmp_path / "it", name, config, module), on(network, kernels))
    seen = proposals(drafter)
    outputs = Engine(on(network, kernels), drafter).generate(prompts, SamplingParams(max_new_tokens=6))
    assert [o.token_ids for o in outputs] == expected
    proposed = {token for tree in seen for row in tree.tokens for token in row[1:]}
    assert proposed and proposed <= set(kept)


# ---- the configuration


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"kept": (3, 2)}, "ascending"), ({"kept": (3, VOCAB)}, "ascending"), ({"known": VOCAB + 1}, "give fewer, or 0")],
)
@every_case
def test_parts_that_make_no_sense_are_refused(name: str, preset: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(DrafterError, match=said):
        config_of(name, preset, lively(), **{"kept": (), **fields})


def test_a_tensor_of_tokens_has_the_right_width(tmp_path: Path) -> None:
    """The table of the token before stays whole; the one of the token behind does not."""
    config = config_of("medusa", "medusa-fused", lively(), KEPT)
    module = module_of(config, lively())
    shapes: dict[str, Tensor] = dict(module.named_parameters())
    assert shapes["markov.before"].shape[0] == VOCAB and shapes["markov.behind"].shape[0] == len(KEPT)
    assert module.of_known(lively().head.weight).shape == (len(KEPT), WIDTH)
    assert "15 tokens" in config.brief
