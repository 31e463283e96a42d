"""Block drafters: what is trained is what drafts, trees are the best there are, and the text is the target's own."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from drafters.heading import PREFIX, PROMPTS, VOCAB, WIDTH, every_kernel, filled, greedy, lively, needs_kernels, on
from forerun.drafters.block import BlockConfig
from forerun.drafters.block.drafter import BlockDrafter, Blocks, PackedBlocks, TorchBlocks, blocks_on
from forerun.drafters.block.network import BlockModule, sources_of
from forerun.drafting import checkpoint as checkpoints
from forerun.drafting.checkpoint import Checkpoint
from forerun.drafting.drafter import Context, Drafter
from forerun.drafting.growth import TopTree
from forerun.drafting.heads import Places
from forerun.drafting.markov import MarkovExpander
from forerun.drafting.workshop import Workshop
from forerun.drafting.workshop import build as make
from forerun.engine.engine import Engine
from forerun.errors import DrafterError
from forerun.model import Inputs, Model
from forerun.row import Row
from forerun.sampling import SamplingParams
from forerun.tree import TokenTree

BLOCK = 5
CONFIGS = {
    "one layer": BlockConfig(WIDTH, VOCAB, BLOCK, rank=8, sources=(1, -1), layer=PREFIX),
    "two layers": BlockConfig(WIDTH, VOCAB, BLOCK, layers=2, rank=8, sources=(0, 2), layer=PREFIX),
    "no Markov term": BlockConfig(WIDTH, VOCAB, BLOCK, rank=0, sources=(2,), layer=PREFIX),
    "DFlash": BlockConfig(WIDTH, VOCAB, BLOCK, rank=0, sources=(1,), mask_token=7, from_anchor=False, layer=PREFIX),
    "past the anchor": BlockConfig(WIDTH, VOCAB, BLOCK, 2, rank=8, sources=(0, 2), from_anchor=False, layer=PREFIX),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]


@cache
def block(config: BlockConfig) -> BlockModule:
    """Nothing in it is at its neutral value."""
    module: BlockModule = filled(BlockModule(config), 1.5, seed=5).eval().requires_grad_(False)
    return module


@cache
def states_of(tokens: tuple[int, ...]) -> dict[int, Tensor]:
    read = Model(lively(), 0).read(Inputs.whole(torch.tensor([tokens])), (0, 1, 2))
    return {layer: states.clone() for layer, states in read.items()}


def joined(config: BlockConfig, tokens: Sequence[int]) -> Tensor:
    return torch.cat([states_of(tuple(tokens))[source] for source in block(config).reads(2)], -1)


# ---- the network


def slow_states(module: BlockModule, tokens: Sequence[int], place: int) -> Tensor:
    """The last states of the rows that propose, of the block behind one place, [K, D], one row and one head after
    another, in fp64."""
    w, config = {name: p.double() for name, p in module.named_parameters()}, module.config
    shape = config.layer
    assert shape is not None

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + shape.norm_eps).rsqrt() * weight

    def turned(x: Tensor, position: int) -> Tensor:
        half = shape.head_dim // 2
        angle = position * shape.rope_theta ** (-torch.arange(half).double() / half)
        a, b = x[:half], x[half:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))

    size, group = shape.head_dim, shape.heads // shape.kv_heads
    q_rows, kv_rows = shape.heads * size, shape.kv_heads * size
    fused = [norm(w["fuse"] @ joined(config, tokens)[0, t].double(), w["fuse_norm"]) for t in range(place + 1)]
    root = lively().embedding.weight[tokens[place + 1]].double()
    table = lively().embedding.weight.double()
    mask = w["mask"] if config.mask_token is None else table[config.mask_token]
    x = [root, *[mask] * (config.heads - 1 if config.from_anchor else config.heads)]
    for layer in range(config.layers):
        own = {name.split(".", 3)[3]: p for name, p in w.items() if name.startswith(f"stack.blocks.{layer}.")}

        def kept(y: Tensor, position: int, own: dict[str, Tensor] = own) -> tuple[list[Tensor], list[Tensor]]:
            k, v = (own["qkv.weight"] @ y)[q_rows:].split(kv_rows)
            return [turned(norm(one, own["k_norm"]), position) for one in k.split(size)], list(v.split(size))

        normed = [norm(row, own["attention_norm"]) for row in x]
        seen = [kept(y, t) for t, y in enumerate(fused)] + [kept(y, place + 1 + k) for k, y in enumerate(normed)]
        after = []
        for k, row in enumerate(x):
            mixed = []
            for head, query in enumerate((own["qkv.weight"] @ normed[k])[:q_rows].split(size)):
                q = turned(norm(query, own["q_norm"]), place + 1 + k)
                law = torch.stack([q @ keys[head // group] for keys, _ in seen]).div(size**0.5).softmax(-1)
                mixed.append(law @ torch.stack([values[head // group] for _, values in seen]))
            row = row + own["out.weight"] @ torch.cat(mixed)
            gate, up = (own["gate_up.weight"] @ norm(row, own["mlp_norm"])).chunk(2)
            after.append(row + own["down.weight"] @ (F.silu(gate) * up))
        x = after
    return torch.stack([norm(row, w["stack.final_norm"]) for row in x[-config.heads :]])


def slow_logits(module: BlockModule, tokens: Sequence[int], place: int, before: Sequence[int]) -> Tensor:
    """[W, V]: what may follow each of these tokens, the root first."""
    logits = slow_states(module, tokens, place) @ lively().head.weight.double().T
    if module.markov is None:
        return logits
    return logits + module.markov.before[list(before)].double() @ module.markov.behind.double().T


def taught(module: BlockModule, texts: Sequence[Sequence[int]], places: Sequence[tuple[int, int]]) -> Tensor:
    """What training computes at these (text, place)s, [W, P, V]; texts are padded to the longest."""
    longest = max(map(len, texts))
    tokens = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
    read = Model(lively(), 0).read(Inputs.whole(tokens), module.reads(2))
    rows, at = (torch.tensor(part) for part in zip(*places, strict=True))
    table = lively().embedding.weight
    there = Places(rows, at, F.embedding(tokens, table), table)
    seen = module.seen({layer: states.clone() for layer, states in read.items()}, there)
    behind = tokens[rows[:, None], at[:, None] + 1 + torch.arange(module.count)]
    return module.logits(seen, F.embedding(behind, module.table(lively().embedding.weight)), lively().head.weight)


@every_config
def test_training_computes_what_the_definition_says(config: BlockConfig) -> None:
    """Blocks of several texts side by side; a text's padding and the other blocks change nothing."""
    module, texts = block(config), [TEXT, TEXT[5:17]]
    places = [(0, 0), (0, 7), (0, 8), (1, 2)]
    logits = taught(module, texts, places)
    for number, (text, place) in enumerate(places):
        before = texts[text][place + 1 : place + 1 + BLOCK]
        expected = slow_logits(module, texts[text], place, before)
        torch.testing.assert_close(logits[:, number].double(), expected, atol=2e-4, rtol=1e-4)


