"""Targets and draft heads small enough to look through, and the slow obvious versions of what heads do.

lively   a random transformer: its greedy texts take a while to repeat themselves, and attention matters
cyclic   a transformer without attention: its state names the newest token, and the next token is a function of that one
Told     a drafting that is given its tokens, so that heads can be as good or as bad as they like
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from functools import cache, lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fakes import TableNetwork, plain
from forerun.drafters.hydra import HydraConfig
from forerun.drafters.hydra import network as hydra
from forerun.drafters.hydra.network import HydraHeads
from forerun.drafters.medusa import MedusaConfig
from forerun.drafters.medusa.network import MedusaHeads
from forerun.drafting.drafter import Context
from forerun.drafting.heads import ContextReader, HeadDrafter, HeadParts, HeadsModule, LastState, drafting
from forerun.drafting.trained import LayerConfig
from forerun.engine.engine import Engine
from forerun.engine.requests import Piece
from forerun.model import Model
from forerun.nn.backends.native.transformer import pack
from forerun.nn.network import Network
from forerun.nn.transformer import Transformer, TransformerConfig
from forerun.ranktree import RankTree
from forerun.row import Row
from forerun.sampling import SamplingParams
from forerun.tree import TokenTree
from nn.kernel_oracles import REASON

VOCAB, WIDTH, HEADS = 40, 24, 4
PREFIX = LayerConfig(heads=4, kv_heads=2, head_dim=6, mlp_width=40, max_length=256)
PROMPTS = [[1, 2, 3], [4], [7, 7, 7, 7, 7], [9, 30, 2, 2, 11, 25, 0, 6, 19], [12, 3]]
CONFIGS: dict[str, MedusaConfig | HydraConfig] = {
    "medusa": MedusaConfig(WIDTH, VOCAB, HEADS),
    "medusa, deep": MedusaConfig(WIDTH, VOCAB, HEADS, layers=3),
    "medusa, tied": MedusaConfig(WIDTH, VOCAB, HEADS, layers=3, tied_layers=True),
    "medusa, shared": MedusaConfig(WIDTH, VOCAB, HEADS, layers=2, vocabulary="shared"),
    "medusa, fused": MedusaConfig(WIDTH, VOCAB, HEADS, layers=2, vocabulary="shared", rank=5),
    "hydra": HydraConfig(WIDTH, VOCAB, HEADS),
    "hydra, deep": HydraConfig(WIDTH, VOCAB, HEADS, layers=3, tied_layers=False),
    "hydra, shared": HydraConfig(WIDTH, VOCAB, HEADS, layers=2, vocabulary="shared"),
    "hydra++": HydraConfig(WIDTH, VOCAB, HEADS, layers=4, prefix=PREFIX),
}
MEDUSA = [kind for kind in CONFIGS if kind.startswith("medusa")]
HYDRA = [kind for kind in CONFIGS if kind.startswith("hydra")]
DENSE = [(a, b, c)[:depth] for depth in (1, 2, 3) for a in (0, 1) for b in (0, 1) for c in (0, 1)]
TREES = {
    "one": RankTree.chain(1),
    "chain": RankTree.chain(4),
    "star": RankTree([(rank,) for rank in range(9)]),
    "dense": RankTree(sorted(set(DENSE))),
    "gaps": RankTree([(0,), (2,), (2, 1), (2, 1, 4), (0, 3), (5,), (2, 1, 4, 0), (2, 1, 4, 6), (5, 0), (0, 3, 0)]),
    "mc_sim": RankTree.named("mc_sim_7b_63"),
}
"""`gaps`: ranks that are not contiguous, and children below later siblings; the reference cannot
grow such trees, ours can."""

needs_kernels = pytest.mark.skipif(REASON is not None, reason=str(REASON))
every_kernel = pytest.mark.parametrize("kernels", ["torch", pytest.param("native", marks=needs_kernels)])
every_tree = pytest.mark.parametrize("tree", TREES.values(), ids=TREES)


# ---- targets


@cache
def lively(seed: int = 3, vocab: int = VOCAB) -> Transformer:
    """Nothing in it is at its neutral value."""
    config = TransformerConfig(vocab, WIDTH, layers=2, heads=4, kv_heads=2, head_dim=6, mlp_width=40, max_length=256)
    return filled(Transformer(config), 1.8, seed).requires_grad_(False)


@cache
def relative(seed: int = 0, strength: float = 0.1) -> Transformer:
    """A lively target that was knocked a little: it often says the same."""
    network, generator = deepcopy(lively()), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            weight += torch.randn(weight.shape, generator=generator) * weight.std() * strength
    return network


def filled(module: Any, scale: float = 1.5, seed: int = 0) -> Any:
    """Random matrices of about this gain, random biases; what is one-dimensional (norms) is near what it was."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise * scale * weight.shape[-1] ** -0.5 if weight.dim() > 1 else weight + noise * 0.2)
    return module


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@cache
def successors(vocab: int) -> Tensor:
    """A cycle through all tokens, in no order."""
    order = torch.randperm(vocab, generator=torch.Generator().manual_seed(1))
    following = torch.empty_like(order)
    following[order] = order.roll(-1)
    return following


def ahead(tokens: Tensor, steps: int, vocab: int) -> Tensor:
    """The tokens that come `steps` later in a cyclic text."""
    for _ in range(steps):
        tokens = successors(vocab)[tokens]
    return tokens


@cache
def cyclic(vocab: int = 16) -> Transformer:
    """States are the newest token's unit vector (times the root of the width), embeddings too."""
    config = TransformerConfig(vocab, vocab, layers=1, heads=1, kv_heads=1, head_dim=4, mlp_width=4, max_length=256)
    network = Transformer(config).requires_grad_(False)
    for weight in (network.blocks[0].out.weight, network.blocks[0].down.weight):
        weight.zero_()
    network.embedding.weight.copy_(torch.eye(vocab))
    network.head.weight.copy_(torch.eye(vocab)[successors(vocab)].T)
    return network


def greedy(network: Transformer, prompt: Sequence[int], count: int) -> list[int]:
    """Decoding without engine, cache or tree."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(best_after(network, tuple(tokens)))
    return tokens[len(prompt) :]


@lru_cache(maxsize=20_000)
def best_after(network: Transformer, tokens: tuple[int, ...]) -> int:
    return int((network.features(torch.tensor([tokens]))[0, -1] @ network.head.weight.T).argmax())


def on(network: Transformer, kernels: str) -> Network:
    return pack(network) if kernels == "native" else network


# ---- heads


def heads_of(config: MedusaConfig | HydraConfig) -> HeadsModule:
    return MedusaHeads(config) if isinstance(config, MedusaConfig) else HydraHeads(config)


def some_heads(kind: str, seed: int = 0) -> HeadsModule:
    """Random in every parameter."""
    found: HeadsModule = filled(heads_of(CONFIGS[kind]), seed=seed)
    return found


def all_knowing(vocab: int = 16, heads: int = HEADS, wrong: int = 0) -> MedusaHeads:
    """Heads that are right about every token of a cyclic text; or, with `wrong`, are sure of a token so far from it."""
    module = MedusaHeads(MedusaConfig(vocab, vocab, heads))
    with torch.no_grad():
        for head in range(heads):
            future = ahead(torch.arange(vocab), head + 2, vocab)
            module.vocabulary[head] = torch.eye(vocab)[(future + wrong) % vocab].T - 9 * torch.eye(vocab)[future].T * (
                wrong > 0
            )
    return module


def follower_of(module: HeadsModule, network: Network) -> ContextReader:
    return hydra.reader(module, network) if isinstance(module, HydraHeads) else LastState()


def drafter_of(module: HeadsModule, network: Network, tree: RankTree) -> HeadDrafter:
    """What `build` makes of a checkpoint."""
    return HeadDrafter(
        "heads",
        HeadParts(drafting(module, network, "auto"), follower_of(module, network), tree, network.cache_shape.layers),
    )


def engine_with(module: HeadsModule, network: Network, tree: RankTree, **options: Any) -> Engine:
    return Engine(network, drafter_of(module, network, tree), **options)


def slow_head(
    module: HeadsModule, index: int, context_D: Tensor, embedded: Sequence[Tensor], head_VD: Tensor
) -> Tensor:
    """One head's logits [V], written down as the papers and their code have it, in fp64."""
    assert isinstance(module, MedusaHeads | HydraHeads)
    w = {name: p.detach().double() for name, p in module.named_parameters()}
    own, config = module.config.vocabulary == "own", module.config
    if isinstance(module, MedusaHeads):
        u, first = context_D.double(), 0
    else:
        z, first = torch.cat((context_D, *embedded[: index + 1])).double(), 1
        u = w[f"through.{index}"] @ z + w["through_biases"][index]
        u = u + F.silu(w[f"first.{index}"] @ z + w["first_biases"][index])
    for layer in range(config.layers - first):
        stored = 0 if config.tied_layers else layer
        u = u + F.silu(w["blocks"][stored, index] @ u + w["biases"][stored, index])
    logits = (w["vocabulary"][index] if own else head_VD.double()) @ u
    if isinstance(module, MedusaHeads) and module.markov is not None:
        logits = logits + w["markov.behind"] @ embedded[index].double()
    return logits + w["vocabulary_biases"][index] if own and first else logits