def row_of(tokens: Sequence[int]) -> Row:
    return Row([*tokens], len(tokens), SamplingParams(max_new_tokens=40), key=0, limit=200)


def following(config: BlockConfig, read: Sequence[Sequence[int]], kernels: str = "torch") -> Blocks:
    """Blocks that have followed these texts up to, but without, the last token, in pieces of a few tokens."""
    blocks = blocks_on(block(config), on(lively(), kernels), torch.float32)
    for text in read:
        states = joined(config, text)[:, :-1]
        blocks.admit(row_of(text), states[:, :1])
    for begin in range(1, max(map(len, read)) - 1, 3):
        blocks.observe([joined(config, text)[0, :-1][begin : begin + 3] for text in read])
    return blocks


@every_kernel
@every_config
def test_drafting_computes_what_training_does(config: BlockConfig, kernels: str) -> None:
    """Rows of several lengths side by side, whose text came piece by piece."""
    read = [TEXT[:12], TEXT[:4], TEXT[:15]]
    blocks, logits = following(config, read, kernels), taught(block(config), [TEXT] * 3, [(0, 10), (1, 2), (2, 13)])
    found = blocks.expander([text[-1] for text in read])
    assert isinstance(found, MarkovExpander) and isinstance(blocks, TorchBlocks if kernels == "torch" else PackedBlocks)
    for row, text in enumerate(read):
        for depth in range(BLOCK):
            scores = found._after(torch.tensor([[TEXT[len(text) - 1 + depth]]] * 3), depth)
            torch.testing.assert_close(scores.logits_BNV[row, 0], logits[depth, row], atol=2e-4, rtol=1e-4)


# ---- trees


def best_first(log_probs: Sequence[Tensor], tokens: int, nodes: int, least: float) -> list[tuple[int, ...]]:
    """Paths of tokens, the most probable first, by a heap (DDTree); log_probs[d]: of every token behind every token,
    [V, V], at depth d. The most probable nodes of all, as long as they are above `least`."""
    heap: list[tuple[float, tuple[int, ...]]] = [(-float(p), (t,)) for t, p in enumerate(log_probs[0][tokens])]
    heapq.heapify(heap)
    found: list[tuple[int, ...]] = []
    while heap and len(found) < nodes:
        cost, path = heapq.heappop(heap)
        if -cost < least:
            break
        found.append(path)
        if len(path) < len(log_probs):
            children = log_probs[len(path)][path[-1]]
            for token, p in enumerate(children.tolist()):
                heapq.heappush(heap, (cost - p, (*path, token)))
    return found


@every_kernel
@every_config
@pytest.mark.parametrize(("nodes", "price"), [(1, None), (6, None), (16, None), (16, 0.05), (16, 0.3)])
def test_a_tree_as_wide_as_it_has_nodes_is_the_best_first_one(
    config: BlockConfig, nodes: int, price: float | None, kernels: str
) -> None:
    module, text = block(config), TEXT[:9]
    row = row_of(text)
    prices = None if price is None else [price]
    context = Context([row], [nodes], [BLOCK], torch.device("cpu"), prices=prices)
    grown = BlockDrafter(following(config, [text], kernels), TopTree(nodes, BLOCK, nodes), ()).propose(context)
    states = slow_states(module, [*text, 0], len(text) - 2) @ lively().head.weight.double().T
    markov = torch.zeros(VOCAB, VOCAB)
    if module.markov is not None:
        markov = (module.markov.before @ module.markov.behind.T).double()
    log_probs = [(states[depth] + markov).log_softmax(-1) for depth in range(BLOCK)]
    expected = best_first(log_probs, text[-1], nodes, -math.inf if price is None else math.log(price))
    assert sorted(paths_of(grown.tokens[0], grown.topology.parents[0])) == sorted(expected)
    assert nodes == 1 or price == 0.3 or len(expected) > 1


def paths_of(tokens: Sequence[int], parents: Sequence[int]) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tokens[1:], parents[1:], strict=True):
        paths.append((*paths[parent], token))
    return paths[1:]


# ---- in the engine


class Watching(BlockDrafter):
    """Compares its memory, at every step, with that of blocks that were given the whole text at once."""

    config: BlockConfig
    compared = 0

    def propose(self, context: Context):  # type: ignore[no-untyped-def]
        tree = super().propose(context)
        for slot, row in enumerate(context.rows):
            if self.blocks.known(slot) == len(row.tokens) - 1 > 0:
                fresh = following(self.config, [row.tokens])
                torch.testing.assert_close(
                    self.blocks.cache.entries(slot), fresh.cache.entries(0), rtol=1e-4, atol=1e-4
                )
                self.compared += 1
        return tree