def slow_draft(module: HeadsModule, context_D: Tensor, root: int, tree: RankTree, network: Transformer) -> list[int]:
    """The tokens of a tree, the root first: every path is walked by itself, from the root down."""
    found = [root]
    for path in tree.nodes:
        said = [root]
        for index, rank in enumerate(path):
            embedded = [module.table(network.embedding.weight)[token] for token in said]
            logits = slow_head(module, index, context_D, embedded, network.head.weight)
            said.append(int(logits.argsort(descending=True)[rank]))
        found.append(said[-1])
    return found


# ---- drafts that are told


Say = Callable[[Row, RankTree], list[int]]


class Told:
    """A drafting that gets the rows themselves (from `Telling`)."""

    def __init__(self, say: Say):
        self._say, self.rows, self.contexts = say, list[Row](), torch.zeros(0)

    def draft(self, context_BD: Tensor, roots: Sequence[int], tree: RankTree) -> list[list[int]]:
        assert list(roots) == [row.tokens[-1] for row in self.rows]
        self.contexts = context_BD
        return [[root, *self._say(row, tree)] for root, row in zip(roots, self.rows, strict=True)]


class Telling(HeadDrafter):
    """A drafter with heads that shows its drafting the rows."""

    def propose(self, context: Context) -> TokenTree:
        assert isinstance(self.head.drafting, Told)
        self.head.drafting.rows = list(context.rows)
        return super().propose(context)


class Watching(Telling):
    """Heads on a model that a level above or a drafter in front may leave behind. They are told now
    more, now less of what that model will say. Whenever it has read a text but for its newest
    token, they must draft there, and from what heads would see that had been given the whole text
    at once.
    """

    def __init__(self, module: HeadsModule, network: Transformer, kernels: str, scratch: int = 1):
        tree = RankTree([[0], [1], [0, 0], [0, 0, 0]])
        super().__init__("watching", HeadParts(Told(self._say), follower_of(module, on(network, kernels)), tree, 2))
        self.model = Model(on(network, kernels), max(scratch, tree.size + 1))
        self._module, self._network = module, network
        self.silent = self.spoken = 0

    def _say(self, row: Row, tree: RankTree) -> list[int]:
        text, deep = greedy(self._network, row.tokens, tree.depth), len(row.tokens) * 5 % (tree.depth + 1)
        return [(text[len(path) - 1] + path[-1] + (len(path) > deep)) % VOCAB for path in tree.nodes]

    def propose(self, context: Context) -> TokenTree:
        ready = [
            depth > 0 and self.model.cache.lengths[slot] >= len(row.tokens) - 1 > 0
            for slot, (row, depth) in enumerate(zip(context.rows, context.depths, strict=True))
        ]
        tree = super().propose(context)
        assert [size > 1 for size in tree.sizes] == ready
        assert isinstance(self.head.drafting, Told)
        for slot, row in enumerate(context.rows):
            if ready[slot]:
                expected = self._context(row.tokens)
                torch.testing.assert_close(self.head.drafting.contexts[slot], expected, rtol=1e-4, atol=1e-4)
                self.spoken += 1
            self.silent += context.depths[slot] > 0 and not ready[slot]
        return tree

    def _context(self, tokens: Sequence[int]) -> Tensor:
        """What heads see that have been given a text at once, all but its newest token."""
        return self._module.contexts(self._network.features(torch.tensor([tokens[:-1]])))[0, -1]


def telling(say: Say, tree: RankTree) -> Telling:
    """For tables: their only layer is layer 1."""
    return Telling("told", HeadParts(Told(say), LastState(), tree, 1))


def future(target: TableNetwork, row: Row, count: int) -> list[int]:
    """What the target will greedily say."""
    return list(_future(target, tuple(row.tokens), count))


@lru_cache(maxsize=100_000)
def _future(target: TableNetwork, tokens: tuple[int, ...], count: int) -> tuple[int, ...]:
    return tuple(plain(target, tokens, count))


# ---- the engine step by step


def pieces_of(engine: Engine, prompts: Iterable[Sequence[int]], wishes: SamplingParams) -> Iterator[list[Piece]]:
    """Run to the end, a new request at every second step; the pieces of every step, when it has been made."""
    waiting = list(prompts)
    for step in range(10_000):
        if waiting and step % 2 == 0:
            engine.add(waiting.pop(0), wishes)
        yield engine.step()
        if not waiting and engine.is_idle:
            return


def demand_cache_of_the_texts(engine: Engine) -> None:
    """The target's cache holds what reading every running text but its newest token at once would have left there."""
    for slot, request in enumerate(engine._running):
        tokens = request.row.tokens
        fresh = Model(engine.target.network, 1)
        fresh.admit(len(tokens))
        fresh.prefill(Row(list(tokens), len(tokens), SamplingParams(), 0, len(tokens)), 0)
        assert engine.target.cache.lengths[slot] == len(tokens) - 1
        torch.testing.assert_close(engine.target.cache.entries(slot), fresh.cache.entries(0), rtol=1e-4, atol=1e-4)