@every_kernel
@every_config
def test_the_memory_is_that_of_the_text_whatever_runs_beside_it(config: BlockConfig, kernels: str) -> None:
    blocks = blocks_on(block(config), on(lively(), kernels), torch.float32)
    drafter = Watching(blocks, TopTree(8, BLOCK, 8), block(config).reads(2))
    drafter.config = config
    engine, wishes = (
        Engine(on(lively(), kernels), drafter, max_rows=3),
        [SamplingParams(max_new_tokens=n) for n in (9, 25, 4, 17, 12)],
    )
    outputs = engine.generate(PROMPTS, wishes)
    expected = [greedy(lively(), prompt, one.max_new_tokens or 0) for prompt, one in zip(PROMPTS, wishes, strict=True)]
    assert [output.token_ids for output in outputs] == expected
    assert drafter.compared > 40 and blocks.cache.rows == 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two layers that say what the target does, more or less."""
    config = CONFIGS["two layers"]
    module = BlockModule(config).initialise(lively().head.weight)
    for weight, knock in zip(module.parameters(), filled(BlockModule(config), 0.3).parameters(), strict=True):
        weight.data += knock.data
    path = tmp_path_factory.mktemp("blocks") / "block"
    checkpoints.write(module, config, Checkpoint(path, "block", {}, "lively", {}), torch.float32)
    return str(path)


SETTINGS: dict[str, dict[str, object]] = {
    "best first": {},
    "few nodes": {"nodes": 3},
    "static": {"tree": [[0], [1], [0, 0], [0, 1], [0, 0, 0]]},
    "chain": {"tree": [[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]},
    "int8": {"weights": "int8"},
}


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_text_on_the_native_kernels_is_that_of_plain_decoding(
    settings: dict[str, object], dtype: torch.dtype, checkpoint: str
) -> None:
    """Greedy, drawn, alone, in company, where rows come and go and where budgets change; bit by bit in bf16, too."""
    network = on(deepcopy(lively()).to(dtype), "native")
    workshop = Workshop(Model(network, 1), {}.__getitem__)
    drafter = make({"drafter": "block", "checkpoint": checkpoint, **settings}, workshop)
    assert isinstance(drafter, BlockDrafter) and isinstance(drafter.blocks, PackedBlocks)

    def said(drafter: Drafter, prompts: Sequence[list[int]], wishes: Any, rows: int = 8) -> list[list[int]]:
        outputs = Engine(network, drafter, max_rows=rows).generate(prompts, wishes)
        return [output.token_ids for output in outputs]

    long = SamplingParams(max_new_tokens=150)
    for prompts in (PROMPTS[:1], PROMPTS[1:4]):
        expected = said(make("none", workshop), prompts, long)
        assert said(drafter, prompts, long) == expected
        assert dtype == torch.bfloat16 or expected == [greedy(lively(), prompt, 150) for prompt in prompts]
    wishes = [
        SamplingParams(temperature=row % 3 * 0.6, seed=row, max_new_tokens=(30, 3, 41, 1, 12)[row]) for row in range(5)
    ]
    expected = said(make("none", workshop), PROMPTS, wishes, 3)
    assert said(drafter, PROMPTS, wishes, 2) == said(drafter, PROMPTS, wishes, 3) == expected
    assert drafter.blocks.cache.rows == 0


@needs_kernels
def test_both_backends_propose_the_same(checkpoint: str) -> None:
    """And accept as much: texts of two engines side by side, step by step."""
    trees: dict[str, list[object]] = {}
    for kernels in ("torch", "native"):
        network = on(lively(), kernels)
        drafter = make({"drafter": "block", "checkpoint": checkpoint}, Workshop(Model(network, 1), {}.__getitem__))
        propose, seen = drafter.propose, trees.setdefault(kernels, [])

        def watched(context: Context, propose: Any = propose, seen: list[object] = seen) -> TokenTree:
            tree: TokenTree = propose(replace(context, prices=None))
            rows = zip(tree.tokens, tree.topology.parents, strict=True)
            seen.append([sorted(paths_of(tokens, parents)) for tokens, parents in rows])
            return tree

        drafter.propose = watched  # type: ignore[method-assign]
        Engine(network, drafter).generate(PROMPTS[:3], SamplingParams(max_new_tokens=60))
    assert len(trees["torch"]) == len(trees["native"]) > 10
    equal = sum(one == other for one, other in zip(trees["torch"], trees["native"], strict=True))
    assert equal > 0.9 * len(trees["torch"])


@every_kernel
def test_a_target_of_a_longer_context_than_the_checkpoints(kernels: str, tmp_path: Path) -> None:
    """Positions that no layer was trained at are as good as any: drafts are guesses."""
    config = replace(CONFIGS["two layers"], layer=replace(PREFIX, max_length=16))
    module = BlockModule(config).initialise(lively().head.weight)
    checkpoints.write(module, config, Checkpoint(tmp_path / "short", "block", {}, "lively", {}), torch.float32)
    network = on(lively(), kernels)
    drafter = make(
        {"drafter": "block", "checkpoint": str(tmp_path / "short")}, Workshop(Model(network, 1), {}.__getitem__)
    )
    (output,) = Engine(network, drafter).generate([TEXT], SamplingParams(max_new_tokens=30))
    assert output.token_ids == greedy(lively(), TEXT, 30) and output.stats.drafted_tokens > 0


@every_kernel
@pytest.mark.parametrize(("sources", "said"), [((1, 5), "reads layer 5, and this target has 2"), ((2, -1), "twice")])
def test_a_target_that_has_not_its_layers_is_refused(
    sources: tuple[int, ...], said: str, kernels: str, tmp_path: Path
) -> None:
    config = replace(CONFIGS["two layers"], sources=sources)
    checkpoints.write(BlockModule(config), config, Checkpoint(tmp_path / "x", "block", {}, "lively", {}), torch.float32)
    workshop = Workshop(Model(on(lively(), kernels), 1), {}.__getitem__)
    with pytest.raises(DrafterError, match=said):
        make({"drafter": "block", "checkpoint": str(tmp_path / "x")}, workshop)


# ---- the configuration


def test_sources_are_spread_over_the_target() -> None:
    assert [sources_of(top) for top in (1, 2, 8, 32)] == [(-1,), (1, -1), (2, 5, -1), (8, 20, -1)]


def test_layers_begin_as_the_targets_last_ones() -> None:
    module = BlockModule(replace(CONFIGS["two layers"], layer=PREFIX)).initialise(lively().head.weight)
    module.borrow(list(lively().blocks))
    for own, theirs in zip(module.stack.blocks, lively().blocks, strict=True):
        assert torch.equal(own.qkv.weight, theirs.qkv.weight) and torch.equal(own.down.weight, theirs.down.weight)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": -1}, "rank"),
        ({"sources": ()}, "sources"),
        ({"layer": None}, "sizes"),
        ({"vocabulary": "own"}, "vocabulary"),
        ({"heads": 0}, "heads"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(DrafterError, match=said):
        replace(CONFIGS["one layer"], **change)  # type: ignore[arg-type]
